//! Requests of clients: each records its task, what it changes at once, and that the task's
//! dispatch is owed, in one transaction.

use super::{
    Lock, Sql, Tx, orphans, place,
    query::{in_turn, query},
    quotas, rows,
    rows::{execution_columns, task_columns},
    snapshots, write,
};
use crate::{
    Accepted, AcceptedBuild, CancelOutcome, Idempotency, NewExecution, NewTask, StoreError,
    VmPatch, error::Context,
};
use aether_types::{
    ErrorCode, Execution, ExecutionState, Fault, ProjectId, Task, TaskId, TaskKind, TaskState,
    Timestamp, ToolRequest, Vm, VmEvent, VmId, VmState, VmTool, project::Usage,
};

/// How long an idempotency key is kept: 24 hours.
const IDEMPOTENCY_MS: i64 = 24 * 3600 * 1000;

pub(super) async fn request_on_vm(
    store: &Sql,
    id: VmId,
    new: NewTask,
    idempotency: Option<Idempotency>,
) -> Result<Accepted, StoreError> {
    let mut writer = store.writer().await;
    let mut tx = writer.begin(&key_lock(idempotency.as_ref())).await?;
    let now = Timestamp::now();
    if let Some(earlier) = earlier(&mut tx, idempotency.as_ref(), now).await? {
        return Ok(earlier);
    }
    admit(&mut tx, id, &new).await?;
    if new.kind == TaskKind::VmStart {
        tx.lock(Lock::Creation).await?;
    }
    tx.lock(Lock::Vm(id)).await?;
    let mut vm = write::vm_for(&mut tx, id, &new).await?;
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
        TaskKind::VmCreate
        | TaskKind::VmExecute
        | TaskKind::VmSuspend
        | TaskKind::VmSnapshot
        | TaskKind::TemplateBuild
        | TaskKind::ToolBuild => {
            return Err(StoreError::WrongKind { kind: new.kind });
        }
    };
    let next = vm.state.apply(event);
    let mut place = None;
    if new.kind == TaskKind::VmStart && next.is_some() {
        place = Some(place::make_room_to_start(&mut tx, &mut vm).await?);
    }
    if new.kind == TaskKind::VmDelete {
        orphans::disown(&mut tx, &mut vm).await?;
    }
    match next {
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
        | TaskKind::VmSuspend
        | TaskKind::VmSnapshot
        | TaskKind::TemplateBuild
        | TaskKind::ToolBuild
        | TaskKind::VmExecute => Vec::new(),
    };
    let mut task = write::pending(&new, &vm, now);
    write::insert_task(&mut tx, &task).await?;
    if let Some(place) = place {
        place::hold_back(&mut tx, &mut task, &place).await?;
    }
    remember(&mut tx, idempotency, task.id, now).await?;
    tx.commit("commit a request on a VM").await?;
    Ok(Accepted { vm, task, repeated: false, cancelled })
}

/// Is there room in the project for what is asked for? What gives back is never refused.
pub(super) async fn admit(tx: &mut Tx<'_>, id: VmId, new: &NewTask) -> Result<(), StoreError> {
    let asked = match new.kind {
        TaskKind::VmStop | TaskKind::VmSuspend | TaskKind::VmDelete => return Ok(()),
        TaskKind::VmStart => {
            let vm = write::vm_for(tx, id, new).await?;
            // One that cannot be started is refused for that, a moment later.
            if vm.state.apply(VmEvent::StartRequested).is_none() {
                return Ok(());
            }
            Usage { waiting_tasks: 1, ..quotas::machine(&vm) }
        }
        TaskKind::VmPause
        | TaskKind::VmResume
        | TaskKind::VmCreate
        | TaskKind::VmExecute
        | TaskKind::VmSnapshot
        | TaskKind::TemplateBuild
        | TaskKind::ToolBuild => quotas::ONE_TASK,
    };
    quotas::admit_on_vm(tx, new, asked).await
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
    let row = query(LATEST)
        .bind(vm.id.to_string())
        .fetch_optional(&mut *tx)
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
        TaskKind::VmSuspend,
        TaskKind::VmSnapshot,
        TaskKind::TemplateBuild,
        TaskKind::VmExecute,
    ];
    let fault = Fault::new(ErrorCode::VmStopped, "the VM was deleted");
    let ended = write::end_pending_of_vm(tx, vm, KINDS, TaskState::Cancelled, &fault, now).await?;
    query(
        "update tasks set cancel_requested = 1 \
         where vm_id = $1 and state = 'running' and kind <> 'vm:delete'",
    )
    .bind(vm.to_string())
    .execute(&mut *tx)
    .await
    .context("ask a VM's tasks to end")?;
    Ok(ended)
}

