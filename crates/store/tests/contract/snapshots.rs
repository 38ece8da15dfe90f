//! Snapshots: of users, of forks, of suspended VMs.

use aether_store::{
    AttemptEnd, Begin, CancelOutcome, Capacity, NewSnapshot, PageRequest, SnapshotFilter, Store,
    StoreError, VmChange, VmPatch,
};
use aether_types::{
    ErrorCode, Origin, ProjectId, Snapshot, SnapshotId, SnapshotPurpose, SnapshotState, StartKind,
    StartPhase, StartReport, Task, TaskKind, TaskState, VmEvent, VmId, VmState, WorkerId,
};

use crate::support::{
    begin, carry_out, clones, completed, create, execute, failed, fault, fork, key, made,
    new_snapshot, new_task, new_vm, request, running, sealed, snapshot, snapshot_now, suspend,
};

/// Begins and ends the task of a snapshot well.
async fn make(store: &impl Store, task: &Task, event: Option<VmEvent>) {
    begin(store, task.id, task.epoch + 1).await;
    store.end_attempt(task.id, task.epoch + 1, made(event)).await.unwrap();
}

/// A VM that is stopped with its memory kept.
async fn suspended(store: &impl Store, name: &str) -> (VmId, SnapshotId) {
    let vm = running(store, name).await;
    let (asked, memory) = suspend(store, vm).await;
    make(store, &asked.task, Some(VmEvent::Stopped)).await;
    (vm, memory.id)
}

async fn memory_of(store: &impl Store, vm: VmId) -> Option<SnapshotId> {
    store.vm(vm).await.unwrap().unwrap().memory
}

async fn retired(store: &impl Store) -> Vec<SnapshotId> {
    store.retire_snapshots().await.unwrap().iter().map(|s| s.id).collect()
}

pub(crate) async fn a_snapshot_and_its_task_are_recorded_and_owed(store: &impl Store) {
    let vm = running(store, "a").await;
    let before = store.vm(vm).await.unwrap().unwrap();
    let (asked, snapshot) = snapshot(store, vm).await;
    assert_eq!(store.snapshot(snapshot.id).await.unwrap(), Some(snapshot.clone()));
    assert_eq!(store.task(asked.task.id).await.unwrap(), Some(asked.task.clone()));
    assert_eq!(asked.task.snapshot_id, Some(snapshot.id));
    assert_eq!(store.undispatched(10).await.unwrap(), std::slice::from_ref(&asked.task));
    assert_eq!(store.vm(vm).await.unwrap(), Some(before.clone()), "the VM is as it was");
    let spec = &before.spec;
    let expected = Snapshot {
        id: snapshot.id,
        project_id: ProjectId::DEFAULT,
        name: None,
        purpose: SnapshotPurpose::User,
        state: SnapshotState::Creating,
        reason: None,
        vm_id: vm,
        worker_id: None,
        driver: spec.driver,
        image: spec.image.clone(),
        vcpus: spec.vcpus,
        memory_mb: spec.memory_mb,
        disk_mb: spec.disk_mb,
        size_bytes: None,
        digest: None,
        paused_us: None,
        created_at: snapshot.created_at,
        updated_at: snapshot.created_at,
    };
    assert_eq!(snapshot, expected);

    let task = begin(store, asked.task.id, 1).await;
    store.end_attempt(task.id, 1, made(None)).await.unwrap();
    let ready = snapshot_now(store, snapshot.id).await;
    let facts = sealed();
    assert_eq!(ready.state, SnapshotState::Ready);
    assert_eq!(ready.worker_id, task.worker_id);
    assert_eq!(ready.size_bytes, Some(facts.size_bytes));
    assert_eq!((ready.digest, ready.paused_us), (Some(facts.digest), Some(facts.paused_us)));
    assert_eq!(retired(store).await, [], "a user's snapshot stays");
}

