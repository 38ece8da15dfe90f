//! Takes a snapshot of a VM, and lets another go on from it.
//!
//! ```text
//!   guest runs          │ stands still                     │ runs
//!   disk is flushed     │ devices, changed pages (to snap) │ memory is put together in the
//!                       │ disk is copied                   │ snapshot's folder, without zeros
//! ```
//!
//! Changed pages are those since the last snapshot, or since the guest began. What was before is the
//! VM's `memory.base`: another name of the last snapshot's memory; an empty file where all was zero.
//! It is put away before Firecracker is asked and is there again when its answer is in place, so
//! that after a failure in between all of the memory is written.
//!
//! Firecracker ends the guest's connections at each snapshot, and does not tell their other ends.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::atomic::Ordering,
    time::Duration,
};

use aether_types::{DriverKind, MachineId};
use serde_json::json;
use tokio::time::{Instant, timeout};

use super::{
    Control, Firecracker,
    api::State,
    machine::{MEMORY_NAME, STATE_NAME},
    memory, scratch, vsock,
};
use crate::{
    AfterSnapshot, DriverError, SnapshotDisk, SnapshotMachine, SnapshotTaken,
    host::{Host, file_error, remove_file},
    machines::{Place, SnapshotWish},
    tools,
};

pub(super) const DISK_NAME: &str = "disk";
const BASE: &str = "memory.base";
const PUT_AWAY: &str = "memory.old";
/// All of a large memory onto a slow disk.
const CREATE_LIMIT: Duration = Duration::from_mins(15);
/// Devices only; tens of kilobytes.
const STATE_BYTES_MAX: u64 = 64 << 20;
/// For a guest that goes on to take connections again.
pub(super) const CHANNEL_LIMIT: Duration = Duration::from_secs(5);
/// Beyond this a guest's memory is in more than one piece, of which releases that are in use write
/// wrong pages.
const DIFF_MEMORY_MB_MAX: u32 = 3072;

/// What memory was when Firecracker began to note changes.
#[derive(Debug)]
enum Base {
    Unknown,
    Zero,
    File(PathBuf),
}

fn base_path(host: &Host, id: MachineId) -> PathBuf {
    host.directory(id).join(BASE)
}

/// A guest that boots begins with a memory of zeros.
pub(super) fn begin_at_zero(host: &Host, id: MachineId) -> Result<(), DriverError> {
    let path = base_path(host, id);
    let mut options = File::options();
    let made = options.write(true).create_new(true).mode(0o600).open(&path);
    made.map(drop).map_err(|e| file_error("make", &path, e))
}

/// Notes what memory is from now on. Across file systems there is no other name for it: the next
/// snapshot is written whole.
pub(super) fn begin_at(host: &Host, id: MachineId, memory: &Path) {
    if let Err(error) = fs::hard_link(memory, base_path(host, id)) {
        tracing::debug!(machine.id = %id, %error, "the next snapshot's memory is written whole");
    }
}

/// A VMM that reads beyond the end of its memory dies without a word.
pub(super) fn check_memory(directory: &Path, memory_mb: u32) -> Result<(), DriverError> {
    let (path, size) = (directory.join(MEMORY_NAME), u64::from(memory_mb) << 20);
    let found = fs::metadata(&path).map_err(|e| file_error("examine", &path, e))?.len();
    if found == size {
        return Ok(());
    }
    Err(DriverError::Damaged { path, detail: format!("it has {found} bytes in place of {size}") })
}

/// Gives back the room of a VMM that has ended.
pub(super) fn forget_base(directory: &Path) -> Result<(), DriverError> {
    remove_file(&directory.join(BASE))?;
    remove_file(&directory.join(PUT_AWAY))
}

fn put_base_away(host: &Host, id: MachineId) -> Result<Base, DriverError> {
    let (base, away) = (base_path(host, id), host.directory(id).join(PUT_AWAY));
    match fs::rename(&base, &away) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Base::Unknown),
        renamed => renamed.map_err(|e| file_error("put away", &base, e))?,
    }
    let found = fs::symlink_metadata(&away).map_err(|e| file_error("examine", &away, e))?;
    Ok(match found.size() {
        _ if !found.is_file() => Base::Unknown,
        0 => Base::Zero,
        _ => Base::File(away),
    })
}

/// Before the pause: all that can be done by then.
fn prepare(place: &Place, disk: SnapshotDisk) -> Result<Base, DriverError> {
    let (host, id) = (&place.host, place.id());
    let home = super::home::Home::of_running(host, id)?;
    scratch::empty(&home)?;
    let base = put_base_away(host, id)?;
    if disk == SnapshotDisk::Include {
        // Firecracker flushes it while the guest stands still.
        let path = host.disk(id);
        let flushed = File::open(&path).and_then(|disk| disk.sync_data());
        flushed.map_err(|e| file_error("flush", &path, e))?;
    }
    let can_diff = place.record.spec.memory_mb <= DIFF_MEMORY_MB_MAX
        && memory::has_holes_of_pages(&home.path.join(scratch::FOLDER));
    Ok(if can_diff { base } else { Base::Unknown })
}

