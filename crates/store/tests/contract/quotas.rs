//! What a project may have at most, on every way to more of it.

use aether_store::{Capacity, NewExecution, NewVm, Store, StoreError};
use aether_types::{
    ExecutionId, ExecutionSpec, ProjectId, SnapshotPurpose, TaskKind, VmEvent, VmId,
    project::{Quota, QuotaResource, Shortage, Usage},
};

use crate::support::{
    carry_out, clones, key, new_snapshot, new_template, new_vm, project, task_of,
};

/// A project of this quota.
async fn bounded(store: &impl Store, quota: Quota) -> ProjectId {
    let id = project(store, "bounded").await;
    store.set_quota(id, quota).await.unwrap();
    assert_eq!(store.project(id).await.unwrap().unwrap().quota, quota);
    id
}

fn vm_of(name: &str, vcpus: u32, memory_mb: u32) -> NewVm {
    let mut vm = new_vm(name);
    (vm.spec.vcpus, vm.spec.memory_mb) = (vcpus, memory_mb);
    vm
}

async fn make(store: &impl Store, project: ProjectId, vm: NewVm) -> Result<VmId, StoreError> {
    let task = task_of(project, TaskKind::VmCreate);
    let made = store.create_vm(vm, task, Capacity::default(), None).await?;
    carry_out(store, &made.task, Some(VmEvent::Started)).await;
    Ok(made.vm.id)
}

async fn act(
    store: &impl Store,
    project: ProjectId,
    vm: VmId,
    kind: TaskKind,
    event: VmEvent,
) -> Result<(), StoreError> {
    let asked = store.request_on_vm(vm, task_of(project, kind), None).await?;
    carry_out(store, &asked.task, Some(event)).await;
    Ok(())
}

fn short<T: std::fmt::Debug>(answer: Result<T, StoreError>) -> Shortage {
    match answer.unwrap_err() {
        StoreError::QuotaExceeded(shortage) => shortage,
        other => panic!("{other:?}"),
    }
}

pub(crate) async fn every_way_to_a_machine_is_held_to_the_quota(store: &impl Store) {
    let quota = Quota { vcpus: Some(4), memory_mb: Some(1000), ..Quota::default() };
    let ours = bounded(store, quota).await;
    let one = make(store, ours, vm_of("a", 3, 400)).await.unwrap();
    // A new one.
    let vcpus = Shortage { resource: QuotaResource::Vcpus, limit: 4, used: 3, asked: 2 };
    assert_eq!(short(make(store, ours, vm_of("b", 2, 100)).await), vcpus);
    let memory = Shortage { resource: QuotaResource::MemoryMb, limit: 1000, used: 400, asked: 601 };
    assert_eq!(short(make(store, ours, vm_of("b", 1, 601)).await), memory);
    // One that was stopped has no machine, and needs one to start.
    act(store, ours, one, TaskKind::VmStop, VmEvent::Stopped).await.unwrap();
    let two = make(store, ours, vm_of("b", 2, 100)).await.unwrap();
    let start = act(store, ours, one, TaskKind::VmStart, VmEvent::Started).await;
    assert_eq!(short(start), Shortage { used: 2, asked: 3, ..vcpus });
    // One that is paused has its machine.
    act(store, ours, two, TaskKind::VmPause, VmEvent::PauseDone).await.unwrap();
    let used = store.project_usage(ours).await.unwrap();
    assert_eq!(used, Usage { vms: 2, vcpus: 2, memory_mb: 100, waiting_tasks: 0 });
    // The VM in which a template is built.
    let build = async |vcpus| {
        let template = new_template("t");
        let builder = vm_of(&format!("build-{}", template.id), vcpus, 100);
        let task = task_of(ours, TaskKind::TemplateBuild);
        let new = new_snapshot(SnapshotPurpose::Template);
        store.build_template(template, new, builder, task, None).await
    };
    assert_eq!(short(build(3).await), Shortage { used: 2, asked: 3, ..vcpus });
    build(2).await.unwrap();
    let start = act(store, ours, two, TaskKind::VmStart, VmEvent::Started).await.unwrap_err();
    assert!(matches!(start, StoreError::WrongState { .. }), "its state is said first: {start:?}");
    act(store, ours, two, TaskKind::VmDelete, VmEvent::Deleted).await.unwrap();
    let start = act(store, ours, one, TaskKind::VmStart, VmEvent::Started).await;
    assert_eq!(short(start), Shortage { used: 2, asked: 3, ..vcpus }, "the build's");
}

pub(crate) async fn a_fork_has_room_for_all_of_it_or_is_refused_whole(store: &impl Store) {
    let ours = bounded(store, Quota { vms: Some(3), ..Quota::default() }).await;
    let source = make(store, ours, new_vm("a")).await.unwrap();
    let fork = async |names: &[&str]| {
        let names: Vec<_> = names.iter().map(|&name| name.to_owned()).collect();
        let (new, task) =
            (new_snapshot(SnapshotPurpose::Fork), task_of(ours, TaskKind::VmSnapshot));
        store.fork_vm(source, new, task, clones(&names), Capacity::default(), None).await
    };
    let refused = short(fork(&["b", "c", "d"]).await);
    assert_eq!((refused.limit, refused.used, refused.asked), (3, 1, 3));
    assert_eq!(store.vm_by_name(ours, "b").await.unwrap(), None);
    assert_eq!(store.open_tasks().await.unwrap(), []);
    fork(&["b", "c"]).await.unwrap();
    assert_eq!(store.project_usage(ours).await.unwrap().vms, 3);
}