/// What needs the VM to run and has not begun fails; what runs is ended by the stop itself.
pub(super) async fn end_for_stop(
    tx: &mut Tx<'_>,
    vm: VmId,
    now: Timestamp,
) -> Result<Vec<Task>, StoreError> {
    const KINDS: &[TaskKind] =
        &[TaskKind::VmExecute, TaskKind::VmPause, TaskKind::VmResume, TaskKind::VmSnapshot];
    let fault = Fault::new(ErrorCode::VmStopped, "the VM was stopped before this began");
    write::end_pending_of_vm(tx, vm, KINDS, TaskState::Failed, &fault, now).await
}

pub(super) async fn request_execution(
    store: &Sql,
    id: VmId,
    new: NewExecution,
    task: NewTask,
    idempotency: Option<Idempotency>,
) -> Result<(Accepted, Execution), StoreError> {
    expect_kind(&task, task.kind == TaskKind::VmExecute)?;
    let mut writer = store.writer().await;
    let mut tx = writer.begin(&key_lock(idempotency.as_ref())).await?;
    let now = Timestamp::now();
    if let Some(earlier) = earlier(&mut tx, idempotency.as_ref(), now).await? {
        let execution = execution_of(&mut tx, &earlier.task).await?;
        return Ok((earlier, execution));
    }
    admit(&mut tx, id, &task).await?;
    tx.lock(Lock::VmState(id)).await?;
    let vm = write::vm_for(&mut tx, id, &task).await?;
    if !vm.state.takes_commands() {
        return Err(StoreError::WrongState { vm: Box::new(vm), action: "run commands" });
    }
    let task = Task { execution_id: Some(new.id), ..write::pending(&task, &vm, now) };
    let execution = Execution {
        id: new.id,
        project_id: vm.project_id,
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
    tx.commit("commit a request to execute").await?;
    Ok((Accepted { vm, task, repeated: false, cancelled: Vec::new() }, execution))
}

pub(super) async fn build_tools(
    store: &Sql,
    tools: &[ToolRequest],
    task: NewTask,
    idempotency: Option<Idempotency>,
) -> Result<AcceptedBuild, StoreError> {
    expect_kind(&task, task.kind == TaskKind::ToolBuild)?;
    let mut writer = store.writer().await;
    let mut tx = writer.begin(&key_lock(idempotency.as_ref())).await?;
    let now = Timestamp::now();
    if let Some(task) = earlier_task(&mut tx, idempotency.as_ref(), now).await? {
        if task.kind != TaskKind::ToolBuild {
            return Err(StoreError::IdempotencyConflict);
        }
        return Ok(AcceptedBuild { task, repeated: true });
    }
    let project = task.project.unwrap_or(ProjectId::DEFAULT);
    quotas::admit(&mut tx, project, quotas::ONE_TASK).await?;
    let tools = tools.iter().map(VmTool::asked).collect();
    let task = Task { tools, ..write::pending_of_no_vm(&task, now) };
    write::insert_task(&mut tx, &task).await?;
    remember(&mut tx, idempotency, task.id, now).await?;
    tx.commit("commit a request to build tools").await?;
    Ok(AcceptedBuild { task, repeated: false })
}

async fn execution_of(tx: &mut Tx<'_>, task: &Task) -> Result<Execution, StoreError> {
    const OF_TASK: &str =
        concat!("select ", execution_columns!(), " from executions where id = $1");
    let id = task.execution_id.ok_or(StoreError::IdempotencyConflict)?;
    let row = query(OF_TASK)
        .bind(id.to_string())
        .fetch_optional(&mut *tx)
        .await
        .context("read an execution")?;
    rows::execution(&row.ok_or(StoreError::Corrupt("execution"))?)
}

pub(super) async fn cancel_task(store: &Sql, id: TaskId) -> Result<CancelOutcome, StoreError> {
    let mut writer = store.writer().await;
    let mut tx = writer.begin(&[Lock::Task(id)]).await?;
    let now = Timestamp::now();
    let mut task = write::task(&mut tx, id).await?.ok_or(StoreError::TaskNotFound)?;
    if task.state.is_end() {
        return Ok(CancelOutcome::AlreadyEnded(task));
    }
    match task.kind {
        TaskKind::VmCreate
        | TaskKind::VmExecute
        | TaskKind::VmSnapshot
        | TaskKind::TemplateBuild
        | TaskKind::ToolBuild => {}
        TaskKind::VmStart
        | TaskKind::VmSuspend
        | TaskKind::VmStop
        | TaskKind::VmPause
        | TaskKind::VmResume
        | TaskKind::VmDelete => return Err(StoreError::NotCancellable { task: Box::new(task) }),
    }
    if task.state == TaskState::Running {
        task.cancel_requested = true;
        query("update tasks set cancel_requested = 1 where id = $1")
            .bind(id.to_string())
            .execute(&mut tx)
            .await
            .context("ask a task to end")?;
        tx.commit("commit a request to cancel").await?;
        return Ok(CancelOutcome::Requested(task));
    }
    let fault = Fault::new(ErrorCode::Cancelled, "cancelled before it began");
    task.cancel_requested = true;
    query("update tasks set cancel_requested = 1 where id = $1")
        .bind(id.to_string())
        .execute(&mut tx)
        .await
        .context("cancel a task")?;
    write::end_task(&mut tx, &mut task, TaskState::Cancelled, Some(fault.clone()), now).await?;
    write::end_execution(&mut tx, &task, None, now).await?;
    snapshots::settle(&mut tx, &task, None, None, now).await?;
    if matches!(task.kind, TaskKind::VmCreate | TaskKind::TemplateBuild) {
        let mut vm = write::vm_of(&mut tx, &task).await?;
        if let Some(next) = vm.state.apply(VmEvent::Failed) {
            let patch = VmPatch::default();
            write::move_vm(&mut tx, &mut vm, next, Some(fault), &patch, now).await?;
        }
    }
    tx.commit("commit a cancellation").await?;
    Ok(CancelOutcome::Cancelled(task))
}

/// The second of two equal requests waits for the first one's answer.
pub(super) fn key_lock(idempotency: Option<&Idempotency>) -> Vec<Lock<'_>> {
    idempotency.map(|asked| Lock::Key(&asked.key)).into_iter().collect()
}