pub(crate) async fn a_snapshot_is_refused_unless_the_vm_runs_or_is_paused(store: &impl Store) {
    let refused = async |vm: VmId, kind: TaskKind, purpose: SnapshotPurpose| {
        let new = new_snapshot(purpose);
        let id = new.id;
        let refused = store.request_snapshot(vm, new, new_task(kind), None).await.unwrap_err();
        assert_eq!(store.snapshot(id).await.unwrap(), None);
        refused
    };
    let user = (TaskKind::VmSnapshot, SnapshotPurpose::User);
    let memory = (TaskKind::VmSuspend, SnapshotPurpose::Memory);
    let young = create(store, "young").await.vm.id;
    let text = refused(young, user.0, user.1).await.to_string();
    assert_eq!(text, "VM `young` is creating; it cannot have a snapshot taken");
    let text = refused(young, memory.0, memory.1).await.to_string();
    assert_eq!(text, "VM `young` is creating; it cannot be stopped");
    let fork = (new_snapshot(SnapshotPurpose::Fork), new_task(TaskKind::VmSnapshot));
    let fork = store.fork_vm(young, fork.0, fork.1, Vec::new(), Capacity::default(), None).await;
    let text = fork.unwrap_err().to_string();
    assert_eq!(text, "VM `young` is creating; it cannot be forked");
    assert!(matches!(refused(VmId::new(), user.0, user.1).await, StoreError::VmNotFound));

    let vm = running(store, "a").await;
    let pause = request(store, vm, TaskKind::VmPause).await;
    carry_out(store, &pause.task, Some(VmEvent::PauseDone)).await;
    snapshot(store, vm).await;
    suspend(store, vm).await;
    assert_eq!(refused(vm, user.0, user.1).await.code(), ErrorCode::VmStateConflict);
    assert_eq!(refused(vm, memory.0, memory.1).await.code(), ErrorCode::VmStateConflict);
    // The caller's defects.
    for (kind, purpose) in [
        (TaskKind::VmSnapshot, SnapshotPurpose::Memory),
        (TaskKind::VmSuspend, SnapshotPurpose::User),
        (TaskKind::VmSnapshot, SnapshotPurpose::Fork),
        (TaskKind::VmStop, SnapshotPurpose::User),
    ] {
        assert!(matches!(refused(vm, kind, purpose).await, StoreError::WrongKind { .. }));
    }
    for kind in [TaskKind::VmSnapshot, TaskKind::VmSuspend, TaskKind::TemplateBuild] {
        let refused = store.request_on_vm(vm, new_task(kind), None).await;
        assert!(matches!(refused, Err(StoreError::WrongKind { .. })));
    }
}

pub(crate) async fn a_snapshots_name_is_free_again_when_it_failed_or_is_deleted(
    store: &impl Store,
) {
    let vm = running(store, "a").await;
    let ask = async || {
        let new = NewSnapshot { name: Some("s".into()), ..new_snapshot(SnapshotPurpose::User) };
        store.request_snapshot(vm, new, new_task(TaskKind::VmSnapshot), None).await
    };
    let (first, one) = ask().await.unwrap();
    assert_eq!(store.snapshot_by_name(ProjectId::DEFAULT, "s").await.unwrap(), Some(one.clone()));
    assert!(matches!(ask().await, Err(StoreError::NameTaken { name }) if name == "s"));
    begin(store, first.task.id, 1).await;
    store.end_attempt(first.task.id, 1, failed(ErrorCode::Internal, None)).await.unwrap();
    let (second, two) = ask().await.unwrap();
    assert_eq!(snapshot_now(store, one.id).await.state, SnapshotState::Deleted);
    make(store, &second.task, None).await;
    assert!(matches!(ask().await, Err(StoreError::NameTaken { .. })));
    assert_eq!(store.delete_snapshot(two.id).await.unwrap().state, SnapshotState::Deleted);
    assert_eq!(store.snapshot_by_name(ProjectId::DEFAULT, "s").await.unwrap(), None);
    ask().await.unwrap();
}

