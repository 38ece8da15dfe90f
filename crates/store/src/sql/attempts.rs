//! Attempts at tasks, each fenced by its epoch.

use super::{
    Lock, Sql, Tx,
    place::{self, Fleet, Place},
    query::{query, together},
    rows,
    rows::task_columns,
    snapshots, workers, write,
};
use crate::{
    AttemptEnd, Begin, ExecutionEnd, Registration, StoreError, VmChange, VmPatch, error::Context,
};
use aether_types::{
    ErrorCode, ExecutionId, ExecutionState, Fault, RetainedOutput, SnapshotId, Task, TaskId,
    TaskKind, TaskState, Timestamp, VmEvent, VmState, VmTool, WorkerId,
};

/// Whether what is said of a task's attempt counts: the worker that began it is in no registry, or
/// there still as it was then. One that was declared lost, or has registered anew, has no say from
/// that moment on, whether or not its VMs are settled yet.
macro_rules! counts {
    () => {
        "not exists (select 1 from workers where workers.id = tasks.worker_id \
         and (workers.presence <> 'present' or workers.epoch <> tasks.registration))"
    };
}

pub(super) use counts;

const COUNTS: &str = concat!("select 1 from tasks where id = $1 and ", counts!());

const BEGIN: &str = concat!(
    "update tasks set state = 'running', worker_id = $2, registration = $5, epoch = $3, \
     attempts = attempts + 1, started_at = coalesce(started_at, $4), error_code = null, error_message = null \
     where id = $1 and state in ('pending', 'running') and epoch < $3 \
     and attempts < max_attempts \
     and not exists (select 1 from workers where workers.id = $2 \
     and (workers.presence <> 'present' or workers.epoch <> $5 \
     or exists (select 1 from vms where vms.id = tasks.vm_id and (vms.worker_id <> $2 \
     or vms.worker_id is null and tasks.kind <> 'vm:delete')))) returning ",
    task_columns!()
);

const END: &str = concat!(
    "update tasks set state = $3, error_code = $4, error_message = $5, finished_at = $6 \
     where id = $1 and epoch = $2 and state = 'running' and ",
    counts!(),
    " returning ",
    task_columns!()
);

pub(super) async fn begin(
    store: &Sql,
    id: TaskId,
    by: Registration,
    epoch: i64,
) -> Result<Begin, StoreError> {
    let mut writer = store.writer().await;
    let now = Timestamp::now();
    // Nearly always this one statement is all.
    let begun = writer.lone(begin_query(id, by, epoch, now), "begin an attempt").await?;
    if let Some(row) = begun.first() {
        return Ok(Begin::Go(rows::task(row)?));
    }
    let mut tx = writer.begin(&[Lock::Creation, Lock::Task(id)]).await?;
    let task = write::task(&mut tx, id).await?.ok_or(StoreError::TaskNotFound)?;
    if task.state.is_end() {
        return Ok(Begin::Ended(task));
    }
    if epoch <= task.epoch || !workers::is_current(&mut tx, by).await? {
        return Ok(Begin::Fenced);
    }
    if !is_at(&mut tx, &task, by.worker).await? {
        if task.attempts < task.max_attempts && take_here(&mut tx, &task, by.worker).await? {
            let begin = begin_query(id, by, epoch, now).fetch_all(&mut tx).await;
            let begun = begin.context("begin an attempt")?;
            let row = begun.first().ok_or(StoreError::Fenced)?;
            let task = rows::task(row)?;
            tx.commit("commit an attempt").await?;
            return Ok(Begin::Go(task));
        }
        owe(&mut tx, &task).await?;
        tx.commit("commit that a task is another worker's").await?;
        return Ok(Begin::Elsewhere(task));
    }
    if task.attempts < task.max_attempts {
        // What was in the way is gone by now; the lease runs out, and the next attempt begins.
        return Ok(Begin::Fenced);
    }
    let end = exhausted(&task);
    let task = finish(&mut tx, task, &end, now).await?;
    tx.commit("commit the end of a task").await?;
    Ok(Begin::Ended(task))
}

