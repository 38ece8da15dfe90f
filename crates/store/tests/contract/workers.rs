//! The registry of workers, and what becomes of the VMs of one that is lost.

use std::time::Duration;

use aether_store::{Begin, NewWorker, Registration, Store, StoreError, VmChange, VmPatch};
use aether_types::{
    DriverKind, ErrorCode, ExecutionState, Fault, Presence, Task, TaskKind, TaskState, VmEvent,
    VmId, VmState, Worker, WorkerCapacity, WorkerDriver, WorkerId, WorkerState,
};

use crate::capacity::all;
use crate::support::{completed, create, execute, exited, request, snapshot, suspend};

pub(crate) fn new_worker(host: &str) -> NewWorker {
    let driver = WorkerDriver {
        kind: DriverKind::Sim,
        version: "1".into(),
        accelerated: false,
        isolation: "none".into(),
        takes_snapshots: true,
    };
    NewWorker {
        id: WorkerId::new(),
        host: host.into(),
        zone: Some("a".into()),
        labels: [("disk".to_owned(), "fast".to_owned())].into(),
        drivers: vec![driver],
        capacity: WorkerCapacity {
            processors: 4,
            host_memory_mb: 8192,
            ..WorkerCapacity::default()
        },
        template_folder: None,
        stream_address: Some("host:8443".into()),
        version: "1.0.0".into(),
        lease: Duration::from_mins(1),
    }
}

pub(crate) async fn worker(store: &impl Store, host: &str) -> Worker {
    store.register_worker(new_worker(host)).await.unwrap()
}

/// One whose lease is over as soon as it has begun.
async fn short(store: &impl Store, host: &str) -> Worker {
    let new = NewWorker { lease: Duration::ZERO, ..new_worker(host) };
    store.register_worker(new).await.unwrap()
}

pub(crate) async fn lose(store: &impl Store, worker: &Worker) {
    let lost = store.lose_worker(worker.into(), worker.heartbeat_at).await.unwrap();
    assert_eq!(lost.unwrap().state(), WorkerState::Lost);
}

/// Every VM of a lost worker that has something to settle, settled.
async fn settle(store: &impl Store) -> Vec<aether_store::Orphan> {
    let mut settled = Vec::new();
    for vm in store.orphans(100).await.unwrap() {
        settled.extend(store.settle_orphan(vm).await.unwrap());
    }
    assert_eq!(store.orphans(100).await.unwrap(), [], "what is settled is settled");
    settled
}

pub(crate) async fn begin_as(store: &impl Store, by: &Worker, task: &Task, epoch: i64) -> Task {
    match store.begin_attempt(task.id, by.into(), epoch).await.unwrap() {
        Begin::Go(task) => task,
        other => panic!("the attempt does not go on: {other:?}"),
    }
}

/// A VM that runs on the worker, which is the only one that takes VMs.
pub(crate) async fn running_on(store: &impl Store, worker: &Worker, name: &str) -> VmId {
    let made = create(store, name).await;
    assert_eq!(made.vm.worker_id, Some(worker.id));
    begin_as(store, worker, &made.task, 1).await;
    let end = completed(Some(VmEvent::Started));
    store.end_attempt(made.task.id, 1, end).await.unwrap();
    made.vm.id
}

async fn state(store: &impl Store, vm: VmId) -> VmState {
    store.vm(vm).await.unwrap().unwrap().state
}

async fn task(store: &impl Store, task: &Task) -> Task {
    store.task(task.id).await.unwrap().unwrap()
}

pub(crate) async fn a_worker_registers_again_and_again(store: &impl Store) {
    let new = new_worker("one");
    let first = store.register_worker(new.clone()).await.unwrap();
    assert_eq!((first.epoch, first.state()), (1, WorkerState::Active));
    assert_eq!(first.lease_ms, 60_000);
    let other = NewWorker { host: "renamed".into(), zone: None, stream_address: None, ..new };
    let second = store.register_worker(other).await.unwrap();
    assert_eq!((second.id, second.epoch, second.host.as_str()), (first.id, 2, "renamed"));
    let (read, load) = store.worker(first.id).await.unwrap().unwrap();
    assert_eq!((read, load.vms), (second.clone(), 0));
    assert_eq!(store.workers().await.unwrap().len(), 1);
    assert_eq!(store.worker(WorkerId::new()).await.unwrap(), None);
    // Only the last registration has a say.
    let late = store.heartbeat(Registration::from(&first)).await;
    assert!(matches!(late, Err(StoreError::Fenced)));
    let late = store.leave(Registration::from(&first)).await;
    assert!(matches!(late, Err(StoreError::Fenced)));
    let beaten = store.heartbeat(Registration::from(&second)).await.unwrap();
    assert!(beaten.heartbeat_at >= second.heartbeat_at);
    let left = store.leave(Registration::from(&second)).await.unwrap();
    assert_eq!(left.state(), WorkerState::Left);
    let late = store.heartbeat(Registration::from(&second)).await;
    assert!(matches!(late, Err(StoreError::Fenced)), "who has left is not there");
}

