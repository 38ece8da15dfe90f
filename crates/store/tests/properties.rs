//! Random sequences of what clients, workers and guests do: whatever the order, the invariants
//! hold.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "contract/engines.rs"]
mod engines;
#[path = "contract/support.rs"]
#[expect(dead_code, reason = "shared with the contract suite, which uses all of it")]
mod support;

use std::collections::{HashMap, HashSet};

use aether_store::{
    AttemptEnd, Begin, Capacity, Durability, NewExecution, PageRequest, SnapshotFilter,
    SqliteStore, Store, StoreError, TaskFilter, TemplateFilter, VmChange, VmFilter, VmPatch,
};
use aether_types::{
    ErrorCode, ExecutionId, ExecutionSpec, Origin, SnapshotId, SnapshotPurpose, SnapshotState,
    Task, TaskId, TaskKind, TaskState, TemplateId, TemplateState, Vm, VmEvent, VmId, VmState,
    WorkerId,
};
use proptest::prelude::*;

const EVENTS: [VmEvent; 9] = [
    VmEvent::Started,
    VmEvent::StartRequested,
    VmEvent::PauseDone,
    VmEvent::ResumeDone,
    VmEvent::StopRequested,
    VmEvent::Stopped,
    VmEvent::Failed,
    VmEvent::DeleteRequested,
    VmEvent::Deleted,
];

const REQUESTS: [TaskKind; 5] = [
    TaskKind::VmStart,
    TaskKind::VmStop,
    TaskKind::VmPause,
    TaskKind::VmResume,
    TaskKind::VmDelete,
];

/// Clients have so many VMs at most.
const CAPACITY: Capacity = Capacity { vms_max: Some(5), starting_max: None };

/// What a worker says at the end of a task of this kind that went well.
fn done(kind: TaskKind) -> Option<VmEvent> {
    match kind {
        TaskKind::VmCreate | TaskKind::VmStart => Some(VmEvent::Started),
        TaskKind::VmStop | TaskKind::VmSuspend => Some(VmEvent::Stopped),
        TaskKind::VmPause => Some(VmEvent::PauseDone),
        TaskKind::VmResume => Some(VmEvent::ResumeDone),
        TaskKind::VmDelete => Some(VmEvent::Deleted),
        TaskKind::VmExecute
        | TaskKind::VmSnapshot
        | TaskKind::TemplateBuild
        | TaskKind::ToolBuild => None,
    }
}

#[derive(Debug, Clone)]
enum Op {
    Create { name: usize },
    Request { vm: usize, kind: usize },
    Execute { vm: usize },
    Snapshot { vm: usize, suspend: bool },
    Fork { vm: usize, count: usize },
    Build { name: usize },
    DeleteSnapshot { at: usize },
    DeleteTemplate { at: usize },
    Retire,
    Cancel { task: usize },
    Begin { task: usize, ahead: i64 },
    ExecutionStarted { task: usize, boot: usize },
    End { task: usize, behind: i64, well: bool },
    Retry { task: usize, behind: i64 },
    Change { vm: usize, event: usize },
}

fn op() -> impl Strategy<Value = Op> {
    let at = any::<usize>;
    let behind = || prop_oneof![4 => Just(0_i64), 1 => 1..3_i64];
    prop_oneof![
        2 => (0..3_usize).prop_map(|name| Op::Create { name }),
        3 => (at(), 0..REQUESTS.len()).prop_map(|(vm, kind)| Op::Request { vm, kind }),
        3 => at().prop_map(|vm| Op::Execute { vm }),
        2 => (at(), any::<bool>()).prop_map(|(vm, suspend)| Op::Snapshot { vm, suspend }),
        1 => (at(), 1..3_usize).prop_map(|(vm, count)| Op::Fork { vm, count }),
        1 => (0..2_usize).prop_map(|name| Op::Build { name }),
        1 => at().prop_map(|at| Op::DeleteSnapshot { at }),
        1 => at().prop_map(|at| Op::DeleteTemplate { at }),
        1 => Just(Op::Retire),
        1 => at().prop_map(|task| Op::Cancel { task }),
        6 => (at(), -1..3_i64).prop_map(|(task, ahead)| Op::Begin { task, ahead }),
        1 => (at(), 0..2_usize).prop_map(|(task, boot)| Op::ExecutionStarted { task, boot }),
        6 => (at(), behind(), any::<bool>())
            .prop_map(|(task, behind, well)| Op::End { task, behind, well }),
        2 => (at(), behind()).prop_map(|(task, behind)| Op::Retry { task, behind }),
        1 => (at(), 0..EVENTS.len()).prop_map(|(vm, event)| Op::Change { vm, event }),
    ]
}

