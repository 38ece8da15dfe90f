//! Takes a snapshot of a guest that runs.
//!
//! ```text
//!   guest runs                     │ stands still                       │ runs
//!   memory is sent, and sent again │ new top layer, the last pages,     │ frozen layers are linked
//!   where the guest changes it     │ devices                            │ or copied
//! ```
//!
//! QEMU sends a migration stream into a socket of ours, which is taken apart while it comes
//! ([`stream`]): no second QEMU takes part, and the guest stands still only for what changed in the
//! last few milliseconds. A worker that dies breaks the socket; the next one lets the guest go on
//! ([`settle`]).

use std::{
    fs::File,
    os::{
        fd::OwnedFd,
        unix::{fs::OpenOptionsExt as _, net::UnixStream},
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serde_json::{Value, json};
use tokio::{
    sync::oneshot,
    time::{Instant, sleep, timeout},
};

use super::{
    Control, Qemu,
    command_line::{DISK_ID, layer_node, node_name, number_of_node, own_file},
    layers,
    qmp::{Migration, Qmp},
    stream,
};
use crate::{
    DriverError, SnapshotDisk, SnapshotMachine, SnapshotTaken,
    host::{blocking, file_error},
    machines::{Place, WasBefore},
};

pub(super) const MEMORY_FILE: &str = "memory";
pub(super) const STATE_FILE: &str = "state";

/// What the guest may stand still for its last pages, as QEMU reckons it. Devices come on top.
const DOWNTIME_LIMIT_MS: u64 = 10;
/// A guest that changes its memory faster than it is sent is stopped after this and a time for each
/// MiB: otherwise it would never end.
const CONVERGE_LIMIT: Duration = Duration::from_secs(3);
const CONVERGE_LIMIT_PER_MIB: Duration = Duration::from_millis(4);
/// From the guest's stop to the end of the stream.
const SWITCH_LIMIT: Duration = Duration::from_mins(1);
const MERGE_LIMIT: Duration = Duration::from_mins(10);
const MERGE_JOB: &str = "merge";
const FD_NAME: &str = "snapshot";

fn refused(action: &str, detail: impl Into<String>) -> DriverError {
    DriverError::Vmm { action: action.to_owned(), detail: detail.into() }
}

impl Qemu {
    pub(super) async fn take_snapshot(
        &self,
        place: &Place,
        control: &Control,
        into: &Path,
        disk: SnapshotDisk,
    ) -> Result<SnapshotTaken, DriverError> {
        let fault = &place.host.fault;
        let qmp = &control.qmp;
        let new_top = match disk {
            SnapshotDisk::Include => Some(prepare_layer(place, qmp).await?),
            SnapshotDisk::Leave => None,
        };
        fault.hit("snapshot: layer made")?;
        let was_paused = qmp.is_paused().await?;
        let (sending, mut receiving) = Receiving::begin(place, into)?;
        let begun = Instant::now();
        self.send(place, qmp, sending).await?;
        fault.hit("snapshot: stands still")?;
        let stopped = if was_paused { None } else { qmp.stopped_at() };
        let switched = timeout(SWITCH_LIMIT, switch(qmp, new_top)).await;
        switched.unwrap_or_else(|_| Err(refused("take a snapshot", "no end of the stream")))?;
        // Before that QEMU is not done with its migration, though it says so.
        receiving.closed().await?;
        fault.hit("snapshot: sent")?;
        if !was_paused {
            qmp.execute("cont", json!({})).await?;
        }
        let paused = stopped.map_or(Duration::ZERO, |at| at.elapsed());
        fault.hit("snapshot: goes on")?;
        receiving.join().await?;
        tracing::debug!(machine.id = %place.id(), ?paused, took = ?begun.elapsed(), "memory taken");
        let layers = match new_top {
            Some(top) => {
                let (host, id, into) = (Arc::clone(&place.host), place.id(), into.to_owned());
                blocking(move || layers::freeze_into(&host, id, top.number, &into)).await?
            }
            None => Vec::new(),
        };
        fault.hit("snapshot: layers frozen")?;
        let spec = &place.record.spec;
        let machine = SnapshotMachine {
            driver: place.record.kind,
            format: self.format.clone(),
            vcpus: spec.vcpus,
            memory_mb: spec.memory_mb,
            disk_mb: spec.disk_mb,
            boot: spec.boot.clone(),
            mac: place.attachment.guest.mac.clone(),
            detail: layers::detail(&layers),
        };
        Ok(SnapshotTaken { machine, paused })
    }

    /// Sends all memory, and what changes meanwhile, until the guest stands still.
    async fn send(&self, place: &Place, qmp: &Qmp, sending: OwnedFd) -> Result<(), DriverError> {
        qmp.give(FD_NAME, sending).await?;
        let on = |name: &str| json!({ "capability": name, "state": true });
        let capabilities = json!({ "capabilities": [on("events"), on("pause-before-switchover")] });
        qmp.execute("migrate-set-capabilities", capabilities).await?;
        // As fast as it goes; QEMU reckons with what it sees.
        let parameters =
            json!({ "max-bandwidth": 1_u64 << 40, "downtime-limit": DOWNTIME_LIMIT_MS });
        qmp.execute("migrate-set-parameters", parameters).await?;
        qmp.forget_migration();
        qmp.execute("migrate", json!({ "uri": format!("fd:{FD_NAME}") })).await?;
        place.host.fault.hit("snapshot: sending")?;
        let still = async {
            match qmp.migration(|at| at != Migration::Active).await? {
                Migration::PreSwitchover => Ok(()),
                Migration::Completed | Migration::Failed | Migration::Active => {
                    Err(refused("send the guest's memory", why_failed(qmp).await))
                }
            }
        };
        tokio::pin!(still);
        let limit = CONVERGE_LIMIT + CONVERGE_LIMIT_PER_MIB * place.record.spec.memory_mb;
        if let Ok(stands) = timeout(limit, &mut still).await {
            return stands;
        }
        tracing::info!(machine.id = %place.id(), "the guest is stopped for its snapshot");
        qmp.execute("stop", json!({})).await?;
        timeout(SWITCH_LIMIT + limit, still)
            .await
            .unwrap_or_else(|_| Err(refused("send the guest's memory", "it does not end")))
    }
}

/// The disk's new top layer, of which QEMU knows already.
#[derive(Debug, Clone, Copy)]
struct NewTop {
    below: u32,
    number: u32,
}

async fn prepare_layer(place: &Place, qmp: &Qmp) -> Result<NewTop, DriverError> {
    let (host, id) = (Arc::clone(&place.host), place.id());
    let below = top_layer(qmp).await?;
    let there = blocking(move || layers::of(&host, id)).await?;
    if there.len() >= layers::LAYERS_MAX {
        merge(place, qmp, below).await?;
    }
    // A number that no file has: an earlier attempt may have left one that QEMU has open.
    let number = there.last_key_value().map_or(below, |(highest, _)| below.max(*highest)) + 1;
    let (host, record) = (Arc::clone(&place.host), place.record.clone());
    blocking(move || layers::make_top(&host, &record, number)).await?;
    let node = layer_node(number, &own_file(number), Some(Value::Null));
    qmp.execute("blockdev-add", node).await?;
    Ok(NewTop { below, number })
}

/// The layer that QEMU writes.
async fn top_layer(qmp: &Qmp) -> Result<u32, DriverError> {
    let blocks = qmp.execute("query-block", json!({})).await?;
    // A device's id, or where it has a part of its own for the disk, that part's path.
    let within = format!("/machine/peripheral/{DISK_ID}/");
    let disk = blocks.as_array().into_iter().flatten().find(|block| {
        let device = block.get("qdev").and_then(Value::as_str);
        device.is_some_and(|device| device == DISK_ID || device.starts_with(&within))
    });
    let node = disk.and_then(|disk| disk.pointer("/inserted/node-name")).and_then(Value::as_str);
    node.and_then(number_of_node)
        .ok_or_else(|| refused("name the disk's top layer", "no such disk"))
}

/// Copies what is between the lowest and the top layer up into the top, while the guest runs.
async fn merge(place: &Place, qmp: &Qmp, top: u32) -> Result<(), DriverError> {
    qmp.forget_job();
    let job = json!({
        "job-id": MERGE_JOB, "device": node_name(top), "base-node": node_name(0),
        "auto-dismiss": true,
    });
    qmp.execute("block-stream", job).await?;
    let ended = timeout(MERGE_LIMIT, qmp.job_end()).await;
    ended
        .unwrap_or_else(|_| Err(refused("merge the disk's layers", "no end of it")))?
        .map_err(|detail| refused("merge the disk's layers", detail))?;
    let (host, id) = (Arc::clone(&place.host), place.id());
    let there = blocking({
        let host = Arc::clone(&host);
        move || layers::of(&host, id)
    })
    .await?;
    for number in there.into_keys().rev().filter(|number| *number > 0 && *number < top) {
        // One that QEMU does not know, or that has no name of its own, is of no harm.
        if let Err(error) =
            qmp.execute("blockdev-del", json!({ "node-name": node_name(number) })).await
        {
            tracing::debug!(%error, "a merged layer stays open");
        }
    }
    blocking(move || layers::remove_merged(&host, id, top)).await
}

/// From the guest's stop to the end of the stream.
async fn switch(qmp: &Qmp, new_top: Option<NewTop>) -> Result<(), DriverError> {
    if let Some(NewTop { below, number }) = new_top {
        let nodes = json!({ "node": node_name(below), "overlay": node_name(number) });
        qmp.execute("blockdev-snapshot", nodes).await?;
    }
    qmp.execute("migrate-continue", json!({ "state": "pre-switchover" })).await?;
    let is_end = |at| matches!(at, Migration::Completed | Migration::Failed);
    match qmp.migration(is_end).await? {
        Migration::Completed => Ok(()),
        Migration::Failed | Migration::Active | Migration::PreSwitchover => {
            Err(refused("send the guest's devices", why_failed(qmp).await))
        }
    }
}

async fn why_failed(qmp: &Qmp) -> String {
    let known = qmp.execute("query-migrate", json!({})).await.ok();
    let reason = known.as_ref().and_then(|known| known.get("error-desc")).and_then(Value::as_str);
    reason.unwrap_or("QEMU gives no reason").chars().take(500).collect()
}

/// Ends a migration that nobody receives any more and lets the guest be what it was.
pub(super) async fn settle(qmp: &Qmp, was: WasBefore) -> Result<(), DriverError> {
    qmp.forget_migration();
    let events = json!({ "capability": "events", "state": true });
    // Refused while one is under way, which has its events already.
    let _ = qmp.execute("migrate-set-capabilities", json!({ "capabilities": [events] })).await;
    qmp.execute("migrate_cancel", json!({})).await?;
    let now = qmp.execute("query-migrate", json!({})).await?;
    let status = now.get("status").and_then(Value::as_str).unwrap_or("none");
    if !matches!(status, "none" | "completed" | "failed" | "cancelled") {
        qmp.migration(|at| matches!(at, Migration::Completed | Migration::Failed)).await?;
    }
    if was == WasBefore::Paused {
        return Ok(());
    }
    loop {
        match qmp.execute("cont", json!({})).await {
            // It has ended its migration and is not done with it, which no event says. Whoever
            // calls has a limit.
            Err(DriverError::Vmm { detail, .. }) if detail.contains(NOT_FINAL) => {
                sleep(NOT_FINAL_PAUSE).await;
            }
            answer => return answer.map(drop),
        }
    }
}

/// QEMU's word for it.
const NOT_FINAL: &str = "not finalized";
const NOT_FINAL_PAUSE: Duration = Duration::from_millis(5);

/// The other end of QEMU's stream. Dropped, it breaks it.
struct Receiving {
    breaker: UnixStream,
    closed: oneshot::Receiver<()>,
    taking: tokio::task::JoinHandle<Result<(), DriverError>>,
}

impl Drop for Receiving {
    fn drop(&mut self) {
        let _ = self.breaker.shutdown(std::net::Shutdown::Both);
    }
}

impl Receiving {
    fn begin(place: &Place, into: &Path) -> Result<(OwnedFd, Self), DriverError> {
        let failed = |source| DriverError::Io { action: "make a socket".to_owned(), source };
        let (theirs, ours) = UnixStream::pair().map_err(failed)?;
        let breaker = ours.try_clone().map_err(failed)?;
        let memory_bytes = u64::from(place.record.spec.memory_mb) << 20;
        let into = into.to_owned();
        let (closing, closed) = oneshot::channel();
        let taking =
            tokio::task::spawn_blocking(move || receive(ours, memory_bytes, &into, closing));
        Ok((theirs.into(), Self { breaker, closed, taking }))
    }

    /// Waits until QEMU has closed the stream.
    async fn closed(&mut self) -> Result<(), DriverError> {
        if let Ok(closed) = timeout(SWITCH_LIMIT, &mut self.closed).await {
            // Where it was not read to its end, the reason is what counts.
            return if closed.is_ok() { Ok(()) } else { self.join().await };
        }
        Err(refused("close the stream of a snapshot", "no answer in time"))
    }

    async fn join(&mut self) -> Result<(), DriverError> {
        crate::finished((&mut self.taking).await)
    }
}

fn receive(
    stream: UnixStream,
    memory_bytes: u64,
    into: &Path,
    closing: oneshot::Sender<()>,
) -> Result<(), DriverError> {
    let create = |name: &str| -> Result<(PathBuf, File), DriverError> {
        let path = into.join(name);
        let made = File::options().write(true).create_new(true).mode(0o600).open(&path);
        made.map(|file| (path.clone(), file)).map_err(|e| file_error("make", &path, e))
    };
    let (path, memory) = create(MEMORY_FILE)?;
    memory.set_len(memory_bytes).map_err(|e| file_error("size", &path, e))?;
    let state = stream::take_apart(stream, &memory, memory_bytes)
        .map_err(|e| file_error("receive the guest's memory into", &path, e))?;
    // Nobody listens where the snapshot was given up.
    let _ = closing.send(());
    let (path, file) = create(STATE_FILE)?;
    std::os::unix::fs::FileExt::write_all_at(&file, &state, 0)
        .map_err(|e| file_error("write", &path, e))
}
