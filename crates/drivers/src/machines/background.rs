//! A VMM's share of the processors: its own, or only what nobody else wants.
//!
//! By the scheduler and not by a cgroup, which many hosts do not let the worker make. Only with
//! `CAP_SYS_NICE`: without it what was lowered could not be raised again.

use std::{fs, io, sync::OnceLock};

/// Bit of the capability in the masks of `/proc/self/status`.
const CAP_SYS_NICE: u32 = 23;
/// Threads may begin while they are walked through; those inherit from threads that were changed.
const ROUNDS_MAX: usize = 8;

/// Whether this process may lower and raise what other users' processes get. Asked once: the
/// kernel writes the whole file for it, and a claim must not wait for that.
pub(crate) fn is_permitted() -> bool {
    static PERMITTED: OnceLock<bool> = OnceLock::new();
    *PERMITTED.get_or_init(|| {
        let Ok(status) = fs::read_to_string("/proc/self/status") else { return false };
        let mask = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
        let mask = mask.and_then(|text| u64::from_str_radix(text.trim(), 16).ok());
        mask.is_some_and(|mask| mask & (1 << CAP_SYS_NICE) != 0)
    })
}

/// Changes every thread of a process; threads and programs that it begins later inherit it. Does
/// nothing without the permission.
pub(crate) fn set(pid: u32, background: bool) -> io::Result<()> {
    if !is_permitted() {
        tracing::debug!(pid, "no CAP_SYS_NICE: a VMM keeps its share of the processors");
        return Ok(());
    }
    let policy = if background { libc::SCHED_IDLE } else { libc::SCHED_OTHER };
    let mut changed = Vec::new();
    for _ in 0..ROUNDS_MAX {
        let before = changed.len();
        for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
            let name = entry?.file_name();
            let Some(thread) = name.to_str().and_then(|n| n.parse::<libc::pid_t>().ok()) else {
                continue;
            };
            if !changed.contains(&thread) {
                set_thread(thread, policy)?;
                changed.push(thread);
            }
        }
        if changed.len() == before {
            break;
        }
    }
    Ok(())
}

#[expect(unsafe_code, reason = "no wrapper for scheduling policies")]
fn set_thread(thread: libc::pid_t, policy: libc::c_int) -> io::Result<()> {
    let priority = libc::sched_param { sched_priority: 0 };
    // SAFETY: the structure lives on this stack and the call only reads it.
    let result = unsafe { libc::sched_setscheduler(thread, policy, &raw const priority) };
    if result == 0 {
        return Ok(());
    }
    match io::Error::last_os_error() {
        // It ended in between.
        error if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        error => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_thread_of_a_process_is_lowered_and_raised() {
        if !is_permitted() {
            return;
        }
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let policy = |pid: u32| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
            let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split(' ').collect();
            fields[39].parse::<libc::c_int>().unwrap()
        };
        set(child.id(), true).unwrap();
        let lowered = policy(child.id());
        set(child.id(), false).unwrap();
        let raised = policy(child.id());
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!((lowered, raised), (libc::SCHED_IDLE, libc::SCHED_OTHER));
    }
}
