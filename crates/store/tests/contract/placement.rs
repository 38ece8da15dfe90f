//! Which worker gets a VM, and VMs that wait for one.

use aether_store::{Begin, Capacity, NewVm, NewWorker, Store, StoreError};
use aether_types::{
    ErrorCode, Origin, Placement, SnapshotPurpose, TaskKind, VmEvent, VmId, VmSpec, WorkerCapacity,
};

use crate::{
    capacity::all,
    support::{
        build, clones, completed, create, execute, new_snapshot, new_task, new_vm, request, spec,
        template_made,
    },
    workers::{begin_as, new_worker, running_on, worker},
};

async fn create_of(store: &impl Store, name: &str, spec: VmSpec) -> aether_store::Accepted {
    let vm = NewVm { spec, ..new_vm(name) };
    let task = new_task(TaskKind::VmCreate);
    store.create_vm(vm, task, Capacity::default(), None).await.unwrap()
}

/// A worker with room for so many VMs.
async fn with_room(store: &impl Store, host: &str, vms: u32) -> aether_types::Worker {
    let new = new_worker(host);
    let capacity = WorkerCapacity { vms_max: Some(vms), ..new.capacity };
    store.register_worker(NewWorker { capacity, ..new }).await.unwrap()
}

async fn owed(store: &impl Store) -> Vec<aether_types::TaskId> {
    store.undispatched(100).await.unwrap().iter().map(|task| task.id).collect()
}

pub(crate) async fn without_a_registry_whoever_claims_a_vm_has_it(store: &impl Store) {
    let made = create(store, "a").await;
    assert_eq!((made.vm.worker_id, &made.task.progress), (None, &None));
    assert_eq!(owed(store).await, [made.task.id]);
    assert_eq!(store.waiting_vms().await.unwrap(), 0);
}

pub(crate) async fn vms_go_where_the_least_is_promised(store: &impl Store) {
    let (one, two) = (worker(store, "one").await, worker(store, "two").await);
    let mut counts = [0, 0];
    for n in 0..6 {
        let made = create(store, &format!("vm-{n}")).await;
        let at = [one.id, two.id].iter().position(|id| made.vm.worker_id == Some(*id)).unwrap();
        counts[at] += 1;
    }
    assert_eq!(counts, [3, 3]);
    let loads = store.workers().await.unwrap();
    for (_, load) in loads {
        assert_eq!((load.vms, load.vcpus, load.memory_mb), (3, 3, 3 * 256));
    }
}

pub(crate) async fn a_vm_waits_where_nobody_has_room_and_goes_on_when_there_is(store: &impl Store) {
    let one = with_room(store, "one", 1).await;
    let first = running_on(store, &one, "first").await;
    store.confirm_dispatched(&owed(store).await).await.unwrap();
    let waits = create(store, "waits").await;
    assert_eq!(waits.vm.worker_id, None);
    let says = waits.task.progress.clone().unwrap().now;
    assert_eq!(says, "waits for a worker; of 1: 1 has no room");
    let (command, _) = execute(store, waits.vm.id).await;
    assert_eq!((owed(store).await, store.waiting_vms().await.unwrap()), (vec![], 1));
    assert_eq!(store.place_waiting(10).await.unwrap(), 0);
    // A VM that is stopped gives its room back, and one that is deleted too.
    let stop = request(store, first, TaskKind::VmStop).await;
    begin_as(store, &one, &stop.task, 1).await;
    store.end_attempt(stop.task.id, 1, completed(Some(VmEvent::Stopped))).await.unwrap();
    assert_eq!(store.place_waiting(10).await.unwrap(), 1);
    assert_eq!(store.waiting_vms().await.unwrap(), 0);
    let placed = store.vm(waits.vm.id).await.unwrap().unwrap();
    assert_eq!(placed.worker_id, Some(one.id));
    assert_eq!(owed(store).await, [waits.task.id, command.id]);
    assert_eq!(store.task(waits.task.id).await.unwrap().unwrap().progress, None);
    // The room is taken: the stopped one cannot come back now.
    let start = store.request_on_vm(first, new_task(TaskKind::VmStart), None).await.unwrap_err();
    assert!(matches!(start, StoreError::NoRoom { .. }), "{start:?}");
    assert_eq!(start.code(), ErrorCode::InsufficientCapacity);
}

pub(crate) async fn a_waiting_vm_can_be_cancelled_and_deleted(store: &impl Store) {
    with_room(store, "one", 0).await;
    let (cancelled, deleted) = (create(store, "a").await, create(store, "b").await);
    store.cancel_task(cancelled.task.id).await.unwrap();
    assert_eq!(store.waiting_vms().await.unwrap(), 1);
    let deletion = request(store, deleted.vm.id, TaskKind::VmDelete).await;
    assert_eq!(store.waiting_vms().await.unwrap(), 0);
    assert_eq!(owed(store).await, [deletion.task.id], "any worker can do it");
}

pub(crate) async fn creations_at_the_same_time_never_exceed_what_a_worker_may_promise(
    store: &impl Store,
) {
    with_room(store, "one", 3).await;
    with_room(store, "two", 2).await;
    let creations = (0..12).map(|n| async move { create(store, &format!("vm-{n}")).await });
    let made = all(creations.map(Box::pin).collect()).await;
    let placed = made.iter().filter(|accepted| accepted.vm.worker_id.is_some()).count();
    assert_eq!((placed, store.waiting_vms().await.unwrap()), (5, 7));
    for (worker, load) in store.workers().await.unwrap() {
        assert_eq!(Some(load.vms), worker.capacity.vms_max);
    }
}

