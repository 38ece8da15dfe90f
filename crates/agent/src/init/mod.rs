//! PID 1: brings the guest up, then keeps an agent in it.

mod channel;
mod command_line;
mod devices;
mod modules;
mod mounts;

use std::convert::Infallible;
use std::fs::File;
use std::io;
use std::process::exit;
use std::time::{Duration, Instant};

use command_line::CommandLine;
use rustix::fs::{MemfdFlags, memfd_create};

use crate::log::{self, Level};
use crate::server::{self, Agent};
use crate::{guest, kmsg, net, power, sys};

/// An agent that ends sooner than this after its start has a fault that a new one has too.
const SHORT_LIFE: Duration = Duration::from_secs(1);
/// Such ends in a row, after which the guest gives up and says so by its own end.
const SHORT_LIVES_MAX: u32 = 10;

/// Does not return: the kernel panics when PID 1 ends.
pub fn main() -> ! {
    match bring_up() {
        Ok(command_line) => supervise(&command_line),
        Err(error) => {
            // A guest that cannot be reached is ended, so that its VMM ends and the host sees why.
            log::write(Level::Fatal, format_args!("give up: {error}"));
            power::end_machine(true);
            exit(1)
        }
    }
}

fn bring_up() -> io::Result<CommandLine> {
    mounts::early()?;
    // Not earlier: without /dev it could not be opened, and later tries count for nothing.
    log::use_kernel_log();
    let command_line = CommandLine::read()?;
    let events = devices::Events::listen();
    modules::load();
    let disks = devices::wait_for_disks(&events)?;
    let writable = mounts::root(&disks)?;
    mounts::late(&writable);
    if let Err(error) = command_line.hide() {
        kmsg!("hide the command line: {error}");
    }
    if let Err(error) = net::bring_up_loopback() {
        kmsg!("bring up lo: {error}");
    }
    mounts::limits();
    Ok(command_line)
}

/// Keeps an agent alive and collects every process that has lost its parent.
fn supervise(command_line: &CommandLine) -> ! {
    sys::set_all_signals_blocked(true);
    let legacy = legacy();
    let mut instance = 0_u32;
    let mut short_lives = 0;
    loop {
        instance = instance.saturating_add(1);
        let begun = Instant::now();
        match sys::fork() {
            Ok(0) => run_agent(command_line, legacy.as_ref(), instance),
            Ok(agent) => {
                collect_until(agent);
                // Its runs have nobody left; nothing else is alive in this guest.
                sys::kill(-1, libc::SIGKILL);
            }
            Err(error) => kmsg!("fork: {error}"),
        }
        short_lives = if begun.elapsed() < SHORT_LIFE { short_lives + 1 } else { 0 };
        if short_lives >= SHORT_LIVES_MAX {
            log::write(Level::Fatal, format_args!("the agent does not stay alive"));
            power::end_machine(true);
        }
    }
}

/// A file in memory that every agent of this guest has from here: a token that was given replaces
/// that of the command line for those that come after, too.
fn legacy() -> Option<File> {
    match memfd_create("token", MemfdFlags::CLOEXEC) {
        Ok(file) => Some(file.into()),
        Err(error) => {
            kmsg!("make a file for the token: {error}");
            None
        }
    }
}

fn collect_until(agent: i32) {
    while let Some((pid, status)) = sys::wait_any() {
        if pid == agent {
            kmsg!("the agent has ended with status {status:#x}; starting another");
            return;
        }
    }
}

#[expect(clippy::exit, reason = "the main of the forked agent")]
fn run_agent(command_line: &CommandLine, legacy: Option<&File>, instance: u32) -> ! {
    sys::set_all_signals_blocked(false);
    let Err(error) = serve(command_line, legacy, instance);
    kmsg!("serve: {error}");
    exit(1)
}

fn serve(
    command_line: &CommandLine,
    legacy: Option<&File>,
    instance: u32,
) -> io::Result<Infallible> {
    let boot_id = format!("{}.{instance}", guest::kernel_boot_id());
    let legacy = legacy.map(File::try_clone).transpose()?;
    let agent = Agent::with_legacy(command_line.token.clone(), boot_id.clone(), legacy);
    let listener = channel::listen(&command_line.channel)?;
    // A hint only: the host asks again by itself where it is lost.
    if let Err(error) = channel::say_ready(&command_line.channel, &boot_id) {
        kmsg!("say that the guest is ready: {error}");
    }
    server::serve(&agent, listener)
}
