//! New VMs: alone, or as the clones of a fork.

use super::{
    Lock, Sql, Tx,
    place::Fleet,
    query::{Builder, query, together},
    quotas, requests,
    rows::{self, task_columns, vm_columns},
    snapshots, templates, write,
};
use crate::{
    Accepted, Capacity, Forked, Idempotency, NewSnapshot, NewTask, NewVm, StoreError,
    error::{Context, is_taken},
};
use aether_types::{
    Origin, ProjectId, Snapshot, SnapshotId, SnapshotPurpose, SnapshotState, Task, TaskKind,
    TemplateId, TemplateState, Timestamp, Vm, VmId, VmState, VmTool,
};

pub(super) async fn create_vm(
    store: &Sql,
    new: NewVm,
    task: NewTask,
    capacity: Capacity,
    idempotency: Option<Idempotency>,
) -> Result<Accepted, StoreError> {
    let builder = matches!(new.spec.origin, Origin::Builder(_));
    requests::expect_kind(&task, task.kind == TaskKind::VmCreate && !builder)?;
    let now = Timestamp::now();
    let mut vm = creating(new, task.project.unwrap_or(ProjectId::DEFAULT), now);
    let mut task = write::pending(&task, &vm, now);

    let mut writer = store.writer().await;
    let mut tx = writer.begin(&requests::key_lock(idempotency.as_ref())).await?;
    if let Some(earlier) = requests::earlier(&mut tx, idempotency.as_ref(), now).await? {
        return Ok(earlier);
    }
    quotas::admit(&mut tx, vm.project_id, quotas::new_vms(1, quotas::machine(&vm))).await?;
    tx.lock(Lock::Creation).await?;
    admit(&mut tx, capacity, 1, vm.spec.origin, vm.project_id).await?;
    let mut fleet = Fleet::read(&mut tx).await?;
    insert_vm(&mut tx, &mut fleet, &mut vm, &mut task).await?;
    requests::remember(&mut tx, idempotency, task.id, now).await?;
    tx.commit("commit a VM's creation").await?;
    Ok(Accepted { vm, task, repeated: false, cancelled: Vec::new() })
}

pub(super) async fn fork_vm(
    store: &Sql,
    id: VmId,
    new: NewSnapshot,
    task: NewTask,
    clones: Vec<(NewVm, NewTask)>,
    capacity: Capacity,
    idempotency: Option<Idempotency>,
) -> Result<Forked, StoreError> {
    let fits = task.kind == TaskKind::VmSnapshot && new.purpose == SnapshotPurpose::Fork;
    requests::expect_kind(&task, fits)?;
    for (_, task) in &clones {
        requests::expect_kind(task, task.kind == TaskKind::VmCreate)?;
    }
    let mut writer = store.writer().await;
    let mut tx = writer.begin(&requests::key_lock(idempotency.as_ref())).await?;
    let now = Timestamp::now();
    if let Some(earlier) = requests::earlier(&mut tx, idempotency.as_ref(), now).await? {
        return forked(&mut tx, earlier).await;
    }
    // What is counted does not change with the VM's state.
    let source = write::vm_for(&mut tx, id, &task).await?;
    if source.state.takes_snapshots() {
        quotas::admit_on_vm(&mut tx, &task, quotas::fork(&source, clones.len())).await?;
    }
    tx.lock(Lock::Creation).await?;
    tx.lock(Lock::VmState(id)).await?;
    let vm = write::vm_for(&mut tx, id, &task).await?;
    if !vm.state.takes_snapshots() {
        return Err(StoreError::WrongState { vm: Box::new(vm), action: "be forked" });
    }
    let count = u32::try_from(clones.len()).unwrap_or(u32::MAX);
    // The snapshot that they begin as is recorded with them.
    admit(&mut tx, capacity, count, Origin::Image, vm.project_id).await?;
    let snapshot = snapshots::creating(new, &vm, now);
    let task = Task { snapshot_id: Some(snapshot.id), ..write::pending(&task, &vm, now) };
    snapshots::insert(&mut tx, &snapshot).await?;
    write::insert_task(&mut tx, &task).await?;
    let clones = insert_clones(&mut tx, &snapshot, clones, now).await?;
    requests::remember(&mut tx, idempotency, task.id, now).await?;
    tx.commit("commit a fork").await?;
    let accepted = Accepted { vm, task, repeated: false, cancelled: Vec::new() };
    Ok(Forked { accepted, snapshot, clones })
}

