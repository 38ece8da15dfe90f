//! The parts that transactions are made of.

use super::{
    Tx,
    query::{query, together},
    rows,
    rows::{task_columns, vm_columns},
    snapshots,
};
use crate::{ExecutionEnd, NewTask, StoreError, VmPatch, error::Context};
use aether_types::{
    Execution, ExecutionState, ExitStatus, Fault, ProjectId, RetainedOutput, Task, TaskId,
    TaskKind, TaskState, Timestamp, Vm, VmEvent, VmId, VmState,
};

const VM: &str = concat!("select ", vm_columns!(), " from vms where id = $1");
const TASK: &str = concat!("select ", task_columns!(), " from tasks where id = $1");

pub(super) async fn vm(tx: &mut Tx<'_>, id: VmId) -> Result<Option<Vm>, StoreError> {
    query(VM)
        .bind(id.to_string())
        .fetch_optional(&mut *tx)
        .await
        .context("read a VM")?
        .as_ref()
        .map(rows::vm)
        .transpose()
}

/// The VM that a request is about. Of another project it is one that there is not.
pub(super) async fn vm_for(tx: &mut Tx<'_>, id: VmId, new: &NewTask) -> Result<Vm, StoreError> {
    let found = vm(tx, id).await?;
    let found = found.filter(|vm| new.project.is_none_or(|project| project == vm.project_id));
    found.ok_or(StoreError::VmNotFound)
}

/// The VM of a task that is known to have one.
pub(super) async fn vm_of(tx: &mut Tx<'_>, task: &Task) -> Result<Vm, StoreError> {
    let found = match task.vm_id {
        Some(id) => vm(tx, id).await?,
        None => None,
    };
    found.ok_or(StoreError::Corrupt("task"))
}

pub(super) async fn task(tx: &mut Tx<'_>, id: TaskId) -> Result<Option<Task>, StoreError> {
    query(TASK)
        .bind(id.to_string())
        .fetch_optional(&mut *tx)
        .await
        .context("read a task")?
        .as_ref()
        .map(rows::task)
        .transpose()
}

pub(super) fn wrong_state(vm: Vm, event: VmEvent) -> StoreError {
    let action = match event {
        VmEvent::Started => "become running",
        VmEvent::StartRequested => "be started",
        VmEvent::PauseDone => "be paused",
        VmEvent::ResumeDone => "be resumed",
        VmEvent::StopRequested => "be stopped",
        VmEvent::Stopped => "become stopped",
        VmEvent::Failed => "become failed",
        VmEvent::DeleteRequested => "be deleted",
        VmEvent::Deleted => "become deleted",
    };
    StoreError::WrongState { vm: Box::new(vm), action }
}

/// Moves a VM to its next state, and keeps the change. `vm` is then as it is stored.
pub(super) async fn move_vm(
    tx: &mut Tx<'_>,
    vm: &mut Vm,
    next: VmState,
    reason: Option<Fault>,
    patch: &VmPatch,
    now: Timestamp,
) -> Result<(), StoreError> {
    vm.state = next;
    vm.reason = reason;
    vm.updated_at = now;
    vm.generation += 1;
    vm.worker_id = patch.worker_id.or(vm.worker_id);
    if patch.start.is_some() {
        vm.start.clone_from(&patch.start);
    }
    if let Some(tools) = &patch.tools {
        vm.tools.clone_from(tools);
    }
    vm.memory = vm.memory.filter(|_| next.keeps_memory());
    // The address of a deleted VM goes to another.
    vm.address = if next == VmState::Deleted { None } else { patch.address.or(vm.address) };
    let start = vm.start.as_ref().map(|start| rows::json(start, "start to record")).transpose()?;
    let tools =
        patch.tools.as_ref().map(|tools| rows::json(tools, "tools to record")).transpose()?;
    let (reason_code, reason_message) = rows::fault_columns(vm.reason.as_ref());
    let change = together(&[
        "update vms set state = $2, reason_code = $3, reason_message = $4, worker_id = $7, \
         address = $8, updated_at = $5, generation = $6, start = $9, memory = $10, \
         tools = coalesce($11, tools) where id = $1",
        "insert into vm_changes (vm_id, state, reason_code, reason_message, at, generation) \
         values ($1, $2, $3, $4, $5, $6)",
    ])
    .bind(vm.id.to_string())
    .bind(next.as_str())
    .bind(reason_code)
    .bind(reason_message)
    .bind(now.unix_ms())
    .bind(vm.generation)
    .bind(vm.worker_id.map(|w| w.to_string()))
    .bind(vm.address.map(|a| a.to_string()))
    .bind(start)
    .bind(vm.memory.map(|s| s.to_string()))
    .bind(tools);
    tx.run(change).await.context("change a VM")
}