/// After the pause: the snapshot's own files, and what the next one is laid over.
fn collect(place: &Place, base: &Base, into: &Path) -> Result<(), DriverError> {
    let (host, id) = (&place.host, place.id());
    let home = super::home::Home::of_running(host, id)?;
    let state = scratch::open(&home, scratch::STATE)?;
    let to = into.join(STATE_NAME);
    copy_bounded(&state, &to).map_err(|e| file_error("write", &to, e))?;
    let written = scratch::open(&home, scratch::MEMORY)?;
    let below = match base {
        Base::Unknown | Base::Zero => None,
        Base::File(path) => Some(path.as_path()),
    };
    let (to, size) = (into.join(MEMORY_NAME), u64::from(place.record.spec.memory_mb) << 20);
    memory::merge(below, &written, &to, size).map_err(|e| file_error("write", &to, e))?;
    begin_at(host, id, &to);
    scratch::empty(&home)?;
    remove_file(&host.directory(id).join(PUT_AWAY))
}

fn copy_bounded(from: &File, to: &Path) -> io::Result<()> {
    let mut options = File::options();
    let mut target = options.write(true).create_new(true).mode(0o600).open(to)?;
    let copied = io::copy(&mut io::Read::take(from, STATE_BYTES_MAX + 1), &mut target)?;
    if copied > STATE_BYTES_MAX {
        return Err(io::Error::other("the VMM wrote more than a state has"));
    }
    Ok(())
}

/// A copy of a disk that nothing writes to now.
pub(super) fn copy_disk(from: &Path, to: &Path) -> Result<(), DriverError> {
    let copied = aether_images::clone_sparse(from, to);
    copied.map(drop).map_err(|e| file_error("copy a disk to", to, io::Error::other(e)))
}

/// Works on a machine's files, to the end.
async fn blocking_at<T: Send + 'static>(
    place: &Place,
    work: impl FnOnce(&Place) -> Result<T, DriverError> + Send + 'static,
) -> Result<T, DriverError> {
    let at = place.clone();
    place.blocking(move || work(&at)).await
}

impl Firecracker {
    pub(super) async fn take_snapshot(
        &self,
        place: &Place,
        control: &Control,
        into: &Path,
        wish: SnapshotWish,
    ) -> Result<SnapshotTaken, DriverError> {
        let SnapshotWish { disk, after } = wish;
        let fault = &place.host.fault;
        let mut session = Self::session(control).await?;
        let was_running = session.state().await? == State::Running;
        let base = blocking_at(place, move |place| prepare(place, disk)).await?;
        fault.hit("snapshot: prepared")?;
        let begun = Instant::now();
        if was_running {
            session.set_state(State::Paused).await?;
        }
        fault.hit("snapshot: stands still")?;
        let kind = if matches!(base, Base::Unknown) { "Full" } else { "Diff" };
        let request = json!({
            "snapshot_type": kind, "snapshot_path": scratch::STATE, "mem_file_path": scratch::MEMORY,
        });
        control.is_channel_lost.store(true, Ordering::Release);
        session.put_within(CREATE_LIMIT, "/snapshot/create", &request).await?;
        self.break_streams(place.id());
        fault.hit("snapshot: written")?;
        if disk == SnapshotDisk::Include {
            let to = into.join(DISK_NAME);
            blocking_at(place, move |place| copy_disk(&place.host.disk(place.id()), &to)).await?;
        }
        fault.hit("snapshot: disk copied")?;
        let goes_on = was_running && after == AfterSnapshot::GoOn;
        if goes_on {
            session.set_state(State::Running).await?;
        }
        let paused = if was_running { begun.elapsed() } else { Duration::ZERO };
        fault.hit("snapshot: goes on")?;
        let into = into.to_owned();
        let with_disk = disk == SnapshotDisk::Include;
        let (collected, ()) = tokio::join!(
            blocking_at(place, move |place| {
                if with_disk {
                    let layers = place.record.spec.layers.len();
                    tools::keep_in_snapshot(&place.host, place.id(), layers, &into)?;
                }
                collect(place, &base, &into)
            }),
            control.regain_channel(goes_on),
        );
        collected?;
        let spec = &place.record.spec;
        let machine = SnapshotMachine {
            driver: DriverKind::Firecracker,
            format: self.snapshot_format.clone().unwrap_or_default(),
            vcpus: spec.vcpus,
            memory_mb: spec.memory_mb,
            disk_mb: spec.disk_mb,
            boot: spec.boot.clone(),
            layers: tools::in_snapshot(&spec.layers),
            mac: place.attachment.guest.mac.clone(),
            detail: json!({}),
        };
        Ok(SnapshotTaken { machine, paused })
    }
}

impl Control {
    /// After a snapshot, once the guest runs: without this its next connection could be lost.
    pub(super) async fn regain_channel(&self, is_running: bool) {
        if !is_running || !self.is_channel_lost.swap(false, Ordering::AcqRel) {
            return;
        }
        let regained = timeout(CHANNEL_LIMIT, vsock::outlast_reset(&self.home.directory)).await;
        match regained {
            Ok(Ok(())) => {}
            // Who connects next finds out, and tries again.
            Ok(Err(error)) => tracing::warn!(%error, "a guest does not answer after a snapshot"),
            Err(_) => tracing::warn!("a guest does not answer in time after a snapshot"),
        }
    }
}