pub(crate) async fn a_repeated_snapshot_or_fork_is_answered_with_the_first(store: &impl Store) {
    let vm = running(store, "a").await;
    let ask = async |digest| {
        let new = new_snapshot(SnapshotPurpose::User);
        let task = new_task(TaskKind::VmSnapshot);
        store.request_snapshot(vm, new, task, Some(key("s", digest))).await
    };
    let (first, one) = ask(1).await.unwrap();
    make(store, &first.task, None).await;
    let (second, again) = ask(1).await.unwrap();
    assert!(second.repeated && !first.repeated);
    assert_eq!((again.id, again.state), (one.id, SnapshotState::Ready), "as things are now");
    assert!(matches!(ask(2).await, Err(StoreError::IdempotencyConflict)));

    let ask = async |digest| {
        let new = new_snapshot(SnapshotPurpose::Fork);
        let clones = clones(&["c0".into(), "c1".into(), "c2".into()]);
        let (task, key) = (new_task(TaskKind::VmSnapshot), Some(key("f", digest)));
        store.fork_vm(vm, new, task, clones, Capacity::default(), key).await
    };
    let first = ask(1).await.unwrap();
    let again = ask(1).await.unwrap();
    assert!(again.accepted.repeated && !first.accepted.repeated);
    assert_eq!((again.snapshot, again.clones), (first.snapshot, first.clones));
    assert!(matches!(ask(2).await, Err(StoreError::IdempotencyConflict)));
}

pub(crate) async fn a_fork_records_its_snapshot_and_clones_whole_or_not_at_all(store: &impl Store) {
    let vm = running(store, "a").await;
    let forked = fork(store, vm, &["c0".into(), "c1".into()]).await;
    assert_eq!(forked.snapshot.purpose, SnapshotPurpose::Fork);
    assert_eq!(forked.accepted.task.snapshot_id, Some(forked.snapshot.id));
    for ((clone, task), name) in forked.clones.iter().zip(["c0", "c1"]) {
        assert_eq!((clone.name.as_str(), clone.state), (name, VmState::Creating));
        assert_eq!(clone.spec.origin, Origin::Snapshot(forked.snapshot.id));
        assert_eq!(store.vm(clone.id).await.unwrap().as_ref(), Some(clone));
        assert_eq!(store.task(task.id).await.unwrap().as_ref(), Some(task));
    }
    assert_eq!(store.undispatched(10).await.unwrap().len(), 3);

    let new = new_snapshot(SnapshotPurpose::Fork);
    let (id, task) = (new.id, new_task(TaskKind::VmSnapshot));
    let (task_id, clones) = (task.id, clones(&["d0".into(), "c1".into()]));
    let first = clones[0].0.id;
    let refused = store.fork_vm(vm, new, task, clones, Capacity::default(), None).await;
    assert!(matches!(refused, Err(StoreError::NameTaken { name }) if name == "c1"));
    assert_eq!(store.snapshot(id).await.unwrap(), None);
    assert_eq!(store.task(task_id).await.unwrap(), None);
    assert_eq!(store.vm(first).await.unwrap(), None);
}

pub(crate) async fn a_snapshot_fails_with_its_task(store: &impl Store) {
    let vm = running(store, "a").await;
    let (asked, one) = snapshot(store, vm).await;
    begin(store, asked.task.id, 1).await;
    store.end_attempt(asked.task.id, 1, failed(ErrorCode::Internal, None)).await.unwrap();
    let one = snapshot_now(store, one.id).await;
    assert_eq!(one.state, SnapshotState::Failed);
    assert_eq!(one.reason, Some(fault(ErrorCode::Internal)));

    // A task that went well without a snapshot, and one that failed with one.
    let (asked, two) = snapshot(store, vm).await;
    begin(store, asked.task.id, 1).await;
    store.end_attempt(asked.task.id, 1, completed(None)).await.unwrap();
    let two = snapshot_now(store, two.id).await;
    assert_eq!((two.state, two.reason.unwrap().code), (SnapshotState::Failed, ErrorCode::Internal));
    let (asked, three) = snapshot(store, vm).await;
    begin(store, asked.task.id, 1).await;
    let end = AttemptEnd { snapshot: Some(sealed()), ..failed(ErrorCode::Unavailable, None) };
    store.end_attempt(asked.task.id, 1, end).await.unwrap();
    assert_eq!(snapshot_now(store, three.id).await.state, SnapshotState::Failed);

    let gone = store.retire_snapshots().await.unwrap();
    assert_eq!(gone.len(), 3);
    assert!(gone.iter().all(|s| s.state == SnapshotState::Deleted && s.reason.is_some()));
    assert_eq!(store.vm(vm).await.unwrap().unwrap().state, VmState::Running);
}