pub(crate) async fn tasks_that_wait_are_bounded_and_what_gives_back_is_not(store: &impl Store) {
    let ours = bounded(store, Quota { waiting_tasks: Some(2), ..Quota::default() }).await;
    let vm = make(store, ours, new_vm("a")).await.unwrap();
    let execute = async || {
        let new = NewExecution { id: ExecutionId::new(), spec: ExecutionSpec::default() };
        store.request_execution(vm, new, task_of(ours, TaskKind::VmExecute), None).await
    };
    let first = execute().await.unwrap().0.task;
    execute().await.unwrap();
    let full = Shortage { resource: QuotaResource::WaitingTasks, limit: 2, used: 2, asked: 1 };
    assert_eq!(short(execute().await), full);
    let new = new_snapshot(SnapshotPurpose::User);
    let snapshot = store.request_snapshot(vm, new, task_of(ours, TaskKind::VmSnapshot), None);
    assert_eq!(short(snapshot.await), full);
    let pause = store.request_on_vm(vm, task_of(ours, TaskKind::VmPause), None);
    assert_eq!(short(pause.await), full);
    let tools = store.build_tools(Vec::new(), task_of(ours, TaskKind::ToolBuild), None);
    assert_eq!(short(tools.await), full);
    assert_eq!(short(make(store, ours, new_vm("b")).await), full);
    // One that a worker has taken waits no more.
    crate::support::begin(store, first.id, 1).await;
    execute().await.unwrap();
    assert_eq!(short(execute().await), full);
    store.request_on_vm(vm, task_of(ours, TaskKind::VmStop), None).await.unwrap();
    store.request_on_vm(vm, task_of(ours, TaskKind::VmDelete), None).await.unwrap();
}

pub(crate) async fn creations_and_starts_at_once_do_not_exceed_a_quota(store: &impl Store) {
    let ours = bounded(store, Quota { vcpus: Some(5), ..Quota::default() }).await;
    let mut stopped = Vec::new();
    for n in 0..4 {
        let vm = make(store, ours, vm_of(&format!("stopped-{n}"), 1, 128)).await.unwrap();
        act(store, ours, vm, TaskKind::VmStop, VmEvent::Stopped).await.unwrap();
        stopped.push(vm);
    }
    let create = async |n: usize| {
        let task = task_of(ours, TaskKind::VmCreate);
        let vm = vm_of(&format!("vm-{n}"), 1, 128);
        store.create_vm(vm, task, Capacity::default(), None).await.map(drop)
    };
    let start = async |n: usize| {
        let task = task_of(ours, TaskKind::VmStart);
        store.request_on_vm(stopped[n], task, None).await.map(drop)
    };
    let answers = <[_; 8]>::from(tokio::join!(
        create(0),
        start(0),
        create(1),
        start(1),
        create(2),
        start(2),
        create(3),
        start(3)
    ));
    assert_eq!(answers.iter().filter(|answer| answer.is_ok()).count(), 5, "{answers:?}");
    for refused in answers.into_iter().filter(Result::is_err) {
        short(refused);
    }
    assert_eq!(store.project_usage(ours).await.unwrap().vcpus, 5);
}

pub(crate) async fn a_repetition_needs_no_quota_and_others_have_their_own(store: &impl Store) {
    let ours = bounded(store, Quota { vms: Some(1), ..Quota::default() }).await;
    let create = async |project, name: &str| {
        let task = task_of(project, TaskKind::VmCreate);
        store.create_vm(new_vm(name), task, Capacity::default(), Some(key("k", 1))).await
    };
    let first = create(ours, "a").await.unwrap();
    let again = create(ours, "a").await.unwrap();
    assert!(again.repeated);
    assert_eq!(again.vm.id, first.vm.id);
    make(store, ProjectId::DEFAULT, new_vm("a")).await.unwrap();
    make(store, ProjectId::DEFAULT, new_vm("b")).await.unwrap();
    assert_eq!(short(make(store, ours, new_vm("b")).await).resource, QuotaResource::Vms);
    let unknown = store.set_quota(ProjectId::new(), Quota::default()).await.unwrap_err();
    assert!(matches!(unknown, StoreError::ProjectNotFound));
}

pub(crate) async fn a_quota_that_is_lowered_takes_nothing_away(store: &impl Store) {
    let ours = bounded(store, Quota::default()).await;
    let vm = make(store, ours, vm_of("a", 4, 512)).await.unwrap();
    store.set_quota(ours, Quota { vcpus: Some(1), ..Quota::default() }).await.unwrap();
    // What needs no more of it goes on.
    let new = NewExecution { id: ExecutionId::new(), spec: ExecutionSpec::default() };
    store.request_execution(vm, new, task_of(ours, TaskKind::VmExecute), None).await.unwrap();
    let refused = short(make(store, ours, vm_of("b", 1, 128)).await);
    assert_eq!((refused.limit, refused.used, refused.asked), (1, 4, 1));
    store.set_quota(ours, Quota::default()).await.unwrap();
    make(store, ours, vm_of("b", 1, 128)).await.unwrap();
}
