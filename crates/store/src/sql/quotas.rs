//! How much a project has, and whether it may have more. Counted in the transaction that makes
//! more, under the project's lock.

use aether_types::{
    ProjectId, Vm,
    project::{Quota, Usage},
};

use super::{
    Lock, Sql, Tx,
    query::{Row, query},
    rows,
};
use crate::{NewTask, StoreError, error::Context};

/// VMs that have a machine, or are about to.
const USAGE: &str = "select \
     (select count(*) from vms where project_id = $1 and state <> 'deleted' and builder = 0), \
     (select cast(coalesce(sum(vcpus), 0) as bigint) from vms where project_id = $1 \
     and state <> 'deleted' \
     and state in ('creating', 'starting', 'running', 'paused', 'stopping')), \
     (select cast(coalesce(sum(memory_mb), 0) as bigint) from vms where project_id = $1 \
     and state <> 'deleted' \
     and state in ('creating', 'starting', 'running', 'paused', 'stopping')), \
     (select count(*) from tasks where project_id = $1 and state = 'pending')";

/// A task that waits, and nothing else.
pub(super) const ONE_TASK: Usage = Usage { vms: 0, vcpus: 0, memory_mb: 0, waiting_tasks: 1 };

/// What a VM has as long as it has a machine.
pub(super) fn machine(vm: &Vm) -> Usage {
    Usage {
        vms: 0,
        vcpus: vm.spec.vcpus.into(),
        memory_mb: vm.spec.memory_mb.into(),
        waiting_tasks: 0,
    }
}

/// As many machines more, of new VMs, each with its task.
pub(super) fn new_vms(count: u64, one: Usage) -> Usage {
    Usage {
        vms: count,
        vcpus: one.vcpus.saturating_mul(count),
        memory_mb: one.memory_mb.saturating_mul(count),
        waiting_tasks: count,
    }
}

/// The clones of this VM, and its snapshot's task.
pub(super) fn fork(source: &Vm, clones: usize) -> Usage {
    let count = u64::try_from(clones).unwrap_or(u64::MAX);
    Usage { waiting_tasks: count.saturating_add(1), ..new_vms(count, machine(source)) }
}

/// For what makes something in a project: that it is there and stays, and has room for it. Nothing
/// after [`Lock::Project`] may be held.
pub(super) async fn admit(
    tx: &mut Tx<'_>,
    project: ProjectId,
    asked: Usage,
) -> Result<(), StoreError> {
    tx.lock(Lock::Project(project)).await?;
    let quota = read(tx, project).await?;
    check(tx, project, quota, asked).await
}

/// For what is asked of a VM that there is: its project stays as long as it does. Where nothing of
/// it is bounded nobody waits for another.
pub(super) async fn admit_on_vm(
    tx: &mut Tx<'_>,
    new: &NewTask,
    asked: Usage,
) -> Result<(), StoreError> {
    // The platform itself is not held up.
    let Some(project) = new.project else { return Ok(()) };
    if read(tx, project).await?.bounds(&asked) {
        admit(tx, project, asked).await?;
    }
    Ok(())
}

async fn check(
    tx: &mut Tx<'_>,
    project: ProjectId,
    quota: Quota,
    asked: Usage,
) -> Result<(), StoreError> {
    if !quota.bounds(&asked) {
        return Ok(());
    }
    let row = query(USAGE)
        .bind(project.to_string())
        .fetch_one(&mut *tx)
        .await
        .context("count what a project has")?;
    quota.admit(&usage(&row)?, &asked).map_err(StoreError::QuotaExceeded)
}

async fn read(tx: &mut Tx<'_>, project: ProjectId) -> Result<Quota, StoreError> {
    let row = query(
        "select quota_vms, quota_vcpus, quota_memory_mb, quota_waiting_tasks from projects \
         where id = $1 and deleted_at is null",
    )
    .bind(project.to_string())
    .fetch_optional(&mut *tx)
    .await
    .context("read a project's quota")?;
    quota(&row.ok_or(StoreError::ProjectNotFound)?, 0)
}

pub(super) async fn set(store: &Sql, id: ProjectId, quota: Quota) -> Result<(), StoreError> {
    let column = |limit: Option<u32>| limit.map(i64::from);
    let set = query(
        "update projects set quota_vms = $2, quota_vcpus = $3, quota_memory_mb = $4, \
         quota_waiting_tasks = $5 where id = $1 and deleted_at is null returning id",
    )
    .bind(id.to_string())
    .bind(column(quota.vms))
    .bind(column(quota.vcpus))
    .bind(column(quota.memory_mb))
    .bind(column(quota.waiting_tasks));
    let done = store.writer().await.lone(set, "set a project's quota").await?;
    if done.is_empty() { Err(StoreError::ProjectNotFound) } else { Ok(()) }
}

pub(super) async fn used(store: &Sql, id: ProjectId) -> Result<Usage, StoreError> {
    let asked = query(USAGE).bind(id.to_string());
    usage(&asked.fetch_one(store).await.context("count what a project has")?)
}

fn usage(row: &Row) -> Result<Usage, StoreError> {
    let r = rows::Reader { row, noun: "project" };
    let count = |column| u64::try_from(r.get::<i64>(column)?).map_err(|_| r.corrupt());
    Ok(Usage { vms: count(0)?, vcpus: count(1)?, memory_mb: count(2)?, waiting_tasks: count(3)? })
}

/// From the four columns that begin at `first`.
pub(super) fn quota(row: &Row, first: usize) -> Result<Quota, StoreError> {
    let r = rows::Reader { row, noun: "project" };
    let limit = |column| {
        let limit = r.get::<Option<i64>>(column)?;
        limit.map(u32::try_from).transpose().map_err(|_| r.corrupt())
    };
    Ok(Quota {
        vms: limit(first)?,
        vcpus: limit(first + 1)?,
        memory_mb: limit(first + 2)?,
        waiting_tasks: limit(first + 3)?,
    })
}
