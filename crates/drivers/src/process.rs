//! Processes of VMMs: started so that they outlive the worker, watched by pidfd, never confused
//! with another process that got the same number.
//!
//! A child reports its own number and waits for a byte before it runs the program, so that the
//! number is in the journal first. If the worker dies in between, the kernel ends the child. The descriptors a program is given keep the number that they have in the
//! worker; all others are closed by `exec`.
//!
//! What this deliberately does not do: run a supervisor beside the VMM. A VMM that ends while no
//! worker runs leaves what its driver finds in its files.

use std::{
    ffi::OsString,
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
        unix::process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use rustix::{
    io::Errno,
    net::{AddressFamily, SocketFlags, SocketType},
    process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions},
};
use tokio::io::unix::AsyncFd;

use crate::DriverError;

/// Open descriptors of one VMM: disks, TAPs, sockets and some room.
const NOFILE_MAX: libc::rlim_t = 1024;
/// From fork to exec; a host that takes longer is not going to run a VM.
const SPAWN_LIMIT: Duration = Duration::from_secs(20);
/// What the worker answers a child that waits.
const ADMITTED: u8 = 1;
const REFUSED: u8 = 0;
/// A log's size: the last words of a program, not its history.
pub(crate) const LOG_BYTES: u64 = 64 * 1024;

/// The user that a VMM runs as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Group of `/dev/kvm`, where it has one.
    pub(crate) groups: Vec<u32>,
}

/// A program to start.
#[derive(Debug)]
pub(crate) struct Launch {
    pub(crate) program: PathBuf,
    pub(crate) args: Vec<OsString>,
    /// Stay open in the program, under the same numbers.
    pub(crate) fds: Vec<OwnedFd>,
    /// The directory it runs in, by descriptor: the user it runs as may not be able to reach it
    /// by its path.
    pub(crate) directory: OwnedFd,
    /// Network namespace; `None` stays in the worker's.
    pub(crate) netns: Option<OwnedFd>,
    /// `None` stays the worker's user.
    pub(crate) identity: Option<Identity>,
    /// Both output streams; see [`bounded_log`].
    pub(crate) log: Option<File>,
    pub(crate) page_size: PageSize,
}

/// Of what size a program's memory is given to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PageSize {
    /// As it asks.
    Any,
    /// Not more than it touches: large pages round up what many programs have little of.
    Small,
}

/// Where `/proc` says that a process began: with its number, its identity until the next boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ProcessId {
    pub(crate) pid: u32,
    pub(crate) start_ticks: u64,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    Code(i32),
    Signal(i32),
    /// It was not our child, so nobody told us.
    Unknown,
}

/// A process that was started or adopted. Dropping it leaves the process alone.
#[derive(Debug, Clone)]
pub(crate) struct Process {
    id: ProcessId,
    pidfd: Arc<AsyncFd<OwnedFd>>,
}

impl Process {
    #[cfg(test)]
    pub(crate) fn id(&self) -> ProcessId {
        self.id
    }

    pub(crate) fn pid(&self) -> u32 {
        self.id.pid
    }