pub(super) fn expect_kind(task: &NewTask, fits: bool) -> Result<(), StoreError> {
    if fits { Ok(()) } else { Err(StoreError::WrongKind { kind: task.kind }) }
}

/// The answer to an earlier request with the same key, as things are now.
pub(super) async fn earlier(
    tx: &mut Tx<'_>,
    idempotency: Option<&Idempotency>,
    now: Timestamp,
) -> Result<Option<Accepted>, StoreError> {
    let Some(task) = earlier_task(tx, idempotency, now).await? else { return Ok(None) };
    // The same key with a request that is of no VM.
    let id = task.vm_id.ok_or(StoreError::IdempotencyConflict)?;
    let vm = write::vm(tx, id).await?.ok_or(StoreError::Corrupt("idempotency key"))?;
    Ok(Some(Accepted { vm, task, repeated: true, cancelled: Vec::new() }))
}

async fn earlier_task(
    tx: &mut Tx<'_>,
    idempotency: Option<&Idempotency>,
    now: Timestamp,
) -> Result<Option<Task>, StoreError> {
    let Some(Idempotency { key, request_digest }) = idempotency else { return Ok(None) };
    let row = query("select digest, task_id from idempotency where key = $1 and created_at > $2")
        .bind(key.clone())
        .bind(now.plus_ms(-IDEMPOTENCY_MS).unix_ms())
        .fetch_optional(&mut *tx)
        .await
        .context("look up an idempotency key")?;
    let Some(row) = row else { return Ok(None) };
    let r = rows::Reader { row: &row, noun: "idempotency key" };
    if r.get::<&[u8]>(0)? != request_digest.as_slice() {
        return Err(StoreError::IdempotencyConflict);
    }
    write::task(tx, r.parsed(1)?).await?.ok_or_else(|| r.corrupt()).map(Some)
}

/// Keeps a key with the task that it asked for, and drops the keys that are too old.
pub(super) async fn remember(
    tx: &mut Tx<'_>,
    idempotency: Option<Idempotency>,
    task: TaskId,
    now: Timestamp,
) -> Result<(), StoreError> {
    let Some(Idempotency { key, request_digest }) = idempotency else { return Ok(()) };
    let keep = in_turn(&[
        "delete from idempotency where created_at <= $4",
        "insert into idempotency (key, digest, task_id, created_at) values ($1, $2, $3, $5)",
    ])
    .bind(key)
    .bind(request_digest.to_vec())
    .bind(task.to_string())
    .bind(now.plus_ms(-IDEMPOTENCY_MS).unix_ms())
    .bind(now.unix_ms());
    tx.run(keep).await.context("keep an idempotency key")
}