fn begin_query<'q>(
    id: TaskId,
    by: Registration,
    epoch: i64,
    now: Timestamp,
) -> super::query::Query<'q> {
    query(BEGIN)
        .bind(id.to_string())
        .bind(by.worker.to_string())
        .bind(epoch)
        .bind(now.unix_ms())
        .bind(by.epoch)
}

/// Whether the task may be begun by this worker, as `BEGIN` asks.
async fn is_at(tx: &mut Tx<'_>, task: &Task, worker: WorkerId) -> Result<bool, StoreError> {
    if task.vm_id.is_none() || workers::read(tx, worker).await?.is_none() {
        return Ok(true);
    }
    let at = write::vm_of(tx, task).await?.worker_id;
    Ok(at == Some(worker) || at.is_none() && task.kind == TaskKind::VmDelete)
}

/// A creation that came to nobody in particular: the worker that claimed it gets it where it fits.
async fn take_here(tx: &mut Tx<'_>, task: &Task, worker: WorkerId) -> Result<bool, StoreError> {
    let makes =
        matches!(task.kind, TaskKind::VmCreate | TaskKind::TemplateBuild | TaskKind::VmStart);
    if !makes {
        return Ok(false);
    }
    let vm = write::vm_of(tx, task).await?;
    if vm.worker_id.is_some() {
        return Ok(false);
    }
    let mut here = Fleet::read(tx).await?.alone(worker);
    match here.place(tx, &vm.spec).await? {
        Place::On(worker) => {
            place::put(tx, vm.id, worker).await?;
            Ok(true)
        }
        Place::Waits(_) | Place::Anywhere => Ok(false),
    }
}

/// Its dispatch is owed again: to where its VM is, or once it is somewhere.
async fn owe(tx: &mut Tx<'_>, task: &Task) -> Result<(), StoreError> {
    let waits = write::vm_of(tx, task).await?.worker_id.is_none();
    query(
        "insert into outbox (task_id, waits) values ($1, $2) \
         on conflict (task_id) do update set waits = $2",
    )
    .bind(task.id.to_string())
    .bind(waits)
    .execute(&mut *tx)
    .await
    .context("owe a dispatch")?;
    Ok(())
}

/// What becomes of a task whose attempts are used up. Nobody knows what its last attempt did, so
/// a VM on its way somewhere has failed; one that was to be paused, resumed or deleted is what it
/// was (a deletion can be asked for again).
fn exhausted(task: &Task) -> AttemptEnd {
    let attempts = task.attempts;
    let fault =
        Fault::new(ErrorCode::AttemptsExhausted, format!("gave up after {attempts} attempts"));
    let vm = match task.kind {
        TaskKind::VmCreate
        | TaskKind::VmStart
        | TaskKind::VmStop
        | TaskKind::VmSuspend
        | TaskKind::TemplateBuild => Some(VmChange {
            event: VmEvent::Failed,
            reason: Some(fault.clone()),
            patch: VmPatch::default(),
        }),
        TaskKind::VmPause
        | TaskKind::VmResume
        | TaskKind::VmSnapshot
        | TaskKind::ToolBuild
        | TaskKind::VmExecute
        | TaskKind::VmDelete => None,
    };
    let lost =
        Fault::new(ErrorCode::ExecutionLost, "nobody knows whether the command ran to its end");
    let execution = ExecutionEnd {
        state: ExecutionState::Failed,
        exit: None,
        error: Some(lost),
        duration_us: None,
        stdout: RetainedOutput::default(),
        stderr: RetainedOutput::default(),
    };
    AttemptEnd {
        state: TaskState::Failed,
        error: Some(fault),
        vm,
        execution: Some(execution),
        snapshot: None,
        template: None,
        tools: None,
    }
}