    /// Takes hold of a running process, if it still is the one that was journaled.
    pub(crate) fn adopt(id: ProcessId) -> Result<Option<Self>, DriverError> {
        let Some(pid) = i32::try_from(id.pid).ok().and_then(Pid::from_raw) else {
            return Ok(None);
        };
        let pidfd = match rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK) {
            Ok(fd) => fd,
            Err(Errno::SRCH) => return Ok(None),
            Err(e) => return Err(io_error(format!("open process {}", id.pid), e.into())),
        };
        // After the pidfd is open: the number cannot change its owner unseen any more.
        if start_ticks(id.pid) != Some(id.start_ticks) || is_zombie(id.pid) {
            // A zombie child of this very process has ended; nobody else reaps it.
            let _ = rustix::process::waitid(
                WaitId::PidFd(pidfd.as_fd()),
                WaitIdOptions::EXITED | WaitIdOptions::NOHANG,
            );
            return Ok(None);
        }
        Self::watch(id, pidfd).map(Some)
    }

    #[expect(unsafe_code, reason = "tokio asks for a promise that the type cannot make")]
    fn watch(id: ProcessId, pidfd: OwnedFd) -> Result<Self, DriverError> {
        let interest = tokio::io::Interest::READABLE;
        // SAFETY: an `OwnedFd` gives the same descriptor for its whole life, and keeps it open.
        let pidfd = unsafe { AsyncFd::register_with_interest(pidfd, interest) }
            .map_err(|e| io_error(format!("watch process {}", id.pid), e.into()))?;
        Ok(Self { id, pidfd: Arc::new(pidfd) })
    }

    /// Waits for the end. Reaps it if it is our child. Safe to drop and to repeat.
    pub(crate) async fn ended(&self) -> Ended {
        // An error of the reactor means that it is shutting down with the runtime: the process's
        // end is then for the next worker to see.
        if self.pidfd.readable().await.is_err() {
            std::future::pending::<()>().await;
        }
        self.reap()
    }

    fn reap(&self) -> Ended {
        let waited = rustix::process::waitid(
            WaitId::PidFd(self.pidfd.get_ref().as_fd()),
            WaitIdOptions::EXITED | WaitIdOptions::NOHANG,
        );
        match waited {
            Ok(Some(status)) => match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => Ended::Code(code),
                (None, Some(signal)) => Ended::Signal(signal),
                (None, None) => Ended::Unknown,
            },
            Ok(None) | Err(_) => Ended::Unknown,
        }
    }

    /// Still there, and not a zombie.
    pub(crate) fn is_alive(&self) -> bool {
        start_ticks(self.id.pid) == Some(self.id.start_ticks) && !is_zombie(self.id.pid)
    }

    /// Ends it at once. An ended process is no error.
    pub(crate) fn kill(&self) -> Result<(), DriverError> {
        match rustix::process::pidfd_send_signal(self.pidfd.get_ref(), Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(e) => Err(io_error(format!("end process {}", self.id.pid), e.into())),
        }
    }

    /// Ends it and waits until it is gone.
    pub(crate) async fn kill_and_wait(&self) -> Result<Ended, DriverError> {
        self.kill()?;
        Ok(self.ended().await)
    }
}

fn io_error(action: String, source: io::Error) -> DriverError {
    DriverError::Io { action, source }
}

/// The fields of `/proc/PID/stat` after the program's name, which may itself contain spaces.
fn stat_fields(pid: u32) -> Option<String> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')').map(|(_, rest)| rest.trim_start().to_owned())
}

/// Field 22 of `/proc/PID/stat`: when the process started, in clock ticks after boot.
pub(crate) fn start_ticks(pid: u32) -> Option<u64> {
    stat_fields(pid)?.split_ascii_whitespace().nth(19)?.parse().ok()
}

fn is_zombie(pid: u32) -> bool {
    stat_fields(pid).is_none_or(|fields| fields.starts_with(['Z', 'X']))
}

