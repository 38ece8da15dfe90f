//! Attempts, and changes that workers report.

use aether_store::{AttemptEnd, Begin, Store, StoreError, VmChange, VmPatch};
use aether_types::{
    ErrorCode, ExecutionState, ExitStatus, OutputStream, RetainedOutput, TaskKind, TaskState,
    VmEvent, VmState, WorkerId,
};

use crate::support::{
    begin, carry_out, completed, create, execute, exited, failed, fault, request, running,
};

pub(crate) async fn an_attempt_is_counted_and_fenced_by_its_epoch(store: &impl Store) {
    let made = create(store, "a").await;
    let worker = WorkerId::new();
    let Begin::Go(task) = store.begin_attempt(made.task.id, worker.into(), 5).await.unwrap() else {
        panic!("the first attempt does not go on")
    };
    assert_eq!((task.state, task.attempts, task.epoch), (TaskState::Running, 1, 5));
    assert_eq!(task.worker_id, Some(worker));
    assert!(task.started_at.is_some());
    assert_eq!(store.task(task.id).await.unwrap(), Some(task.clone()));
    for epoch in [5, 4, 0] {
        let begun = store.begin_attempt(task.id, WorkerId::new().into(), epoch).await.unwrap();
        assert!(matches!(begun, Begin::Fenced), "epoch {epoch}");
    }
    let second = begin(store, task.id, 9).await;
    assert_eq!((second.attempts, second.epoch), (2, 9));
    assert_eq!(second.started_at, task.started_at);
}

pub(crate) async fn a_late_answer_is_refused_whole(store: &impl Store) {
    let made = create(store, "a").await;
    begin(store, made.task.id, 1).await;
    begin(store, made.task.id, 2).await;
    let late = store.end_attempt(made.task.id, 1, completed(Some(VmEvent::Started))).await;
    assert!(matches!(late, Err(StoreError::Fenced)));
    assert_eq!(store.vm(made.vm.id).await.unwrap().unwrap().state, VmState::Creating);
    let otherwise = failed(ErrorCode::Internal, Some(VmEvent::Failed));
    let late = store.retry_attempt(made.task.id, 1, fault(ErrorCode::Unavailable), otherwise).await;
    assert!(matches!(late, Err(StoreError::Fenced)));
    assert_eq!(store.task(made.task.id).await.unwrap().unwrap().state, TaskState::Running);
    store.end_attempt(made.task.id, 2, completed(Some(VmEvent::Started))).await.unwrap();
    assert_eq!(store.vm(made.vm.id).await.unwrap().unwrap().state, VmState::Running);
}

pub(crate) async fn a_task_ends_once(store: &impl Store) {
    let made = create(store, "a").await;
    begin(store, made.task.id, 1).await;
    let ended = store.end_attempt(made.task.id, 1, completed(None)).await.unwrap();
    assert!(ended.finished_at.is_some());
    let again = store.end_attempt(made.task.id, 1, failed(ErrorCode::Internal, None)).await;
    assert!(matches!(again, Err(StoreError::Fenced)));
    assert_eq!(store.task(ended.id).await.unwrap(), Some(ended.clone()));
    let begun = store.begin_attempt(ended.id, WorkerId::new().into(), 2).await.unwrap();
    assert!(matches!(begun, Begin::Ended(t) if t == ended));
}

pub(crate) async fn an_attempt_cannot_end_as_running(store: &impl Store) {
    let made = create(store, "a").await;
    begin(store, made.task.id, 1).await;
    let end = AttemptEnd { state: TaskState::Running, ..completed(None) };
    let refused = store.end_attempt(made.task.id, 1, end.clone()).await;
    assert!(matches!(refused, Err(StoreError::NotAnEnd)));
    let refused = store.retry_attempt(made.task.id, 1, fault(ErrorCode::Internal), end).await;
    assert!(matches!(refused, Err(StoreError::NotAnEnd)));
}

pub(crate) async fn used_up_attempts_end_the_task_and_fail_the_vm(store: &impl Store) {
    let made = create(store, "a").await;
    for epoch in 1..=3 {
        begin(store, made.task.id, epoch).await;
    }
    let begun = store.begin_attempt(made.task.id, WorkerId::new().into(), 4).await.unwrap();
    let Begin::Ended(task) = begun else { panic!("{begun:?}") };
    assert_eq!(task.state, TaskState::Failed);
    assert_eq!(task.error.as_ref().unwrap().code, ErrorCode::AttemptsExhausted);
    assert_eq!(store.task(task.id).await.unwrap(), Some(task));
    let vm = store.vm(made.vm.id).await.unwrap().unwrap();
    assert_eq!(vm.state, VmState::Failed);
    assert_eq!(vm.reason.unwrap().code, ErrorCode::AttemptsExhausted);
}

