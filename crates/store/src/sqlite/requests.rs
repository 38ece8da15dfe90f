//! Requests of clients: each records its task, what it changes at once, and that the task's
//! dispatch is owed, in one transaction.

use aether_types::{
    ErrorCode, Execution, ExecutionState, Fault, Task, TaskId, TaskKind, TaskState, Timestamp, Vm,
    VmEvent, VmId, VmState,
};
use sqlx::Connection;

use super::{
    SqliteStore, rows,
    rows::{execution_columns, task_columns},
    write::{self, Tx},
};
use crate::{
    Accepted, CancelOutcome, Idempotency, NewExecution, NewTask, NewVm, StoreError, VmPatch,
    error::Context,
};

/// How long an idempotency key is kept: 24 hours.
const IDEMPOTENCY_MS: i64 = 24 * 3600 * 1000;

pub(super) async fn create_vm(
    store: &SqliteStore,
    new: NewVm,
    task: NewTask,
    idempotency: Option<Idempotency>,
) -> Result<Accepted, StoreError> {
    expect_kind(&task, task.kind == TaskKind::VmCreate)?;
    let now = Timestamp::now();
    let timeout_ms =
        new.spec.timeout_s.map(|s| i64::try_from(s).unwrap_or(i64::MAX).saturating_mul(1000));
    let vm = Vm {
        id: new.id,
        name: new.name,
        state: VmState::Creating,
        reason: None,
        spec: new.spec,
        worker_id: None,
        address: None,
        created_at: now,
        updated_at: now,
        expires_at: timeout_ms.map(|ms| now.plus_ms(ms)),
        generation: 1,
    };
    let task = write::pending(&task, vm.id, now);
    let spec = serde_json::to_string(&vm.spec).map_err(|_| StoreError::Corrupt("VM to record"))?;

    let mut writer = store.writer.lock().await;
    let mut tx = writer.begin_with("begin immediate").await.context("begin a transaction")?;
    if let Some(earlier) = earlier(&mut tx, idempotency.as_ref(), now).await? {
        return Ok(earlier);
    }
    let inserted = sqlx::query(
        "insert into vms (id, name, state, spec, driver, created_at, updated_at, expires_at, \
         generation) values ($1, $2, 'creating', $3, $4, $5, $5, $6, 1); \
         insert into vm_changes (vm_id, generation, state, at) values ($1, 1, 'creating', $5)",
    )
    .bind(vm.id.to_string())
    .bind(vm.name.clone())
    .bind(spec)
    .bind(vm.spec.driver.as_str())
    .bind(now.unix_ms())
    .bind(vm.expires_at.map(Timestamp::unix_ms))
    .execute(&mut *tx)
    .await;
    if let Err(sqlx::Error::Database(e)) = &inserted
        && e.is_unique_violation()
        && e.message().ends_with("vms.name")
    {
        return Err(StoreError::NameTaken { name: vm.name });
    }
    inserted.context("record a VM")?;
    for (key, value) in &vm.spec.labels {
        sqlx::query("insert into vm_labels (vm_id, key, value) values ($1, $2, $3)")
            .bind(vm.id.to_string())
            .bind(key.clone())
            .bind(value.clone())
            .execute(&mut *tx)
            .await
            .context("record a VM's labels")?;
    }
    write::insert_task(&mut tx, &task).await?;
    remember(&mut tx, idempotency, task.id, now).await?;
    tx.commit().await.context("commit a VM's creation")?;
    Ok(Accepted { vm, task, repeated: false, cancelled: Vec::new() })
}

pub(super) async fn request_on_vm(
    store: &SqliteStore,
    id: VmId,
    new: NewTask,
    idempotency: Option<Idempotency>,
) -> Result<Accepted, StoreError> {
    let mut writer = store.writer.lock().await;
    let mut tx = writer.begin_with("begin immediate").await.context("begin a transaction")?;
    let now = Timestamp::now();
    if let Some(earlier) = earlier(&mut tx, idempotency.as_ref(), now).await? {
        return Ok(earlier);
    }
    let mut vm = write::vm(&mut tx, id).await?.ok_or(StoreError::VmNotFound)?;
    if new.kind == TaskKind::VmDelete
        && let Some(task) = earlier_deletion(&mut tx, &vm).await?
    {
        return Ok(Accepted { vm, task, repeated: true, cancelled: Vec::new() });
    }
    // A pause or a resumption changes the state when it is done; that it could be done now is
    // checked, and nothing is written.
    let (event, at_once) = match new.kind {
        TaskKind::VmStart => (VmEvent::StartRequested, true),
        TaskKind::VmStop => (VmEvent::StopRequested, true),
        TaskKind::VmDelete => (VmEvent::DeleteRequested, true),
        TaskKind::VmPause => (VmEvent::PauseDone, false),
        TaskKind::VmResume => (VmEvent::ResumeDone, false),
        TaskKind::VmCreate | TaskKind::VmExecute => {
            return Err(StoreError::WrongKind { kind: new.kind });
        }
    };
    match vm.state.apply(event) {
        Some(next) if at_once => {
            write::move_vm(&mut tx, &mut vm, next, None, &VmPatch::default(), now).await?;
        }
        Some(_) => {}
        // Its deletion was given up; this is another try.
        None if new.kind == TaskKind::VmDelete && vm.state == VmState::Deleting => {}
        None => return Err(write::wrong_state(vm, event)),
    }
    let cancelled = match new.kind {
        TaskKind::VmDelete => end_for_deletion(&mut tx, id, now).await?,
        TaskKind::VmStop => end_for_stop(&mut tx, id, now).await?,
        TaskKind::VmStart
        | TaskKind::VmPause
        | TaskKind::VmResume
        | TaskKind::VmCreate
        | TaskKind::VmExecute => Vec::new(),
    };
    let task = write::pending(&new, id, now);
    write::insert_task(&mut tx, &task).await?;
    remember(&mut tx, idempotency, task.id, now).await?;
    tx.commit().await.context("commit a request on a VM")?;
    Ok(Accepted { vm, task, repeated: false, cancelled })
}