async fn insert_clones(
    tx: &mut Tx<'_>,
    snapshot: &Snapshot,
    clones: Vec<(NewVm, NewTask)>,
    now: Timestamp,
) -> Result<Vec<(Vm, Task)>, StoreError> {
    let mut made = Vec::with_capacity(clones.len());
    let mut fleet = Fleet::read(tx).await?;
    for (place, (mut new, task)) in (0_i64..).zip(clones) {
        new.spec.origin = Origin::Snapshot(snapshot.id);
        let mut vm = creating(new, snapshot.project_id, now);
        let mut task = write::pending(&task, &vm, now);
        insert_vm(tx, &mut fleet, &mut vm, &mut task).await?;
        query("insert into forks (snapshot_id, place, vm_id, task_id) values ($1, $2, $3, $4)")
            .bind(snapshot.id.to_string())
            .bind(place)
            .bind(vm.id.to_string())
            .bind(task.id.to_string())
            .execute(&mut *tx)
            .await
            .context("record a clone")?;
        made.push((vm, task));
    }
    Ok(made)
}

/// The answer to an earlier request to fork, as things are now.
async fn forked(tx: &mut Tx<'_>, accepted: Accepted) -> Result<Forked, StoreError> {
    const VMS: &str = concat!(
        "select ",
        vm_columns!(),
        " from vms join (select place, vm_id from forks where snapshot_id = $1) as made \
         on vm_id = id order by place"
    );
    const TASKS: &str = concat!(
        "select ",
        task_columns!(),
        " from tasks join (select place, task_id from forks where snapshot_id = $1) as made \
         on task_id = id order by place"
    );
    let snapshot = snapshots::of_task(tx, &accepted.task).await?;
    let id = snapshot.id.to_string();
    let vms = query(VMS).bind(id.clone()).fetch_all(&mut *tx).await.context("read clones")?;
    let tasks =
        query(TASKS).bind(id).fetch_all(&mut *tx).await.context("read the tasks of clones")?;
    let vms = rows::all(&vms, rows::vm)?;
    let clones = vms.into_iter().zip(rows::all(&tasks, rows::task)?).collect();
    Ok(Forked { accepted, snapshot, clones })
}

/// A VM as it begins.
pub(super) fn creating(new: NewVm, project_id: ProjectId, now: Timestamp) -> Vm {
    let timeout_ms =
        new.spec.timeout_s.map(|s| i64::try_from(s).unwrap_or(i64::MAX).saturating_mul(1000));
    let tools = new.spec.tools.iter().map(VmTool::asked).collect();
    Vm {
        id: new.id,
        project_id,
        name: new.name,
        state: VmState::Creating,
        reason: None,
        spec: new.spec,
        worker_id: None,
        address: None,
        created_at: now,
        updated_at: now,
        expires_at: timeout_ms.map(|ms| now.plus_ms(ms)),
        start: None,
        memory: None,
        tools,
        generation: 1,
    }
}

/// Records a VM in `creating` with its task, whose dispatch is owed, and gives it a worker where
/// one has room. The transaction holds the lock of creations.
pub(super) async fn insert_vm(
    tx: &mut Tx<'_>,
    fleet: &mut Fleet,
    vm: &mut Vm,
    task: &mut Task,
) -> Result<(), StoreError> {
    let place = fleet.place(tx, &vm.spec).await?;
    vm.worker_id = place.worker();
    task.progress = place.progress();
    let progress = task.progress.as_ref();
    let progress = progress.map(|p| rows::json(p, "progress to record")).transpose()?;
    let (origin, builder) = match vm.spec.origin {
        Origin::Image => (None, false),
        Origin::Template(id) => (Some(id.to_string()), false),
        Origin::Snapshot(id) => (Some(id.to_string()), false),
        Origin::Builder(_) => (None, true),
    };
    let insert = together(&[
        "insert into vms (id, name, state, spec, driver, created_at, updated_at, expires_at, \
         generation, origin, builder, project_id, vcpus, memory_mb, worker_id) \
         values ($1, $2, 'creating', $3, $4, $5, $5, $6, 1, $7, $8, $14, $15, $16, $17)",
        "insert into vm_changes (vm_id, generation, state, at) values ($1, 1, 'creating', $5)",
        "insert into tasks (id, kind, state, priority, vm_id, snapshot_id, attempts, \
         max_attempts, epoch, cancel_requested, created_at, project_id, progress) \
         values ($9, $10, 'pending', $11, $1, $12, 0, $13, 0, 0, $5, $14, $18)",
        "insert into outbox (task_id, waits) values ($9, $19)",
    ])
    .bind(vm.id.to_string())
    .bind(vm.name.clone())
    .bind(rows::json(&vm.spec, "VM to record")?)
    .bind(vm.spec.driver.as_str())
    .bind(vm.created_at.unix_ms())
    .bind(vm.expires_at.map(Timestamp::unix_ms))
    .bind(origin)
    .bind(i64::from(builder))
    .bind(task.id.to_string())
    .bind(task.kind.as_str())
    .bind(task.priority.as_str())
    .bind(task.snapshot_id.map(|s| s.to_string()))
    .bind(task.max_attempts)
    .bind(vm.project_id.to_string())
    .bind(vm.spec.vcpus)
    .bind(vm.spec.memory_mb)
    .bind(vm.worker_id.map(|worker| worker.to_string()))
    .bind(progress)
    .bind(place.waits());
    match tx.run(insert).await {
        Err(error) if is_taken(&error, "vms.name", "vms_live_name") => {
            return Err(StoreError::NameTaken { name: vm.name.clone() });
        }
        inserted => inserted.context("record a VM")?,
    }
    insert_labels(tx, vm).await
}

