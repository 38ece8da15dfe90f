//! Short ways to say what a test needs.

use aether_store::{
    Accepted, AttemptEnd, Begin, Capacity, ExecutionEnd, Forked, Idempotency, NewExecution,
    NewSnapshot, NewTask, NewTemplate, NewVm, SnapshotFacts, Store, VmChange, VmPatch,
};
use aether_types::{
    DriverKind, ErrorCode, Execution, ExecutionId, ExecutionSpec, ExecutionState, ExitStatus,
    Fault, NetworkPolicy, Origin, Priority, Project, ProjectId, RetainedOutput, Snapshot,
    SnapshotId, SnapshotPurpose, Task, TaskId, TaskKind, TaskState, Template, TemplateId,
    TemplateSpec, TemplateStep, Timestamp, VmEvent, VmId, VmSpec, WorkerId, project::Quota,
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
        origin: Origin::Image,
        tools: Vec::new(),
        placement: aether_types::Placement::default(),
    }
}

pub(crate) fn new_vm(name: &str) -> NewVm {
    NewVm { id: VmId::new(), name: name.into(), spec: spec() }
}

pub(crate) fn new_task(kind: TaskKind) -> NewTask {
    NewTask { id: TaskId::new(), kind, priority: Priority::Default, max_attempts: 3, project: None }
}

pub(crate) async fn project(store: &impl Store, name: &str) -> ProjectId {
    let project = Project {
        id: ProjectId::new(),
        name: name.into(),
        created_at: Timestamp::now(),
        quota: Quota::default(),
    };
    store.create_project(project.clone()).await.unwrap();
    project.id
}

/// Asked for by somebody of this project.
pub(crate) fn task_of(project: ProjectId, kind: TaskKind) -> NewTask {
    NewTask { project: Some(project), ..new_task(kind) }
}

pub(crate) fn key(text: &str, digest: u8) -> Idempotency {
    Idempotency { key: text.into(), request_digest: [digest; 32] }
}

pub(crate) fn fault(code: ErrorCode) -> Fault {
    Fault::new(code, "it is a test")
}

pub(crate) async fn create(store: &impl Store, name: &str) -> Accepted {
    store
        .create_vm(new_vm(name), new_task(TaskKind::VmCreate), Capacity::default(), None)
        .await
        .unwrap()
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
    match store.begin_attempt(task, WorkerId::new().into(), epoch).await.unwrap() {
        Begin::Go(task) => task,
        other => panic!("the attempt does not go on: {other:?}"),
    }
}

/// Begins and ends a task well.
pub(crate) async fn carry_out(store: &impl Store, task: &Task, event: Option<VmEvent>) -> Task {
    begin(store, task.id, task.epoch + 1).await;
    store.end_attempt(task.id, task.epoch + 1, completed(event)).await.unwrap()
}

pub(crate) fn new_snapshot(purpose: SnapshotPurpose) -> NewSnapshot {
    NewSnapshot { id: SnapshotId::new(), name: None, purpose }
}

/// Of a VM that runs.
pub(crate) async fn snapshot(store: &impl Store, vm: VmId) -> (Accepted, Snapshot) {
    let new = new_snapshot(SnapshotPurpose::User);
    store.request_snapshot(vm, new, new_task(TaskKind::VmSnapshot), None).await.unwrap()
}

pub(crate) async fn suspend(store: &impl Store, vm: VmId) -> (Accepted, Snapshot) {
    let new = new_snapshot(SnapshotPurpose::Memory);
    store.request_snapshot(vm, new, new_task(TaskKind::VmSuspend), None).await.unwrap()
}

pub(crate) fn clones(names: &[String]) -> Vec<(NewVm, NewTask)> {
    names.iter().map(|name| (new_vm(name), new_task(TaskKind::VmCreate))).collect()
}

pub(crate) async fn fork(store: &impl Store, vm: VmId, names: &[String]) -> Forked {
    let (new, task) = (new_snapshot(SnapshotPurpose::Fork), new_task(TaskKind::VmSnapshot));
    store.fork_vm(vm, new, task, clones(names), Capacity::default(), None).await.unwrap()
}

pub(crate) fn template_spec() -> TemplateSpec {
    TemplateSpec {
        image: "debian".into(),
        driver: DriverKind::Sim,
        vcpus: 1,
        memory_mb: 256,
        disk_mb: 512,
        env: [("TOKEN".to_owned(), "s3cret".to_owned())].into(),
        files: Vec::new(),
        steps: vec![TemplateStep { run: "true".into(), timeout_s: None }],
        start: None,
        ready: None,
        network: NetworkPolicy::default(),
        tools: Vec::new(),
    }
}

pub(crate) fn new_template(name: &str) -> NewTemplate {
    let id = TemplateId::new();
    NewTemplate { id, name: name.into(), tag: "latest".into(), spec: template_spec() }
}

pub(crate) async fn build_as(
    store: &impl Store,
    template: NewTemplate,
    idempotency: Option<Idempotency>,
) -> (Accepted, Template) {
    let builder = new_vm(&format!("build-{}", template.id));
    let (new, task) = (new_snapshot(SnapshotPurpose::Template), new_task(TaskKind::TemplateBuild));
    store.build_template(template, new, builder, task, idempotency).await.unwrap()
}

pub(crate) async fn build(store: &impl Store, name: &str) -> (Accepted, Template) {
    build_as(store, new_template(name), None).await
}

/// A template that is ready.
pub(crate) async fn built(store: &impl Store, name: &str) -> Template {
    let (accepted, template) = build(store, name).await;
    begin(store, accepted.task.id, 1).await;
    store.end_attempt(accepted.task.id, 1, template_made("d1")).await.unwrap();
    store.template(template.id).await.unwrap().unwrap()
}

pub(crate) fn sealed() -> SnapshotFacts {
    SnapshotFacts { size_bytes: 4096, digest: "0123abcd".into(), paused_us: 1500 }
}

/// The end of a task that made its snapshot.
pub(crate) fn made(event: Option<VmEvent>) -> AttemptEnd {
    AttemptEnd { snapshot: Some(sealed()), ..completed(event) }
}

pub(crate) fn template_made(digest: &str) -> AttemptEnd {
    AttemptEnd { template: Some(digest.into()), ..made(None) }
}

pub(crate) async fn snapshot_now(store: &impl Store, id: SnapshotId) -> Snapshot {
    store.snapshot(id).await.unwrap().unwrap()
}

pub(crate) fn completed(event: Option<VmEvent>) -> AttemptEnd {
    AttemptEnd {
        state: TaskState::Completed,
        error: None,
        vm: event.map(|event| VmChange { event, reason: None, patch: VmPatch::default() }),
        execution: None,
        snapshot: None,
        template: None,
        tools: None,
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
        snapshot: None,
        template: None,
        tools: None,
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