/// Starts a program. `admit` sees the process before it runs anything of the program: it writes
/// the journal and may put the process into a cgroup; if it refuses, the process ends.
///
/// Runs on a blocking thread of the caller's choice: fork and exec are not for the reactor.
#[expect(clippy::needless_pass_by_value, reason = "its descriptors are closed when it is started")]
pub(crate) fn spawn(
    launch: Launch,
    admit: impl FnOnce(ProcessId) -> Result<(), DriverError> + Send,
) -> Result<Process, DriverError> {
    let name = launch.program.display().to_string();
    let fail = |step: &str, e: io::Error| io_error(format!("start {name}: {step}"), e);
    let (ours, theirs) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .map_err(|e| fail("make its gate", e.into()))?;
    let timeout = Some(SPAWN_LIMIT);
    rustix::net::sockopt::set_socket_timeout(&ours, rustix::net::sockopt::Timeout::Recv, timeout)
        .map_err(|e| fail("bound its gate", e.into()))?;

    let mut command = Command::new(&launch.program);
    command.args(&launch.args).env_clear().stdin(Stdio::null());
    if launch.page_size == PageSize::Small {
        // One heap for all threads, of glibc's.
        command.env("MALLOC_ARENA_MAX", "1");
    }
    match &launch.log {
        Some(log) => {
            let copy = || log.try_clone().map(Stdio::from);
            command.stdout(copy().map_err(|e| fail("copy its log", e))?);
            command.stderr(copy().map_err(|e| fail("copy its log", e))?);
        }
        None => {
            command.stdout(Stdio::null()).stderr(Stdio::null());
        }
    }
    let child = Child {
        parent: rustix::process::getpid().as_raw_nonzero().get(),
        gate: theirs.as_raw_fd(),
        keep: launch.fds.iter().map(AsRawFd::as_raw_fd).collect(),
        directory: launch.directory.as_raw_fd(),
        netns: launch.netns.as_ref().map(AsRawFd::as_raw_fd),
        identity: launch.identity.clone(),
        page_size: launch.page_size,
    };
    // SAFETY: the closure runs between fork and exec and calls only async-signal-safe functions
    // (system calls) on memory that was allocated before the fork; it allocates nothing.
    #[expect(unsafe_code, reason = "what a child does before exec can be said in no other way")]
    unsafe {
        command.pre_exec(move || child.prepare());
    }

    std::thread::scope(|scope| {
        // `spawn` returns after exec, and exec waits at the gate: so it waits on its own thread.
        let spawned = scope.spawn(move || {
            let spawned = command.spawn();
            // The parent's copy of the child's end: without it a dead child would not be noticed.
            drop(theirs);
            spawned
        });
        let admitted = open_gate(&ours, admit);
        if admitted.is_err() {
            // It may be gone, or never have come.
            let _ = rustix::net::send(&ours, &[REFUSED], rustix::net::SendFlags::NOSIGNAL);
        }
        let spawned = spawned.join().unwrap_or_else(|_| Err(io::Error::other("the thread died")));
        match (spawned, admitted) {
            (Ok(child), Ok((id, pidfd))) => {
                debug_assert_eq!(child.id(), id.pid);
                Process::watch(id, pidfd)
            }
            (Ok(mut child), Err(e)) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(e)
            }
            // The child ended at the gate because it was refused there: the reason is ours.
            (Err(e), Err(refusal)) if e.raw_os_error() == Some(libc::ECANCELED) => Err(refusal),
            (Err(e), _) => Err(fail("run it", e)),
        }
    })
}

/// Reads the child's number, shows it to `admit`, and lets the child go.
fn open_gate(
    gate: &OwnedFd,
    admit: impl FnOnce(ProcessId) -> Result<(), DriverError>,
) -> Result<(ProcessId, OwnedFd), DriverError> {
    let mut bytes = [0; 4];
    let (n, _) = rustix::net::recv(gate, &mut bytes, rustix::net::RecvFlags::empty())
        .map_err(|e| io_error("wait for the new process".to_owned(), e.into()))?;
    if n != bytes.len() {
        let source = io::Error::from(io::ErrorKind::UnexpectedEof);
        return Err(io_error("wait for the new process".to_owned(), source));
    }
    let raw = i32::from_ne_bytes(bytes);
    let gone = || io_error("find the new process".to_owned(), Errno::SRCH.into());
    let pid = Pid::from_raw(raw).ok_or_else(gone)?;
    // The child is ours and not reaped, so its number is its own for now.
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK)
        .map_err(|e| io_error("open the new process".to_owned(), e.into()))?;
    let number = u32::try_from(raw).map_err(|_| gone())?;
    let id = ProcessId { pid: number, start_ticks: start_ticks(number).ok_or_else(gone)? };
    admit(id)?;
    rustix::net::send(gate, &[ADMITTED], rustix::net::SendFlags::NOSIGNAL)
        .map_err(|e| io_error("let the new process run".to_owned(), e.into()))?;
    Ok((id, pidfd))
}

