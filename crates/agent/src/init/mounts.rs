//! File systems: those of the kernel, the root made of two layers, and what programs expect.

use std::ffi::{CStr, CString};
use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, symlink};
use std::path::Path;

use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount, mount_bind, mount_move};
use rustix::process::{Resource, Rlimit, chdir, chroot, setrlimit};

use super::devices::Disks;
use crate::{kmsg, layers};

/// Where the layers are put together; below the initramfs, which nobody sees later.
const BASE: &str = "/base";
const WRITABLE: &str = "/writable";
const NEW_ROOT: &str = "/root-new";

/// What the initramfs has in it and is not needed any more; its memory is given back.
const LEFTOVERS: [&str; 2] = ["/modules", "/init"];

const NONE: MountFlags = MountFlags::empty();

/// Before anything else: processes, devices, the kernel's own files.
pub(super) fn early() -> io::Result<()> {
    for (kind, target, options) in
        [("proc", "/proc", c""), ("sysfs", "/sys", c""), ("devtmpfs", "/dev", c"mode=0755")]
    {
        fs::create_dir_all(target)?;
        match mount_on(kind, target, kind, system_flags(kind), options) {
            Ok(()) => {}
            // The kernel may have mounted devtmpfs itself.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn system_flags(kind: &str) -> MountFlags {
    let flags = MountFlags::NOSUID | MountFlags::NOEXEC;
    if kind == "devtmpfs" { flags } else { flags | MountFlags::NODEV }
}

/// Base image below, the VM's disk above, and the whole as `/`. Gives the disk's folder, which has
/// no path any more.
pub(super) fn root(disks: &Disks) -> io::Result<OwnedFd> {
    for directory in [BASE, WRITABLE, NEW_ROOT] {
        fs::create_dir_all(directory)?;
    }
    mount_on(path_text(disks.base), BASE, "erofs", MountFlags::RDONLY, c"")?;
    mount_writable(disks)?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let writable = open(WRITABLE, flags, Mode::empty())?;
    mount_overlay()?;
    for target in ["/proc", "/sys", "/dev"] {
        let inside = format!("{NEW_ROOT}{target}");
        fs::create_dir_all(&inside)?;
        mount_move(target, &*inside).map_err(context(&format!("move {target}")))?;
    }
    for leftover in LEFTOVERS {
        let path = Path::new(leftover);
        let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
        if let Err(error) = removed
            && error.kind() != io::ErrorKind::NotFound
        {
            kmsg!("remove {leftover}: {error}");
        }
    }
    chdir(NEW_ROOT)?;
    // The initramfs itself cannot be unmounted or pivoted away.
    mount_move(".", "/").map_err(context("move the root"))?;
    chroot(".")?;
    chdir("/")?;
    Ok(writable)
}

fn mount_writable(disks: &Disks) -> io::Result<()> {
    match disks.writable {
        Some(disk) => {
            // `upper` and `work` were made by the host, with the file system.
            // Discards give the host back what the guest deletes; not every disk takes them.
            let mount =
                |options| mount_on(path_text(disk), WRITABLE, "ext4", MountFlags::NOATIME, options);
            // Tables that the host left out stay out: a thread that fills them would run on in every
            // clone.
            mount(c"discard,noinit_itable").or_else(|_| mount(c"noinit_itable"))
        }
        None => mount_on("tmpfs", WRITABLE, "tmpfs", NONE, c"mode=0755"),
    }?;
    fs::create_dir_all(format!("{WRITABLE}/upper"))?;
    fs::create_dir_all(format!("{WRITABLE}/work"))
}

fn mount_overlay() -> io::Result<()> {
    let plain = format!("lowerdir={BASE},upperdir={WRITABLE}/upper,workdir={WRITABLE}/work");
    // With redirects, directories of the base can be renamed; not every kernel has them.
    let with_redirects = CString::new(format!("{plain},redirect_dir=on"))?;
    let plain = CString::new(plain)?;
    // To read a file must not write to the disk.
    let flags = MountFlags::NOATIME;
    mount_on("overlay", NEW_ROOT, "overlay", flags, &with_redirects)
        .or_else(|_| mount_on("overlay", NEW_ROOT, "overlay", flags, &plain))
}

/// What programs expect, and what tools will want of the disk. Each is optional: a kernel may lack
/// it.
pub(super) fn late(writable: &OwnedFd) {
    let system = MountFlags::NOSUID | MountFlags::NOEXEC;
    let memory = MountFlags::NOSUID | MountFlags::NODEV;
    optional("devpts", "/dev/pts", system, c"newinstance,gid=5,mode=0620,ptmxmode=0666");
    optional("tmpfs", "/dev/shm", memory, c"mode=1777");
    optional("tmpfs", "/run", memory, c"mode=0755");
    if let Err(error) = show_disk(writable) {
        kmsg!("show the disk at {}: {error}", layers::DISK);
    }
    optional("cgroup2", "/sys/fs/cgroup", system | MountFlags::NODEV, c"");
    optional("mqueue", "/dev/mqueue", system | MountFlags::NODEV, c"");
    for (target, link) in [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
    ] {
        if let Err(error) = symlink(target, link)
            && error.kind() != io::ErrorKind::AlreadyExists
        {
            kmsg!("link {link}: {error}");
        }
    }
    // With an instance of its own, devpts has its own way to make terminals.
    if fs::exists("/dev/pts/ptmx").unwrap_or(false) {
        drop(fs::remove_file("/dev/ptmx"));
        drop(symlink("pts/ptmx", "/dev/ptmx"));
    }
    drop(fs::create_dir_all("/run/lock"));
}

/// A second place for the VM's disk: what is on it and not in the root can be reached there.
fn show_disk(writable: &OwnedFd) -> io::Result<()> {
    DirBuilder::new().mode(0o700).create(layers::FOLDER)?;
    fs::create_dir(layers::DISK)?;
    mount_bind(format!("/proc/self/fd/{}", writable.as_raw_fd()), layers::DISK)?;
    Ok(())
}

/// Open files: what a distribution gives its services.
pub(super) fn limits() {
    let limit = Rlimit { current: Some(1024), maximum: Some(524_288) };
    if let Err(errno) = setrlimit(Resource::Nofile, limit) {
        kmsg!("set the limit of open files: {errno}");
    }
}

fn optional(kind: &str, target: &str, flags: MountFlags, options: &CStr) {
    let mounted =
        fs::create_dir_all(target).and_then(|()| mount_on(kind, target, kind, flags, options));
    // The mount has logged; the guest goes on without it.
    drop(mounted);
}

fn mount_on(
    source: &str,
    target: &str,
    kind: &str,
    flags: MountFlags,
    options: &CStr,
) -> io::Result<()> {
    mount(source, target, kind, flags, options)
        .map_err(context(&format!("mount {kind} on {target}")))
}

/// Logs where it happened and keeps the number, which callers look at.
fn context(what: &str) -> impl FnOnce(Errno) -> io::Error {
    move |errno| {
        if errno != Errno::BUSY {
            kmsg!("{what}: {errno}");
        }
        errno.into()
    }
}

fn path_text(path: &'static Path) -> &'static str {
    path.to_str().unwrap_or_default()
}