pub(crate) async fn a_worker_that_drains_does_so_until_it_is_told_otherwise(store: &impl Store) {
    let new = new_worker("one");
    let one = store.register_worker(new.clone()).await.unwrap();
    for _ in 0..2 {
        let drained = store.drain_worker(one.id).await.unwrap();
        assert_eq!((drained.state(), drained.epoch), (WorkerState::Draining, 1));
    }
    store.leave((&one).into()).await.unwrap();
    let again = store.register_worker(new).await.unwrap();
    assert_eq!(again.state(), WorkerState::Draining);
    assert_eq!(store.activate_worker(one.id).await.unwrap().state(), WorkerState::Active);
    let unknown = WorkerId::new();
    for refused in [store.drain_worker(unknown).await, store.activate_worker(unknown).await] {
        assert_eq!(refused.unwrap_err().code(), ErrorCode::WorkerNotFound);
    }
}

pub(crate) async fn a_worker_is_lost_once_and_only_by_its_last_heartbeat(store: &impl Store) {
    let living = worker(store, "living").await;
    let none = store.lose_worker((&living).into(), living.heartbeat_at).await.unwrap();
    assert_eq!(none, None, "its lease is not over");
    let one = short(store, "one").await;
    // The clock has passed on, so that this is another heartbeat than the first.
    let beaten = loop {
        let beaten = store.heartbeat((&one).into()).await.unwrap();
        if beaten.heartbeat_at > one.heartbeat_at {
            break beaten;
        }
    };
    let none = store.lose_worker((&one).into(), one.heartbeat_at).await.unwrap();
    assert_eq!(none, None, "there was a heartbeat since");
    let seen = Registration::from(&beaten);
    let watchers = (0..8).map(|_| async {
        let lost = store.lose_worker(seen, beaten.heartbeat_at).await.unwrap();
        lost.is_some_and(|lost| lost.state() == WorkerState::Lost)
    });
    let lost = all(watchers.map(Box::pin).collect()).await;
    assert_eq!(lost.iter().filter(|lost| **lost).count(), 1, "one is faster than the others");
    let late = store.heartbeat((&one).into()).await;
    assert!(matches!(late, Err(StoreError::Fenced)));
    let late = store.leave((&one).into()).await;
    assert!(matches!(late, Err(StoreError::Fenced)));
}

pub(crate) async fn what_a_lost_worker_writes_changes_nothing(store: &impl Store) {
    let new = NewWorker { lease: Duration::ZERO, ..new_worker("one") };
    let one = store.register_worker(new.clone()).await.unwrap();
    let vm = running_on(store, &one, "a").await;
    let (run, execution) = execute(store, vm).await;
    let (waiting, _) = execute(store, vm).await;
    begin_as(store, &one, &run, 1).await;
    store.execution_started(run.id, 1, execution.id, "boot").await.unwrap();
    lose(store, &one).await;
    let begun = store.begin_attempt(waiting.id, (&one).into(), 2).await.unwrap();
    assert!(matches!(begun, Begin::Fenced), "{begun:?}");
    let panic = || VmChange { event: VmEvent::Failed, reason: None, patch: VmPatch::default() };
    let refused = store.change_vm(vm, Some((&one).into()), panic()).await;
    assert!(matches!(refused, Err(StoreError::Fenced)));
    // From the moment that it is lost, whether or not its VMs are settled by then.
    nothing_counts(store, &run, 1).await;
    settle(store).await;
    assert_eq!(state(store, vm).await, VmState::Failed);
    nothing_counts(store, &run, 1).await;
    let ended = store.execution(execution.id).await.unwrap().unwrap();
    assert_eq!(ended.state, ExecutionState::Failed);
    assert_eq!(ended.error.unwrap().code, ErrorCode::ExecutionLost);
    // When it is back, what it was before has no say still.
    let back = store.register_worker(new).await.unwrap();
    assert_eq!((back.epoch, back.standing.presence), (2, Presence::Present));
    let made = create(store, "b").await;
    let begun = store.begin_attempt(made.task.id, (&one).into(), 5).await.unwrap();
    assert!(matches!(begun, Begin::Fenced), "{begun:?}");
    begin_as(store, &back, &made.task, 6).await;
    let refused = store.change_vm(made.vm.id, Some((&one).into()), panic()).await;
    assert!(matches!(refused, Err(StoreError::Fenced)));
    store.change_vm(made.vm.id, Some((&back).into()), panic()).await.unwrap();
}

