//! A VM's disk: layers, one over the other, of which QEMU writes the top one only.
//!
//! ```text
//!   DATA/layers/ID/disk.img      raw, frozen    ─┐ of the worker's user, given to QEMU opened for
//!   DATA/layers/ID/disk.1.qcow2  frozen         ─┘ reading: links to a snapshot's files
//!   DATA/vms/ID/disk.2.qcow2     frozen by a snapshot of this VM that did not come to its end
//!   DATA/vms/ID/disk.3.qcow2     the top; QEMU opens it by name, as the VM's user
//! ```
//!
//! Invariants
//! - What another VM or a snapshot shares was never open for writing in a VMM: a layer that this
//!   VM wrote is copied before anyone shares it, and a VM's user cannot reach the frozen folder.
//! - The numbers say the order. A layer that was just made and is empty, or whose contents were
//!   copied up, changes nothing: so the folders can be believed after a crash at any moment.

use std::{
    collections::BTreeMap,
    fs,
    fs::File,
    io,
    os::{fd::OwnedFd, unix::fs::OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use aether_images::write_qcow2_overlay;
use aether_types::MachineId;

use crate::{
    DriverError, MachineSpec, SnapshotFiles,
    host::{DISK_FILE, Host, Record, file_error, remove_file},
    links::{copy, keep_file},
};

/// A guest's read goes through all of them: at this many they are merged before another snapshot.
pub(super) const LAYERS_MAX: usize = 8;
/// The layers in a snapshot, in its detail.
const DETAIL: &str = "layers";

/// The name of a layer's file, everywhere.
pub(super) fn file_name(number: u32) -> String {
    match number {
        0 => DISK_FILE.to_owned(),
        number => format!("disk.{number}.qcow2"),
    }
}

fn number_of(name: &str) -> Option<u32> {
    if name == DISK_FILE {
        return Some(0);
    }
    let number: u32 = name.strip_prefix("disk.")?.strip_suffix(".qcow2")?.parse().ok()?;
    // One way to write each number.
    (file_name(number) == name).then_some(number)
}

/// Where a layer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Home {
    Frozen,
    /// In the folder of the VM's user.
    Own,
}

/// The layers of a VM that are there, from the lowest to the top.
pub(super) fn of(host: &Host, id: MachineId) -> Result<BTreeMap<u32, Home>, DriverError> {
    let mut found = numbers(&host.directory(id), Home::Own)?;
    found.extend(numbers(&host.layers(id), Home::Frozen)?);
    match found.first_key_value() {
        Some((0, _)) => Ok(found),
        Some(_) | None => Err(DriverError::File {
            action: "find the lowest layer of the disk",
            path: host.disk(id),
            source: io::Error::from(io::ErrorKind::NotFound),
        }),
    }
}

fn numbers(folder: &Path, home: Home) -> Result<BTreeMap<u32, Home>, DriverError> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        Err(error) => return Err(file_error("read", folder, error)),
    };
    let mut found = BTreeMap::new();
    for entry in entries {
        let name = entry.map_err(|e| file_error("read", folder, e))?.file_name();
        found.extend(name.to_str().and_then(number_of).map(|number| (number, home)));
    }
    Ok(found)
}

/// Opens a frozen layer for QEMU to inherit.
pub(super) fn open_frozen(host: &Host, id: MachineId, number: u32) -> Result<OwnedFd, DriverError> {
    let path = host.layers(id).join(file_name(number));
    let opened = File::options().read(true).custom_flags(libc::O_NOFOLLOW).open(&path);
    opened.map(OwnedFd::from).map_err(|e| file_error("open", &path, e))
}

/// Makes a VM's disk: the image's empty layer, or an empty one over a snapshot's. Made again, it is
/// as it was when it was first made.
pub(super) fn make(host: &Host, record: &Record) -> Result<(), DriverError> {
    let spec = &record.spec;
    for (number, _) in numbers(&host.directory(spec.id), Home::Own)? {
        remove_file(&host.directory(spec.id).join(file_name(number)))?;
    }
    let Some(from) = &spec.disk_from else { return host.make_disk(record) };
    let frozen = keep(host, spec, from)?;
    make_top(host, record, frozen + 1)
}

/// Makes an empty layer for a VM's user.
pub(super) fn make_top(host: &Host, record: &Record, number: u32) -> Result<(), DriverError> {
    let path = host.directory(record.spec.id).join(file_name(number));
    let failed = |error| DriverError::Io {
        action: format!("make a layer of the disk of machine {}", record.spec.id),
        source: io::Error::other(error),
    };
    // Of an attempt that did not come to use it.
    remove_file(&path)?;
    write_qcow2_overlay(&path, u64::from(record.spec.disk_mb) << 20).map_err(failed)?;
    host.give(&path, record)
}

/// Files of a snapshot that a VM needs until it runs.
pub(super) const STATE_FILES: [&str; 2] = ["memory", "state"];

