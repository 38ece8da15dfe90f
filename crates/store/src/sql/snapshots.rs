//! Snapshots: how they are asked for, made, deleted and read.

use super::{
    Lock, Sql, Tx,
    query::{Builder, query},
    requests,
    rows::{self, snapshot_columns},
    templates, write,
};
use crate::{
    Accepted, Idempotency, NewSnapshot, NewTask, Page, PageRequest, SnapshotFacts, SnapshotFilter,
    StoreError, VmPatch,
    error::{Context, is_taken},
};
use aether_types::{
    ErrorCode, Fault, ProjectId, Snapshot, SnapshotId, SnapshotPurpose, SnapshotState, Task,
    TaskKind, TaskState, Timestamp, Vm, VmEvent, VmId,
};

const GET: &str = concat!("select ", snapshot_columns!(), " from snapshots where id = $1");

const BY_NAME: &str = concat!(
    "select ",
    snapshot_columns!(),
    " from snapshots where project_id = $1 and name is not null and name = $2 \
     and state <> 'deleted'"
);

pub(super) async fn request(
    store: &Sql,
    id: VmId,
    new: NewSnapshot,
    task: NewTask,
    idempotency: Option<Idempotency>,
) -> Result<(Accepted, Snapshot), StoreError> {
    let stops = match (task.kind, new.purpose) {
        (TaskKind::VmSnapshot, SnapshotPurpose::User) => false,
        (TaskKind::VmSuspend, SnapshotPurpose::Memory) => true,
        _ => return Err(StoreError::WrongKind { kind: task.kind }),
    };
    let mut writer = store.writer().await;
    let mut tx = writer.begin(&requests::key_lock(idempotency.as_ref())).await?;
    let now = Timestamp::now();
    if let Some(earlier) = requests::earlier(&mut tx, idempotency.as_ref(), now).await? {
        let snapshot = of_task(&mut tx, &earlier.task).await?;
        return Ok((earlier, snapshot));
    }
    requests::admit(&mut tx, id, &task).await?;
    tx.lock(if stops { Lock::Vm(id) } else { Lock::VmState(id) }).await?;
    let mut vm = write::vm_for(&mut tx, id, &task).await?;
    let mut cancelled = Vec::new();
    if stops {
        let Some(next) = vm.state.apply(VmEvent::StopRequested) else {
            return Err(write::wrong_state(vm, VmEvent::StopRequested));
        };
        write::move_vm(&mut tx, &mut vm, next, None, &VmPatch::default(), now).await?;
        cancelled = requests::end_for_stop(&mut tx, id, now).await?;
    } else if !vm.state.takes_snapshots() {
        let action = "have a snapshot taken";
        return Err(StoreError::WrongState { vm: Box::new(vm), action });
    }
    let snapshot = creating(new, &vm, now);
    let task = Task { snapshot_id: Some(snapshot.id), ..write::pending(&task, &vm, now) };
    insert(&mut tx, &snapshot).await?;
    write::insert_task(&mut tx, &task).await?;
    requests::remember(&mut tx, idempotency, task.id, now).await?;
    tx.commit("commit a request for a snapshot").await?;
    Ok((Accepted { vm, task, repeated: false, cancelled }, snapshot))
}

/// A snapshot of this VM as it begins.
pub(super) fn creating(new: NewSnapshot, vm: &Vm, now: Timestamp) -> Snapshot {
    Snapshot {
        id: new.id,
        project_id: vm.project_id,
        name: new.name,
        purpose: new.purpose,
        state: SnapshotState::Creating,
        reason: None,
        vm_id: vm.id,
        worker_id: None,
        driver: vm.spec.driver,
        image: vm.spec.image.clone(),
        vcpus: vm.spec.vcpus,
        memory_mb: vm.spec.memory_mb,
        disk_mb: vm.spec.disk_mb,
        size_bytes: None,
        digest: None,
        paused_us: None,
        created_at: now,
        updated_at: now,
    }
}

