//! Requests of clients.

use aether_store::{CancelOutcome, Capacity, Store, StoreError};
use aether_types::{
    ErrorCode, ExecutionId, ExecutionState, ProjectId, TaskId, TaskKind, TaskState, VmEvent, VmId,
    VmState,
};

use crate::support::{
    begin, carry_out, completed, create, execute, failed, key, new_task, new_vm, request, running,
};

pub(crate) async fn a_created_vm_and_its_task_are_recorded_and_owed(store: &impl Store) {
    let made = create(store, "a").await;
    assert!(!made.repeated);
    assert_eq!(store.vm(made.vm.id).await.unwrap(), Some(made.vm.clone()));
    assert_eq!(store.vm_by_name(ProjectId::DEFAULT, "a").await.unwrap(), Some(made.vm.clone()));
    assert_eq!(store.task(made.task.id).await.unwrap(), Some(made.task.clone()));
    assert_eq!(made.vm.state, VmState::Creating);
    assert_eq!(made.task.state, TaskState::Pending);
    assert_eq!(store.undispatched(10).await.unwrap(), std::slice::from_ref(&made.task));
    store.confirm_dispatched(&[made.task.id]).await.unwrap();
    assert_eq!(store.undispatched(10).await.unwrap(), []);
}

pub(crate) async fn a_name_is_free_again_only_when_its_vm_is_deleted(store: &impl Store) {
    let vm = running(store, "a").await;
    let again =
        || store.create_vm(new_vm("a"), new_task(TaskKind::VmCreate), Capacity::default(), None);
    let Err(StoreError::NameTaken { name }) = again().await else { panic!("name given twice") };
    assert_eq!(name, "a");
    let deletion = request(store, vm, TaskKind::VmDelete).await;
    assert_eq!(again().await.unwrap_err().code(), ErrorCode::NameTaken);
    carry_out(store, &deletion.task, Some(VmEvent::Deleted)).await;
    assert_eq!(store.vm_by_name(ProjectId::DEFAULT, "a").await.unwrap(), None);
    let second = again().await.unwrap().vm;
    assert_eq!(store.vm_by_name(ProjectId::DEFAULT, "a").await.unwrap(), Some(second));
    assert_eq!(store.vm(vm).await.unwrap().unwrap().state, VmState::Deleted);
}

pub(crate) async fn a_repeated_request_is_answered_with_the_first_task(store: &impl Store) {
    let make = || {
        store.create_vm(
            new_vm("a"),
            new_task(TaskKind::VmCreate),
            Capacity::default(),
            Some(key("k1", 1)),
        )
    };
    let first = make().await.unwrap();
    let second = make().await.unwrap();
    assert!(second.repeated && !first.repeated);
    assert_eq!((second.vm, second.task.id), (first.vm.clone(), first.task.id));
    carry_out(store, &first.task, Some(VmEvent::Started)).await;
    assert_eq!(make().await.unwrap().vm.state, VmState::Running, "as things are now");

    let stop = || store.request_on_vm(first.vm.id, new_task(TaskKind::VmStop), Some(key("k2", 2)));
    let stopped = stop().await.unwrap();
    let again = stop().await.unwrap();
    assert!(again.repeated);
    assert_eq!(again.task.id, stopped.task.id);
    assert_eq!(store.open_tasks().await.unwrap().len(), 1);
}

pub(crate) async fn an_idempotency_key_with_another_request_is_refused(store: &impl Store) {
    let make = |digest| {
        let task = new_task(TaskKind::VmCreate);
        store.create_vm(
            new_vm(&format!("vm-{digest}")),
            task,
            Capacity::default(),
            Some(key("k", digest)),
        )
    };
    make(1).await.unwrap();
    assert!(matches!(make(2).await, Err(StoreError::IdempotencyConflict)));
    assert_eq!(store.open_tasks().await.unwrap().len(), 1);
}

pub(crate) async fn a_refused_request_does_not_use_up_its_idempotency_key(store: &impl Store) {
    create(store, "a").await;
    let make = |name: &'static str| {
        store.create_vm(
            new_vm(name),
            new_task(TaskKind::VmCreate),
            Capacity::default(),
            Some(key("k", 1)),
        )
    };
    assert!(matches!(make("a").await, Err(StoreError::NameTaken { .. })));
    assert!(!make("b").await.unwrap().repeated);
}