pub(crate) async fn what_a_late_attempt_says_of_a_snapshot_does_not_count(store: &impl Store) {
    let vm = running(store, "a").await;
    let (asked, one) = snapshot(store, vm).await;
    begin(store, asked.task.id, 1).await;
    let second = begin(store, asked.task.id, 2).await;
    let late = store.end_attempt(asked.task.id, 1, made(None)).await;
    assert!(matches!(late, Err(StoreError::Fenced)));
    assert_eq!(snapshot_now(store, one.id).await.state, SnapshotState::Creating);
    // Given back, it is still being made.
    let otherwise = failed(ErrorCode::Unavailable, None);
    let again = store.retry_attempt(second.id, 2, fault(ErrorCode::Unavailable), otherwise).await;
    assert_eq!(again.unwrap().snapshot_id, Some(one.id));
    assert_eq!(snapshot_now(store, one.id).await.state, SnapshotState::Creating);
    begin(store, asked.task.id, 3).await;
    assert!(matches!(
        store.begin_attempt(asked.task.id, WorkerId::new().into(), 4).await.unwrap(),
        Begin::Ended(task) if task.state == TaskState::Failed
    ));
    let one = snapshot_now(store, one.id).await;
    assert_eq!(one.reason.unwrap().code, ErrorCode::AttemptsExhausted);
    assert_eq!(store.vm(vm).await.unwrap().unwrap().state, VmState::Running);
}

pub(crate) async fn a_snapshot_can_be_cancelled_and_a_suspension_cannot(store: &impl Store) {
    let vm = running(store, "a").await;
    let (asked, one) = snapshot(store, vm).await;
    let cancelled = store.cancel_task(asked.task.id).await.unwrap();
    assert!(matches!(cancelled, CancelOutcome::Cancelled(t) if t.state == TaskState::Cancelled));
    let one = snapshot_now(store, one.id).await;
    assert_eq!(
        (one.state, one.reason.unwrap().code),
        (SnapshotState::Failed, ErrorCode::Cancelled)
    );
    assert_eq!(store.vm(vm).await.unwrap().unwrap().state, VmState::Running);

    let (asked, two) = snapshot(store, vm).await;
    begin(store, asked.task.id, 1).await;
    let cancelled = store.cancel_task(asked.task.id).await.unwrap();
    assert!(matches!(cancelled, CancelOutcome::Requested(t) if t.cancel_requested));
    assert_eq!(snapshot_now(store, two.id).await.state, SnapshotState::Creating);
    let otherwise = AttemptEnd { snapshot: Some(sealed()), ..completed(None) };
    let fault = fault(ErrorCode::Unavailable);
    store.retry_attempt(asked.task.id, 1, fault, otherwise).await.unwrap();
    let two = snapshot_now(store, two.id).await;
    assert_eq!(two.reason.unwrap().code, ErrorCode::Cancelled);

    let (asked, _) = suspend(store, vm).await;
    let refused = store.cancel_task(asked.task.id).await.unwrap_err();
    assert_eq!(refused.to_string(), "a vm:suspend task cannot be cancelled");
}

pub(crate) async fn a_suspension_stops_the_vm_and_ends_pending_work(store: &impl Store) {
    let vm = running(store, "a").await;
    let (waiting, execution) = execute(store, vm).await;
    let (picture, one) = snapshot(store, vm).await;
    let (asked, memory) = suspend(store, vm).await;
    assert_eq!(asked.vm.state, VmState::Stopping);
    let ended: Vec<_> = asked.cancelled.iter().map(|t| t.id).collect();
    assert_eq!(ended.len(), 2);
    assert!(ended.contains(&waiting.id) && ended.contains(&picture.task.id));
    let execution = store.execution(execution.id).await.unwrap().unwrap();
    assert_eq!(execution.error.unwrap().code, ErrorCode::VmStopped);
    let one = snapshot_now(store, one.id).await;
    assert_eq!(
        (one.state, one.reason.unwrap().code),
        (SnapshotState::Failed, ErrorCode::VmStopped)
    );

    make(store, &asked.task, Some(VmEvent::Stopped)).await;
    let stopped = store.vm(vm).await.unwrap().unwrap();
    assert_eq!((stopped.state, stopped.memory), (VmState::Stopped, Some(memory.id)));
    let gone = retired(store).await;
    assert_eq!(gone, [one.id], "the memory stays");
}