pub(super) async fn insert(tx: &mut Tx<'_>, snapshot: &Snapshot) -> Result<(), StoreError> {
    if let Some(name) = &snapshot.name {
        // One that failed is about to be retired, and does not keep its name from another try.
        query(
            "update snapshots set state = 'deleted', updated_at = $2 \
             where project_id = $3 and name is not null and name = $1 and state <> 'deleted' \
             and state = 'failed'",
        )
        .bind(name.clone())
        .bind(snapshot.created_at.unix_ms())
        .bind(snapshot.project_id.to_string())
        .execute(&mut *tx)
        .await
        .context("free the name of a failed snapshot")?;
    }
    let inserted = query(
        "insert into snapshots (id, name, purpose, state, vm_id, driver, image, vcpus, memory_mb, \
         disk_mb, created_at, updated_at, project_id) \
         values ($1, $2, $3, 'creating', $4, $5, $6, $7, $8, $9, $10, $10, $11)",
    )
    .bind(snapshot.id.to_string())
    .bind(snapshot.name.clone())
    .bind(snapshot.purpose.as_str())
    .bind(snapshot.vm_id.to_string())
    .bind(snapshot.driver.as_str())
    .bind(snapshot.image.clone())
    .bind(snapshot.vcpus)
    .bind(snapshot.memory_mb)
    .bind(snapshot.disk_mb)
    .bind(snapshot.created_at.unix_ms())
    .bind(snapshot.project_id.to_string())
    .execute(&mut *tx)
    .await;
    if let (Err(error), Some(name)) = (&inserted, &snapshot.name)
        && is_taken(error, "snapshots.name", "snapshots_live_name")
    {
        return Err(StoreError::NameTaken { name: name.clone() });
    }
    inserted.context("record a snapshot")?;
    Ok(())
}

pub(super) async fn read(tx: &mut Tx<'_>, id: SnapshotId) -> Result<Option<Snapshot>, StoreError> {
    query(GET)
        .bind(id.to_string())
        .fetch_optional(&mut *tx)
        .await
        .context("read a snapshot")?
        .as_ref()
        .map(rows::snapshot)
        .transpose()
}

/// The snapshot that a task makes; for the answer to a request that was made before with the same
/// idempotency key. A task without one came from another kind of request.
pub(super) async fn of_task(tx: &mut Tx<'_>, task: &Task) -> Result<Snapshot, StoreError> {
    let id = task.snapshot_id.ok_or(StoreError::IdempotencyConflict)?;
    read(tx, id).await?.ok_or(StoreError::Corrupt("snapshot"))
}

/// What the end of a task does to the snapshot that it makes, and to the template whose snapshot
/// that is. Gives the snapshot where it is ready.
pub(super) async fn settle(
    tx: &mut Tx<'_>,
    task: &Task,
    facts: Option<SnapshotFacts>,
    template_digest: Option<String>,
    now: Timestamp,
) -> Result<Option<SnapshotId>, StoreError> {
    let Some(id) = task.snapshot_id else { return Ok(None) };
    let sealed = facts.filter(|_| task.state == TaskState::Completed);
    let size_bytes = sealed.as_ref().map(|facts| facts.size_bytes);
    let ready = if let Some(facts) = sealed {
        make_ready(tx, task, id, facts, now).await?
    } else {
        fail(tx, task, id, now).await?;
        false
    };
    if task.kind == TaskKind::TemplateBuild {
        let built = template_digest.filter(|_| ready);
        templates::settle(tx, task, built, size_bytes, now).await?;
    }
    Ok(Some(id).filter(|_| ready))
}