pub(crate) async fn requests_on_a_vm_follow_its_state_machine(store: &impl Store) {
    let vm = running(store, "a").await;
    let steps = [
        (TaskKind::VmPause, VmState::Running, VmEvent::PauseDone, VmState::Paused),
        (TaskKind::VmResume, VmState::Paused, VmEvent::ResumeDone, VmState::Running),
        (TaskKind::VmStop, VmState::Stopping, VmEvent::Stopped, VmState::Stopped),
        (TaskKind::VmStart, VmState::Starting, VmEvent::Started, VmState::Running),
        (TaskKind::VmDelete, VmState::Deleting, VmEvent::Deleted, VmState::Deleted),
    ];
    for (kind, at_once, event, done) in steps {
        let accepted = request(store, vm, kind).await;
        assert_eq!(accepted.vm.state, at_once);
        assert_eq!(store.vm(vm).await.unwrap().unwrap(), accepted.vm);
        assert_eq!(carry_out(store, &accepted.task, Some(event)).await.state, TaskState::Completed);
        assert_eq!(store.vm(vm).await.unwrap().unwrap().state, done);
    }
    for kind in [TaskKind::VmPause, TaskKind::VmResume, TaskKind::VmStop, TaskKind::VmStart] {
        let refused = store.request_on_vm(vm, new_task(kind), None).await.unwrap_err();
        assert_eq!(refused.code(), ErrorCode::VmStateConflict);
        let StoreError::WrongState { vm: now, .. } = refused else { panic!("{refused:?}") };
        assert_eq!(now.state, VmState::Deleted);
    }
    assert_eq!(store.open_tasks().await.unwrap(), []);
    let wrong = store.request_on_vm(vm, new_task(TaskKind::VmExecute), None).await;
    assert!(matches!(wrong, Err(StoreError::WrongKind { .. })));
}

pub(crate) async fn a_command_is_refused_unless_the_vm_takes_commands(store: &impl Store) {
    let creating = create(store, "a").await.vm.id;
    let (task, execution) = execute(store, creating).await;
    assert_eq!(task.execution_id, Some(execution.id));
    assert_eq!(store.execution(execution.id).await.unwrap(), Some(execution));
    assert_eq!(store.task(task.id).await.unwrap(), Some(task));

    let paused = running(store, "b").await;
    let pause = request(store, paused, TaskKind::VmPause).await;
    carry_out(store, &pause.task, Some(VmEvent::PauseDone)).await;
    let refused = store
        .request_execution(
            paused,
            aether_store::NewExecution {
                id: ExecutionId::new(),
                spec: aether_types::ExecutionSpec::default(),
            },
            new_task(TaskKind::VmExecute),
            None,
        )
        .await
        .unwrap_err();
    assert_eq!(refused.to_string(), "VM `b` is paused; it cannot run commands");
    assert_eq!(refused.code(), ErrorCode::VmStateConflict);
}

pub(crate) async fn a_stop_fails_what_has_not_begun(store: &impl Store) {
    let vm = running(store, "a").await;
    let (waiting, waiting_execution) = execute(store, vm).await;
    let (begun, begun_execution) = execute(store, vm).await;
    begin(store, begun.id, 1).await;
    let stop = request(store, vm, TaskKind::VmStop).await;
    let [ended] = stop.cancelled.as_slice() else { panic!("{:?}", stop.cancelled) };
    assert_eq!((ended.id, ended.state), (waiting.id, TaskState::Failed));
    assert_eq!(ended.error.as_ref().unwrap().code, ErrorCode::VmStopped);
    assert_eq!(store.task(waiting.id).await.unwrap().as_ref(), Some(ended));
    let execution = store.execution(waiting_execution.id).await.unwrap().unwrap();
    assert_eq!(execution.state, ExecutionState::Failed);
    assert_eq!(execution.error.unwrap().code, ErrorCode::VmStopped);
    assert!(execution.finished_at.is_some());
    let still = store.execution(begun_execution.id).await.unwrap().unwrap();
    assert_eq!(still.state, ExecutionState::Pending);
    assert!(!store.task(begun.id).await.unwrap().unwrap().cancel_requested);
    assert!(store.undispatched(10).await.unwrap().iter().all(|t| t.id != waiting.id));
}

pub(crate) async fn a_deletion_ends_what_is_pending_and_asks_what_runs_to_end(store: &impl Store) {
    let made = create(store, "a").await;
    let (waiting, waiting_execution) = execute(store, made.vm.id).await;
    let deletion = request(store, made.vm.id, TaskKind::VmDelete).await;
    let mut ended: Vec<_> = deletion.cancelled.iter().map(|t| (t.id, t.state)).collect();
    ended.sort_by_key(|e| e.0);
    assert_eq!(ended, [(made.task.id, TaskState::Cancelled), (waiting.id, TaskState::Cancelled)]);
    let execution = store.execution(waiting_execution.id).await.unwrap().unwrap();
    assert_eq!(execution.state, ExecutionState::Cancelled);
    assert_eq!(execution.error.unwrap().message, "the VM was deleted");
    assert_eq!(store.undispatched(10).await.unwrap(), [deletion.task]);

    let vm = running(store, "b").await;
    let (begun, _) = execute(store, vm).await;
    begin(store, begun.id, 1).await;
    let deletion = request(store, vm, TaskKind::VmDelete).await;
    assert!(deletion.cancelled.is_empty());
    let begun = store.task(begun.id).await.unwrap().unwrap();
    assert!(begun.cancel_requested && begun.state == TaskState::Running);
    assert!(!store.task(deletion.task.id).await.unwrap().unwrap().cancel_requested);
}