/// Whatever the attempt says.
async fn nothing_counts(store: &impl Store, task: &Task, epoch: i64) {
    let before = store.task(task.id).await.unwrap();
    let execution = task.execution_id.unwrap();
    let fault = || Fault::new(ErrorCode::Internal, "a try");
    for said in [
        store.end_attempt(task.id, epoch, exited(0)).await.map(drop),
        store.retry_attempt(task.id, epoch, fault(), exited(1)).await.map(drop),
        store.task_progress(task.id, epoch, "now".into(), String::new()).await.map(drop),
        store.execution_started(task.id, epoch, execution, "boot").await,
    ] {
        assert!(matches!(said, Err(StoreError::Fenced)), "{said:?}");
    }
    assert_eq!(store.task(task.id).await.unwrap(), before);
}

pub(crate) async fn what_a_worker_said_before_it_registered_anew_does_not_count(
    store: &impl Store,
) {
    let new = new_worker("one");
    let one = store.register_worker(new.clone()).await.unwrap();
    let vm = running_on(store, &one, "a").await;
    let (run, execution) = execute(store, vm).await;
    begin_as(store, &one, &run, 1).await;
    store.execution_started(run.id, 1, execution.id, "boot").await.unwrap();
    let anew = store.register_worker(new).await.unwrap();
    nothing_counts(store, &run, 1).await;
    begin_as(store, &anew, &run, 2).await;
    store.execution_started(run.id, 2, execution.id, "boot").await.unwrap();
    nothing_counts(store, &run, 1).await;
    store.end_attempt(run.id, 2, exited(0)).await.unwrap();
    assert_eq!(task(store, &run).await.state, TaskState::Completed);
}

pub(crate) async fn the_vms_of_a_lost_worker_fail_and_its_tasks_end_once(store: &impl Store) {
    let one = short(store, "one").await;
    let runs = running_on(store, &one, "runs").await;
    let (command, _) = execute(store, runs).await;
    begin_as(store, &one, &command, 1).await;
    let (waits, _) = execute(store, runs).await;
    let (taken, shot) = snapshot(store, runs).await;
    let stops = running_on(store, &one, "stops").await;
    let stop = request(store, stops, TaskKind::VmStop).await;
    begin_as(store, &one, &stop.task, 1).await;
    let stopped = running_on(store, &one, "stopped").await;
    let (suspension, _) = suspend(store, stopped).await;
    begin_as(store, &one, &suspension.task, 1).await;
    store
        .end_attempt(suspension.task.id, 1, crate::support::made(Some(VmEvent::Stopped)))
        .await
        .unwrap();
    assert_eq!(store.orphans(100).await.unwrap(), []);
    lose(store, &one).await;
    let settled = settle(store).await;
    assert_eq!(settled.len(), 2, "a VM that is stopped lacks nothing but its worker");
    for vm in [runs, stops] {
        let vm = store.vm(vm).await.unwrap().unwrap();
        assert_eq!((vm.state, vm.worker_id), (VmState::Failed, Some(one.id)));
        let reason = vm.reason.unwrap();
        assert_eq!(reason.code, ErrorCode::WorkerLost);
        assert!(reason.message.contains("on one does not answer"), "{}", reason.message);
    }
    for ended in [&command, &waits, &taken.task, &stop.task] {
        let ended = task(store, ended).await;
        assert_eq!(ended.state, TaskState::Failed);
        assert_eq!(ended.error.unwrap().code, ErrorCode::WorkerLost);
    }
    let shot = store.snapshot(shot.id).await.unwrap().unwrap();
    assert_eq!(shot.state, aether_types::SnapshotState::Failed);
    assert_eq!(store.open_tasks().await.unwrap(), []);
    let kept = store.vm(stopped).await.unwrap().unwrap();
    assert!(kept.state == VmState::Stopped && kept.memory.is_some());
    // Its disk is on the worker: nobody else can start it.
    let refused = store.request_on_vm(stopped, crate::support::new_task(TaskKind::VmStart), None);
    let refused = refused.await.unwrap_err();
    assert_eq!(refused.code(), ErrorCode::VmStateConflict);
    assert!(refused.to_string().contains("worker that has its disk is lost"), "{refused}");
    assert!(store.settle_orphan(runs).await.unwrap().is_none(), "it is settled");
}