struct World<S> {
    store: S,
    vms: Vec<VmId>,
    tasks: Vec<TaskId>,
    snapshots: Vec<SnapshotId>,
    templates: Vec<TemplateId>,
    /// As they were when they ended.
    ended: HashMap<TaskId, Task>,
    generations: HashMap<VmId, i64>,
}

fn pick<T: Copy>(of: &[T], at: usize) -> Option<T> {
    (!of.is_empty()).then(|| of[at % of.len()])
}

/// Refusals that a caller must expect; anything else is a defect.
fn refused<T>(answer: Result<T, StoreError>) -> Option<T> {
    match answer {
        Ok(value) => Some(value),
        Err(
            StoreError::NameTaken { .. }
            | StoreError::TooManyVms { .. }
            | StoreError::SnapshotNotReady { .. }
            | StoreError::TemplateNotReady { .. }
            | StoreError::WrongState { .. }
            | StoreError::NotCancellable { .. }
            | StoreError::Fenced
            | StoreError::AlreadyStarted,
        ) => None,
        Err(other) => panic!("{other:?}"),
    }
}

impl<S: Store> World<S> {
    async fn task(&self, at: usize) -> Option<Task> {
        let id = pick(&self.tasks, at)?;
        self.store.task(id).await.unwrap()
    }

    async fn apply(&mut self, op: Op) {
        let store = &self.store;
        match op {
            Op::Create { name } => {
                let new = support::new_vm(&format!("vm-{name}"));
                let task = support::new_task(TaskKind::VmCreate);
                if let Some(made) = refused(store.create_vm(new, task, CAPACITY, None).await) {
                    self.vms.push(made.vm.id);
                    self.tasks.push(made.task.id);
                }
            }
            Op::Request { vm, kind } => {
                let Some(vm) = pick(&self.vms, vm) else { return };
                let task = support::new_task(REQUESTS[kind]);
                if let Some(made) = refused(store.request_on_vm(vm, task, None).await)
                    && !made.repeated
                {
                    self.tasks.push(made.task.id);
                }
            }
            Op::Execute { vm } => {
                let Some(vm) = pick(&self.vms, vm) else { return };
                let new = NewExecution { id: ExecutionId::new(), spec: ExecutionSpec::default() };
                let task = support::new_task(TaskKind::VmExecute);
                if let Some((made, _)) = refused(store.request_execution(vm, new, task, None).await)
                {
                    self.tasks.push(made.task.id);
                }
            }
            Op::Snapshot { vm, suspend } => {
                let Some(vm) = pick(&self.vms, vm) else { return };
                let (kind, purpose) = if suspend {
                    (TaskKind::VmSuspend, SnapshotPurpose::Memory)
                } else {
                    (TaskKind::VmSnapshot, SnapshotPurpose::User)
                };
                let (new, task) = (support::new_snapshot(purpose), support::new_task(kind));
                if let Some((made, snapshot)) =
                    refused(store.request_snapshot(vm, new, task, None).await)
                {
                    self.tasks.push(made.task.id);
                    self.snapshots.push(snapshot.id);
                }
            }
            Op::Fork { vm, count } => {
                let Some(vm) = pick(&self.vms, vm) else { return };
                let names: Vec<_> = (0..count).map(|i| format!("vm-{i}")).collect();
                let clones = support::clones(&names);
                let new = support::new_snapshot(SnapshotPurpose::Fork);
                let task = support::new_task(TaskKind::VmSnapshot);
                let forked = store.fork_vm(vm, new, task, clones, CAPACITY, None).await;
                if let Some(forked) = refused(forked) {
                    self.tasks.push(forked.accepted.task.id);
                    self.snapshots.push(forked.snapshot.id);
                    self.vms.extend(forked.clones.iter().map(|(vm, _)| vm.id));
                    self.tasks.extend(forked.clones.iter().map(|(_, task)| task.id));
                }
            }
            Op::Build { name } => {
                let (made, template) = support::build(store, &format!("t-{name}")).await;
                if !made.repeated {
                    self.vms.push(made.vm.id);
                    self.tasks.push(made.task.id);
                    self.snapshots.push(template.snapshot_id);
                    self.templates.push(template.id);
                }
            }
            Op::DeleteSnapshot { at } => {
                let Some(id) = pick(&self.snapshots, at) else { return };
                if let Some(snapshot) = refused(store.delete_snapshot(id).await) {
                    assert_eq!(snapshot.state, SnapshotState::Deleted);
                }
            }
            Op::DeleteTemplate { at } => {
                let Some(id) = pick(&self.templates, at) else { return };
                if let Some(template) = refused(store.delete_template(id).await) {
                    assert_eq!(template.state, TemplateState::Deleted);
                }
            }
            Op::Retire => {
                for snapshot in store.retire_snapshots().await.unwrap() {
                    assert_eq!(snapshot.state, SnapshotState::Deleted);
                    let failed = snapshot.reason.is_some();
                    assert!(failed || snapshot.purpose != SnapshotPurpose::User);
                }
            }
            Op::Cancel { task } => {
                let Some(task) = pick(&self.tasks, task) else { return };
                refused(store.cancel_task(task).await);
            }
            Op::Begin { task, ahead } => {
                let Some(before) = self.task(task).await else { return };
                let epoch = before.epoch + ahead;
                match store.begin_attempt(before.id, WorkerId::new().into(), epoch).await.unwrap() {
                    Begin::Go(after) => {
                        assert!(epoch > before.epoch && !before.state.is_end());
                        assert_eq!(after.attempts, before.attempts + 1);
                        assert!(after.attempts <= after.max_attempts);
                    }
                    Begin::Ended(after) => {
                        assert!(after.state.is_end());
                        let used_up = before.attempts == before.max_attempts;
                        assert!(before.state.is_end() || (used_up && epoch > before.epoch));
                    }
                    Begin::Fenced => assert!(epoch <= before.epoch && !before.state.is_end()),
                    Begin::Elsewhere(_) => panic!("there is no registry"),
                }
            }
            Op::ExecutionStarted { task, boot } => {
                let Some(task) = self.task(task).await else { return };
                let Some(execution) = task.execution_id else { return };
                let boot = ["one", "two"][boot];
                refused(store.execution_started(task.id, task.epoch, execution, boot).await);
            }
            Op::End { task, behind, well } => {
                let Some(before) = self.task(task).await else { return };
                let end = if well {
                    AttemptEnd {
                        snapshot: Some(support::sealed()),
                        template: Some("d".into()),
                        ..support::completed(done(before.kind))
                    }
                } else {
                    support::failed(ErrorCode::Internal, Some(VmEvent::Failed))
                };
                let state = end.state;
                let answer = store.end_attempt(before.id, before.epoch - behind, end).await;
                let counts = before.state == TaskState::Running && behind == 0;
                match refused(answer) {
                    Some(after) => {
                        assert!(counts, "a late answer was taken: {before:?}");
                        assert_eq!(after.state, state);
                    }
                    None => assert!(!counts, "the answer that counts was refused: {before:?}"),
                }
            }
            Op::Retry { task, behind } => {
                let Some(before) = self.task(task).await else { return };
                let fault = support::fault(ErrorCode::Unavailable);
                let otherwise: AttemptEnd = support::failed(ErrorCode::Internal, None);
                let epoch = before.epoch - behind;
                let answer = store.retry_attempt(before.id, epoch, fault, otherwise).await;
                let counts = before.state == TaskState::Running && behind == 0;
                assert_eq!(refused(answer).is_some(), counts);
            }
            Op::Change { vm, event } => {
                let Some(vm) = pick(&self.vms, vm) else { return };
                let patch = VmPatch::default();
                let change = VmChange { event: EVENTS[event], reason: None, patch };
                refused(store.change_vm(vm, None, change).await);
            }
        }
    }

