//! Named network namespaces, and kernel settings in them.
//!
//! In a directory of our own, not in that of `ip netns`: its first use lays a mount over what is
//! there and hides it. `nsenter --net=/run/aether/netns/NAME` enters one.

use std::{
    fs, io,
    os::fd::{AsRawFd as _, OwnedFd},
    path::{Path, PathBuf},
    thread,
};

use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
    mount::{UnmountFlags, mount_bind, unmount},
    thread::{UnshareFlags, unshare_unsafe},
};

use crate::DriverError;

const DIRECTORY: &str = "/run/aether/netns";
/// What `statfs` says of a namespace's file.
const NSFS_MAGIC: libc::c_long = 0x6e73_6673;

fn path(name: &str) -> PathBuf {
    Path::new(DIRECTORY).join(name)
}

fn failed(action: &'static str, path: &Path, source: impl Into<io::Error>) -> DriverError {
    DriverError::File { action, path: path.to_owned(), source: source.into() }
}

/// The namespace of that name; `None` where there is none, or only the file that a crash left.
pub(super) fn open(name: &str) -> Result<Option<OwnedFd>, DriverError> {
    let path = path(name);
    let fd = match rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) {
        Ok(fd) => fd,
        Err(Errno::NOENT) => return Ok(None),
        Err(errno) => return Err(failed("open the network namespace", &path, errno)),
    };
    let kind = rustix::fs::fstatfs(&fd).map_err(|e| failed("examine", &path, e))?.f_type;
    Ok((kind == NSFS_MAGIC).then_some(fd))
}

/// Makes a namespace that stays without a process in it.
pub(super) fn make(name: &str) -> Result<OwnedFd, DriverError> {
    let path = path(name);
    fs::create_dir_all(DIRECTORY).map_err(|e| failed("make", Path::new(DIRECTORY), e))?;
    fs::write(&path, b"").map_err(|e| failed("make", &path, e))?;
    let target = path.clone();
    // A thread of its own, which ends in the new namespace.
    let made = thread::spawn(move || {
        #[expect(unsafe_code, reason = "the call is unsafe for what other flags do")]
        // SAFETY: a new network namespace for this thread shares no memory or descriptor anew.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
        mount_bind("/proc/thread-self/ns/net", &target)
    });
    let made = made.join().unwrap_or(Err(Errno::IO));
    made.map_err(|e| failed("make the network namespace", &path, e))?;
    open(name)?.ok_or_else(|| failed("make the network namespace", &path, Errno::NOENT))
}

/// Gives a namespace its name again if it has lost it.
pub(super) fn pin(name: &str, namespace: &OwnedFd) -> Result<(), DriverError> {
    if open(name)?.is_some() {
        return Ok(());
    }
    let path = path(name);
    fs::create_dir_all(DIRECTORY).map_err(|e| failed("make", Path::new(DIRECTORY), e))?;
    fs::write(&path, b"").map_err(|e| failed("make", &path, e))?;
    let source = format!("/proc/thread-self/fd/{}", namespace.as_raw_fd());
    mount_bind(source, &path).map_err(|e| failed("name the network namespace", &path, e))
}

/// Takes the name away; the namespace ends when no process and no descriptor is in it.
pub(super) fn remove(name: &str) -> Result<(), DriverError> {
    let path = path(name);
    // As often as it was mounted; EINVAL: not any more.
    loop {
        match unmount(&path, UnmountFlags::DETACH) {
            Ok(()) => {}
            Err(Errno::INVAL | Errno::NOENT) => break,
            Err(errno) => return Err(failed("unmount", &path, errno)),
        }
    }
    match fs::remove_file(&path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed("remove", &path, error)),
    }
    // Others may have names there.
    let _ = fs::remove_dir(DIRECTORY);
    Ok(())
}

pub(super) fn names() -> Vec<String> {
    let entries = fs::read_dir(DIRECTORY).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

/// Writes `/proc/sys/net/<key>` of this thread's namespace.
pub(super) fn set(key: &str, value: &str) -> Result<(), DriverError> {
    let path = Path::new("/proc/sys/net").join(key);
    fs::write(&path, value).map_err(|e| failed("write the kernel setting", &path, e))
}

pub(super) fn get(key: &str) -> Option<String> {
    let text = fs::read_to_string(Path::new("/proc/sys/net").join(key)).ok()?;
    Some(text.trim().to_owned())
}

/// Whether this host's kernel has IPv6, which the links to the guests' agents use.
pub(super) fn has_ipv6() -> bool {
    Path::new("/proc/sys/net/ipv6").exists()
}