pub(crate) async fn a_lost_workers_creations_go_to_another(store: &impl Store) {
    let one = short(store, "one").await;
    let begun = create(store, "begun").await;
    begin_as(store, &one, &begun.task, 1).await;
    let (early, _) = execute(store, begun.vm.id).await;
    begin_as(store, &one, &early, 1).await;
    let pending = create(store, "pending").await;
    store.confirm_dispatched(&[begun.task.id, early.id, pending.task.id]).await.unwrap();
    let two = worker(store, "two").await;
    lose(store, &one).await;
    let settled = settle(store).await;
    assert!(settled.len() == 2 && settled.iter().all(|orphan| orphan.goes_on));
    let now = task(store, &begun.task).await;
    assert_eq!((now.state, now.attempts), (TaskState::Pending, 1));
    assert_eq!(now.error.unwrap().code, ErrorCode::WorkerLost);
    assert_eq!(store.undispatched(10).await.unwrap(), [], "they wait for a worker");
    assert_eq!(store.place_waiting(10).await.unwrap(), 2);
    assert_eq!(store.undispatched(10).await.unwrap().len(), 3);
    for vm in [begun.vm.id, pending.vm.id] {
        assert_eq!(store.vm(vm).await.unwrap().unwrap().worker_id, Some(two.id));
    }
    let late = store.end_attempt(begun.task.id, 1, completed(Some(VmEvent::Started))).await;
    assert!(matches!(late, Err(StoreError::Fenced)));
    begin_as(store, &two, &begun.task, 2).await;
    begin_as(store, &two, &early, 2).await;
}

pub(crate) async fn a_creation_with_used_up_attempts_is_not_tried_elsewhere(store: &impl Store) {
    let one = short(store, "one").await;
    let made = create(store, "a").await;
    for epoch in 1..=3 {
        begin_as(store, &one, &made.task, epoch).await;
    }
    lose(store, &one).await;
    let settled = settle(store).await;
    assert!(!settled[0].goes_on);
    assert_eq!(settled[0].ended.len(), 1);
    assert_eq!(state(store, made.vm.id).await, VmState::Failed);
}

pub(crate) async fn a_vm_of_a_lost_worker_can_be_deleted_by_any(store: &impl Store) {
    let one = short(store, "one").await;
    let (before, after) = (running_on(store, &one, "a").await, running_on(store, &one, "b").await);
    let early = request(store, before, TaskKind::VmDelete).await;
    begin_as(store, &one, &early.task, 1).await;
    lose(store, &one).await;
    settle(store).await;
    let late = request(store, after, TaskKind::VmDelete).await;
    assert_eq!(late.vm.worker_id, None);
    let two = worker(store, "two").await;
    for (vm, deletion) in [(before, early.task), (after, late.task)] {
        assert_eq!(state(store, vm).await, VmState::Deleting);
        begin_as(store, &two, &deletion, 2).await;
        let end = completed(Some(VmEvent::Deleted));
        store.end_attempt(deletion.id, 2, end).await.unwrap();
        assert_eq!(state(store, vm).await, VmState::Deleted);
    }
}

pub(crate) async fn a_worker_that_is_back_keeps_what_was_not_settled(store: &impl Store) {
    let new = NewWorker { lease: Duration::ZERO, ..new_worker("one") };
    let one = store.register_worker(new.clone()).await.unwrap();
    let vm = running_on(store, &one, "a").await;
    lose(store, &one).await;
    store.register_worker(new).await.unwrap();
    assert!(store.settle_orphan(vm).await.unwrap().is_none());
    assert_eq!(state(store, vm).await, VmState::Running);
}