/// Makes links to all of a snapshot that a VM needs; returns the number of the highest layer.
fn keep(host: &Host, spec: &MachineSpec, from: &SnapshotFiles) -> Result<u32, DriverError> {
    let names = layers_in(&from.machine.detail).ok_or_else(|| DriverError::Damaged {
        path: from.directory.clone(),
        detail: "it has no list of the disk's layers".to_owned(),
    })?;
    let folder = host.make_layers_folder(spec.id)?;
    for number in &names {
        keep_file(&from.directory.join(file_name(*number)), &folder.join(file_name(*number)))?;
    }
    for name in STATE_FILES {
        match keep_file(&from.directory.join(name), &folder.join(name)) {
            // A disk can be used without them; a restore says that they are missing.
            Err(DriverError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
            kept => kept?,
        }
    }
    Ok(names.into_iter().max().unwrap_or(0))
}

/// The files of a snapshot that only a start needs. They stay where a restore fails.
pub(super) fn forget_state(host: &Host, id: MachineId) -> Result<(), DriverError> {
    STATE_FILES.iter().try_for_each(|name| remove_file(&host.layers(id).join(name)))
}

/// Where a snapshot's file is for a VM: with its layers, or with the snapshot.
pub(super) fn state_file(host: &Host, id: MachineId, from: &SnapshotFiles, name: &str) -> PathBuf {
    let kept = host.layers(id).join(name);
    if kept.exists() { kept } else { from.directory.join(name) }
}

/// Puts the layers below `top` into a snapshot. The VM shares them with it from then on.
pub(super) fn freeze_into(
    host: &Host,
    id: MachineId,
    top: u32,
    into: &Path,
) -> Result<Vec<u32>, DriverError> {
    let folder = host.make_layers_folder(id)?;
    let layers: Vec<(u32, Home)> = of(host, id)?.into_iter().filter(|(n, _)| *n < top).collect();
    for (number, home) in &layers {
        let name = file_name(*number);
        if *home == Home::Frozen {
            keep_file(&folder.join(&name), &into.join(&name))?;
            continue;
        }
        let own = host.directory(id).join(&name);
        copy_own(&own, &into.join(&name))?;
        keep_file(&into.join(&name), &folder.join(&name))?;
        // QEMU has it open, and goes on with what it has.
        remove_file(&own)?;
    }
    Ok(layers.into_iter().map(|(number, _)| number).collect())
}

/// Copies a file that its VM's user may have put something else in the place of.
fn copy_own(from: &Path, to: &Path) -> Result<(), DriverError> {
    use std::os::fd::AsRawFd as _;
    let opened = File::options()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(from)
        .map_err(|e| file_error("open", from, e))?;
    let kind = opened.metadata().map_err(|e| file_error("look at", from, e))?.file_type();
    if !kind.is_file() {
        let detail = "it is not a file".to_owned();
        return Err(DriverError::Damaged { path: from.to_owned(), detail });
    }
    copy(Path::new(&format!("/proc/self/fd/{}", opened.as_raw_fd())), to)
}

/// Removes layers that nothing reads any more, or that nothing was ever written to.
pub(super) fn remove(
    host: &Host,
    id: MachineId,
    is_meant: impl Fn(u32) -> bool,
) -> Result<(), DriverError> {
    for (number, home) in of(host, id)? {
        if !is_meant(number) {
            continue;
        }
        let folder = match home {
            Home::Frozen => host.layers(id),
            Home::Own => host.directory(id),
        };
        remove_file(&folder.join(file_name(number)))?;
    }
    Ok(())
}

/// What a snapshot's detail says of its layers.
pub(super) fn detail(layers: &[u32]) -> serde_json::Value {
    serde_json::json!({ DETAIL: layers })
}

fn layers_in(detail: &serde_json::Value) -> Option<Vec<u32>> {
    let numbers: Vec<u32> = serde_json::from_value(detail.get(DETAIL)?.clone()).ok()?;
    (numbers.first() == Some(&0) && numbers.is_sorted()).then_some(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_are_one_to_one() {
        for number in [0, 1, 17] {
            assert_eq!(number_of(&file_name(number)), Some(number));
        }
        for name in ["disk.0.qcow2", "disk.01.qcow2", "disk.x.qcow2", "disk.1.qcow2.part", "a"] {
            assert_eq!(number_of(name), None, "{name}");
        }
    }

    #[test]
    fn a_snapshots_layers_are_found_again_or_refused() {
        assert_eq!(layers_in(&detail(&[0, 1, 4])), Some(vec![0, 1, 4]));
        assert_eq!(layers_in(&detail(&[])), None);
        assert_eq!(layers_in(&serde_json::json!({ DETAIL: [1, 0] })), None);
        assert_eq!(layers_in(&serde_json::Value::Null), None);
    }

    #[test]
    fn what_a_vms_user_puts_in_the_place_of_a_layer_is_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        let (secret, link) = (folder.path().join("secret"), folder.path().join("disk.1.qcow2"));
        fs::write(&secret, "secret").unwrap();
        std::os::unix::fs::symlink(&secret, &link).unwrap();
        assert!(copy_own(&link, &folder.path().join("copy")).is_err());
        copy_own(&secret, &folder.path().join("copy")).unwrap();
        assert_eq!(fs::read(folder.path().join("copy")).unwrap(), b"secret");
    }
}