/// What the child does between fork and exec. Everything is allocated before.
struct Child {
    parent: libc::pid_t,
    gate: RawFd,
    keep: Vec<RawFd>,
    directory: RawFd,
    netns: Option<RawFd>,
    identity: Option<Identity>,
    page_size: PageSize,
}

#[expect(unsafe_code, reason = "system calls of a child before exec; std and rustix may allocate")]
impl Child {
    fn prepare(&self) -> io::Result<()> {
        self.wait_at_gate()?;
        // SAFETY: plain system calls on descriptors that the parent keeps open until after exec,
        // and on structures that live on this stack.
        unsafe {
            check(libc::setsid())?;
            libc::umask(0o077);
            check(libc::fchdir(self.directory))?;
            if let Some(netns) = self.netns {
                check(libc::setns(netns, libc::CLONE_NEWNET))?;
            }
            if self.page_size == PageSize::Small {
                // To save memory, and no more: a kernel that does not know it gives large ones.
                let _ = libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0);
            }
            let core = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            check(libc::setrlimit(libc::RLIMIT_CORE, &raw const core))?;
            let files = libc::rlimit { rlim_cur: NOFILE_MAX, rlim_max: NOFILE_MAX };
            // Raising a hard limit needs a capability; a lower one that exists will do.
            let _ = libc::setrlimit(libc::RLIMIT_NOFILE, &raw const files);
            if let Some(identity) = &self.identity {
                check(libc::setgroups(identity.groups.len(), identity.groups.as_ptr()))?;
                check(libc::setresgid(identity.gid, identity.gid, identity.gid))?;
                check(libc::setresuid(identity.uid, identity.uid, identity.uid))?;
            }
            check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
            // Whatever the worker was started with, and whatever another thread just opened.
            let cloexec = libc::CLOSE_RANGE_CLOEXEC.cast_signed();
            check(libc::close_range(3, u32::MAX, cloexec))?;
            for fd in &self.keep {
                check(libc::fcntl(*fd, libc::F_SETFD, 0))?;
            }
        }
        Ok(())
    }

    fn wait_at_gate(&self) -> io::Result<()> {
        // SAFETY: the buffers live on this stack and have the lengths given.
        unsafe {
            // Until it runs, it goes with the thread that started it. Afterwards it outlives it.
            check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0))?;
            if libc::getppid() != self.parent {
                return Err(io::Error::from_raw_os_error(libc::ECANCELED));
            }
            let pid = libc::getpid().to_ne_bytes();
            let sent = libc::send(self.gate, pid.as_ptr().cast(), pid.len(), libc::MSG_NOSIGNAL);
            if sent < 0 {
                return Err(io::Error::last_os_error());
            }
            let mut answer = REFUSED;
            loop {
                match libc::recv(self.gate, (&raw mut answer).cast(), 1, 0) {
                    1 if answer == ADMITTED => {
                        return check(libc::prctl(libc::PR_SET_PDEATHSIG, 0, 0, 0, 0));
                    }
                    0 | 1 => return Err(io::Error::from_raw_os_error(libc::ECANCELED)),
                    _ if io::Error::last_os_error().raw_os_error() == Some(libc::EINTR) => {}
                    _ => return Err(io::Error::last_os_error()),
                }
            }
        }
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A log in memory that keeps its first `bytes` and refuses the rest: its size is sealed, so that
/// no guest fills the host's disk through what its VMM prints, also while no worker runs.
pub(crate) fn bounded_log(bytes: u64) -> Result<File, DriverError> {
    use rustix::fs::{MemfdFlags, SealFlags};
    let make = || -> rustix::io::Result<OwnedFd> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::NOEXEC_SEAL;
        let fd = match rustix::fs::memfd_create(c"vmm-log", flags) {
            // Kernels before 6.3 do not know the last flag.
            Err(Errno::INVAL) => rustix::fs::memfd_create(
                c"vmm-log",
                MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
            )?,
            made => made?,
        };
        rustix::fs::ftruncate(&fd, bytes)?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
        Ok(fd)
    };
    make().map(File::from).map_err(|e| io_error("make a log".to_owned(), e.into()))
}

