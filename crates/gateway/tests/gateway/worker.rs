//! A worker whose guests do what the command's name says.

use std::{sync::Arc, time::Duration};

use aether_events::{Event, EventBus};
use aether_queue::{Lease, Queue};
use aether_store::{AttemptEnd, Begin, ExecutionEnd, SnapshotFacts, Store, VmChange, VmPatch};
use aether_streams::{SessionInput, SessionOutput, Sessions, WorkerEnd};
use aether_types::{
    ErrorCode, Execution, ExecutionState, ExitStatus, Fault, Origin, OutputStream, RetainedOutput,
    SnapshotId, SnapshotState, StartKind, StartPhase, StartReport, Task, TaskKind, TaskState,
    TemplateProgress, Timestamp, ToolRequest, VmEvent, VmTool, WorkerId,
};
use bytes::Bytes;
use tokio::sync::{Semaphore, watch};

pub(crate) struct ScriptedWorker {
    id: WorkerId,
    store: Arc<dyn Store>,
    queue: Arc<dyn Queue>,
    bus: Arc<dyn EventBus>,
    sessions: Sessions,
    /// A permit lets one command `gate` go on.
    pub(crate) gate: Semaphore,
    /// The last thing that a command noticed, for tests to wait for.
    pub(crate) noticed: watch::Sender<String>,
}

/// How a scripted command ended.
struct Ran {
    exit: Option<ExitStatus>,
    fault: Option<Fault>,
    stdout: RetainedOutput,
    /// Whether the client hears of the end.
    says_so: bool,
}

impl ScriptedWorker {
    pub(crate) fn new(
        store: &Arc<dyn Store>,
        queue: &Arc<dyn Queue>,
        bus: &Arc<dyn EventBus>,
        sessions: &Sessions,
    ) -> Arc<Self> {
        Arc::new(Self {
            id: WorkerId::new(),
            store: Arc::clone(store),
            queue: Arc::clone(queue),
            bus: Arc::clone(bus),
            sessions: sessions.clone(),
            gate: Semaphore::new(0),
            noticed: watch::Sender::default(),
        })
    }

    pub(crate) fn start(self: &Arc<Self>) {
        let worker = Arc::clone(self);
        tokio::spawn(async move {
            loop {
                if let Some(lease) = worker.claim().await {
                    let worker = Arc::clone(&worker);
                    tokio::spawn(async move { worker.carry_out(lease).await });
                }
            }
        });
    }

    /// One task, where the worker was not started.
    pub(crate) async fn carry_out_next(&self) {
        let lease = crate::rig::soon(self.claim()).await.unwrap();
        self.carry_out(lease).await;
    }

    async fn claim(&self) -> Option<Lease> {
        let claim = self.queue.claim(self.id, Duration::from_secs(30), Duration::from_mins(1));
        claim.await.unwrap()
    }

    /// Waits until a command noticed this.
    pub(crate) async fn saw(&self, text: &str) {
        let mut noticed = self.noticed.subscribe();
        crate::rig::soon(noticed.wait_for(|n| n == text)).await.unwrap();
    }

    async fn carry_out(&self, lease: Lease) {
        let begun =
            self.store.begin_attempt(lease.task, self.id.into(), lease.epoch).await.unwrap();
        if let Begin::Go(task) = begun {
            match task.kind {
                TaskKind::VmExecute => self.execute(&task, &lease).await,
                TaskKind::TemplateBuild => self.build(&task, &lease).await,
                TaskKind::ToolBuild => self.build_tools(&task, &lease).await,
                _ => self.operate(&task, &lease).await,
            }
        }
        let _ = self.queue.complete(&lease).await;
    }

    async fn end(&self, task: &Task, lease: &Lease, end: AttemptEnd) {
        // Fenced where the VM was deleted meanwhile.
        if let Ok(task) = self.store.end_attempt(task.id, lease.epoch, end).await {
            let (task_id, vm_id, state) = (task.id, task.vm_id, task.state);
            let at = Timestamp::now();
            if let Some(id) = task.snapshot_id
                && let Some(snapshot) = self.store.snapshot(id).await.unwrap()
            {
                let event = Event::Snapshot { snapshot_id: id, state: snapshot.state, at };
                self.bus.publish(event).await.unwrap();
            }
            let event = Event::Task { task_id, vm_id, state, at };
            self.bus.publish(event).await.unwrap();
        }
    }

