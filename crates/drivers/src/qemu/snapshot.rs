//! Takes a snapshot of a guest that runs.
//!
//! ```text
//!   guest runs                     │ stands still                       │ runs
//!   memory is sent, and sent again │ new top layer, the last pages,     │ frozen layers are linked
//!   where the guest changes it     │ devices                            │ or copied
//! ```
//!
//! An emulator stands still once more, for a moment, when the memory begins to be sent: see
//! [`WriteTracking`].
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
    command_line::{Accelerator, DISK_ID, layer_node, node_name, number_of_node, own_file},
    layers,
    qmp::{Migration, Qmp},
    stream,
};
use crate::{
    AfterSnapshot, DriverError, SnapshotDisk, SnapshotMachine, SnapshotTaken,
    host::file_error,
    machines::{Place, SnapshotWish, WasBefore},
    tools,
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

/// How QEMU learns of writes to memory that it has sent already.
///
/// An emulator (TCG) keeps in a cache of its own which addresses it may write without saying so.
/// QEMU must bring that cache up to date whenever it collects the pages that were written, and does
/// not always: guests restored from what was lost were seen to crash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum WriteTracking {
    /// The processor says so.
    Always,
    /// QEMU 9.0 and later bring it up to date if they find pages that they did not know of. At
    /// first they know of all: then the guest has to stand still, which empties the cache.
    FromStandstill,
    /// Earlier ones never do ("physmem: Fix migration dirty bitmap coherency with TCG memory
    /// access" mended it). Those up to 7.2 collect only at the beginning and at the end where no
    /// downtime is allowed them: the guest stands still both times.
    OnePass,
    /// Others collect in between all the same: all is sent from a guest that stands still.
    Never,
}

impl WriteTracking {
    pub(super) fn of(accelerator: Accelerator, version: &str) -> Self {
        if accelerator == Accelerator::Kvm {
            return Self::Always;
        }
        let major = version.split('.').next().and_then(|number| number.parse().ok()).unwrap_or(0);
        match major {
            9_u32.. => Self::FromStandstill,
            6 | 7 => Self::OnePass,
            0..=5 | 8 => Self::Never,
        }
    }

    fn downtime_limit_ms(self) -> u64 {
        match self {
            Self::Always | Self::FromStandstill | Self::Never => DOWNTIME_LIMIT_MS,
            Self::OnePass => 0,
        }
    }
}

fn refused(action: &str, detail: impl Into<String>) -> DriverError {
    DriverError::Vmm { action: action.to_owned(), detail: detail.into() }
}

