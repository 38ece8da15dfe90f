//! Where a VMM lives: the VM's directory, or a jail in it.
//!
//! ```text
//! DATA/vms/ID/                               disk.img; without a jailer also the sockets and
//!                                            names for an image's and a snapshot's files
//! DATA/vms/ID/scratch/                       behind `snap` in the VMM's home
//! DATA/vms/ID/jail/firecracker/ID/root/      with one: what the VMM sees as /, made for each start
//! ```
//!
//! A jail is thrown away before the next start: what an earlier VMM left in it, such as a link in
//! the way of the jailer (CVE-2026-1386), is gone before the jailer runs as root.

use std::{
    fs, io,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use aether_types::MachineId;
use rustix::{
    fs::inotify::{self, CreateFlags, WatchFlags},
    mount::{MountFlags, mount_bind, mount_remount},
};
use tokio::io::unix::AsyncFd;

use super::{
    API_SOCKET,
    api::Session,
    machine::{Files, MEMORY_NAME, ROOTFS_NAME, STATE_NAME, TOOLS_NAME},
    scratch, snapshot, vsock,
};
use crate::{
    BootSource, DriverError,
    host::{DISK_FILE, Host, Record, file_error, make_folder, remove_file, remove_tree, unmount},
    journal::Resource,
    process, tools,
};

const JAIL: &str = "jail";
/// Between the socket's making and its listening: two system calls of the VMM.
const LISTEN_INTERVAL: Duration = Duration::from_millis(1);

pub(super) fn jail_base(host: &Host, id: MachineId) -> PathBuf {
    host.directory(id).join(JAIL)
}

#[derive(Debug)]
pub(super) struct Home {
    pub(super) path: PathBuf,
    pub(super) directory: OwnedFd,
}

impl Home {
    pub(super) fn open(path: PathBuf) -> Result<Self, DriverError> {
        let directory = process::open_directory(&path)?;
        Ok(Self { path, directory })
    }

    /// Where a VMM lives that runs, whether its jailer is the one that is configured now or not.
    pub(super) fn of_running(host: &Host, id: MachineId) -> Result<Self, DriverError> {
        let jail = fs::read_dir(jail_base(host, id)).ok().and_then(|mut jails| jails.next());
        let root =
            jail.and_then(Result::ok).map(|jail| jail.path().join(id.to_string()).join("root"));
        Self::open(root.unwrap_or_else(|| host.directory(id)))
    }

    /// Puts the disks of a VM into its VMM's home. A snapshot has their names in it.
    pub(super) fn furnish(&self, host: &Host, record: &Record) -> Result<(), DriverError> {
        let id = record.spec.id;
        self.bring(host, id, &record.spec.boot.rootfs, ROOTFS_NAME)?;
        if self.path != host.directory(id) {
            self.bring(host, id, &host.disk(id), DISK_FILE)?;
        }
        self.bring(host, id, &tools::composed(host, id), TOOLS_NAME)?;
        scratch::make(host, record, self)
    }

    /// Puts what a guest boots into a jail.
    pub(super) fn bring_kernel(&self, host: &Host, record: &Record) -> Result<Files, DriverError> {
        let BootSource { kernel, initrd, .. } = &record.spec.boot;
        for (source, name) in [(kernel, "kernel"), (initrd, "initrd")] {
            self.bring(host, record.spec.id, source, name)?;
        }
        Ok(Files { kernel: "kernel".to_owned(), initrd: "initrd".to_owned() })
    }

    /// Puts a snapshot into a VMM's home, while it loads it.
    pub(super) fn bring_snapshot(
        &self,
        host: &Host,
        id: MachineId,
        directory: &Path,
    ) -> Result<(), DriverError> {
        for name in [MEMORY_NAME, STATE_NAME] {
            self.bring(host, id, &directory.join(name), name)?;
        }
        Ok(())
    }

    /// The VMM has loaded it, and keeps the memory by a mapping.
    pub(super) fn remove_snapshot(&self, host: &Host, id: MachineId) -> Result<(), DriverError> {
        for name in [MEMORY_NAME, STATE_NAME] {
            let path = self.path.join(name);
            let mount = Resource::Mount { path: path.clone() };
            if host.journal.resources(id).contains(&mount) {
                unmount(&path)?;
                host.journal.forget(id, &mount)?;
            }
            remove_file(&path)?;
        }
        Ok(())
    }

    /// Another name for the file, or where the file system has none, a mount over an empty one. A
    /// worker that may not mount has VMMs that see what it sees.
    fn bring(
        &self,
        host: &Host,
        id: MachineId,
        from: &Path,
        name: &str,
    ) -> Result<(), DriverError> {
        let from = fs::canonicalize(from).map_err(|e| file_error("find", from, e))?;
        let path = self.path.join(name);
        if fs::hard_link(&from, &path).is_ok() {
            return Ok(());
        }
        if !rustix::process::geteuid().is_root() {
            return std::os::unix::fs::symlink(&from, &path)
                .map_err(|e| file_error("make a link at", &path, e));
        }
        host.journal.intend(id, &Resource::Mount { path: path.clone() })?;
        fs::write(&path, b"").map_err(|e| file_error("make", &path, e))?;
        mount_bind(&from, &path)
            // The disk is always in the same file system, so what is mounted is only read.
            .and_then(|()| mount_remount(&path, MountFlags::BIND | MountFlags::RDONLY, c""))
            .map_err(|e| file_error("mount a file at", &path, e.into()))
    }
}

/// Without a jail: what a guest boots, by inherited descriptors.
pub(super) fn inherited(boot: &BootSource) -> Result<(Vec<OwnedFd>, Files), DriverError> {
    let open = |path: &Path| {
        let fd = process::open_for(path)?;
        let name = format!("/proc/self/fd/{}", fd.as_raw_fd());
        Ok::<_, DriverError>((fd, name))
    };
    let (kernel, kernel_name) = open(&boot.kernel)?;
    let (initrd, initrd_name) = open(&boot.initrd)?;
    Ok((vec![kernel, initrd], Files { kernel: kernel_name, initrd: initrd_name }))
}

/// Makes the root of a new jail.
pub(super) fn make_jail(host: &Host, id: MachineId, root: PathBuf) -> Result<Home, DriverError> {
    // Of root until the jailer gives its inside to the VM's user.
    make_folder(&jail_base(host, id), 0o700)?;
    make_folder(&root, 0o700)?;
    Home::open(root)
}

/// Removes what a VMM that has ended left, with a jail or without.
pub(super) fn clean(host: &Host, id: MachineId) -> Result<(), DriverError> {
    let (directory, jail) = (host.directory(id), jail_base(host, id));
    for resource in host.journal.resources(id) {
        if let Resource::Mount { path } = &resource {
            unmount(path)?;
            host.journal.forget(id, &resource)?;
        }
    }
    for folder in [jail, scratch::behind(host, id), directory.join(scratch::FOLDER)] {
        remove_tree(&folder)?;
    }
    let ready = vsock::ready_socket();
    for name in
        [API_SOCKET, vsock::SOCKET, &ready, ROOTFS_NAME, TOOLS_NAME, MEMORY_NAME, STATE_NAME]
    {
        remove_file(&directory.join(name))?;
    }
    snapshot::forget_base(&directory)
}

/// Sees the API's socket appear in a directory.
pub(super) struct Appearance(AsyncFd<OwnedFd>);

impl Appearance {
    /// Before the VMM starts.
    pub(super) fn of(home: &Home) -> Result<Self, DriverError> {
        let failed = |e: io::Error| file_error("watch", &home.path, e);
        let watch = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)
            .map_err(|e| failed(e.into()))?;
        let directory = process::short_path(home.directory.as_fd(), ".");
        inotify::add_watch(&watch, directory, WatchFlags::CREATE).map_err(|e| failed(e.into()))?;
        #[expect(unsafe_code, reason = "tokio asks for a promise that the type cannot make")]
        // SAFETY: an `OwnedFd` gives the same descriptor for its whole life, and keeps it open.
        let watch = unsafe { AsyncFd::register(watch) };
        watch.map(Self).map_err(|e| failed(e.into()))
    }

    /// The caller bounds it.
    pub(super) async fn session(&self, home: &Home) -> Result<Session, DriverError> {
        loop {
            match Session::open(home.directory.as_fd(), API_SOCKET).await {
                Err(DriverError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                    self.next().await.map_err(|e| file_error("watch", &home.path, e))?;
                }
                Err(DriverError::Io { source, .. })
                    if source.kind() == io::ErrorKind::ConnectionRefused =>
                {
                    tokio::time::sleep(LISTEN_INTERVAL).await;
                }
                opened => return opened,
            }
        }
    }

    async fn next(&self) -> io::Result<()> {
        let mut events = [0; 1024];
        let mut ready = self.0.readable().await?;
        match rustix::io::read(self.0.get_ref(), &mut events) {
            Ok(_) => Ok(()),
            Err(rustix::io::Errno::AGAIN) => {
                ready.clear_ready();
                Ok(())
            }
            Err(errno) => Err(errno.into()),
        }
    }
}
