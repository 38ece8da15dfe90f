//! Tools of a container: one overlay on its `/usr`, put together on the host before it starts.
//!
//! ```text
//!   DATA/vms/ID/usr/base        the root file system, as it is in the image
//!                   layer.N     tool N: mounted from the machine's own link to it
//!                   written.C   what the container writes to /usr, over C tools
//!                   merged      all of it; bound over /usr
//! ```
//!
//! The kernel of the host reads the layers: files that this platform's builders made, checked by
//! their digest. Each mount is in the journal before it is made, and they go when the container has
//! ended; the next start makes them anew, as after a reboot of the host.

use std::{
    ffi::CString,
    fs,
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use aether_types::MachineId;
use rustix::mount::MountFlags;

use crate::{
    DriverError,
    host::{Host, Record, file_error, make_folder, remove_tree, unmount},
    journal::Resource,
    process, tools,
};

fn folder(host: &Host, id: MachineId) -> PathBuf {
    host.directory(id).join("usr")
}

/// What is bound over `/usr` of a container with tools.
pub(super) fn merged(machine: &Path) -> PathBuf {
    machine.join("usr").join("merged")
}

/// The folders of a container that is being made, where it has tools.
pub(super) fn prepare(host: &Host, record: &Record) -> Result<(), DriverError> {
    let path = folder(host, record.spec.id);
    remove_tree(&path)?;
    if record.spec.layers.is_empty() {
        return Ok(());
    }
    make_folder(&path, 0o755)?;
    make_folder(&path.join("merged"), 0o755)
}

/// Puts the overlay together for a container that does not run. Blocks. What it leaves when it
/// fails is found in the journal.
pub(super) fn put_together(host: &Host, record: &Record) -> Result<(), DriverError> {
    let (id, count) = (record.spec.id, record.spec.layers.len());
    take_apart(host, id)?;
    if count == 0 {
        return Ok(());
    }
    let path = folder(host, id);
    let written = format!("written.{count}");
    if !path.join("merged").is_dir() || has_other_than(&path, &written)? {
        return Err(DriverError::Layers(
            "tools cannot be added to a container that was made without them; make another VM"
                .to_owned(),
        ));
    }
    let directory = process::open_directory(&path)?;
    mount_image(host, id, &record.spec.boot.rootfs, &path.join("base"))?;
    for (number, layer) in record.spec.layers.iter().enumerate() {
        let target = path.join(format!("layer.{number}"));
        // Says whether it still is what it was.
        drop(tools::open(host, id, number, layer)?);
        mount_image(host, id, &host.layers(id).join(tools::file_name(number)), &target)?;
    }
    for name in [&written, "work"] {
        make_folder(&path.join(name), 0o755)?;
    }
    mount_overlay(host, id, &directory, &path.join("merged"), &written, count)
}

/// Unmounts what there is, the last first. Repeating it is harmless.
pub(super) fn take_apart(host: &Host, id: MachineId) -> Result<(), DriverError> {
    for resource in host.journal.resources(id).into_iter().rev() {
        if let Resource::Mount { path } = &resource {
            unmount(path)?;
            host.journal.forget(id, &resource)?;
        }
    }
    Ok(())
}

/// Whether something was written over another number of tools: that would be lost.
fn has_other_than(folder: &Path, written: &str) -> Result<bool, DriverError> {
    let entries = fs::read_dir(folder).map_err(|e| file_error("read", folder, e))?;
    let mut names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    Ok(names.any(|name| name.starts_with("written.") && name != written))
}

/// By the program: it finds a loop device and has the kernel give it back with the mount.
fn mount_image(host: &Host, id: MachineId, image: &Path, target: &Path) -> Result<(), DriverError> {
    make_folder(target, 0o755)?;
    host.journal.intend(id, &Resource::Mount { path: target.to_owned() })?;
    let output = Command::new("mount")
        .args(["-t", "erofs", "-o", "ro,nodev,loop"])
        .args([image, target])
        .stdin(Stdio::null())
        .output()
        .map_err(|source| DriverError::Io { action: "start mount".to_owned(), source })?;
    if output.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(DriverError::Program { program: "mount", detail: words })
}

/// Paths from an open folder: with 32 layers, whole ones would be more than the kernel takes.
fn mount_overlay(
    host: &Host,
    id: MachineId,
    directory: &OwnedFd,
    target: &Path,
    written: &str,
    count: usize,
) -> Result<(), DriverError> {
    let at = |name: &str| process::short_path(directory.as_fd(), name).display().to_string();
    let mut lower: Vec<String> =
        (0..count).rev().map(|number| at(&format!("layer.{number}/usr"))).collect();
    lower.push(at("base/usr"));
    let options =
        format!("lowerdir={},upperdir={},workdir={}", lower.join(":"), at(written), at("work"));
    let failed = |source| file_error("mount the tools on", target, source);
    let options = CString::new(options).map_err(|e| failed(e.into()))?;
    host.journal.intend(id, &Resource::Mount { path: target.to_owned() })?;
    rustix::mount::mount("overlay", target, "overlay", MountFlags::NODEV, options.as_c_str())
        .map_err(|e| failed(e.into()))
}