/// The task that deletes, or has deleted, this VM already.
async fn earlier_deletion(tx: &mut Tx<'_>, vm: &Vm) -> Result<Option<Task>, StoreError> {
    const LATEST: &str = concat!(
        "select ",
        task_columns!(),
        " from tasks where vm_id = $1 and kind = 'vm:delete' \
         order by created_at desc, id desc limit 1"
    );
    if !matches!(vm.state, VmState::Deleting | VmState::Deleted) {
        return Ok(None);
    }
    let row = sqlx::query(LATEST)
        .bind(vm.id.to_string())
        .fetch_optional(&mut **tx)
        .await
        .context("look for an earlier deletion")?;
    let Some(task) = row.as_ref().map(rows::task).transpose()? else { return Ok(None) };
    let given_up = vm.state == VmState::Deleting && task.state.is_end();
    Ok(if given_up { None } else { Some(task) })
}

/// What has not begun ends; what runs is asked to end. Another deletion (of a VM whose first one
/// was given up) is not touched.
async fn end_for_deletion(
    tx: &mut Tx<'_>,
    vm: VmId,
    now: Timestamp,
) -> Result<Vec<Task>, StoreError> {
    const KINDS: &[TaskKind] = &[
        TaskKind::VmCreate,
        TaskKind::VmStart,
        TaskKind::VmStop,
        TaskKind::VmPause,
        TaskKind::VmResume,
        TaskKind::VmExecute,
    ];
    let fault = Fault::new(ErrorCode::VmStopped, "the VM was deleted");
    let ended = write::end_pending_of_vm(tx, vm, KINDS, TaskState::Cancelled, &fault, now).await?;
    sqlx::query(
        "update tasks set cancel_requested = 1 \
         where vm_id = $1 and state = 'running' and kind <> 'vm:delete'",
    )
    .bind(vm.to_string())
    .execute(&mut **tx)
    .await
    .context("ask a VM's tasks to end")?;
    Ok(ended)
}

/// What needs the VM to run and has not begun fails; what runs is ended by the stop itself.
async fn end_for_stop(tx: &mut Tx<'_>, vm: VmId, now: Timestamp) -> Result<Vec<Task>, StoreError> {
    const KINDS: &[TaskKind] = &[TaskKind::VmExecute, TaskKind::VmPause, TaskKind::VmResume];
    let fault = Fault::new(ErrorCode::VmStopped, "the VM was stopped before this began");
    write::end_pending_of_vm(tx, vm, KINDS, TaskState::Failed, &fault, now).await
}

pub(super) async fn request_execution(
    store: &SqliteStore,
    id: VmId,
    new: NewExecution,
    task: NewTask,
    idempotency: Option<Idempotency>,
) -> Result<(Accepted, Execution), StoreError> {
    expect_kind(&task, task.kind == TaskKind::VmExecute)?;
    let mut writer = store.writer.lock().await;
    let mut tx = writer.begin_with("begin immediate").await.context("begin a transaction")?;
    let now = Timestamp::now();
    if let Some(earlier) = earlier(&mut tx, idempotency.as_ref(), now).await? {
        let execution = execution_of(&mut tx, &earlier.task).await?;
        return Ok((earlier, execution));
    }
    let vm = write::vm(&mut tx, id).await?.ok_or(StoreError::VmNotFound)?;
    if !vm.state.takes_commands() {
        return Err(StoreError::WrongState { vm: Box::new(vm), action: "run commands" });
    }
    let task = Task { execution_id: Some(new.id), ..write::pending(&task, id, now) };
    let execution = Execution {
        id: new.id,
        vm_id: id,
        task_id: task.id,
        spec: new.spec,
        state: ExecutionState::Pending,
        boot_id: None,
        exit: None,
        error: None,
        created_at: now,
        started_at: None,
        finished_at: None,
        duration_us: None,
    };
    write::insert_task(&mut tx, &task).await?;
    write::insert_execution(&mut tx, &execution).await?;
    remember(&mut tx, idempotency, task.id, now).await?;
    tx.commit().await.context("commit a request to execute")?;
    Ok((Accepted { vm, task, repeated: false, cancelled: Vec::new() }, execution))
}