    async fn check(&mut self) {
        let store = &self.store;
        let all = PageRequest { limit: 500, after: None };
        let states = VmState::ALL.to_vec();
        let filter = VmFilter { states, builders: true, ..Default::default() };
        let vms = store.vms(filter, all).await.unwrap().items;
        assert_eq!(vms.len(), self.vms.len());
        let live: Vec<_> = vms.iter().filter(|v| v.state != VmState::Deleted).collect();
        let names: HashSet<_> = live.iter().map(|v| &v.name).collect();
        assert_eq!(names.len(), live.len(), "a name was given twice");
        let listed = store.vms(VmFilter::default(), all).await.unwrap().items;
        let of_clients = live.iter().filter(|v| !matches!(v.spec.origin, Origin::Builder(_)));
        assert_eq!(listed.iter().collect::<Vec<_>>(), of_clients.copied().collect::<Vec<_>>());
        assert!(listed.len() <= 5, "more VMs than there may be");

        let tasks = store.tasks(TaskFilter::default(), all).await.unwrap().items;
        assert_eq!(tasks.len(), self.tasks.len());
        let tasks: HashMap<_, _> = tasks.into_iter().map(|t| (t.id, t)).collect();
        for task in tasks.values().filter(|t| t.state.is_end()) {
            assert!(task.finished_at.is_some());
            let first = self.ended.entry(task.id).or_insert_with(|| task.clone());
            assert_eq!(first, task, "a task that had ended was changed");
        }
        assert!(self.ended.keys().all(|id| tasks[id].state.is_end()));
        let open: HashSet<_> = store.open_tasks().await.unwrap().iter().map(|t| t.id).collect();
        assert_eq!(open, tasks.values().filter(|t| !t.state.is_end()).map(|t| t.id).collect());
        // Nothing was confirmed, so what is pending is owed, and nothing else.
        let owed = store.undispatched(500).await.unwrap();
        let owed: HashSet<_> = owed.iter().map(|t| t.id).collect();
        let pending = tasks.values().filter(|t| t.state == TaskState::Pending).map(|t| t.id);
        assert_eq!(owed, pending.collect());

        self.check_snapshots(&vms, &tasks).await;
        for vm in &vms {
            let history = store.vm_history(vm.id).await.unwrap();
            assert_eq!(history.last().unwrap().state, vm.state);
            assert_eq!(history.last().unwrap().reason, vm.reason);
            for pair in history.windows(2) {
                let exists = EVENTS.iter().any(|e| pair[0].state.apply(*e) == Some(pair[1].state));
                assert!(exists, "no transition from {} to {}", pair[0].state, pair[1].state);
            }
            let generation = self.generations.entry(vm.id).or_default();
            assert!(*generation <= vm.generation);
            *generation = vm.generation;
            for execution in store.executions(vm.id, all).await.unwrap().items {
                let task = &tasks[&execution.task_id];
                assert_eq!(task.execution_id, Some(execution.id));
                assert_eq!(execution.state.is_end(), task.state.is_end(), "{execution:?} {task:?}");
            }
        }
    }
}