    async fn operate(&self, task: &Task, lease: &Lease) {
        let vm = self.store.vm(task.vm_id.unwrap()).await.unwrap().unwrap();
        let mut fault = (task.kind == TaskKind::VmCreate && vm.name.starts_with("broken"))
            .then(|| Fault::new(ErrorCode::VmStartFailed, "the kernel is missing"));
        let tools = if starts(task.kind) {
            let got = self.get_tools(task, lease, &vm.spec.tools).await;
            got.map_err(|error| fault = Some(error)).ok()
        } else {
            None
        };
        if let Origin::Snapshot(id) = vm.spec.origin {
            fault = fault.or(self.wait_for_snapshot(id).await);
        }
        if task.kind == TaskKind::VmSnapshot && vm.name.starts_with("full") {
            fault = Some(Fault::new(ErrorCode::NoSpace, "there is no room for the memory"));
        }
        let event = match task.kind {
            TaskKind::VmCreate | TaskKind::VmStart if fault.is_some() => Some(VmEvent::Failed),
            TaskKind::VmCreate | TaskKind::VmStart => Some(VmEvent::Started),
            TaskKind::VmStop | TaskKind::VmSuspend => Some(VmEvent::Stopped),
            TaskKind::VmPause => Some(VmEvent::PauseDone),
            TaskKind::VmResume => Some(VmEvent::ResumeDone),
            TaskKind::VmDelete => Some(VmEvent::Deleted),
            TaskKind::VmSnapshot
            | TaskKind::TemplateBuild
            | TaskKind::ToolBuild
            | TaskKind::VmExecute => None,
        };
        let takes_snapshot = matches!(task.kind, TaskKind::VmSnapshot | TaskKind::VmSuspend);
        let start = (event == Some(VmEvent::Started)).then(|| start(vm.spec.origin));
        let patch = VmPatch { worker_id: Some(self.id), start, tools, ..VmPatch::default() };
        let end = AttemptEnd {
            state: if fault.is_some() { TaskState::Failed } else { TaskState::Completed },
            error: fault.clone(),
            snapshot: (takes_snapshot && fault.is_none()).then(facts),
            vm: event.map(|event| VmChange { event, reason: fault, patch }),
            execution: None,
            template: None,
            tools: None,
        };
        self.end(task, lease, end).await;
    }

    /// Each tool gets the version that was asked for. `slow` says something, waits for a permit of
    /// the gate, and says more; `go@0` fails.
    async fn get_tools(
        &self,
        task: &Task,
        lease: &Lease,
        wanted: &[ToolRequest],
    ) -> Result<Vec<VmTool>, Fault> {
        for tool in wanted {
            if tool.version == "slow" {
                self.say(task, lease, "rust 1.90.0: install", "one\n").await;
                self.noticed.send_replace("gate".into());
                self.gate.acquire().await.unwrap().forget();
                self.say(task, lease, "rust 1.90.0: verify", "one\ntwo\n").await;
            }
            if tool.version == "0" {
                let detail = "go 0 could not be built: it exits with 1; its last lines:\nno room";
                return Err(Fault::new(ErrorCode::ToolBuildFailed, detail));
            }
        }
        let got = |tool: &ToolRequest| VmTool {
            got: Some(format!("{}.9", tool.version)),
            verified_at: Some(Timestamp::from_unix_ms(0)),
            ..VmTool::asked(tool)
        };
        Ok(wanted.iter().map(got).collect())
    }

    async fn say(&self, task: &Task, lease: &Lease, now: &str, log: &str) {
        let (id, epoch) = (task.id, lease.epoch);
        let told = self.store.task_progress(id, epoch, now.into(), log.into()).await.unwrap();
        let (task_id, vm_id, state) = (told.id, told.vm_id, told.state);
        let event = Event::Task { task_id, vm_id, state, at: Timestamp::now() };
        self.bus.publish(event).await.unwrap();
    }

