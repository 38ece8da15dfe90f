//! Ending a run's processes.

use std::fs;

use crate::sys;

/// Passes over `/proc` at most: a process that forks as fast as it can is met again.
const SWEEPS_MAX: usize = 8;

/// Kills the process group, and what is left of the session in other groups, such as the jobs of an
/// interactive shell. What has made a session of its own has left the run, as under any shell.
pub(super) fn kill_all(session: i32) {
    sys::kill(-session, libc::SIGKILL);
    for _ in 0..SWEEPS_MAX {
        let members = session_members(session);
        if members.is_empty() {
            return;
        }
        for pid in members {
            sys::kill(pid, libc::SIGKILL);
        }
    }
}

/// Processes of the session that live; without the leader, which the group's signal has met.
fn session_members(session: i32) -> Vec<i32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|&pid| pid != session && is_live_member(pid, session)).collect()
}

fn is_live_member(pid: i32, session: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name, in parentheses, may have anything in it; after it: state, parent, group, session.
    let Some((_, rest)) = stat.rsplit_once(')') else { return false };
    let mut fields = rest.split_ascii_whitespace();
    let is_dead = matches!(fields.next(), Some("Z" | "X") | None);
    !is_dead && fields.nth(2).and_then(|field| field.parse().ok()) == Some(session)
}
