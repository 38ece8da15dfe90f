//! A worker whose guests do what the command's name says.

use std::{sync::Arc, time::Duration};

use aether_events::{Event, EventBus};
use aether_queue::{Lease, Queue};
use aether_store::{AttemptEnd, Begin, ExecutionEnd, Store, VmChange, VmPatch};
use aether_streams::{SessionInput, SessionOutput, Sessions, WorkerEnd};
use aether_types::{
    ErrorCode, Execution, ExecutionState, ExitStatus, Fault, OutputStream, RetainedOutput, Task,
    TaskKind, TaskState, Timestamp, VmEvent, WorkerId,
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
                let claim =
                    worker.queue.claim(worker.id, Duration::from_secs(30), Duration::from_mins(1));
                if let Some(lease) = claim.await.unwrap() {
                    let worker = Arc::clone(&worker);
                    tokio::spawn(async move { worker.carry_out(lease).await });
                }
            }
        });
    }

    /// Waits until a command noticed this.
    pub(crate) async fn saw(&self, text: &str) {
        let mut noticed = self.noticed.subscribe();
        crate::rig::soon(noticed.wait_for(|n| n == text)).await.unwrap();
    }

    async fn carry_out(&self, lease: Lease) {
        let begun = self.store.begin_attempt(lease.task, self.id, lease.epoch).await.unwrap();
        if let Begin::Go(task) = begun {
            let event = match task.kind {
                TaskKind::VmExecute => None,
                TaskKind::VmCreate | TaskKind::VmStart => Some(VmEvent::Started),
                TaskKind::VmStop => Some(VmEvent::Stopped),
                TaskKind::VmPause => Some(VmEvent::PauseDone),
                TaskKind::VmResume => Some(VmEvent::ResumeDone),
                TaskKind::VmDelete => Some(VmEvent::Deleted),
            };
            match event {
                Some(event) => self.operate(&task, &lease, event).await,
                None => self.execute(&task, &lease).await,
            }
        }
        let _ = self.queue.complete(&lease).await;
    }

    async fn end(&self, task: &Task, lease: &Lease, end: AttemptEnd) {
        // Fenced where the VM was deleted meanwhile.
        if let Ok(task) = self.store.end_attempt(task.id, lease.epoch, end).await {
            let (task_id, vm_id, state) = (task.id, task.vm_id, task.state);
            let event = Event::Task { task_id, vm_id, state, at: Timestamp::now() };
            self.bus.publish(event).await.unwrap();
        }
    }

    async fn operate(&self, task: &Task, lease: &Lease, event: VmEvent) {
        let vm = self.store.vm(task.vm_id).await.unwrap().unwrap();
        let fault = (task.kind == TaskKind::VmCreate && vm.name.starts_with("broken"))
            .then(|| Fault::new(ErrorCode::VmStartFailed, "the kernel is missing"));
        let patch = VmPatch { worker_id: Some(self.id), ..VmPatch::default() };
        let event = if fault.is_some() { VmEvent::Failed } else { event };
        let end = AttemptEnd {
            state: if fault.is_some() { TaskState::Failed } else { TaskState::Completed },
            error: fault.clone(),
            vm: Some(VmChange { event, reason: fault, patch }),
            execution: None,
        };
        self.end(task, lease, end).await;
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