    async fn build_tools(&self, task: &Task, lease: &Lease) {
        let wanted: Vec<ToolRequest> = task.tools.iter().map(VmTool::request).collect();
        let (tools, error) = match self.get_tools(task, lease, &wanted).await {
            Ok(tools) => (Some(tools), None),
            Err(fault) => (None, Some(fault)),
        };
        let state = if error.is_some() { TaskState::Failed } else { TaskState::Completed };
        let end = AttemptEnd {
            state,
            error,
            vm: None,
            execution: None,
            snapshot: None,
            template: None,
            tools,
        };
        self.end(task, lease, end).await;
    }

    /// As a worker does: what is still being made is waited for.
    async fn wait_for_snapshot(&self, id: SnapshotId) -> Option<Fault> {
        let mut events = self.bus.subscribe();
        loop {
            let snapshot = self.store.snapshot(id).await.unwrap().unwrap();
            match snapshot.state {
                SnapshotState::Creating => {
                    crate::rig::soon(events.next()).await;
                }
                SnapshotState::Ready => return None,
                SnapshotState::Failed | SnapshotState::Deleted => return snapshot.reason,
            }
        }
    }

    /// One step done for each permit of the gate; `exit 1` fails.
    async fn build(&self, task: &Task, lease: &Lease) {
        let vm = self.store.vm(task.vm_id.unwrap()).await.unwrap().unwrap();
        let Origin::Builder(template) = vm.spec.origin else { panic!("not a builder") };
        let template = self.store.template(template).await.unwrap().unwrap();
        let steps = u32::try_from(template.spec.steps.len()).unwrap();
        let mut fault = None;
        for (step, done) in template.spec.steps.iter().zip(1..) {
            if step.run == "gate" {
                self.noticed.send_replace("gate".into());
                self.gate.acquire().await.unwrap().forget();
            }
            if step.run == "exit 1" {
                fault = Some(Fault::new(ErrorCode::TemplateBuildFailed, "step 1 exited with 1"));
                break;
            }
            let (now, log) = (step.run.clone(), format!("{}\n", step.run));
            let progress = TemplateProgress { done, steps, now, log };
            let told = self.store.template_progress(task.id, lease.epoch, progress).await.unwrap();
            let (template_id, state) = (told.id, told.state);
            let event = Event::Template { template_id, state, at: told.updated_at };
            self.bus.publish(event).await.unwrap();
        }
        let failed = fault.is_some();
        let end = AttemptEnd {
            state: if failed { TaskState::Failed } else { TaskState::Completed },
            error: fault,
            vm: None,
            execution: None,
            snapshot: (!failed).then(facts),
            template: (!failed).then(|| "d".repeat(64)),
            tools: None,
        };
        self.end(task, lease, end).await;
        let told = self.store.template(template.id).await.unwrap().unwrap();
        let (template_id, state) = (told.id, told.state);
        let event = Event::Template { template_id, state, at: told.updated_at };
        self.bus.publish(event).await.unwrap();
    }

    async fn execute(&self, task: &Task, lease: &Lease) {
        let id = task.execution_id.unwrap();
        let execution = self.store.execution(id).await.unwrap().unwrap();
        let mut session = self.sessions.take(id);
        self.store.execution_started(task.id, lease.epoch, id, "boot").await.unwrap();
        if let Some(session) = &session {
            let _ = session.output.send(SessionOutput::Started).await;
        }
        let ran = self.run(&execution, &mut session).await;
        let duration_us = Some(1500);
        let (exit, fault) = (ran.exit, ran.fault);
        let failed = fault.is_some();
        let end = AttemptEnd {
            state: if failed { TaskState::Failed } else { TaskState::Completed },
            error: fault.clone(),
            vm: None,
            execution: Some(ExecutionEnd {
                state: if failed { ExecutionState::Failed } else { ExecutionState::Completed },
                exit,
                error: fault.clone(),
                duration_us,
                stdout: ran.stdout,
                stderr: RetainedOutput::default(),
            }),
            snapshot: None,
            template: None,
            tools: None,
        };
        self.end(task, lease, end).await;
        if let Some(session) = session
            && ran.says_so
        {
            let last = SessionOutput::End { exit, error: fault, duration_us };
            let _ = session.output.send(last).await;
        }
    }

