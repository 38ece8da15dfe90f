//! The registry of workers: who is there, by the store's own clock.

use super::{
    Lock, Sql, Tx, place,
    query::query,
    rows::{self, worker_columns},
    write,
};
use crate::{NewWorker, Registration, StoreError, error::Context};
use aether_types::{
    Presence, Standing, TaskId, Timestamp, Worker, WorkerEvent, WorkerId, WorkerLoad,
};

/// A worker that has left or is lost, and has no VM, is forgotten after this long: 30 days. Hosts
/// that come and go would fill the table.
const FORGET_MS: i64 = 30 * 24 * 3600 * 1000;

const GET: &str = concat!("select ", worker_columns!(), " from workers where id = $1");

const RENEW: &str = concat!(
    "update workers set heartbeat_at = $3 where id = $1 and epoch = $2 and presence = 'present' \
     returning ",
    worker_columns!()
);

pub(super) async fn register(store: &Sql, new: &NewWorker) -> Result<Worker, StoreError> {
    let mut writer = store.writer().await;
    let mut tx = writer.begin(&[Lock::Worker(new.id)]).await?;
    let now = tx.now().await?;
    forget(&mut tx, now).await?;
    let known = read(&mut tx, new.id).await?;
    let (standing, epoch) = known.map_or((Standing::NEW, 0), |known| (known.standing, known.epoch));
    let worker = Worker {
        id: new.id,
        host: new.host.clone(),
        zone: new.zone.clone(),
        labels: new.labels.clone(),
        drivers: new.drivers.clone(),
        capacity: new.capacity,
        template_folder: new.template_folder.clone(),
        stream_address: new.stream_address.clone(),
        version: new.version.clone(),
        standing: apply(standing, WorkerEvent::Registered)?,
        epoch: epoch + 1,
        registered_at: now,
        heartbeat_at: now,
        lease_ms: i64::try_from(new.lease.as_millis()).unwrap_or(i64::MAX),
    };
    keep(&mut tx, &worker).await?;
    tx.commit("commit a worker's registration").await?;
    Ok(worker)
}

async fn keep(tx: &mut Tx<'_>, worker: &Worker) -> Result<(), StoreError> {
    query(
        "insert into workers (id, host, zone, labels, drivers, capacity, template_folder, version, \
         presence, draining, epoch, registered_at, heartbeat_at, lease_ms, stream_address) \
         values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $12, $13, $14) \
         on conflict (id) do update set host = $2, zone = $3, labels = $4, drivers = $5, \
         capacity = $6, template_folder = $7, version = $8, presence = $9, draining = $10, \
         epoch = $11, registered_at = $12, heartbeat_at = $12, lease_ms = $13, \
         stream_address = $14",
    )
    .bind(worker.id.to_string())
    .bind(worker.host.clone())
    .bind(worker.zone.clone())
    .bind(rows::json(&worker.labels, "worker to record")?)
    .bind(rows::json(&worker.drivers, "worker to record")?)
    .bind(rows::json(&worker.capacity, "worker to record")?)
    .bind(worker.template_folder.clone())
    .bind(worker.version.clone())
    .bind(worker.standing.presence.as_str())
    .bind(worker.standing.draining)
    .bind(worker.epoch)
    .bind(worker.registered_at.unix_ms())
    .bind(worker.lease_ms)
    .bind(worker.stream_address.clone())
    .execute(&mut *tx)
    .await
    .context("record a worker")?;
    Ok(())
}

async fn forget(tx: &mut Tx<'_>, now: Timestamp) -> Result<(), StoreError> {
    query(
        "delete from workers where presence <> 'present' and heartbeat_at < $1 \
         and not exists (select 1 from vms where vms.worker_id = workers.id \
         and vms.state <> 'deleted')",
    )
    .bind(now.plus_ms(-FORGET_MS).unix_ms())
    .execute(&mut *tx)
    .await
    .context("forget workers that are gone for long")?;
    Ok(())
}

/// The transitions of a worker are its own business; one that is not there is a fenced writer's.
fn apply(standing: Standing, event: WorkerEvent) -> Result<Standing, StoreError> {
    standing.apply(event).ok_or(StoreError::Fenced)
}

pub(super) async fn heartbeat(store: &Sql, by: Registration) -> Result<Worker, StoreError> {
    let mut writer = store.writer().await;
    let mut tx = writer.begin(&[]).await?;
    let now = tx.now().await?;
    let renewed = query(RENEW)
        .bind(by.worker.to_string())
        .bind(by.epoch)
        .bind(now.unix_ms())
        .fetch_all(&mut tx)
        .await
        .context("renew a worker's lease")?;
    tx.commit("commit a heartbeat").await?;
    rows::worker(renewed.first().ok_or(StoreError::Fenced)?)
}

