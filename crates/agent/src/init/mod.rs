//! PID 1: brings the guest up, then keeps an agent in it.

mod channel;
mod command_line;
mod devices;
mod modules;
mod mounts;

mod supervise;

use std::convert::Infallible;
use std::fs::File;
use std::io;
use std::process::exit;

use command_line::CommandLine;
pub(crate) use supervise::{After, supervise};

use crate::log::{self, Level};
use crate::server::{self, Agent};
use crate::{guest, kmsg, net, power};

/// Does not return: the kernel panics when PID 1 ends.
pub fn main() -> ! {
    match bring_up() {
        Ok(command_line) => {
            supervise(|legacy, instance| serve(&command_line, legacy, instance), |_| After::GoOn);
            log::write(Level::Fatal, format_args!("the agent does not stay alive"));
            power::end_machine(true);
            exit(1)
        }
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
