//! What becomes of the VMs of a worker that is lost, one VM and one transaction at a time: whoever
//! dies in the middle leaves the rest to the next who looks.
//!
//! | the VM | what becomes of it |
//! |---|---|
//! | is being created, attempts are left | waits for another worker |
//! | is being deleted | any worker completes that: the lost one removes the machine when it is back |
//! | anything else with a process | has failed, with `worker_lost`; its disk is where it was |
//!
//! Its other tasks have failed: nobody knows what became of them.

use super::{
    Lock, Sql, Tx, attempts, place,
    query::query,
    rows::{self, task_columns},
    workers, write,
};
use crate::{AttemptEnd, ExecutionEnd, Orphan, StoreError, VmPatch, error::Context};
use aether_types::{
    ErrorCode, ExecutionState, Fault, Presence, RetainedOutput, Task, TaskId, TaskKind, TaskState,
    Timestamp, Vm, VmEvent, VmId, VmState, Worker,
};

pub(super) async fn list(store: &Sql, limit: u32) -> Result<Vec<VmId>, StoreError> {
    let found = query(
        "select vms.id from vms join workers on workers.id = vms.worker_id \
         where workers.presence = 'lost' and vms.state <> 'deleted' \
         and (vms.state in ('creating', 'starting', 'running', 'paused', 'stopping') \
         or exists (select 1 from tasks where tasks.vm_id = vms.id \
         and tasks.state in ('pending', 'running'))) \
         order by vms.id limit $1",
    )
    .bind(limit)
    .fetch_all(store)
    .await
    .context("look for VMs of lost workers")?;
    rows::all(&found, |row| rows::Reader { row, noun: "VM" }.parsed(0))
}

pub(super) async fn settle(store: &Sql, id: VmId) -> Result<Option<Orphan>, StoreError> {
    let mut writer = store.writer().await;
    let mut tx = writer.begin(&[]).await?;
    let Some(worker) = write::vm(&mut tx, id).await?.and_then(|vm| vm.worker_id) else {
        return Ok(None);
    };
    // It cannot come back while this is under way, and comes back to what this has decided.
    tx.lock(Lock::WorkerStays(worker)).await?;
    tx.lock(Lock::Vm(id)).await?;
    let Some(worker) = workers::read(&mut tx, worker).await? else { return Ok(None) };
    let vm = write::vm(&mut tx, id).await?.ok_or(StoreError::VmNotFound)?;
    if vm.worker_id != Some(worker.id) || worker.standing.presence != Presence::Lost {
        return Ok(None);
    }
    let before = vm.generation;
    let orphan = settle_vm(&mut tx, vm, &worker).await?;
    if orphan.ended.is_empty() && !orphan.goes_on && orphan.vm.generation == before {
        return Ok(None);
    }
    tx.commit("commit what becomes of a lost worker's VM").await?;
    Ok(Some(orphan))
}

async fn settle_vm(tx: &mut Tx<'_>, vm: Vm, worker: &Worker) -> Result<Orphan, StoreError> {
    let now = Timestamp::now();
    let fault = Fault::new(
        ErrorCode::WorkerLost,
        format!("worker {} on {} does not answer any more", worker.id, worker.host),
    );
    let id = vm.id;
    let mut orphan = Orphan { vm, ended: Vec::new(), goes_on: false };
    for task in open_tasks(tx, id).await? {
        tx.lock(Lock::Task(task)).await?;
        let task = write::task(tx, task).await?.ok_or(StoreError::Corrupt("task"))?;
        if task.state.is_end() {
            continue;
        }
        if goes_on(&task, &orphan.vm) {
            again(tx, &task, &fault).await?;
            orphan.goes_on = true;
        } else if orphan.goes_on && waits_for_its_vm(tx, &task).await? {
            // The VM is created elsewhere, and this waits with it.
            again(tx, &task, &fault).await?;
        } else {
            let asked_to_end = task.cancel_requested;
            let end = end(&fault);
            let end = if asked_to_end { attempts::cancelled(end) } else { end };
            orphan.ended.push(attempts::finish(tx, task, &end, now).await?);
        }
    }
    if orphan.vm.state == VmState::Deleting {
        let of_nobody = query("update vms set worker_id = null where id = $1").bind(id.to_string());
        of_nobody.execute(&mut *tx).await.context("take a VM from its worker")?;
    } else if orphan.goes_on {
        place::unplace(tx, id).await?;
    } else if let Some(next) = orphan.vm.state.apply(VmEvent::Failed) {
        // A start that ended just now may have used up the VM's memory.
        orphan.vm = write::vm(tx, id).await?.ok_or(StoreError::VmNotFound)?;
        let patch = VmPatch::default();
        write::move_vm(tx, &mut orphan.vm, next, Some(fault), &patch, now).await?;
        return Ok(orphan);
    }
    orphan.vm = write::vm(tx, id).await?.ok_or(StoreError::VmNotFound)?;
    Ok(orphan)
}

