//! What PID 1 does for ever: an agent that ends is replaced, and processes that have lost their
//! parent are collected.

use std::convert::Infallible;
use std::fs::File;
use std::io;
use std::process::exit;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, memfd_create};

use crate::{kmsg, sys};

/// An agent that ends sooner than this after its start has a fault that a new one has too.
const SHORT_LIFE: Duration = Duration::from_secs(1);
/// Such ends in a row, after which the guest gives up and says so by its own end.
const SHORT_LIVES_MAX: u32 = 10;

/// What the end of an agent is followed by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum After {
    /// Another agent.
    GoOn,
    /// The end of the guest, which the agent was asked for.
    End,
}

/// Keeps an agent alive, until one was asked to end the guest (by `after`, which sees the status of
/// each that ended) or until none stays alive.
pub(crate) fn supervise(
    serve: impl Fn(Option<&File>, u32) -> io::Result<Infallible>,
    after: impl Fn(i32) -> After,
) -> After {
    sys::set_all_signals_blocked(true);
    let legacy = legacy();
    let mut instance = 0_u32;
    let mut short_lives = 0;
    while short_lives < SHORT_LIVES_MAX {
        instance = instance.saturating_add(1);
        let begun = Instant::now();
        match sys::fork() {
            Ok(0) => run_agent(&serve, legacy.as_ref(), instance),
            Ok(agent) => {
                let status = collect_until(agent);
                // Its runs have nobody left; nothing else is alive in this guest.
                sys::kill(-1, libc::SIGKILL);
                if status.is_some_and(|status| after(status) == After::End) {
                    return After::End;
                }
            }
            Err(error) => kmsg!("fork: {error}"),
        }
        short_lives = if begun.elapsed() < SHORT_LIFE { short_lives + 1 } else { 0 };
    }
    After::GoOn
}

/// A file in memory that every agent of this guest has from here: a token that was given replaces
/// the first one for those that come after, too.
fn legacy() -> Option<File> {
    match memfd_create("token", MemfdFlags::CLOEXEC) {
        Ok(file) => Some(file.into()),
        Err(error) => {
            kmsg!("make a file for the token: {error}");
            None
        }
    }
}

/// The status with which the agent ended.
fn collect_until(agent: i32) -> Option<i32> {
    while let Some((pid, status)) = sys::wait_any() {
        if pid == agent {
            kmsg!("the agent has ended with status {status:#x}");
            return Some(status);
        }
    }
    None
}

#[expect(clippy::exit, reason = "the main of the forked agent")]
fn run_agent(
    serve: impl Fn(Option<&File>, u32) -> io::Result<Infallible>,
    legacy: Option<&File>,
    instance: u32,
) -> ! {
    sys::set_all_signals_blocked(false);
    let Err(error) = serve(legacy, instance);
    kmsg!("serve: {error}");
    exit(1)
}
