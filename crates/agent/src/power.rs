//! Ending the guest.

use std::fs;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use aether_protocol::{Shutdown, ShuttingDown};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::mount::{MountFlags, mount_remount};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use rustix::system::{RebootCommand, reboot};

use crate::conn::{Conn, timespec};
use crate::server::Place;
use crate::{kmsg, sys};

/// Longest grace that a request may ask for.
const GRACE_MAX: Duration = Duration::from_mins(10);
/// What killed processes get to be gone.
const KILL_LIMIT: Duration = Duration::from_secs(2);

/// With this status the agent of a container ends when it was asked to end the container.
const CONTAINER_END: i32 = 0;

/// Ends every process, then the machine. Does not come back.
pub(crate) fn shut_down(mut conn: Conn, place: Place, request: &Shutdown) {
    // The host learns that it has begun; whether it heard so changes nothing.
    drop(conn.send(ShuttingDown {}));
    let grace = Duration::from_millis(request.grace_ms.into()).min(GRACE_MAX);
    // To everything but PID 1 and this process.
    sys::kill(-1, libc::SIGTERM);
    sys::kill(-1, libc::SIGCONT);
    wait_for_all(grace);
    sys::kill(-1, libc::SIGKILL);
    wait_for_all(KILL_LIMIT);
    match place {
        Place::Machine => end_machine(request.reboot),
        Place::Container => end_container(),
    }
}

/// PID 1 sees the status and ends the container by its own end: the kernel's command for that is not
/// a container's to give.
#[expect(clippy::exit, reason = "the end of the guest, which was asked for")]
fn end_container() -> ! {
    rustix::fs::sync();
    std::process::exit(CONTAINER_END)
}

/// Whether a status of the agent, as `wait` gives it, says that the container is to end.
pub(crate) fn is_end_of_container(status: i32) -> bool {
    libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == CONTAINER_END
}

pub(crate) fn end_machine(is_reboot: bool) {
    rustix::fs::sync();
    // The layer below stays writable, yet after the sync and without writers it is clean.
    if let Err(errno) = mount_remount("/", MountFlags::RDONLY, c"") {
        kmsg!("remount / read-only: {errno}");
    }
    // Remounts what has no mount point any more, where the kernel has it.
    drop(fs::write("/proc/sysrq-trigger", "u"));
    rustix::fs::sync();
    // Without ACPI nothing can switch the machine off: it would halt, and its VMM would go on. A
    // restart ends a VMM that was told not to restart.
    let can_power_off = fs::exists("/sys/firmware/acpi").unwrap_or(false);
    let command =
        if is_reboot || !can_power_off { RebootCommand::Restart } else { RebootCommand::PowerOff };
    if let Err(errno) = reboot(command) {
        kmsg!("end the machine: {errno}");
    }
}

/// Waits until no process is left but PID 1, this one and the kernel's own.
fn wait_for_all(limit: Duration) {
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let others = other_processes();
        let Some(first) = others.first() else { return };
        if left.is_zero() {
            return;
        }
        let mut fds = [PollFd::new(first, PollFlags::IN)];
        // Interrupted or not, the list is made again.
        let _ = poll(&mut fds, Some(&timespec(left)));
    }
}

fn other_processes() -> Vec<OwnedFd> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
    let this = std::process::id();
    let others = pids.filter(|&pid| pid != 1 && pid.unsigned_abs() != this && has_program(pid));
    others.filter_map(|pid| pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()).collect()
}

/// The kernel's threads have no program, and neither have processes that wait to be collected.
fn has_program(pid: i32) -> bool {
    fs::read_link(format!("/proc/{pid}/exe")).is_ok()
}