/// A file in memory that a program reads by its descriptor: what no other user may see. It is on no
/// disk and on no command line.
pub(crate) fn secret_file(text: &str) -> Result<OwnedFd, DriverError> {
    use std::io::{Seek as _, Write as _};
    let make = || -> io::Result<OwnedFd> {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let mut file = File::from(rustix::fs::memfd_create(c"vmm-config", flags)?);
        file.write_all(text.as_bytes())?;
        file.rewind()?;
        Ok(file.into())
    };
    make().map_err(|e| io_error("make a file in memory".to_owned(), e))
}

/// A program by its configured path, or by its name in a list of folders such as `PATH`.
pub(crate) fn find_program(
    name: &str,
    configured: Option<PathBuf>,
    search: Option<&std::ffi::OsStr>,
) -> Option<PathBuf> {
    let is_there = |path: &PathBuf| {
        use std::os::unix::fs::PermissionsExt as _;
        std::fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
    };
    if let Some(path) = configured {
        return Some(path).filter(is_there);
    }
    let folders = search.unwrap_or_else(|| "/usr/local/bin:/usr/bin:/bin:/usr/sbin".as_ref());
    std::env::split_paths(folders).map(|folder| folder.join(name)).find(is_there)
}

/// What a [`bounded_log`] holds. Not UTF-8 is shown as such.
pub(crate) fn read_log(log: &File) -> String {
    use std::os::unix::fs::FileExt;
    let size = log.metadata().map_or(0, |m| m.len()).min(1024 * 1024);
    let mut bytes = vec![0; usize::try_from(size).unwrap_or(0)];
    let n = log.read_at(&mut bytes, 0).unwrap_or(0);
    bytes.truncate(n);
    let end = bytes.iter().rposition(|b| *b != 0).map_or(0, |last| last + 1);
    bytes.truncate(end);
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The log of an adopted process: its standard output, if that is such a log.
pub(crate) fn log_of(pid: u32) -> Option<File> {
    let path = format!("/proc/{pid}/fd/1");
    let target = std::fs::read_link(&path).ok()?;
    target.to_str()?.starts_with("/memfd:vmm-log").then(|| File::open(&path).ok()).flatten()
}

/// The last lines of a text: at most `lines`, at most 100 bytes for each (and 1200 where they are
/// few), control characters replaced.
pub(crate) fn last_lines(text: &str, lines: usize) -> String {
    let bytes_max = lines.saturating_mul(100).max(1200);
    let kept: Vec<&str> = text.lines().map(str::trim_end).filter(|l| !l.is_empty()).collect();
    let tail = kept[kept.len().saturating_sub(lines)..].join("\n");
    let mut start = tail.len().saturating_sub(bytes_max);
    while !tail.is_char_boundary(start) {
        start += 1;
    }
    tail[start..].chars().map(|c| if c.is_control() && c != '\n' { ' ' } else { c }).collect()
}

/// Opens a file for a VMM to inherit and read.
pub(crate) fn open_for(path: &Path) -> Result<OwnedFd, DriverError> {
    File::open(path).map(OwnedFd::from).map_err(|source| DriverError::File {
        action: "open",
        path: path.to_owned(),
        source,
    })
}

/// Opens a directory, to run in or to reach a socket in it by a short path.
pub(crate) fn open_directory(path: &Path) -> Result<OwnedFd, DriverError> {
    use rustix::fs::{Mode, OFlags};
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).map_err(|e| DriverError::File {
        action: "open directory",
        path: path.to_owned(),
        source: e.into(),
    })
}