impl Qemu {
    pub(super) async fn take_snapshot(
        &self,
        place: &Place,
        control: &Control,
        into: &Path,
        wish: SnapshotWish,
    ) -> Result<SnapshotTaken, DriverError> {
        let fault = &place.host.fault;
        let qmp = &control.qmp;
        let was_paused = qmp.is_paused().await?;
        if was_paused {
            leave_last_migration(qmp).await?;
        }
        let new_top = match wish.disk {
            SnapshotDisk::Include => Some(prepare_layer(place, qmp).await?),
            SnapshotDisk::Leave => None,
        };
        fault.hit("snapshot: layer made")?;
        let (sending, mut receiving) = Receiving::begin(place, into)?;
        let begun = Instant::now();
        qmp.forget_stops();
        let tracking = if was_paused { WriteTracking::Always } else { self.tracking };
        tokio::select! {
            sent = send(place, qmp, sending, tracking) => sent?,
            error = receiving.failed() => return Err(error),
        }
        fault.hit("snapshot: stands still")?;
        let switched = tokio::select! {
            switched = timeout(SWITCH_LIMIT, switch(qmp, new_top)) => switched,
            error = receiving.failed() => return Err(error),
        };
        switched.unwrap_or_else(|_| Err(refused("take a snapshot", "no end of the stream")))?;
        // Before that QEMU is not done with its migration, though it says so.
        let closed = timeout(SWITCH_LIMIT, receiving.closed()).await;
        closed
            .unwrap_or_else(|_| Err(refused("close the stream of a snapshot", "no end of it")))?;
        fault.hit("snapshot: sent")?;
        if !was_paused && wish.after == AfterSnapshot::GoOn {
            qmp.execute("cont", json!({})).await?;
        }
        let paused = if was_paused { Duration::ZERO } else { qmp.stood_still() };
        fault.hit("snapshot: goes on")?;
        receiving.join().await?;
        tracing::debug!(machine.id = %place.id(), ?paused, took = ?begun.elapsed(), "memory taken");
        let layers = match new_top {
            Some(top) => {
                let (host, id, into) = (Arc::clone(&place.host), place.id(), into.to_owned());
                let tools = place.record.spec.layers.len();
                let freeze = move || {
                    tools::keep_in_snapshot(&host, id, tools, &into)?;
                    layers::freeze_into(&host, id, top.number, &into)
                };
                place.blocking(freeze).await?
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
            layers: tools::in_snapshot(&spec.layers),
            mac: place.attachment.guest.mac.clone(),
            detail: layers::detail(&layers),
        };
        Ok(SnapshotTaken { machine, paused })
    }
}

/// Sends all memory, and what changes meanwhile, until the guest stands still.
async fn send(
    place: &Place,
    qmp: &Qmp,
    sending: OwnedFd,
    tracking: WriteTracking,
) -> Result<(), DriverError> {
    qmp.give(FD_NAME, sending).await?;
    let on = |name: &str| json!({ "capability": name, "state": true });
    let capabilities = json!({ "capabilities": [on("events"), on("pause-before-switchover")] });
    qmp.execute("migrate-set-capabilities", capabilities).await?;
    // As fast as it goes; QEMU reckons with what it sees.
    let downtime_limit = tracking.downtime_limit_ms();
    let parameters = json!({ "max-bandwidth": 1_u64 << 40, "downtime-limit": downtime_limit });
    qmp.execute("migrate-set-parameters", parameters).await?;
    if tracking != WriteTracking::Always {
        qmp.execute("stop", json!({})).await?;
    }
    qmp.forget_migration();
    qmp.execute("migrate", json!({ "uri": format!("fd:{FD_NAME}") })).await?;
    place.host.fault.hit("snapshot: sending")?;
    if matches!(tracking, WriteTracking::FromStandstill | WriteTracking::OnePass) {
        let begun = timeout(SWITCH_LIMIT, qmp.migration(|at| at != Migration::Setup)).await;
        begun.unwrap_or_else(|_| Err(refused("send the guest's memory", "it does not begin")))?;
        match qmp.execute("cont", json!({})).await {
            // All of a small memory is sent already: the guest stands still as it must, and goes on
            // later.
            Err(DriverError::Vmm { detail, .. }) if detail.contains(NOT_FINAL) => {}
            answer => drop(answer?),
        }
    }
    let still = stands_still(qmp);
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

async fn stands_still(qmp: &Qmp) -> Result<(), DriverError> {
    match qmp.migration(|at| !matches!(at, Migration::Setup | Migration::Active)).await? {
        Migration::PreSwitchover => Ok(()),
        Migration::Completed | Migration::Failed | Migration::Setup | Migration::Active => {
            Err(refused("send the guest's memory", why_failed(qmp).await))
        }
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
    let there = place.blocking(move || layers::of(&host, id)).await?;
    if there.len() >= layers::LAYERS_MAX {
        merge(place, qmp, below).await?;
    }
    // A number that no file has: an earlier attempt may have left one that QEMU has open.
    let number = there.last_key_value().map_or(below, |(highest, _)| below.max(*highest)) + 1;
    let (host, record) = (Arc::clone(&place.host), place.record.clone());
    place.blocking(move || layers::make_top(&host, &record, number)).await?;
    let node = layer_node(number, &own_file(number), Some(Value::Null));
    qmp.execute("blockdev-add", node).await?;
    Ok(NewTop { below, number })
}

/// QEMU migrates a paused guest once only: it must have run in between. So it does, for as long as
/// it takes to read the second of two commands that were sent together.
async fn leave_last_migration(qmp: &Qmp) -> Result<(), DriverError> {
    if qmp.status().await? == "postmigrate" {
        let (went_on, stopped) =
            tokio::join!(qmp.execute("cont", json!({})), qmp.execute("stop", json!({})));
        went_on.and(stopped)?;
    }
    Ok(())
}

/// The layer that QEMU writes.
async fn top_layer(qmp: &Qmp) -> Result<u32, DriverError> {
    number_of_node(&drive_of(qmp, DISK_ID).await?)
        .ok_or_else(|| refused("name the disk's top layer", "no such disk"))
}

/// The node that a device reads and writes.
pub(super) async fn drive_of(qmp: &Qmp, id: &str) -> Result<String, DriverError> {
    let blocks = qmp.execute("query-block", json!({})).await?;
    // A device's id, or where it has a part of its own for the disk, that part's path.
    let within = format!("/machine/peripheral/{id}/");
    let disk = blocks.as_array().into_iter().flatten().find(|block| {
        let device = block.get("qdev").and_then(Value::as_str);
        device.is_some_and(|device| device == id || device.starts_with(&within))
    });
    let node = disk.and_then(|disk| disk.pointer("/inserted/node-name")).and_then(Value::as_str);
    node.map(str::to_owned).ok_or_else(|| refused("name a device's drive", "no such device"))
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
    forget_layers(place, qmp, |number| number > 0 && number < top).await?;
    place.blocking(move || layers::remove(&host, id, |n| n > 0 && n < top)).await
}

/// Lets QEMU close layers that nothing reads or writes any more.
async fn forget_layers(
    place: &Place,
    qmp: &Qmp,
    is_meant: impl Fn(u32) -> bool,
) -> Result<(), DriverError> {
    let (host, id) = (Arc::clone(&place.host), place.id());
    let there = place.blocking(move || layers::of(&host, id)).await?;
    for number in there.into_keys().rev().filter(|number| is_meant(*number)) {
        let node = json!({ "node-name": node_name(number) });
        // One that QEMU does not know is of no harm.
        if let Err(error) = qmp.execute("blockdev-del", node).await {
            tracing::debug!(%error, "a layer that is not used stays open");
        }
    }
    Ok(())
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
        Migration::Failed | Migration::Setup | Migration::Active | Migration::PreSwitchover => {
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
pub(super) async fn settle(place: &Place, qmp: &Qmp, was: WasBefore) -> Result<(), DriverError> {
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
    if was == WasBefore::Running {
        go_on(qmp).await?;
    }
    let top = top_layer(qmp).await?;
    forget_layers(place, qmp, |number| number > top).await?;
    let (host, id) = (Arc::clone(&place.host), place.id());
    place.blocking(move || layers::remove(&host, id, |number| number > top)).await
}

async fn go_on(qmp: &Qmp) -> Result<(), DriverError> {
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
    /// `None` once it is known.
    closed: Option<oneshot::Receiver<()>>,
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
        let taking = place.work.spawn_blocking(move || receive(ours, memory_bytes, &into, closing));
        Ok((theirs.into(), Self { breaker, closed: Some(closed), taking }))
    }

    /// Waits until QEMU has closed the stream. Safe to drop and call again, unless it failed.
    async fn closed(&mut self) -> Result<(), DriverError> {
        if let Some(closed) = &mut self.closed {
            let was_read = closed.await.is_ok();
            self.closed = None;
            if !was_read {
                return self.join().await;
            }
        }
        Ok(())
    }

    /// Waits until the stream cannot be taken any more; for ever where it was taken whole.
    async fn failed(&mut self) -> DriverError {
        match self.closed().await {
            Ok(()) => std::future::pending().await,
            Err(error) => error,
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_qemu_that_does_not_see_writes_is_known() {
        let of = |version| WriteTracking::of(Accelerator::Tcg, version);
        assert_eq!(of("7.2.22"), WriteTracking::OnePass);
        assert_eq!(of("8.2.2"), WriteTracking::Never);
        assert_eq!(of("10.0.8"), WriteTracking::FromStandstill);
        assert_eq!(of("unknown"), WriteTracking::Never);
        assert_eq!(WriteTracking::of(Accelerator::Kvm, "8.2.2"), WriteTracking::Always);
    }
}