/// A task of a VM as it begins: of its VM's project, whoever asked.
pub(super) fn pending(new: &NewTask, vm: &Vm, now: Timestamp) -> Task {
    Task { vm_id: Some(vm.id), project_id: vm.project_id, ..pending_of_no_vm(new, now) }
}

pub(super) fn pending_of_no_vm(new: &NewTask, now: Timestamp) -> Task {
    Task {
        id: new.id,
        project_id: new.project.unwrap_or(ProjectId::DEFAULT),
        kind: new.kind,
        state: TaskState::Pending,
        priority: new.priority,
        vm_id: None,
        execution_id: None,
        snapshot_id: None,
        attempts: 0,
        max_attempts: new.max_attempts,
        worker_id: None,
        epoch: 0,
        cancel_requested: false,
        created_at: now,
        started_at: None,
        finished_at: None,
        error: None,
        tools: Vec::new(),
        progress: None,
    }
}

/// Records a pending task, and that its dispatch is owed.
pub(super) async fn insert_task(tx: &mut Tx<'_>, task: &Task) -> Result<(), StoreError> {
    let tools = Some(&task.tools).filter(|tools| !tools.is_empty());
    let tools = tools.map(|tools| rows::json(tools, "tools to record")).transpose()?;
    let insert = together(&[
        "insert into tasks (id, kind, state, priority, vm_id, execution_id, attempts, \
         max_attempts, epoch, cancel_requested, created_at, snapshot_id, tools, project_id) \
         values ($1, $2, 'pending', $3, $4, $5, 0, $6, 0, 0, $7, $8, $9, $10)",
        // With a VM that waits for a worker waits all that is asked of it.
        "insert into outbox (task_id, waits) select $1, coalesce((select max(owed.waits) \
         from outbox as owed join tasks as other on other.id = owed.task_id \
         where other.vm_id = $4), 0)",
    ])
    .bind(task.id.to_string())
    .bind(task.kind.as_str())
    .bind(task.priority.as_str())
    .bind(task.vm_id.map(|vm| vm.to_string()))
    .bind(task.execution_id.map(|e| e.to_string()))
    .bind(task.max_attempts)
    .bind(task.created_at.unix_ms())
    .bind(task.snapshot_id.map(|s| s.to_string()))
    .bind(tools)
    .bind(task.project_id.to_string());
    tx.run(insert).await.context("record a task")
}

pub(super) async fn insert_execution(
    tx: &mut Tx<'_>,
    execution: &Execution,
) -> Result<(), StoreError> {
    let spec = rows::json(&execution.spec, "execution to record")?;
    query(
        "insert into executions (id, vm_id, task_id, spec, state, created_at, project_id) \
         values ($1, $2, $3, $4, 'pending', $5, $6)",
    )
    .bind(execution.id.to_string())
    .bind(execution.vm_id.to_string())
    .bind(execution.task_id.to_string())
    .bind(spec)
    .bind(execution.created_at.unix_ms())
    .bind(execution.project_id.to_string())
    .execute(&mut *tx)
    .await
    .context("record an execution")?;
    Ok(())
}

/// Ends a task whose row the transaction has read. `task` is then as it is stored.
pub(super) async fn end_task(
    tx: &mut Tx<'_>,
    task: &mut Task,
    state: TaskState,
    error: Option<Fault>,
    now: Timestamp,
) -> Result<(), StoreError> {
    task.state = state;
    task.error = error;
    task.finished_at = Some(now);
    let (error_code, error_message) = rows::fault_columns(task.error.as_ref());
    let end = together(&[
        "update tasks set state = $2, error_code = $3, error_message = $4, finished_at = $5 \
         where id = $1",
        "delete from outbox where task_id = $1",
    ])
    .bind(task.id.to_string())
    .bind(state.as_str())
    .bind(error_code)
    .bind(error_message)
    .bind(now.unix_ms());
    tx.run(end).await.context("end a task")
}