async fn insert_labels(tx: &mut Tx<'_>, vm: &Vm) -> Result<(), StoreError> {
    if vm.spec.labels.is_empty() {
        return Ok(());
    }
    let mut insert = Builder::new("insert into vm_labels (vm_id, key, value) values ");
    for (i, (key, value)) in vm.spec.labels.iter().enumerate() {
        insert.push(if i == 0 { "(" } else { ", (" }).push_bind(vm.id.to_string());
        insert.push(", ").push_bind(key).push(", ").push_bind(value).push(")");
    }
    insert.build().execute(&mut *tx).await.context("record a VM's labels")?;
    Ok(())
}

/// One statement answers what a creation depends on; a subquery that is not asked for is not run.
/// The first counts in the index that keeps live names apart.
const ADMIT: &str = "select \
     case when $1 = 1 then (select count(*) from vms where state <> 'deleted') \
     - (select count(*) from vms where builder = 1 and state <> 'deleted') end, \
     case when $2 = 1 then (select count(*) from vms where state in ('creating', 'starting')) end, \
     (select state from templates where id = $3 and project_id = $5), \
     (select state from snapshots where id = $4 and project_id = $5 and purpose = 'user')";

/// Is there room for so many VMs, and can they begin as they are to?
async fn admit(
    tx: &mut Tx<'_>,
    capacity: Capacity,
    count: u32,
    origin: Origin,
    project: ProjectId,
) -> Result<(), StoreError> {
    let (template, snapshot) = match origin {
        Origin::Template(id) => (Some(id), None),
        Origin::Snapshot(id) => (None, Some(id)),
        Origin::Image | Origin::Builder(_) => (None, None),
    };
    if capacity == Capacity::default() && template.is_none() && snapshot.is_none() {
        return Ok(());
    }
    match origin {
        Origin::Template(id) => tx.lock(Lock::OriginTemplate(id)).await?,
        Origin::Snapshot(id) => tx.lock(Lock::OriginSnapshot(id)).await?,
        Origin::Image | Origin::Builder(_) => {}
    }
    let row = query(ADMIT)
        .bind(capacity.vms_max.is_some())
        .bind(capacity.starting_max.is_some())
        .bind(template.map(|id| id.to_string()))
        .bind(snapshot.map(|id| id.to_string()))
        .bind(project.to_string())
        .fetch_one(&mut *tx)
        .await
        .context("look whether there is room for a VM")?;
    let r = rows::Reader { row: &row, noun: "VM" };
    room(r.get(0)?, count, capacity.vms_max, "VMs")?;
    room(r.get(1)?, count, capacity.starting_max, "VMs that are being created or started")?;
    if let Some(id) = template {
        expect_template(tx, id, r.parsed_option(2)?).await?;
    }
    if let Some(id) = snapshot {
        expect_snapshot(tx, id, r.parsed_option(3)?).await?;
    }
    Ok(())
}

fn room(
    there: Option<i64>,
    count: u32,
    max: Option<u32>,
    what: &'static str,
) -> Result<(), StoreError> {
    let (Some(there), Some(max)) = (there, max) else { return Ok(()) };
    if there.saturating_add(i64::from(count)) <= i64::from(max) {
        Ok(())
    } else {
        Err(StoreError::TooManyVms { what, max })
    }
}

async fn expect_template(
    tx: &mut Tx<'_>,
    id: TemplateId,
    state: Option<TemplateState>,
) -> Result<(), StoreError> {
    match state {
        Some(TemplateState::Building | TemplateState::Ready) => Ok(()),
        None | Some(TemplateState::Deleted) => Err(StoreError::TemplateNotFound),
        Some(TemplateState::Failed) => {
            let failed = templates::read(tx, id).await?.ok_or(StoreError::TemplateNotFound)?;
            let why = failed.reason.map(|fault| format!(": {}", fault.message)).unwrap_or_default();
            let detail = format!("the template `{}:{}` failed{why}", failed.name, failed.tag);
            Err(StoreError::TemplateNotReady { detail })
        }
    }
}

async fn expect_snapshot(
    tx: &mut Tx<'_>,
    id: SnapshotId,
    state: Option<SnapshotState>,
) -> Result<(), StoreError> {
    match state {
        Some(SnapshotState::Creating | SnapshotState::Ready) => Ok(()),
        None | Some(SnapshotState::Deleted) => Err(StoreError::SnapshotNotFound),
        Some(SnapshotState::Failed) => {
            let failed = snapshots::read(tx, id).await?.ok_or(StoreError::SnapshotNotFound)?;
            let why = failed.reason.map(|fault| format!(": {}", fault.message)).unwrap_or_default();
            Err(StoreError::SnapshotNotReady { detail: format!("the snapshot failed{why}") })
        }
    }
}
