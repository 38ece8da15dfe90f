//! Short ways to say what a test needs.

use aether_store::{
    Accepted, AttemptEnd, Begin, ExecutionEnd, Idempotency, NewExecution, NewTask, NewVm, Store,
    VmChange, VmPatch,
};
use aether_types::{
    DriverKind, ErrorCode, Execution, ExecutionId, ExecutionSpec, ExecutionState, ExitStatus,
    Fault, NetworkPolicy, Priority, RetainedOutput, Task, TaskId, TaskKind, TaskState, VmEvent,
    VmId, VmSpec, WorkerId,
};

pub(crate) fn spec() -> VmSpec {
    VmSpec {
        vcpus: 1,
        memory_mb: 256,
        disk_mb: 512,
        image: "debian".into(),
        driver: DriverKind::Sim,
        env: [("TOKEN".to_owned(), "s3cret".to_owned())].into(),
        labels: [("team".to_owned(), "blue".to_owned())].into(),
        timeout_s: None,
        network: NetworkPolicy::default(),
    }
}

pub(crate) fn new_vm(name: &str) -> NewVm {
    NewVm { id: VmId::new(), name: name.into(), spec: spec() }
}

pub(crate) fn new_task(kind: TaskKind) -> NewTask {
    NewTask { id: TaskId::new(), kind, priority: Priority::Default, max_attempts: 3 }
}

pub(crate) fn key(text: &str, digest: u8) -> Idempotency {
    Idempotency { key: text.into(), request_digest: [digest; 32] }
}

pub(crate) fn fault(code: ErrorCode) -> Fault {
    Fault::new(code, "it is a test")
}

pub(crate) async fn create(store: &impl Store, name: &str) -> Accepted {
    store.create_vm(new_vm(name), new_task(TaskKind::VmCreate), None).await.unwrap()
}

/// A VM that runs.
pub(crate) async fn running(store: &impl Store, name: &str) -> VmId {
    let made = create(store, name).await;
    carry_out(store, &made.task, Some(VmEvent::Started)).await;
    made.vm.id
}

pub(crate) async fn request(store: &impl Store, vm: VmId, kind: TaskKind) -> Accepted {
    store.request_on_vm(vm, new_task(kind), None).await.unwrap()
}

pub(crate) async fn execute(store: &impl Store, vm: VmId) -> (Task, Execution) {
    let execution = NewExecution {
        id: ExecutionId::new(),
        spec: ExecutionSpec { command: "true".into(), ..Default::default() },
    };
    let (accepted, execution) =
        store.request_execution(vm, execution, new_task(TaskKind::VmExecute), None).await.unwrap();
    (accepted.task, execution)
}

/// Begins an attempt that must go on.
pub(crate) async fn begin(store: &impl Store, task: TaskId, epoch: i64) -> Task {
    match store.begin_attempt(task, WorkerId::new(), epoch).await.unwrap() {
        Begin::Go(task) => task,
        other => panic!("the attempt does not go on: {other:?}"),
    }
}

/// Begins and ends a task well.
pub(crate) async fn carry_out(store: &impl Store, task: &Task, event: Option<VmEvent>) -> Task {
    begin(store, task.id, task.epoch + 1).await;
    store.end_attempt(task.id, task.epoch + 1, completed(event)).await.unwrap()
}

pub(crate) fn completed(event: Option<VmEvent>) -> AttemptEnd {
    AttemptEnd {
        state: TaskState::Completed,
        error: None,
        vm: event.map(|event| VmChange { event, reason: None, patch: VmPatch::default() }),
        execution: None,
    }
}

pub(crate) fn failed(code: ErrorCode, event: Option<VmEvent>) -> AttemptEnd {
    AttemptEnd {
        state: TaskState::Failed,
        error: Some(fault(code)),
        vm: event.map(|event| VmChange {
            event,
            reason: Some(fault(code)),
            patch: VmPatch::default(),
        }),
        execution: None,
    }
}

pub(crate) fn exited(code: i32) -> AttemptEnd {
    let mut stdout = RetainedOutput::default();
    stdout.push(b"out\0\xff");
    AttemptEnd {
        execution: Some(ExecutionEnd {
            state: ExecutionState::Completed,
            exit: Some(ExitStatus::Code(code)),
            error: None,
            duration_us: Some(1234),
            stdout,
            stderr: RetainedOutput::default(),
        }),
        ..completed(None)
    }
}