pub(crate) async fn a_start_uses_up_the_memory_however_it_ends(store: &impl Store) {
    let (vm, memory) = suspended(store, "a").await;
    let start = request(store, vm, TaskKind::VmStart).await;
    assert_eq!((start.vm.state, start.vm.memory), (VmState::Starting, Some(memory)));
    assert_eq!(retired(store).await, []);
    let report = StartReport::new(
        StartKind::Restore,
        vec![StartPhase { name: "restore".into(), us: 47_000 }],
        None,
    );
    let patch = VmPatch { start: Some(report.clone()), ..VmPatch::default() };
    let change = VmChange { event: VmEvent::Started, reason: None, patch };
    begin(store, start.task.id, 1).await;
    let end = AttemptEnd { vm: Some(change), ..completed(None) };
    store.end_attempt(start.task.id, 1, end).await.unwrap();
    let now = store.vm(vm).await.unwrap().unwrap();
    assert_eq!((now.state, now.memory, now.start), (VmState::Running, None, Some(report)));
    assert_eq!(retired(store).await, [memory]);

    // One that fails, and one whose attempts are used up.
    let (vm, memory) = suspended(store, "b").await;
    let start = request(store, vm, TaskKind::VmStart).await;
    begin(store, start.task.id, 1).await;
    let end = failed(ErrorCode::SnapshotDamaged, Some(VmEvent::Failed));
    store.end_attempt(start.task.id, 1, end).await.unwrap();
    assert_eq!(memory_of(store, vm).await, None);
    assert_eq!(retired(store).await, [memory]);
    let (vm, _) = suspended(store, "c").await;
    let start = request(store, vm, TaskKind::VmStart).await;
    for epoch in 1..=3 {
        begin(store, start.task.id, epoch).await;
        assert!(memory_of(store, vm).await.is_some(), "another attempt may use it");
    }
    store.begin_attempt(start.task.id, WorkerId::new().into(), 4).await.unwrap();
    assert_eq!(memory_of(store, vm).await, None);
    // One that says nothing about the VM.
    let (vm, _) = suspended(store, "d").await;
    let start = request(store, vm, TaskKind::VmStart).await;
    begin(store, start.task.id, 1).await;
    store.end_attempt(start.task.id, 1, failed(ErrorCode::Internal, None)).await.unwrap();
    assert_eq!(memory_of(store, vm).await, None);
}

pub(crate) async fn a_suspended_vm_that_was_found_stopped_has_its_memory(store: &impl Store) {
    let stop = || VmChange { event: VmEvent::Stopped, reason: None, patch: VmPatch::default() };
    let vm = running(store, "a").await;
    let (asked, memory) = suspend(store, vm).await;
    begin(store, asked.task.id, 1).await;
    store.change_vm(vm, None, stop()).await.unwrap();
    store.end_attempt(asked.task.id, 1, made(Some(VmEvent::Stopped))).await.unwrap();
    assert_eq!(memory_of(store, vm).await, Some(memory.id));

    // Not where it is on its way elsewhere by then.
    let vm = running(store, "b").await;
    let (asked, memory) = suspend(store, vm).await;
    begin(store, asked.task.id, 1).await;
    store.change_vm(vm, None, stop()).await.unwrap();
    request(store, vm, TaskKind::VmStart).await;
    store.end_attempt(asked.task.id, 1, made(Some(VmEvent::Stopped))).await.unwrap();
    assert_eq!(memory_of(store, vm).await, None);
    assert_eq!(retired(store).await, [memory.id]);
}

