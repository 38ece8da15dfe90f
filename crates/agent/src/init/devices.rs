//! Waiting for the disks.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{
    AddressFamily, RecvFlags, SocketFlags, SocketType, bind, netlink, recv, socket_with,
};

use crate::conn::timespec;
use crate::kmsg;

/// The base image, read-only.
const BASE: &str = "/dev/vda";
/// The VM's own writable disk.
const WRITABLE: &str = "/dev/vdb";

/// A disk that is not there by then never comes.
const DISK_LIMIT: Duration = Duration::from_secs(20);

#[derive(Debug)]
pub(super) struct Disks {
    pub(super) base: &'static Path,
    /// Absent: the writable layer is in memory.
    pub(super) writable: Option<&'static Path>,
}

/// The kernel's announcements of devices.
#[derive(Debug)]
pub(super) struct Events(Option<OwnedFd>);

impl Events {
    /// Before the modules are loaded, so that nothing is missed.
    pub(super) fn listen() -> Self {
        let open = || {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let protocol = Some(netlink::KOBJECT_UEVENT);
            let socket = socket_with(AddressFamily::NETLINK, SocketType::DGRAM, flags, protocol)?;
            bind(&socket, &netlink::SocketAddrNetlink::new(0, 1))?;
            Ok::<_, rustix::io::Errno>(socket)
        };
        Self(open().inspect_err(|errno| kmsg!("listen for devices: {errno}")).ok())
    }

    /// Waits for the next announcement, at most until the deadline.
    fn wait(&self, deadline: Instant) {
        let left = timespec(deadline.saturating_duration_since(Instant::now()));
        let mut fds: Vec<_> = self.0.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
        let _ = poll(&mut fds, Some(&left));
        let mut scratch = [0; 4096];
        while let Some(socket) = &self.0
            && recv(socket, &mut scratch, RecvFlags::DONTWAIT).is_ok()
        {}
    }
}

pub(super) fn wait_for_disks(events: &Events) -> io::Result<Disks> {
    let deadline = Instant::now() + DISK_LIMIT;
    let base = Path::new(BASE);
    while !is_disk(base) {
        if Instant::now() >= deadline {
            return Err(io::Error::other(format!("{BASE} does not appear")));
        }
        events.wait(deadline);
    }
    // Disks are found in their order, and a driver makes all of its devices as it is loaded: where
    // the kernel has announced no second one by now, the VM has none.
    let writable = Path::new(WRITABLE);
    let has_second = is_disk(writable) || second_is_announced();
    while has_second && !is_disk(writable) && Instant::now() < deadline {
        events.wait(deadline);
    }
    Ok(Disks { base, writable: is_disk(writable).then_some(writable) })
}

fn is_disk(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device())
}

fn second_is_announced() -> bool {
    let is_block = |device: &Path| {
        // Virtio device type 2 is a disk.
        fs::read_to_string(device.join("device")).is_ok_and(|kind| kind.trim() == "0x0002")
    };
    let Ok(devices) = fs::read_dir("/sys/bus/virtio/devices") else { return false };
    devices.filter_map(Result::ok).filter(|device| is_block(&device.path())).count() > 1
}