async fn make_ready(
    tx: &mut Tx<'_>,
    task: &Task,
    id: SnapshotId,
    facts: SnapshotFacts,
    now: Timestamp,
) -> Result<bool, StoreError> {
    let done = query(
        "update snapshots set state = 'ready', worker_id = $2, size_bytes = $3, digest = $4, \
         paused_us = $5, updated_at = $6 where id = $1 and state = 'creating'",
    )
    .bind(id.to_string())
    .bind(task.worker_id.map(|w| w.to_string()))
    .bind(rows::size_column(facts.size_bytes))
    .bind(facts.digest)
    .bind(rows::size_column(facts.paused_us))
    .bind(now.unix_ms())
    .execute(&mut *tx)
    .await
    .context("record that a snapshot is ready")?;
    Ok(done > 0)
}

async fn fail(
    tx: &mut Tx<'_>,
    task: &Task,
    id: SnapshotId,
    now: Timestamp,
) -> Result<(), StoreError> {
    let fault = implied_fault(task);
    query(
        "update snapshots set state = 'failed', reason_code = $2, reason_message = $3, \
         updated_at = $4 where id = $1 and state = 'creating'",
    )
    .bind(id.to_string())
    .bind(fault.code.as_str())
    .bind(fault.message)
    .bind(now.unix_ms())
    .execute(&mut *tx)
    .await
    .context("record that a snapshot failed")?;
    Ok(())
}

/// Why a task has not made what it was to make.
pub(super) fn implied_fault(task: &Task) -> Fault {
    let code = match task.state {
        TaskState::Cancelled => ErrorCode::Cancelled,
        TaskState::Failed | TaskState::Completed | TaskState::Pending | TaskState::Running => {
            ErrorCode::Internal
        }
    };
    task.error.clone().unwrap_or_else(|| Fault::new(code, "the task ended without a result"))
}

pub(super) async fn delete(store: &Sql, id: SnapshotId) -> Result<Snapshot, StoreError> {
    let mut writer = store.writer().await;
    let mut tx = writer.begin(&[Lock::Snapshot(id)]).await?;
    let mut snapshot = read(&mut tx, id).await?.ok_or(StoreError::SnapshotNotFound)?;
    if snapshot.state == SnapshotState::Deleted {
        return Ok(snapshot);
    }
    if let Some(detail) = kept_because(&mut tx, &snapshot).await? {
        return Err(StoreError::SnapshotNotReady { detail });
    }
    snapshot.state = SnapshotState::Deleted;
    snapshot.updated_at = Timestamp::now();
    mark_deleted(&mut tx, id, snapshot.updated_at).await?;
    tx.commit("commit a snapshot's deletion").await?;
    Ok(snapshot)
}

/// Why a snapshot cannot be deleted now, as a sentence for the client.
async fn kept_because(tx: &mut Tx<'_>, snapshot: &Snapshot) -> Result<Option<String>, StoreError> {
    let detail = match (snapshot.purpose, snapshot.state) {
        (SnapshotPurpose::Fork, _) => {
            "the snapshot is a fork's; it goes when the fork's VMs have begun"
        }
        (SnapshotPurpose::Memory, _) => {
            "the snapshot is the memory of a VM; it goes when the VM is started or deleted"
        }
        (SnapshotPurpose::Template, _) => "the snapshot is a template's; delete the template",
        (SnapshotPurpose::User, SnapshotState::Creating) => {
            "the snapshot is being made; wait for that, or cancel its task"
        }
        (
            SnapshotPurpose::User,
            SnapshotState::Ready | SnapshotState::Failed | SnapshotState::Deleted,
        ) => {
            let row = query(
                "select name from vms where origin = $1 and state in ('creating', 'starting') \
                 and state = 'creating' limit 1",
            )
            .bind(snapshot.id.to_string())
            .fetch_optional(&mut *tx)
            .await
            .context("look for VMs that begin as a snapshot")?;
            let Some(row) = row else { return Ok(None) };
            let name: &str = rows::Reader { row: &row, noun: "VM" }.get(0)?;
            return Ok(Some(format!(
                "the VM `{name}` is being created from the snapshot; wait for that, or delete the \
                 VM"
            )));
        }
    };
    Ok(Some(detail.to_owned()))
}