pub(crate) async fn a_deletion_ends_snapshots_and_gives_up_the_memory(store: &impl Store) {
    let (vm, memory) = suspended(store, "a").await;
    request(store, vm, TaskKind::VmDelete).await;
    assert_eq!(memory_of(store, vm).await, None);
    assert_eq!(retired(store).await, [memory]);

    let vm = running(store, "b").await;
    let (running_one, one) = snapshot(store, vm).await;
    begin(store, running_one.task.id, 1).await;
    let (pending, two) = snapshot(store, vm).await;
    let (suspension, three) = suspend(store, vm).await;
    let deletion = request(store, vm, TaskKind::VmDelete).await;
    let ended: Vec<_> = deletion.cancelled.iter().map(|t| (t.id, t.state)).collect();
    assert_eq!(ended, [(suspension.task.id, TaskState::Cancelled)]);
    let two_task = store.task(pending.task.id).await.unwrap().unwrap();
    assert_eq!(two_task.state, TaskState::Failed, "the suspension ended it");
    for id in [two.id, three.id] {
        let snapshot = snapshot_now(store, id).await;
        assert_eq!(snapshot.state, SnapshotState::Failed);
        assert_eq!(snapshot.reason.unwrap().code, ErrorCode::VmStopped);
    }
    assert_eq!(snapshot_now(store, one.id).await.state, SnapshotState::Creating);
    let asked = store.task(running_one.task.id).await.unwrap().unwrap();
    assert!(asked.cancel_requested);
    // It was quick enough: a snapshot outlives its VM.
    store.end_attempt(running_one.task.id, 1, made(None)).await.unwrap();
    carry_out(store, &deletion.task, Some(VmEvent::Deleted)).await;
    assert_eq!(snapshot_now(store, one.id).await.state, SnapshotState::Ready);
}

pub(crate) async fn only_a_users_snapshot_that_nothing_begins_as_is_deleted(store: &impl Store) {
    let delete = async |id| store.delete_snapshot(id).await;
    let detail = async |id| match store.delete_snapshot(id).await {
        Err(StoreError::SnapshotNotReady { detail }) => detail,
        other => panic!("{other:?}"),
    };
    assert!(matches!(delete(SnapshotId::new()).await, Err(StoreError::SnapshotNotFound)));
    let vm = running(store, "a").await;
    let (asked, one) = snapshot(store, vm).await;
    assert!(detail(one.id).await.starts_with("the snapshot is being made;"));
    make(store, &asked.task, None).await;

    let mut new = new_vm("b");
    new.spec.origin = Origin::Snapshot(one.id);
    let task = new_task(TaskKind::VmCreate);
    let made = store.create_vm(new, task, Capacity::default(), None).await.unwrap();
    assert!(detail(one.id).await.starts_with("the VM `b` is being created from the snapshot;"));
    carry_out(store, &made.task, Some(VmEvent::Started)).await;
    let deleted = delete(one.id).await.unwrap();
    assert_eq!(deleted.state, SnapshotState::Deleted);
    assert_eq!(delete(one.id).await.unwrap(), deleted, "repeating it is harmless");

    let forked = fork(store, vm, &["c".into()]).await;
    assert!(detail(forked.snapshot.id).await.starts_with("the snapshot is a fork's;"));
    let (_, memory) = suspended(store, "d").await;
    assert!(detail(memory).await.starts_with("the snapshot is the memory of a VM;"));
}

