//! Commands.
//!
//! One thread and one poll loop serve one run: its socket, pipes, pidfd, deadlines and, for a
//! detached run, the mailbox through which later connections come.
//!
//! ```text
//!            host: Cancel ──┐                       main process ends
//!  running ─── time limit ──┼─► ending (SIGTERM, then SIGKILL) ──┐
//!     │                     │                                    ▼
//!     ├───── connection lost, not detached: SIGKILL ──────► draining ── both streams at their end,
//!     └───── main process ends ────────────────────────────────► │      or the drain limit
//!                                                                ▼
//!                                               Exited; kept for attachments if detached
//! ```

mod command;
mod ending;
mod finished;
mod input;
mod ring;
mod spawn;
mod stdio;
mod watch;

use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use aether_protocol::limits::KILL_GRACE;
use aether_protocol::{Attach, ErrorCode, ExitStatus, Run};
use rustix::process::{WaitId, WaitIdOptions, waitid};

pub(crate) use finished::{Finished, serve_finished};

use crate::error::Fail;
use crate::registry::{Attachment, Mailbox};
use crate::server::Agent;
use command::Command;
use spawn::{Child, SpawnError};
use stdio::Pipes;
use watch::{Start, Watch};

/// What a shell answers for a command that is not there, or may not be executed.
const EXIT_NOT_FOUND: i32 = 127;
const EXIT_NOT_EXECUTABLE: i32 = 126;

/// Starts a command and serves it to its end. The connection comes back only where it is refused.
#[expect(clippy::result_large_err, reason = "the connection is handed back once, by its owner")]
pub(crate) fn serve(
    agent: &Agent,
    attachment: Attachment,
    run: &Run,
) -> Result<(), (Attachment, Fail)> {
    let begun = Instant::now();
    let mailbox = match run.detached.then(Mailbox::new).transpose() {
        Ok(mailbox) => mailbox.map(Arc::new),
        Err(fail) => return Err((attachment, fail)),
    };
    let place = match agent.registry.enter(&run.run_id, mailbox.as_ref()) {
        Ok(place) => place,
        Err(fail) => return Err((attachment, fail)),
    };
    agent.guest.will_run();
    let (process, pipes) = match start(agent, run) {
        Ok(started) => started,
        Err(fail) => return Err((attachment, fail)),
    };
    if let Process::Running(child) = &process {
        place.set_pid(child.pid.unsigned_abs());
    }
    let grace = run.kill_grace_ms.map_or(KILL_GRACE, |ms| Duration::from_millis(ms.into()));
    let time_limit = (run.timeout_ms > 0).then(|| Duration::from_millis(run.timeout_ms));
    let start = Start { process, pipes, begun, time_limit, grace, mailbox };
    Watch::new(agent, start).serve(place, attachment);
    Ok(())
}

/// An attachment from the start of both streams: what the connection of a `Run` is.
pub(crate) fn from_the_start(run_id: &str) -> Attach {
    Attach { run_id: run_id.to_owned(), ..Attach::default() }
}

/// The command's own process.
#[derive(Debug)]
enum Process {
    Running(Child),
    Ended(ExitStatus),
}

fn start(agent: &Agent, run: &Run) -> Result<(Process, Pipes), Fail> {
    let command = Command::prepare(run, agent.guest.env())?;
    let (pipes, far) = stdio::open(run, &command.user)?;
    match spawn::spawn(&command, &far.stdio()) {
        Ok(child) => Ok((Process::Running(child), pipes)),
        Err(SpawnError::Exec(error)) => {
            let (code, reason) = match error.raw_os_error() {
                Some(libc::ENOENT) => (EXIT_NOT_FOUND, "command not found".to_owned()),
                _ => (EXIT_NOT_EXECUTABLE, error.to_string()),
            };
            // Into the command's own stream, from which it takes the way of all output.
            far.complain(&format!("aether: {}: {reason}\n", run.command));
            Ok((Process::Ended(ExitStatus::Code(code)), pipes))
        }
        Err(SpawnError::Directory(error)) => {
            let cwd = run.cwd.as_deref().unwrap_or("/");
            Err(Fail::new(ErrorCode::NoSuchDirectory, format!("enter directory {cwd}: {error}")))
        }
        Err(SpawnError::Clone(error) | SpawnError::Setup(error)) => {
            Err(Fail::new(ErrorCode::SpawnFailed, format!("start a process: {error}")))
        }
    }
}

/// Collects a process that has ended, or is about to.
fn reap(child: &Child) -> ExitStatus {
    loop {
        match waitid(WaitId::PidFd(child.pidfd.as_fd()), WaitIdOptions::EXITED) {
            Ok(Some(status)) => {
                if let Some(code) = status.exit_status() {
                    return ExitStatus::Code(code);
                }
                return ExitStatus::Signal(status.terminating_signal().unwrap_or(libc::SIGKILL));
            }
            Err(rustix::io::Errno::INTR) => {}
            // Somebody else collected it: nothing is known but that it is gone.
            Ok(None) | Err(_) => return ExitStatus::Signal(libc::SIGKILL),
        }
    }
}