impl<S: Store> World<S> {
    async fn check_snapshots(&self, vms: &[Vm], tasks: &HashMap<TaskId, Task>) {
        let all = PageRequest { limit: 500, after: None };
        let states = SnapshotState::ALL.to_vec();
        let filter = SnapshotFilter { states, ..Default::default() };
        let snapshots = self.store.snapshots(filter, all).await.unwrap().items;
        assert_eq!(snapshots.len(), self.snapshots.len());
        let snapshots: HashMap<_, _> = snapshots.into_iter().map(|s| (s.id, s)).collect();
        let makers = tasks.values().filter_map(|t| Some((t.snapshot_id?, t)));
        let makers: HashMap<_, _> = makers.collect();
        assert_eq!(makers.len(), snapshots.len());
        for snapshot in snapshots.values() {
            let task = makers[&snapshot.id];
            assert_eq!(snapshot.state == SnapshotState::Creating, !task.state.is_end());
            if snapshot.state == SnapshotState::Ready {
                assert_eq!(task.state, TaskState::Completed);
                assert_eq!(snapshot.worker_id, task.worker_id);
                assert!(snapshot.digest.is_some() && snapshot.reason.is_none());
            }
            assert!(snapshot.state != SnapshotState::Failed || snapshot.reason.is_some());
        }
        for vm in vms {
            let Some(memory) = vm.memory else { continue };
            assert!(vm.state.keeps_memory(), "{vm:?}");
            let memory = &snapshots[&memory];
            assert_eq!((memory.vm_id, memory.purpose), (vm.id, SnapshotPurpose::Memory));
            assert_eq!(memory.state, SnapshotState::Ready, "a memory that is needed was retired");
        }

        let states = TemplateState::ALL.to_vec();
        let filter = TemplateFilter { states, ..Default::default() };
        let templates = self.store.templates(filter, all).await.unwrap().items;
        assert_eq!(templates.len(), self.templates.len());
        let ready = templates.iter().filter(|t| t.state == TemplateState::Ready);
        let names: Vec<_> = ready.clone().map(|t| (&t.name, &t.tag)).collect();
        assert_eq!(names.iter().collect::<HashSet<_>>().len(), names.len());
        for template in ready {
            assert_eq!(snapshots[&template.snapshot_id].state, SnapshotState::Ready);
        }
        for template in &templates {
            let task = &tasks[&template.task_id];
            assert_eq!(template.state == TemplateState::Building, !task.state.is_end());
        }
    }
}

impl<S: Store> World<S> {
    fn new(store: S) -> Self {
        Self {
            store,
            vms: Vec::new(),
            tasks: Vec::new(),
            snapshots: Vec::new(),
            templates: Vec::new(),
            ended: HashMap::new(),
            generations: HashMap::new(),
        }
    }

    async fn live(mut self, ops: Vec<Op>) {
        for (i, op) in ops.into_iter().enumerate() {
            self.apply(op).await;
            if i % 8 == 0 {
                self.check().await;
            }
        }
        self.check().await;
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20, ..ProptestConfig::default() })]

    #[test]
    fn invariants_hold_after_any_sequence(ops in prop::collection::vec(op(), 1..100)) {
        runtime().block_on(async {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("store.db");
            let store = SqliteStore::open(&path, Durability::Process).await.unwrap();
            World::new(store).live(ops).await;
        });
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6, ..ProptestConfig::default() })]

    #[test]
    fn invariants_hold_after_any_sequence_on_postgresql(ops in prop::collection::vec(op(), 1..60)) {
        runtime().block_on(async {
            let Some((store, _kept)) = engines::postgres().await else { return };
            World::new(store).live(ops).await;
        });
    }
}