/// A path to `name` in an open directory that is short enough for a Unix socket's address,
/// however deep the directory is. Valid while `directory` is open.
pub(crate) fn short_path(directory: BorrowedFd<'_>, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{name}", directory.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, log: Option<File>) -> Launch {
        Launch {
            program: "/bin/sh".into(),
            args: vec!["-c".into(), script.into()],
            fds: Vec::new(),
            directory: open_directory(Path::new("/")).unwrap(),
            netns: None,
            identity: None,
            log,
            page_size: PageSize::Any,
        }
    }

    #[tokio::test]
    async fn the_process_is_admitted_before_it_runs_and_its_end_is_seen() {
        let log = bounded_log(LOG_BYTES).unwrap();
        let seen = log.try_clone().unwrap();
        let process = spawn(shell("echo ran; exit 7", Some(log.try_clone().unwrap())), |id| {
            assert_eq!(start_ticks(id.pid), Some(id.start_ticks));
            assert_eq!(read_log(&seen), "");
            Ok(())
        })
        .unwrap();
        assert_eq!(process.ended().await, Ended::Code(7));
        assert_eq!(read_log(&log), "ran\n");
        assert!(!process.is_alive());
        assert!(Process::adopt(process.id()).unwrap().is_none());
    }

    #[tokio::test]
    async fn a_refused_process_never_runs() {
        let log = bounded_log(LOG_BYTES).unwrap();
        let mut refused = None;
        let result = spawn(shell("echo ran", Some(log.try_clone().unwrap())), |id| {
            refused = Some(id);
            Err(DriverError::Injected("test".to_owned()))
        });
        assert!(matches!(result, Err(DriverError::Injected(_))), "{result:?}");
        assert_eq!(read_log(&log), "");
        assert_eq!(start_ticks(refused.unwrap().pid), None);
    }

    #[tokio::test]
    async fn a_missing_program_is_an_error_that_names_it() {
        let mut launch = shell("", None);
        launch.program = "/nonexistent/vmm".into();
        let error = spawn(launch, |_| Ok(())).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/vmm"), "{error}");
    }

    #[tokio::test]
    async fn kill_ends_a_process_and_only_the_given_descriptors_are_inherited() {
        let (kept, other) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::empty()).unwrap();
        let number = kept.as_raw_fd();
        let log = bounded_log(LOG_BYTES).unwrap();
        let mut launch =
            shell("ls /proc/self/fd; echo end; exec sleep 60", Some(log.try_clone().unwrap()));
        launch.fds = vec![kept];
        let process = spawn(launch, |_| Ok(())).unwrap();
        let adopted = Process::adopt(process.id()).unwrap().unwrap();
        while !read_log(&log).contains("end") {
            tokio::task::yield_now().await;
        }
        let text = read_log(&log);
        let numbers: Vec<i32> = text.lines().filter_map(|l| l.parse().ok()).collect();
        assert!(numbers.contains(&number), "{numbers:?}");
        assert!(!numbers.contains(&other.as_raw_fd()), "{numbers:?}");
        assert_eq!(process.kill_and_wait().await.unwrap(), Ended::Signal(libc::SIGKILL));
        adopted.ended().await;
    }

    #[test]
    fn a_log_is_bounded() {
        use std::io::Write;
        let mut log = bounded_log(16).unwrap();
        log.write_all(b"0123456789").unwrap();
        assert!(log.write_all(b"0123456789").is_err());
        assert!(read_log(&log).len() <= 16);
    }

    #[test]
    fn another_process_with_the_number_is_not_adopted() {
        let id = ProcessId { pid: std::process::id(), start_ticks: 1 };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
        let _entered = runtime.enter();
        assert!(Process::adopt(id).unwrap().is_none());
    }

    #[test]
    fn last_lines_are_bounded_and_printable() {
        assert_eq!(last_lines("a\n\nb\r\nc\x1b[0m\n", 2), "b\nc [0m");
        assert!(last_lines(&"é".repeat(5000), 3).len() <= 1200);
    }
}