pub(crate) async fn a_vm_begins_only_as_a_users_snapshot_that_can_be_ready(store: &impl Store) {
    let begin_as = async |name: &str, id| {
        let mut new = new_vm(name);
        new.spec.origin = Origin::Snapshot(id);
        store.create_vm(new, new_task(TaskKind::VmCreate), Capacity::default(), None).await
    };
    let not_found = |answer| matches!(answer, Err(StoreError::SnapshotNotFound));
    let vm = running(store, "a").await;
    assert!(not_found(begin_as("x", SnapshotId::new()).await));
    let (asked, one) = snapshot(store, vm).await;
    let early = begin_as("early", one.id).await.unwrap();
    assert_eq!(early.vm.spec.origin, Origin::Snapshot(one.id), "it waits");
    begin(store, asked.task.id, 1).await;
    store.end_attempt(asked.task.id, 1, failed(ErrorCode::Internal, None)).await.unwrap();
    let refused = begin_as("x", one.id).await.unwrap_err();
    assert_eq!(refused.to_string(), "the snapshot failed: it is a test");
    assert_eq!(refused.code(), ErrorCode::SnapshotStateConflict);
    assert_eq!(retired(store).await, [], "a VM that waits for it is to read why");
    store.cancel_task(early.task.id).await.unwrap();
    assert_eq!(retired(store).await, [one.id]);
    assert!(not_found(begin_as("x", one.id).await));

    let forked = fork(store, vm, &["c".into()]).await;
    make(store, &forked.accepted.task, None).await;
    assert!(not_found(begin_as("x", forked.snapshot.id).await), "it may go at any moment");
    let (_, memory) = suspended(store, "d").await;
    assert!(not_found(begin_as("x", memory).await), "it has no disk");
}

pub(crate) async fn a_forks_snapshot_goes_when_its_vms_have_begun(store: &impl Store) {
    let vm = running(store, "a").await;
    let forked = fork(store, vm, &["c0".into(), "c1".into()]).await;
    make(store, &forked.accepted.task, None).await;
    let [(one, first), (_, second)] = forked.clones.as_slice() else { panic!("{forked:?}") };
    carry_out(store, first, Some(VmEvent::Started)).await;
    assert_eq!(retired(store).await, []);
    store.cancel_task(second.id).await.unwrap();
    assert_eq!(retired(store).await, [forked.snapshot.id]);
    assert_eq!(retired(store).await, []);
    assert_eq!(store.vm(one.id).await.unwrap().unwrap().state, VmState::Running);
}

pub(crate) async fn snapshots_are_filtered_and_paged(store: &impl Store) {
    let (a, b) = (running(store, "a").await, running(store, "b").await);
    let (asked, one) = snapshot(store, a).await;
    make(store, &asked.task, None).await;
    let (_, two) = snapshot(store, b).await;
    let (asked, gone) = snapshot(store, b).await;
    make(store, &asked.task, None).await;
    store.delete_snapshot(gone.id).await.unwrap();
    let (asked, memory) = suspend(store, b).await;
    make(store, &asked.task, Some(VmEvent::Stopped)).await;
    let two_is = snapshot_now(store, two.id).await.state;
    assert_eq!(two_is, SnapshotState::Failed, "the suspension ended it");

    let list = async |filter: SnapshotFilter| {
        let page = store.snapshots(filter, PageRequest::default()).await.unwrap();
        page.items.iter().map(|s| s.id).collect::<Vec<_>>()
    };
    let every = SnapshotFilter::default;
    assert_eq!(list(every()).await, [memory.id, two.id, one.id]);
    let states = SnapshotState::ALL.to_vec();
    let all = list(SnapshotFilter { states, ..every() }).await;
    assert_eq!(all, [memory.id, gone.id, two.id, one.id]);
    let states = vec![SnapshotState::Ready];
    assert_eq!(list(SnapshotFilter { states, ..every() }).await, [memory.id, one.id]);
    let purposes = vec![SnapshotPurpose::User];
    assert_eq!(list(SnapshotFilter { purposes, ..every() }).await, [two.id, one.id]);
    assert_eq!(list(SnapshotFilter { vm_id: Some(a), ..every() }).await, [one.id]);
    let worker_id = snapshot_now(store, one.id).await.worker_id;
    assert_eq!(list(SnapshotFilter { worker_id, ..every() }).await, [one.id]);

    let mut seen = Vec::new();
    let mut after = None;
    loop {
        let page = store.snapshots(every(), PageRequest { limit: 1, after }).await.unwrap();
        seen.extend(page.items.iter().map(|s| s.id));
        after = page.next;
        if after.is_none() {
            break;
        }
    }
    assert_eq!(seen, [memory.id, two.id, one.id]);
    assert_eq!(store.snapshot(SnapshotId::new()).await.unwrap(), None);
}