async fn execution_of(tx: &mut Tx<'_>, task: &Task) -> Result<Execution, StoreError> {
    const OF_TASK: &str =
        concat!("select ", execution_columns!(), " from executions where id = $1");
    let id = task.execution_id.ok_or(StoreError::IdempotencyConflict)?;
    let row = sqlx::query(OF_TASK)
        .bind(id.to_string())
        .fetch_optional(&mut **tx)
        .await
        .context("read an execution")?;
    rows::execution(&row.ok_or(StoreError::Corrupt("execution"))?)
}

pub(super) async fn cancel_task(
    store: &SqliteStore,
    id: TaskId,
) -> Result<CancelOutcome, StoreError> {
    let mut writer = store.writer.lock().await;
    let mut tx = writer.begin_with("begin immediate").await.context("begin a transaction")?;
    let now = Timestamp::now();
    let mut task = write::task(&mut tx, id).await?.ok_or(StoreError::TaskNotFound)?;
    if task.state.is_end() {
        return Ok(CancelOutcome::AlreadyEnded(task));
    }
    match task.kind {
        TaskKind::VmCreate | TaskKind::VmExecute => {}
        TaskKind::VmStart
        | TaskKind::VmStop
        | TaskKind::VmPause
        | TaskKind::VmResume
        | TaskKind::VmDelete => return Err(StoreError::NotCancellable { task: Box::new(task) }),
    }
    if task.state == TaskState::Running {
        task.cancel_requested = true;
        sqlx::query("update tasks set cancel_requested = 1 where id = $1")
            .bind(id.to_string())
            .execute(&mut *tx)
            .await
            .context("ask a task to end")?;
        tx.commit().await.context("commit a request to cancel")?;
        return Ok(CancelOutcome::Requested(task));
    }
    let fault = Fault::new(ErrorCode::Cancelled, "cancelled before it began");
    task.cancel_requested = true;
    sqlx::query("update tasks set cancel_requested = 1 where id = $1")
        .bind(id.to_string())
        .execute(&mut *tx)
        .await
        .context("cancel a task")?;
    write::end_task(&mut tx, &mut task, TaskState::Cancelled, Some(fault.clone()), now).await?;
    write::end_execution(&mut tx, &task, None, now).await?;
    if task.kind == TaskKind::VmCreate {
        let mut vm = write::vm(&mut tx, task.vm_id).await?.ok_or(StoreError::Corrupt("task"))?;
        if let Some(next) = vm.state.apply(VmEvent::Failed) {
            let patch = VmPatch::default();
            write::move_vm(&mut tx, &mut vm, next, Some(fault), &patch, now).await?;
        }
    }
    tx.commit().await.context("commit a cancellation")?;
    Ok(CancelOutcome::Cancelled(task))
}

fn expect_kind(task: &NewTask, fits: bool) -> Result<(), StoreError> {
    if fits { Ok(()) } else { Err(StoreError::WrongKind { kind: task.kind }) }
}

/// The answer to an earlier request with the same key, as things are now.
async fn earlier(
    tx: &mut Tx<'_>,
    idempotency: Option<&Idempotency>,
    now: Timestamp,
) -> Result<Option<Accepted>, StoreError> {
    let Some(Idempotency { key, request_digest }) = idempotency else { return Ok(None) };
    let row =
        sqlx::query("select digest, task_id from idempotency where key = $1 and created_at > $2")
            .bind(key.clone())
            .bind(now.plus_ms(-IDEMPOTENCY_MS).unix_ms())
            .fetch_optional(&mut **tx)
            .await
            .context("look up an idempotency key")?;
    let Some(row) = row else { return Ok(None) };
    let r = rows::Reader { row: &row, noun: "idempotency key" };
    if r.get::<&[u8]>(0)? != request_digest.as_slice() {
        return Err(StoreError::IdempotencyConflict);
    }
    let task = write::task(tx, r.parsed(1)?).await?.ok_or_else(|| r.corrupt())?;
    let vm = write::vm(tx, task.vm_id).await?.ok_or_else(|| r.corrupt())?;
    Ok(Some(Accepted { vm, task, repeated: true, cancelled: Vec::new() }))
}

/// Keeps a key with the task that it asked for, and drops the keys that are too old.
async fn remember(
    tx: &mut Tx<'_>,
    idempotency: Option<Idempotency>,
    task: TaskId,
    now: Timestamp,
) -> Result<(), StoreError> {
    let Some(Idempotency { key, request_digest }) = idempotency else { return Ok(()) };
    sqlx::query(
        "delete from idempotency where created_at <= $4; \
         insert into idempotency (key, digest, task_id, created_at) values ($1, $2, $3, $5)",
    )
    .bind(key)
    .bind(request_digest.to_vec())
    .bind(task.to_string())
    .bind(now.plus_ms(-IDEMPOTENCY_MS).unix_ms())
    .bind(now.unix_ms())
    .execute(&mut **tx)
    .await
    .context("keep an idempotency key")?;
    Ok(())
}