pub(crate) async fn an_execution_with_used_up_attempts_is_lost(store: &impl Store) {
    let vm = running(store, "a").await;
    let (task, execution) = execute(store, vm).await;
    for epoch in 1..=3 {
        begin(store, task.id, epoch).await;
    }
    let begun = store.begin_attempt(task.id, WorkerId::new().into(), 4).await.unwrap();
    assert!(matches!(begun, Begin::Ended(_)));
    let execution = store.execution(execution.id).await.unwrap().unwrap();
    assert_eq!(execution.state, ExecutionState::Failed);
    assert_eq!(execution.error.unwrap().code, ErrorCode::ExecutionLost);
    assert_eq!(store.vm(vm).await.unwrap().unwrap().state, VmState::Running);
}

pub(crate) async fn a_task_given_back_is_owed_again(store: &impl Store) {
    let made = create(store, "a").await;
    store.confirm_dispatched(&[made.task.id]).await.unwrap();
    begin(store, made.task.id, 1).await;
    let otherwise = failed(ErrorCode::Internal, Some(VmEvent::Failed));
    let task = store
        .retry_attempt(made.task.id, 1, fault(ErrorCode::Unavailable), otherwise)
        .await
        .unwrap();
    assert_eq!((task.state, task.attempts), (TaskState::Pending, 1));
    assert_eq!(task.error.as_ref().unwrap().code, ErrorCode::Unavailable);
    assert_eq!(store.undispatched(10).await.unwrap(), std::slice::from_ref(&task));
    assert_eq!(store.vm(made.vm.id).await.unwrap().unwrap().state, VmState::Creating);
    let late = store.end_attempt(task.id, 1, completed(None)).await;
    assert!(matches!(late, Err(StoreError::Fenced)));
    assert_eq!(begin(store, task.id, 2).await.error, None);
}

pub(crate) async fn a_task_given_back_too_often_ends(store: &impl Store) {
    let made = create(store, "a").await;
    let otherwise = || failed(ErrorCode::VmStartFailed, Some(VmEvent::Failed));
    for epoch in 1..=3 {
        begin(store, made.task.id, epoch).await;
        let unavailable = fault(ErrorCode::Unavailable);
        let task =
            store.retry_attempt(made.task.id, epoch, unavailable, otherwise()).await.unwrap();
        assert_eq!(task.state.is_end(), epoch == 3);
    }
    let task = store.task(made.task.id).await.unwrap().unwrap();
    assert_eq!(task.error.unwrap().code, ErrorCode::VmStartFailed);
    assert_eq!(store.vm(made.vm.id).await.unwrap().unwrap().state, VmState::Failed);
    assert_eq!(store.undispatched(10).await.unwrap(), []);
}

pub(crate) async fn a_task_given_back_after_a_request_to_end_is_cancelled(store: &impl Store) {
    let made = create(store, "a").await;
    begin(store, made.task.id, 1).await;
    store.cancel_task(made.task.id).await.unwrap();
    let otherwise = failed(ErrorCode::VmStartFailed, Some(VmEvent::Failed));
    let task = store
        .retry_attempt(made.task.id, 1, fault(ErrorCode::Unavailable), otherwise)
        .await
        .unwrap();
    assert_eq!(task.state, TaskState::Cancelled);
    let vm = store.vm(made.vm.id).await.unwrap().unwrap();
    assert_eq!((vm.state, vm.reason.unwrap().code), (VmState::Failed, ErrorCode::Cancelled));
}

pub(crate) async fn a_started_execution_is_not_started_for_another_boot(store: &impl Store) {
    let vm = running(store, "a").await;
    let (task, execution) = execute(store, vm).await;
    let start = |epoch, boot| store.execution_started(task.id, epoch, execution.id, boot);
    assert!(matches!(start(1, "boot-1").await, Err(StoreError::Fenced)));
    begin(store, task.id, 1).await;
    start(1, "boot-1").await.unwrap();
    let begun = store.execution(execution.id).await.unwrap().unwrap();
    assert_eq!(begun.state, ExecutionState::Running);
    assert_eq!(begun.boot_id.as_deref(), Some("boot-1"));
    begin(store, task.id, 2).await;
    assert!(matches!(start(1, "boot-1").await, Err(StoreError::Fenced)));
    start(2, "boot-1").await.unwrap();
    assert_eq!(store.execution(execution.id).await.unwrap(), Some(begun));
    let refused = start(2, "boot-2").await.unwrap_err();
    assert!(matches!(refused, StoreError::AlreadyStarted));
    assert_eq!(refused.code(), ErrorCode::ExecutionLost);
    store.end_attempt(task.id, 2, exited(0)).await.unwrap();
    assert!(matches!(start(2, "boot-1").await, Err(StoreError::Fenced)));
}