pub(super) async fn mark_deleted(
    tx: &mut Tx<'_>,
    id: SnapshotId,
    now: Timestamp,
) -> Result<(), StoreError> {
    query("update snapshots set state = 'deleted', updated_at = $2 where id = $1")
        .bind(id.to_string())
        .bind(now.unix_ms())
        .execute(&mut *tx)
        .await
        .context("delete a snapshot")?;
    Ok(())
}

/// `state <> 'deleted'` is for the index of the few that are left.
const RETIRE: &str = concat!(
    "update snapshots set state = 'deleted', updated_at = $1 \
     where state <> 'deleted' and state in ('ready', 'failed') \
     and (state = 'failed' or purpose = 'fork' \
     or (purpose = 'memory' and not exists (select 1 from vms \
     where vms.id = snapshots.vm_id and vms.memory = snapshots.id)) \
     or (purpose = 'template' and not exists (select 1 from templates \
     where templates.snapshot_id = snapshots.id and templates.state in ('building', 'ready')))) \
     and not exists (select 1 from vms where vms.origin = snapshots.id \
     and vms.state in ('creating', 'starting')) \
     and not exists (select 1 from templates join vms on vms.origin = templates.id \
     where templates.snapshot_id = snapshots.id and vms.state in ('creating', 'starting')) \
     returning ",
    snapshot_columns!()
);

pub(super) async fn retire(store: &Sql) -> Result<Vec<Snapshot>, StoreError> {
    let mut writer = store.writer().await;
    let retire = query(RETIRE).bind(Timestamp::now().unix_ms());
    let retired = writer.lone(retire, "retire snapshots").await?;
    rows::all(&retired, rows::snapshot)
}

pub(super) async fn get(store: &Sql, id: SnapshotId) -> Result<Option<Snapshot>, StoreError> {
    query(GET)
        .bind(id.to_string())
        .fetch_optional(store)
        .await
        .context("read a snapshot")?
        .as_ref()
        .map(rows::snapshot)
        .transpose()
}

pub(super) async fn by_name(
    store: &Sql,
    project: ProjectId,
    name: &str,
) -> Result<Option<Snapshot>, StoreError> {
    query(BY_NAME)
        .bind(project.to_string())
        .bind(name.to_owned())
        .fetch_optional(store)
        .await
        .context("read a snapshot by its name")?
        .as_ref()
        .map(rows::snapshot)
        .transpose()
}

pub(super) async fn list(
    store: &Sql,
    filter: &SnapshotFilter,
    page: PageRequest,
) -> Result<Page<Snapshot>, StoreError> {
    let limit = page.bounded_limit();
    let mut query = Builder::new(concat!("select ", snapshot_columns!(), " from snapshots where "));
    if filter.states.is_empty() {
        query.push("state <> 'deleted'");
    } else {
        query.push_in("state", filter.states.iter().map(|s| s.as_str()));
    }
    if let Some(project) = filter.project {
        query.push(" and project_id = ").push_bind(project.to_string());
    }
    if !filter.purposes.is_empty() {
        query.push(" and ").push_in("purpose", filter.purposes.iter().map(|s| s.as_str()));
    }
    if let Some(vm) = filter.vm_id {
        query.push(" and vm_id = ").push_bind(vm.to_string());
    }
    if let Some(worker) = filter.worker_id {
        query.push(" and worker_id = ").push_bind(worker.to_string());
    }
    if let Some(cursor) = page.after {
        query.push(" and (created_at, id) < (").push_bind(cursor.created_at_ms());
        query.push(", ").push_bind(cursor.id()).push(")");
    }
    query.push(" order by created_at desc, id desc limit ").push_bind(limit + 1);
    let found = query.build().fetch_all(store).await.context("list snapshots")?;
    Ok(Page::cut(rows::all(&found, rows::snapshot)?, limit, rows::snapshot_position))
}
