//! The folder that a VMM writes its snapshots into: `snap` in its home.
//!
//! Firecracker flushes what it has written before it says that a snapshot is done, and the guest
//! stands still meanwhile. Nothing is kept there, so the folder is an overlay that takes no notice
//! of flushes. Where the host cannot mount one it is a plain folder, and pauses are longer.

use std::{ffi::CString, fs::File, os::fd::AsRawFd as _, path::PathBuf};

use aether_types::MachineId;
use rustix::{
    fs::{FileType, Mode, OFlags, ResolveFlags},
    mount::MountFlags,
};

use super::home::Home;
use crate::{
    DriverError,
    host::{Host, Record, file_error, make_folder, remove_tree},
    journal::Resource,
    process,
};

pub(super) const FOLDER: &str = "snap";
/// As the VMM knows them.
pub(super) const MEMORY: &str = "snap/memory";
pub(super) const STATE: &str = "snap/state";

/// Behind the overlay, in the VM's directory.
const BEHIND: &str = "scratch";

pub(super) fn behind(host: &Host, id: MachineId) -> PathBuf {
    host.directory(id).join(BEHIND)
}

/// Before the VMM starts: its jail shows what is mounted by then.
pub(super) fn make(host: &Host, record: &Record, home: &Home) -> Result<(), DriverError> {
    let id = record.spec.id;
    let path = home.path.join(FOLDER);
    make_folder(&path, 0o700)?;
    if rustix::process::geteuid().is_root() {
        let behind = behind(host, id);
        for name in ["lower", "upper", "work"] {
            make_folder(&behind.join(name), 0o700)?;
        }
        host.give(&behind.join("upper"), record)?;
        let mount = Resource::Mount { path: path.clone() };
        host.journal.intend(id, &mount)?;
        let folders = process::open_directory(&behind)?;
        // By descriptor: a path could have a comma in it.
        let at = format!("/proc/self/fd/{}", folders.as_raw_fd());
        let options = format!("lowerdir={at}/lower,upperdir={at}/upper,workdir={at}/work,volatile");
        let options = CString::new(options).unwrap_or_default();
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        match rustix::mount::mount("aether", &path, "overlay", flags, options.as_c_str()) {
            Ok(()) => return Ok(()),
            Err(error) => {
                tracing::debug!(machine.id = %id, %error, "snapshots are flushed while they are taken");
            }
        }
        host.journal.forget(id, &mount)?;
        remove_tree(&behind)?;
    }
    host.give(&path, record)
}

/// Opens what a VMM wrote: a regular file in its home, and not what a link leads to.
pub(super) fn open(home: &Home, name: &'static str) -> Result<File, DriverError> {
    let failed = |e: std::io::Error| file_error("open the VMM's", name.as_ref(), e);
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOFOLLOW;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let fd = rustix::fs::openat2(&home.directory, name, flags, Mode::empty(), resolve)
        .map_err(|e| failed(e.into()))?;
    let stat = rustix::fs::fstat(&fd).map_err(|e| failed(e.into()))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(failed(std::io::Error::other("it is no regular file")));
    }
    Ok(File::from(fd))
}

/// Removes what an earlier snapshot left.
pub(super) fn empty(home: &Home) -> Result<(), DriverError> {
    let failed = |e: std::io::Error| file_error("empty", home.path.join(FOLDER).as_ref(), e);
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let folder = rustix::fs::openat(&home.directory, FOLDER, flags, Mode::empty())
        .map_err(|e| failed(e.into()))?;
    for name in [MEMORY, STATE] {
        let name = name.rsplit('/').next().unwrap_or(name);
        match rustix::fs::unlinkat(&folder, name, rustix::fs::AtFlags::empty()) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => {}
            Err(errno) => return Err(failed(errno.into())),
        }
    }
    Ok(())
}