pub(crate) async fn an_execution_keeps_its_result_and_output(store: &impl Store) {
    let vm = running(store, "a").await;
    let (task, execution) = execute(store, vm).await;
    begin(store, task.id, 1).await;
    store.execution_started(task.id, 1, execution.id, "boot").await.unwrap();
    let empty = store.output(execution.id, OutputStream::Stdout).await.unwrap();
    assert_eq!(empty, RetainedOutput::default());
    store.end_attempt(task.id, 1, exited(3)).await.unwrap();
    let ended = store.execution(execution.id).await.unwrap().unwrap();
    assert_eq!((ended.state, ended.exit), (ExecutionState::Completed, Some(ExitStatus::Code(3))));
    assert_eq!(ended.duration_us, Some(1234));
    assert!(ended.started_at <= ended.finished_at);
    let output = store.output(execution.id, OutputStream::Stdout).await.unwrap();
    assert_eq!((output.head.as_slice(), output.total_bytes), (b"out\0\xff".as_slice(), 5));
    let errors = store.output(execution.id, OutputStream::Stderr).await.unwrap();
    assert_eq!(errors, RetainedOutput::default());
}

pub(crate) async fn an_execution_ends_with_its_task(store: &impl Store) {
    let vm = running(store, "a").await;
    let (task, execution) = execute(store, vm).await;
    begin(store, task.id, 1).await;
    store.end_attempt(task.id, 1, failed(ErrorCode::GuestUnreachable, None)).await.unwrap();
    let ended = store.execution(execution.id).await.unwrap().unwrap();
    assert_eq!(ended.state, ExecutionState::Failed);
    assert_eq!(ended.error.unwrap().code, ErrorCode::GuestUnreachable);
}

pub(crate) async fn a_vm_that_is_being_deleted_does_not_come_back(store: &impl Store) {
    let made = create(store, "a").await;
    begin(store, made.task.id, 1).await;
    request(store, made.vm.id, TaskKind::VmDelete).await;
    let end = completed(Some(VmEvent::Started));
    assert_eq!(store.end_attempt(made.task.id, 1, end).await.unwrap().state, TaskState::Completed);
    assert_eq!(store.vm(made.vm.id).await.unwrap().unwrap().state, VmState::Deleting);
}

pub(crate) async fn history_keeps_every_state_and_survives_deletion(store: &impl Store) {
    let vm = running(store, "a").await;
    let (task, execution) = execute(store, vm).await;
    begin(store, task.id, 1).await;
    store.end_attempt(task.id, 1, exited(0)).await.unwrap();
    let panic = VmChange {
        event: VmEvent::Failed,
        reason: Some(fault(ErrorCode::GuestPanic)),
        patch: VmPatch::default(),
    };
    let changed = store.change_vm(vm, None, panic).await.unwrap();
    assert_eq!(changed.reason, Some(fault(ErrorCode::GuestPanic)));
    let deletion = request(store, vm, TaskKind::VmDelete).await;
    carry_out(store, &deletion.task, Some(VmEvent::Deleted)).await;
    let history = store.vm_history(vm).await.unwrap();
    let states: Vec<_> = history.iter().map(|c| (c.state, c.reason.is_some())).collect();
    assert_eq!(
        states,
        [
            (VmState::Creating, false),
            (VmState::Running, false),
            (VmState::Failed, true),
            (VmState::Deleting, false),
            (VmState::Deleted, false),
        ]
    );
    let kept = store.executions(vm, aether_store::PageRequest::default()).await.unwrap();
    assert_eq!(kept.items.iter().map(|e| e.id).collect::<Vec<_>>(), [execution.id]);
    assert_eq!(store.vm(vm).await.unwrap().unwrap().generation, 5);
}

pub(crate) async fn a_change_without_a_transition_is_refused(store: &impl Store) {
    let vm = running(store, "a").await;
    let change = VmChange { event: VmEvent::Deleted, reason: None, patch: VmPatch::default() };
    let refused = store.change_vm(vm, None, change).await.unwrap_err();
    assert!(matches!(refused, StoreError::WrongState { vm: now, .. } if now.id == vm));
}

pub(crate) async fn a_patch_keeps_what_it_does_not_name(store: &impl Store) {
    let vm = running(store, "a").await;
    let worker = WorkerId::new();
    let patch = VmPatch { worker_id: Some(worker), ..VmPatch::default() };
    store.patch_vm(vm, patch).await.unwrap();
    let address = "10.0.0.7".parse().unwrap();
    let patch = VmPatch { address: Some(address), ..VmPatch::default() };
    let before = store.vm(vm).await.unwrap().unwrap();
    store.patch_vm(vm, patch).await.unwrap();
    let after = store.vm(vm).await.unwrap().unwrap();
    assert_eq!((after.worker_id, after.address), (Some(worker), Some(address)));
    assert_eq!(after.generation, before.generation + 1);
    assert_eq!(store.vm_history(vm).await.unwrap().len(), 2);
    let deletion = request(store, vm, TaskKind::VmDelete).await;
    carry_out(store, &deletion.task, Some(VmEvent::Deleted)).await;
    assert_eq!(store.vm(vm).await.unwrap().unwrap().address, None, "it goes to another VM");
}