pub(super) async fn execution_started(
    store: &Sql,
    task: TaskId,
    epoch: i64,
    execution: ExecutionId,
    boot_id: &str,
) -> Result<(), StoreError> {
    let mut writer = store.writer().await;
    // Said again for the same boot it changes nothing: an attempt that takes over asks the guest
    // whether it knows the run.
    const STARTED: &str = concat!(
        "update executions set state = 'running', boot_id = $4, \
         started_at = coalesce(started_at, $5) \
         where id = $3 and task_id = $1 and (state = 'pending' or (state = 'running' and boot_id = $4)) \
         and exists (select 1 from tasks where id = $1 and epoch = $2 and state = 'running' and ",
        counts!(),
        ")"
    );
    let started = query(STARTED)
        .bind(task.to_string())
        .bind(epoch)
        .bind(execution.to_string())
        .bind(boot_id.to_owned())
        .bind(Timestamp::now().unix_ms())
        .execute(&mut writer)
        .await
        .context("mark an execution as started")?;
    drop(writer);
    if started > 0 {
        return Ok(());
    }
    let (Some(task), Some(execution)) =
        (super::tasks::get(store, task).await?, super::executions::get(store, execution).await?)
    else {
        return Err(StoreError::ExecutionNotFound);
    };
    let counts = query(COUNTS)
        .bind(task.id.to_string())
        .fetch_optional(store)
        .await
        .context("look whether an attempt counts")?;
    let other_boot = counts.is_some()
        && task.epoch == epoch
        && task.state == TaskState::Running
        && task.execution_id == Some(execution.id)
        && execution.state == ExecutionState::Running;
    Err(if other_boot { StoreError::AlreadyStarted } else { StoreError::Fenced })
}