pub(crate) async fn a_vm_goes_only_where_it_wants_to_be(store: &impl Store) {
    let one = worker(store, "one").await;
    let new = NewWorker { zone: Some("b".into()), ..new_worker("two") };
    let labels = [("gpu".to_owned(), "a100".to_owned())].into();
    let two = store.register_worker(NewWorker { labels, ..new }).await.unwrap();
    let at = |zone: Option<&str>, gpu: Option<&str>| Placement {
        zone: zone.map(str::to_owned),
        labels: gpu.map(|gpu| ("gpu".to_owned(), gpu.to_owned())).into_iter().collect(),
    };
    for (n, (placement, expected)) in [
        (at(Some("a"), None), Some(one.id)),
        (at(Some("b"), None), Some(two.id)),
        (at(None, Some("a100")), Some(two.id)),
        (at(None, Some("h100")), None),
        (at(Some("a"), Some("a100")), None),
    ]
    .into_iter()
    .enumerate()
    {
        let spec = VmSpec { placement: placement.clone(), ..spec() };
        let made = create_of(store, &format!("vm-{n}"), spec.clone()).await;
        assert_eq!(made.vm.worker_id, expected, "{placement:?}");
        assert_eq!(store.vm(made.vm.id).await.unwrap().unwrap().spec, spec);
    }
}

pub(crate) async fn a_worker_that_drains_or_left_gets_no_vms(store: &impl Store) {
    let one = worker(store, "one").await;
    let (begun, waits) = (create(store, "begun").await, create(store, "waits").await);
    begin_as(store, &one, &begun.task, 1).await;
    let vm = |id: VmId| async move { store.vm(id).await.unwrap().unwrap().worker_id };
    store.drain_worker(one.id).await.unwrap();
    // What has begun goes on, and what has not goes elsewhere.
    assert_eq!((vm(begun.vm.id).await, vm(waits.vm.id).await), (Some(one.id), None));
    assert_eq!(create(store, "later").await.vm.worker_id, None);
    assert_eq!(store.place_waiting(10).await.unwrap(), 0);
    store.activate_worker(one.id).await.unwrap();
    assert_eq!(store.place_waiting(10).await.unwrap(), 2);
    store.leave((&one).into()).await.unwrap();
    assert_eq!((vm(begun.vm.id).await, vm(waits.vm.id).await), (Some(one.id), None));
    let two = worker(store, "two").await;
    assert_eq!(store.place_waiting(10).await.unwrap(), 2);
    assert_eq!(vm(waits.vm.id).await, Some(two.id));
}

pub(crate) async fn a_task_is_begun_only_where_its_vm_is(store: &impl Store) {
    let unplaced = create(store, "unplaced").await;
    let one = worker(store, "one").await;
    let made = create(store, "a").await;
    let two = with_room(store, "two", 0).await;
    assert_eq!(made.vm.worker_id, Some(one.id));
    store.confirm_dispatched(&owed(store).await).await.unwrap();
    let begun = store.begin_attempt(made.task.id, (&two).into(), 1).await.unwrap();
    assert!(matches!(&begun, Begin::Elsewhere(task) if task.id == made.task.id), "{begun:?}");
    assert_eq!(owed(store).await, [made.task.id], "owed to the worker that has it");
    // A VM that nobody has: it is taken where there is room, and owed where there is none.
    let begun = store.begin_attempt(unplaced.task.id, (&two).into(), 1).await.unwrap();
    assert!(matches!(begun, Begin::Elsewhere(_)), "{begun:?}");
    assert_eq!(store.waiting_vms().await.unwrap(), 1);
    let task = begin_as(store, &one, &unplaced.task, 2).await;
    assert_eq!((task.attempts, task.worker_id), (1, Some(one.id)));
    let vm = store.vm(unplaced.vm.id).await.unwrap().unwrap();
    assert_eq!(vm.worker_id, Some(one.id));
}

pub(crate) async fn a_snapshots_vms_go_where_it_is(store: &impl Store) {
    let one = worker(store, "one").await;
    let source = running_on(store, &one, "source").await;
    let two = worker(store, "two").await;
    assert_eq!(create(store, "other").await.vm.worker_id, Some(two.id));
    let (new, task) = (new_snapshot(SnapshotPurpose::Fork), new_task(TaskKind::VmSnapshot));
    let names: Vec<_> = (0..4).map(|n| format!("clone-{n}")).collect();
    let capacity = Capacity::default();
    let forked = store.fork_vm(source, new, task, clones(&names), capacity, None).await.unwrap();
    assert!(forked.clones.iter().all(|(vm, _)| vm.worker_id == Some(one.id)));
}

pub(crate) async fn a_templates_vms_go_to_who_has_its_folder(store: &impl Store) {
    let shared = |host: &str, folder: &str| NewWorker {
        template_folder: Some(folder.into()),
        ..new_worker(host)
    };
    let one = store.register_worker(shared("one", "/shared")).await.unwrap();
    let (accepted, template) = build(store, "web").await;
    assert_eq!(accepted.vm.worker_id, Some(one.id));
    begin_as(store, &one, &accepted.task, 1).await;
    store.end_attempt(accepted.task.id, 1, template_made("d1")).await.unwrap();
    store.drain_worker(one.id).await.unwrap();
    store.register_worker(shared("other", "/elsewhere")).await.unwrap();
    let spec = VmSpec { origin: Origin::Template(template.id), ..spec() };
    let made = create_of(store, "a", spec.clone()).await;
    assert_eq!(made.vm.worker_id, None, "the other has no such template, and cannot make it");
    let three = store.register_worker(shared("three", "/shared")).await.unwrap();
    assert_eq!(store.place_waiting(10).await.unwrap(), 1);
    let placed = store.vm(made.vm.id).await.unwrap().unwrap();
    assert_eq!(placed.worker_id, Some(three.id));
}