/// Ends the execution of a task that has ended, where it is still open. An execution never
/// outlives its task: without an `end` it gets one that follows from the task's.
pub(super) async fn end_execution(
    tx: &mut Tx<'_>,
    task: &Task,
    end: Option<&ExecutionEnd>,
    now: Timestamp,
) -> Result<(), StoreError> {
    let Some(id) = task.execution_id else { return Ok(()) };
    let id = id.to_string();
    let implied = implied_end(task);
    let end = end.unwrap_or(&implied);
    let (exit_code, exit_signal) = match end.exit {
        Some(ExitStatus::Code(code)) => (Some(code), None),
        Some(ExitStatus::Signal(signal)) => (None, Some(signal)),
        None => (None, None),
    };
    let (error_code, error_message) = rows::fault_columns(end.error.as_ref());
    query(
        "update executions set state = $2, exit_code = $3, exit_signal = $4, error_code = $5, \
         error_message = $6, finished_at = $7, duration_us = $8 \
         where id = $1 and state in ('pending', 'running')",
    )
    .bind(id.clone())
    .bind(end.state.as_str())
    .bind(exit_code)
    .bind(exit_signal)
    .bind(error_code)
    .bind(error_message)
    .bind(now.unix_ms())
    .bind(end.duration_us.map(rows::size_column))
    .execute(&mut *tx)
    .await
    .context("end an execution")?;
    insert_output(tx, &id, "stdout", &end.stdout).await?;
    insert_output(tx, &id, "stderr", &end.stderr).await
}

fn implied_end(task: &Task) -> ExecutionEnd {
    let lost =
        || Fault::new(aether_types::ErrorCode::ExecutionLost, "the task ended without a result");
    let (state, error) = match task.state {
        TaskState::Cancelled => (ExecutionState::Cancelled, task.error.clone()),
        TaskState::Failed => (ExecutionState::Failed, task.error.clone()),
        TaskState::Completed | TaskState::Pending | TaskState::Running => {
            (ExecutionState::Failed, Some(lost()))
        }
    };
    ExecutionEnd {
        state,
        exit: None,
        error,
        duration_us: None,
        stdout: RetainedOutput::default(),
        stderr: RetainedOutput::default(),
    }
}

async fn insert_output(
    tx: &mut Tx<'_>,
    execution: &str,
    stream: &'static str,
    output: &RetainedOutput,
) -> Result<(), StoreError> {
    if output.total_bytes == 0 {
        return Ok(());
    }
    query(
        "insert into outputs (execution_id, stream, head, tail, total_bytes) \
         values ($1, $2, $3, $4, $5) on conflict (execution_id, stream) do nothing",
    )
    .bind(execution.to_owned())
    .bind(stream)
    .bind(&output.head[..])
    .bind(&output.tail[..])
    .bind(rows::size_column(output.total_bytes))
    .execute(&mut *tx)
    .await
    .context("keep an execution's output")?;
    Ok(())
}

const END_PENDING: &str = concat!(
    "update tasks set state = $2, error_code = $3, error_message = $4, finished_at = $5 \
     where vm_id = $1 and state = 'pending' \
     and kind in ($6, $7, $8, $9, $10, $11, $12, $13, $14) returning ",
    task_columns!()
);

/// Every kind of a VM but a deletion.
const KINDS_MAX: usize = 9;

/// Ends the pending tasks of these kinds of a VM, with what they were to make or run.
pub(super) async fn end_pending_of_vm(
    tx: &mut Tx<'_>,
    vm: VmId,
    kinds: &[TaskKind],
    state: TaskState,
    fault: &Fault,
    now: Timestamp,
) -> Result<Vec<Task>, StoreError> {
    debug_assert!(kinds.len() <= KINDS_MAX);
    let id = vm.to_string();
    let mut end = query(END_PENDING)
        .bind(id.clone())
        .bind(state.as_str())
        .bind(fault.code.as_str())
        .bind(fault.message.clone())
        .bind(now.unix_ms());
    for place in 0..KINDS_MAX {
        end = end.bind(kinds.get(place).map(|k| k.as_str()));
    }
    let found = end.fetch_all(&mut *tx).await.context("end a VM's pending tasks")?;
    if found.is_empty() {
        return Ok(Vec::new());
    }
    let ends = together(&[
        "update executions set state = $2, error_code = $3, error_message = $4, \
         finished_at = $5 where vm_id = $1 and state in ('pending', 'running') \
         and not exists (select 1 from tasks where tasks.id = executions.task_id \
         and tasks.state in ('pending', 'running'))",
        "delete from outbox where exists (select 1 from tasks where tasks.id = outbox.task_id \
         and tasks.vm_id = $1 and tasks.state = $2)",
    ])
    .bind(id)
    .bind(state.as_str())
    .bind(fault.code.as_str())
    .bind(fault.message.clone())
    .bind(now.unix_ms());
    tx.run(ends).await.context("end a VM's pending executions")?;
    let ended = rows::all(&found, rows::task)?;
    for task in &ended {
        snapshots::settle(tx, task, None, None, now).await?;
    }
    Ok(ended)
}