    async fn run(&self, execution: &Execution, session: &mut Option<WorkerEnd>) -> Ran {
        let spec = &execution.spec;
        let mut ran = Ran {
            exit: Some(ExitStatus::Code(0)),
            fault: None,
            stdout: RetainedOutput::default(),
            says_so: true,
        };
        match spec.command.as_str() {
            "echo" => say(session.as_ref(), &mut ran, format!("{}\n", spec.args.join(" "))).await,
            "binary" => say(session.as_ref(), &mut ran, vec![0, 0xff, b'a']).await,
            "exit" => ran.exit = Some(ExitStatus::Code(spec.args[0].parse().unwrap())),
            "die" => {
                ran.exit = None;
                ran.fault = Some(Fault::new(ErrorCode::GuestPanic, "the guest panicked"));
            }
            "gate" => {
                self.noticed.send_replace("gate".into());
                self.gate.acquire().await.unwrap().forget();
                say(session.as_ref(), &mut ran, "through\n").await;
            }
            // So many messages of 64 KiB, numbered.
            "flood" => {
                for n in 0..spec.args[0].parse::<u32>().unwrap() {
                    let mut data = vec![b'.'; 64 * 1024];
                    data[..4].copy_from_slice(&n.to_be_bytes());
                    say(session.as_ref(), &mut ran, data).await;
                }
            }
            // Says something live, and then its worker's session breaks.
            "break" => {
                say(session.as_ref(), &mut ran, "live ").await;
                *session = None;
                say(session.as_ref(), &mut ran, "kept").await;
            }
            "cat" => self.cat(session, &mut ran).await,
            // Reads nothing until it gets a signal, as which it exits.
            "deaf" => self.deaf(session, &mut ran).await,
            other => panic!("no script for {other}"),
        }
        ran
    }

    async fn cat(&self, session: &mut Option<WorkerEnd>, ran: &mut Ran) {
        loop {
            let input = session.as_mut().unwrap().input.recv().await;
            match input {
                Some(SessionInput::Stdin(data)) => {
                    let taken = &session.as_ref().unwrap().taken;
                    taken.send_modify(|bytes| *bytes += data.len() as u64);
                    say(session.as_ref(), ran, data).await;
                }
                Some(SessionInput::StdinEof) => return,
                Some(SessionInput::Signal(signal)) => {
                    ran.exit = Some(ExitStatus::Signal(signal));
                    return;
                }
                Some(SessionInput::Resize(size)) => {
                    say(session.as_ref(), ran, format!("{}x{}", size.rows, size.cols)).await;
                }
                None => {
                    self.noticed.send_replace("client left".into());
                    ran.fault = Some(Fault::new(ErrorCode::ClientGone, "the client left"));
                    return;
                }
            }
        }
    }

    async fn deaf(&self, session: &mut Option<WorkerEnd>, ran: &mut Ran) {
        self.noticed.send_replace("deaf".into());
        self.gate.acquire().await.unwrap().forget();
        let input = &mut session.as_mut().unwrap().input;
        while let Some(input) = input.recv().await {
            if let SessionInput::Signal(signal) = input {
                ran.exit = Some(ExitStatus::Signal(signal));
                return;
            }
        }
        self.noticed.send_replace("client left".into());
    }
}

async fn say(session: Option<&WorkerEnd>, ran: &mut Ran, data: impl Into<Bytes>) {
    let data = data.into();
    ran.stdout.push(&data);
    if let Some(session) = session {
        let stream = OutputStream::Stdout;
        let _ = session.output.send(SessionOutput::Data { stream, data }).await;
    }
}

fn starts(kind: TaskKind) -> bool {
    matches!(kind, TaskKind::VmCreate | TaskKind::VmStart)
}

fn facts() -> SnapshotFacts {
    SnapshotFacts { size_bytes: 4096, digest: "a".repeat(64), paused_us: 1500 }
}

fn start(origin: Origin) -> StartReport {
    let kind = match origin {
        Origin::Image | Origin::Builder(_) => StartKind::Boot,
        Origin::Template(_) => StartKind::Pool,
        Origin::Snapshot(_) => StartKind::Restore,
    };
    let phase = |name: &str, us| StartPhase { name: name.into(), us };
    StartReport::new(kind, vec![phase("queue", 250), phase("guest", 1000)], None)
}
