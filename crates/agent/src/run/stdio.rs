//! The standard streams of a command: pipes, or a terminal.

use std::os::fd::{AsFd as _, OwnedFd};

use aether_protocol::{ErrorCode, Run, TtySize};
use rustix::fs::{Mode, OFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use super::spawn::Stdio;
use crate::error::Fail;
use crate::users::User;

/// The agent's ends; all of them non-blocking.
#[derive(Debug)]
pub(super) struct Pipes {
    /// Absent where the host sends no input, and for a terminal.
    pub(super) stdin: Option<OwnedFd>,
    /// A terminal's master, which takes input too.
    pub(super) stdout: OwnedFd,
    /// Absent for a terminal.
    pub(super) stderr: Option<OwnedFd>,
    pub(super) is_terminal: bool,
}

/// The command's ends, open until the command has its own copies.
#[derive(Debug)]
pub(super) struct FarEnds {
    stdin: OwnedFd,
    stdout: OwnedFd,
    /// Absent for a terminal, where all three are one.
    stderr: Option<OwnedFd>,
    is_terminal: bool,
}

impl FarEnds {
    pub(super) fn stdio(&self) -> Stdio<'_> {
        let stderr = self.stderr.as_ref().unwrap_or(&self.stdout);
        let is_terminal = self.is_terminal;
        Stdio { stdin: &self.stdin, stdout: &self.stdout, stderr, is_terminal }
    }

    /// One line from the agent in the place of a command that could not be executed.
    pub(super) fn complain(&self, line: &str) {
        // A fresh pipe takes far more than a line.
        let _ = rustix::io::write(self.stderr.as_ref().unwrap_or(&self.stdout), line.as_bytes());
    }
}

pub(super) fn open(run: &Run, user: &User) -> Result<(Pipes, FarEnds), Fail> {
    match run.tty {
        Some(size) => open_terminal(size, user),
        None => open_pipes(run.stdin),
    }
}

fn open_pipes(with_stdin: bool) -> Result<(Pipes, FarEnds), Fail> {
    let pipe = || pipe_with(PipeFlags::CLOEXEC).map_err(spawn_failed("make a pipe"));
    let (stdout, far_stdout) = pipe()?;
    let (stderr, far_stderr) = pipe()?;
    let (stdin, far_stdin) = if with_stdin {
        let (far, near) = pipe()?;
        set_nonblocking(&near)?;
        (Some(near), far)
    } else {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let null = rustix::fs::open("/dev/null", flags, Mode::empty());
        (None, null.map_err(spawn_failed("open /dev/null"))?)
    };
    set_nonblocking(&stdout)?;
    set_nonblocking(&stderr)?;
    let near = Pipes { stdin, stdout, stderr: Some(stderr), is_terminal: false };
    let stderr = Some(far_stderr);
    Ok((near, FarEnds { stdin: far_stdin, stdout: far_stdout, stderr, is_terminal: false }))
}

fn open_terminal(size: TtySize, user: &User) -> Result<(Pipes, FarEnds), Fail> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags).map_err(spawn_failed("open a terminal"))?;
    unlockpt(&master).map_err(spawn_failed("unlock a terminal"))?;
    let slave = ioctl_tiocgptpeer(&master, flags).map_err(spawn_failed("open a terminal"))?;
    resize(&master, size);
    // So that the user's programs can open it by its name. Fails on no file system that matters.
    let owner = Some(rustix::fs::Uid::from_raw(user.uid));
    let _ = rustix::fs::fchown(&slave, owner, None);
    set_nonblocking(&master)?;
    let stdin = slave.try_clone().map_err(Fail::io("copy a terminal"))?;
    let near = Pipes { stdin: None, stdout: master, stderr: None, is_terminal: true };
    Ok((near, FarEnds { stdin, stdout: slave, stderr: None, is_terminal: true }))
}

pub(super) fn resize(master: &OwnedFd, size: TtySize) {
    let cells = |count: u32| u16::try_from(count).unwrap_or(u16::MAX);
    let window =
        Winsize { ws_row: cells(size.rows), ws_col: cells(size.cols), ws_xpixel: 0, ws_ypixel: 0 };
    // A terminal whose last user is gone has no size to change.
    let _ = tcsetwinsize(master.as_fd(), window);
}

fn set_nonblocking(fd: &OwnedFd) -> Result<(), Fail> {
    rustix::io::ioctl_fionbio(fd, true).map_err(spawn_failed("make a pipe non-blocking"))
}

fn spawn_failed(what: &'static str) -> impl FnOnce(rustix::io::Errno) -> Fail {
    move |errno| Fail::new(ErrorCode::SpawnFailed, format!("{what}: {errno}"))
}