/// A VM that is to be deleted while its worker is lost is nobody's: any worker completes that, and
/// the lost one removes the machine when it is back.
pub(super) async fn disown(tx: &mut Tx<'_>, vm: &mut Vm) -> Result<(), StoreError> {
    let disowned = query(
        "update vms set worker_id = null where id = $1 and exists (select 1 from workers \
         where workers.id = vms.worker_id and workers.presence = 'lost')",
    )
    .bind(vm.id.to_string())
    .execute(&mut *tx)
    .await
    .context("take a VM from its worker")?;
    if disowned > 0 {
        vm.worker_id = None;
    }
    Ok(())
}

/// Creations first, so that what waits for the VM is known to wait.
async fn open_tasks(tx: &mut Tx<'_>, vm: VmId) -> Result<Vec<TaskId>, StoreError> {
    const OPEN: &str = concat!(
        "select ",
        task_columns!(),
        " from tasks where vm_id = $1 and state in ('pending', 'running') order by created_at, id"
    );
    let found =
        query(OPEN).bind(vm.to_string()).fetch_all(&mut *tx).await.context("read a VM's tasks")?;
    let mut tasks = rows::all(&found, rows::task)?;
    tasks.sort_by_key(|task| !matches!(task.kind, TaskKind::VmCreate | TaskKind::TemplateBuild));
    Ok(tasks.into_iter().map(|task| task.id).collect())
}

/// Whether another worker can take the task up.
fn goes_on(task: &Task, vm: &Vm) -> bool {
    match task.kind {
        TaskKind::VmCreate | TaskKind::TemplateBuild => {
            vm.state == VmState::Creating
                && !task.cancel_requested
                && task.attempts < task.max_attempts
        }
        TaskKind::VmDelete => vm.state == VmState::Deleting,
        TaskKind::VmStart
        | TaskKind::VmStop
        | TaskKind::VmPause
        | TaskKind::VmResume
        | TaskKind::VmSuspend
        | TaskKind::VmSnapshot
        | TaskKind::VmExecute
        | TaskKind::ToolBuild => false,
    }
}

/// Whether it is a command that was not handed to a guest.
async fn waits_for_its_vm(tx: &mut Tx<'_>, task: &Task) -> Result<bool, StoreError> {
    let Some(id) = task.execution_id else { return Ok(false) };
    if task.cancel_requested || task.attempts >= task.max_attempts {
        return Ok(false);
    }
    let found = query("select 1 from executions where id = $1 and state = 'pending'")
        .bind(id.to_string())
        .fetch_optional(&mut *tx)
        .await;
    Ok(found.context("read an execution")?.is_some())
}

/// Pending again, so that nothing of the earlier attempt counts, and owed.
async fn again(tx: &mut Tx<'_>, task: &Task, fault: &Fault) -> Result<(), StoreError> {
    let (code, message) = rows::fault_columns(Some(fault));
    let again = super::query::together(&[
        "update tasks set state = 'pending', error_code = $2, error_message = $3 where id = $1",
        "insert into outbox (task_id) values ($1) on conflict (task_id) do nothing",
    ])
    .bind(task.id.to_string())
    .bind(code)
    .bind(message);
    tx.run(again).await.context("give a lost worker's task back")
}

fn end(fault: &Fault) -> AttemptEnd {
    let lost = Fault::new(
        ErrorCode::ExecutionLost,
        format!("{}; nobody knows whether the command ran to its end", fault.message),
    );
    AttemptEnd {
        state: TaskState::Failed,
        error: Some(fault.clone()),
        vm: None,
        execution: Some(ExecutionEnd {
            state: ExecutionState::Failed,
            exit: None,
            error: Some(lost),
            duration_us: None,
            stdout: RetainedOutput::default(),
            stderr: RetainedOutput::default(),
        }),
        snapshot: None,
        template: None,
        tools: None,
    }
}