pub(super) async fn end(
    store: &Sql,
    id: TaskId,
    epoch: i64,
    end: &AttemptEnd,
) -> Result<Task, StoreError> {
    if !end.state.is_end() {
        return Err(StoreError::NotAnEnd);
    }
    // A command's end leaves its VM alone.
    let touches_vm = end.vm.is_some() || end.snapshot.is_some();
    let locks: &[Lock<'_>] = if touches_vm { &[Lock::Task(id)] } else { &[] };
    let mut writer = store.writer().await;
    let mut tx = writer.begin(locks).await?;
    let now = Timestamp::now();
    let (error_code, error_message) = rows::fault_columns(end.error.as_ref());
    let ended = query(END)
        .bind(id.to_string())
        .bind(epoch)
        .bind(end.state.as_str())
        .bind(error_code)
        .bind(error_message)
        .bind(now.unix_ms())
        .fetch_all(&mut tx)
        .await
        .context("end an attempt")?;
    let Some(row) = ended.first() else {
        let known = write::task(&mut tx, id).await?.is_some();
        return Err(if known { StoreError::Fenced } else { StoreError::TaskNotFound });
    };
    let mut task = rows::task(row)?;
    effects(&mut tx, &mut task, end, now).await?;
    tx.commit("commit the end of an attempt").await?;
    Ok(task)
}

pub(super) async fn retry(
    store: &Sql,
    id: TaskId,
    epoch: i64,
    fault: Fault,
    otherwise: &AttemptEnd,
) -> Result<Task, StoreError> {
    if !otherwise.state.is_end() {
        return Err(StoreError::NotAnEnd);
    }
    let mut writer = store.writer().await;
    let mut tx = writer.begin(&[Lock::Task(id)]).await?;
    let now = Timestamp::now();
    let mut task = spoken_of(&mut tx, id, epoch).await?;
    if task.cancel_requested {
        task = finish(&mut tx, task, &cancelled(otherwise.clone()), now).await?;
    } else if task.attempts >= task.max_attempts {
        task = finish(&mut tx, task, otherwise, now).await?;
    } else {
        task.state = TaskState::Pending;
        let (error_code, error_message) = rows::fault_columns(Some(&fault));
        let back = together(&[
            "update tasks set state = 'pending', error_code = $2, error_message = $3 \
             where id = $1",
            "insert into outbox (task_id) values ($1) on conflict (task_id) do nothing",
        ])
        .bind(id.to_string())
        .bind(error_code)
        .bind(error_message);
        tx.run(back).await.context("give a task back")?;
        task.error = Some(fault);
    }
    tx.commit("commit a task given back").await?;
    Ok(task)
}

/// The task, where the attempt with this epoch still speaks for it.
pub(super) async fn spoken_of(tx: &mut Tx<'_>, id: TaskId, epoch: i64) -> Result<Task, StoreError> {
    let task = write::task(tx, id).await?.ok_or(StoreError::TaskNotFound)?;
    let counts = query(COUNTS)
        .bind(id.to_string())
        .fetch_optional(&mut *tx)
        .await
        .context("look whether an attempt counts")?;
    if task.epoch != epoch || task.state != TaskState::Running || counts.is_none() {
        return Err(StoreError::Fenced);
    }
    Ok(task)
}

/// The end of an attempt that failed after its task was asked to end.
pub(super) fn cancelled(mut end: AttemptEnd) -> AttemptEnd {
    let fault = Fault::new(ErrorCode::Cancelled, "cancelled on request");
    end.state = TaskState::Cancelled;
    end.snapshot = None;
    end.template = None;
    end.tools = None;
    if let Some(vm) = &mut end.vm {
        vm.reason = Some(fault.clone());
    }
    if let Some(execution) = &mut end.execution {
        execution.state = ExecutionState::Cancelled;
        execution.error = Some(fault.clone());
    }
    end.error = Some(fault);
    end
}

pub(super) async fn finish(
    tx: &mut Tx<'_>,
    mut task: Task,
    end: &AttemptEnd,
    now: Timestamp,
) -> Result<Task, StoreError> {
    write::end_task(tx, &mut task, end.state, end.error.clone(), now).await?;
    effects(tx, &mut task, end, now).await?;
    Ok(task)
}

/// What the end of a task does to its execution, to what it was to make, and to its VM.
async fn effects(
    tx: &mut Tx<'_>,
    task: &mut Task,
    end: &AttemptEnd,
    now: Timestamp,
) -> Result<(), StoreError> {
    if let Some(tools) = &end.tools {
        set_tools(tx, task, tools.clone()).await?;
    }
    write::end_execution(tx, task, end.execution.as_ref(), now).await?;
    let made = snapshots::settle(tx, task, end.snapshot.clone(), end.template.clone(), now).await?;
    let memory = made.filter(|_| task.kind == TaskKind::VmSuspend);
    let Some(change) = &end.vm else { return settle_memory(tx, task, memory, now).await };
    let mut vm = write::vm_of(tx, task).await?;
    // A failed attempt at a start says nothing about a VM that came to run meanwhile.
    let on_its_way = match (task.kind, change.event) {
        (TaskKind::VmCreate | TaskKind::VmStart, VmEvent::Failed) => {
            matches!(vm.state, VmState::Creating | VmState::Starting)
        }
        _ => true,
    };
    let Some(next) = vm.state.apply(change.event).filter(|_| on_its_way) else {
        return settle_memory(tx, task, memory, now).await;
    };
    vm.memory = memory.or(vm.memory);
    write::move_vm(tx, &mut vm, next, change.reason.clone(), &change.patch, now).await
}

/// What the task built.
async fn set_tools(tx: &mut Tx<'_>, task: &mut Task, tools: Vec<VmTool>) -> Result<(), StoreError> {
    query("update tasks set tools = $2 where id = $1")
        .bind(task.id.to_string())
        .bind(rows::json(&tools, "tools to record")?)
        .execute(&mut *tx)
        .await
        .context("record what was built")?;
    task.tools = tools;
    Ok(())
}

/// The memory of a VM whose state the end of the task leaves as it is: a suspended VM whose machine
/// was found gone meanwhile is stopped already, and has its memory; a start uses it up.
async fn settle_memory(
    tx: &mut Tx<'_>,
    task: &Task,
    memory: Option<SnapshotId>,
    now: Timestamp,
) -> Result<(), StoreError> {
    if memory.is_none() && task.kind != TaskKind::VmStart {
        return Ok(());
    }
    query(
        "update vms set memory = $2, updated_at = $3, generation = generation + 1 \
         where id = $1 and ($2 is null and memory is not null or $2 is not null and state = 'stopped')",
    )
    .bind(task.vm_id.map(|vm| vm.to_string()))
    .bind(memory.map(|id| id.to_string()))
    .bind(now.unix_ms())
    .execute(&mut *tx)
    .await
    .context("settle a VM's memory")?;
    Ok(())
}