pub(crate) async fn a_deletion_is_answered_with_the_earlier_one(store: &impl Store) {
    let vm = running(store, "a").await;
    let first = request(store, vm, TaskKind::VmDelete).await;
    for _ in 0..2 {
        let again = request(store, vm, TaskKind::VmDelete).await;
        assert!(again.repeated && again.cancelled.is_empty());
        assert_eq!(again.task.id, first.task.id);
    }
    carry_out(store, &first.task, Some(VmEvent::Deleted)).await;
    let after = request(store, vm, TaskKind::VmDelete).await;
    assert!(after.repeated);
    assert_eq!((after.task.state, after.vm.state), (TaskState::Completed, VmState::Deleted));
}

pub(crate) async fn a_deletion_that_was_given_up_can_be_asked_for_again(store: &impl Store) {
    let vm = running(store, "a").await;
    let first = request(store, vm, TaskKind::VmDelete).await;
    begin(store, first.task.id, 1).await;
    store.end_attempt(first.task.id, 1, failed(ErrorCode::Internal, None)).await.unwrap();
    let second = request(store, vm, TaskKind::VmDelete).await;
    assert!(!second.repeated);
    assert_ne!(second.task.id, first.task.id);
    assert_eq!(second.vm.state, VmState::Deleting);
    carry_out(store, &second.task, Some(VmEvent::Deleted)).await;
    assert_eq!(store.vm(vm).await.unwrap().unwrap().state, VmState::Deleted);
}

pub(crate) async fn a_cancelled_creation_leaves_a_failed_vm(store: &impl Store) {
    let made = create(store, "a").await;
    let CancelOutcome::Cancelled(task) = store.cancel_task(made.task.id).await.unwrap() else {
        panic!("a pending creation is not cancelled")
    };
    assert_eq!(task.state, TaskState::Cancelled);
    assert_eq!(store.task(task.id).await.unwrap(), Some(task.clone()));
    let vm = store.vm(made.vm.id).await.unwrap().unwrap();
    assert_eq!((vm.state, vm.reason.unwrap().code), (VmState::Failed, ErrorCode::Cancelled));
    assert_eq!(store.undispatched(10).await.unwrap(), []);
    let again = store.cancel_task(task.id).await.unwrap();
    assert!(matches!(again, CancelOutcome::AlreadyEnded(t) if t == task));
    request(store, vm.id, TaskKind::VmDelete).await;
}

pub(crate) async fn a_pending_execution_is_cancelled_with_its_task(store: &impl Store) {
    let vm = running(store, "a").await;
    let (task, execution) = execute(store, vm).await;
    assert!(matches!(store.cancel_task(task.id).await.unwrap(), CancelOutcome::Cancelled(_)));
    let execution = store.execution(execution.id).await.unwrap().unwrap();
    assert_eq!(execution.state, ExecutionState::Cancelled);
    assert_eq!(execution.error.unwrap().code, ErrorCode::Cancelled);
    assert_eq!(store.vm(vm).await.unwrap().unwrap().state, VmState::Running);
}

pub(crate) async fn a_running_execution_is_asked_to_end(store: &impl Store) {
    let vm = running(store, "a").await;
    let (task, _) = execute(store, vm).await;
    begin(store, task.id, 1).await;
    let CancelOutcome::Requested(asked) = store.cancel_task(task.id).await.unwrap() else {
        panic!("a running task was not asked to end")
    };
    assert!(asked.cancel_requested);
    assert_eq!(store.task(task.id).await.unwrap(), Some(asked));
}

pub(crate) async fn a_change_of_state_cannot_be_cancelled(store: &impl Store) {
    let vm = running(store, "a").await;
    let stop = request(store, vm, TaskKind::VmStop).await;
    let refused = store.cancel_task(stop.task.id).await.unwrap_err();
    assert_eq!(refused.code(), ErrorCode::VmStateConflict);
    assert_eq!(refused.to_string(), "a vm:stop task cannot be cancelled");
    carry_out(store, &stop.task, Some(VmEvent::Stopped)).await;
    let ended = store.cancel_task(stop.task.id).await.unwrap();
    assert!(matches!(ended, CancelOutcome::AlreadyEnded(_)));
}

pub(crate) async fn unknown_ids_are_typed_errors(store: &impl Store) {
    let (vm, task) = (VmId::new(), TaskId::new());
    let refused = store.request_on_vm(vm, new_task(TaskKind::VmStop), None).await;
    assert!(matches!(refused, Err(StoreError::VmNotFound)));
    assert!(matches!(store.cancel_task(task).await, Err(StoreError::TaskNotFound)));
    let refused = store.begin_attempt(task, aether_types::WorkerId::new().into(), 1).await;
    assert!(matches!(refused, Err(StoreError::TaskNotFound)));
    let refused = store.end_attempt(task, 1, completed(None)).await;
    assert!(matches!(refused, Err(StoreError::TaskNotFound)));
    let refused = store.patch_vm(vm, aether_store::VmPatch::default()).await;
    assert!(matches!(refused, Err(StoreError::VmNotFound)));
    assert_eq!(store.vm(vm).await.unwrap(), None);
    assert_eq!(store.task(task).await.unwrap(), None);
    assert_eq!(store.execution(ExecutionId::new()).await.unwrap(), None);
    assert_eq!(store.vm_history(vm).await.unwrap(), []);
}