pub(super) async fn leave(store: &Sql, by: Registration) -> Result<Worker, StoreError> {
    let mut writer = store.writer().await;
    let mut tx = writer.begin(&[Lock::Creation, Lock::Worker(by.worker)]).await?;
    let mut worker = read(&mut tx, by.worker).await?.ok_or(StoreError::Fenced)?;
    if worker.epoch != by.epoch {
        return Err(StoreError::Fenced);
    }
    stand(&mut tx, &mut worker, WorkerEvent::Left).await?;
    give_up_creations(&mut tx, worker.id).await?;
    tx.commit("commit that a worker leaves").await?;
    Ok(worker)
}

/// Creations are placed under the same lock: once this is answered none goes to a worker that
/// drains.
pub(super) async fn drain(store: &Sql, id: WorkerId) -> Result<Worker, StoreError> {
    let mut writer = store.writer().await;
    let mut tx = writer.begin(&[Lock::Creation, Lock::Worker(id)]).await?;
    let mut worker = read(&mut tx, id).await?.ok_or(StoreError::WorkerNotFound)?;
    stand(&mut tx, &mut worker, WorkerEvent::DrainRequested).await?;
    give_up_creations(&mut tx, id).await?;
    tx.commit("commit that a worker drains").await?;
    Ok(worker)
}

pub(super) async fn activate(store: &Sql, id: WorkerId) -> Result<Worker, StoreError> {
    let mut writer = store.writer().await;
    let mut tx = writer.begin(&[Lock::Worker(id)]).await?;
    let mut worker = read(&mut tx, id).await?.ok_or(StoreError::WorkerNotFound)?;
    stand(&mut tx, &mut worker, WorkerEvent::ActivateRequested).await?;
    tx.commit("commit that a worker is active").await?;
    Ok(worker)
}

pub(super) async fn lose(
    store: &Sql,
    seen: Registration,
    heartbeat_at: Timestamp,
) -> Result<Option<Worker>, StoreError> {
    let mut writer = store.writer().await;
    let mut tx = writer.begin(&[Lock::Worker(seen.worker)]).await?;
    let now = tx.now().await?;
    let Some(mut worker) = read(&mut tx, seen.worker).await? else { return Ok(None) };
    let is_silent = (worker.epoch, worker.heartbeat_at) == (seen.epoch, heartbeat_at)
        && heartbeat_at.plus_ms(worker.lease_ms) <= now;
    // Another was faster where it is lost already.
    if !is_silent || worker.standing.apply(WorkerEvent::LeaseRanOut).is_none() {
        return Ok(None);
    }
    stand(&mut tx, &mut worker, WorkerEvent::LeaseRanOut).await?;
    tx.commit("commit that a worker is lost").await?;
    Ok(Some(worker))
}

async fn stand(tx: &mut Tx<'_>, worker: &mut Worker, event: WorkerEvent) -> Result<(), StoreError> {
    worker.standing = apply(worker.standing, event)?;
    query("update workers set presence = $2, draining = $3 where id = $1")
        .bind(worker.id.to_string())
        .bind(worker.standing.presence.as_str())
        .bind(worker.standing.draining)
        .execute(&mut *tx)
        .await
        .context("change a worker")?;
    Ok(())
}

/// Creations that were placed on the worker and have not begun wait for another place.
async fn give_up_creations(tx: &mut Tx<'_>, id: WorkerId) -> Result<(), StoreError> {
    let found = query(
        "select tasks.id from vms join tasks on tasks.vm_id = vms.id \
         where vms.worker_id = $1 and vms.state = 'creating' and tasks.state = 'pending' \
         and tasks.kind in ('vm:create', 'template:build')",
    )
    .bind(id.to_string())
    .fetch_all(&mut *tx)
    .await
    .context("look for creations that have not begun")?;
    let ids: Vec<TaskId> = rows::all(&found, |row| rows::Reader { row, noun: "task" }.parsed(0))?;
    for task in ids {
        tx.lock(Lock::Task(task)).await?;
        let task = write::task(tx, task).await?.ok_or(StoreError::Corrupt("task"))?;
        if task.state == aether_types::TaskState::Pending
            && let Some(vm) = task.vm_id
        {
            place::unplace(tx, vm).await?;
        }
    }
    Ok(())
}

pub(super) async fn read(tx: &mut Tx<'_>, id: WorkerId) -> Result<Option<Worker>, StoreError> {
    query(GET)
        .bind(id.to_string())
        .fetch_optional(&mut *tx)
        .await
        .context("read a worker")?
        .as_ref()
        .map(rows::worker)
        .transpose()
}

/// Whether what this worker says may count: it is in no registry, or it is there as it says.
pub(super) async fn is_current(tx: &mut Tx<'_>, by: Registration) -> Result<bool, StoreError> {
    let known = read(tx, by.worker).await?;
    Ok(known.is_none_or(|known| {
        known.epoch == by.epoch && known.standing.presence == Presence::Present
    }))
}

pub(super) async fn get(
    store: &Sql,
    id: WorkerId,
) -> Result<Option<(Worker, WorkerLoad)>, StoreError> {
    Ok(list(store).await?.into_iter().find(|(worker, _)| worker.id == id))
}

/// There are few: those that are gone for long are forgotten.
pub(super) async fn list(store: &Sql) -> Result<Vec<(Worker, WorkerLoad)>, StoreError> {
    place::with_load(store).await
}
