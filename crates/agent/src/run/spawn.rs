//! Starting a process.
//!
//! `clone` with `CLONE_VM | CLONE_VFORK` instead of `fork`: no page table is copied, this thread
//! waits until the child has executed or failed, and the child reports a failure through memory.
//! In between the child shares the address space with threads that run on, so it makes system
//! calls only, and only on what was prepared before.

use std::ffi::{CString, c_char, c_int, c_void};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd as _, OwnedFd, RawFd};
use std::ptr;

use super::command::{Command, Directory};

/// A process that exists.
#[derive(Debug)]
pub(super) struct Child {
    pub(super) pid: i32,
    pub(super) pidfd: OwnedFd,
}

/// Why there is none.
#[derive(Debug)]
pub(super) enum SpawnError {
    /// `clone` itself.
    Clone(io::Error),
    /// Becoming the user, or the terminal's session.
    Setup(io::Error),
    Directory(io::Error),
    Exec(io::Error),
}

/// The child's standard streams.
#[derive(Debug)]
pub(super) struct Stdio<'a> {
    pub(super) stdin: &'a OwnedFd,
    pub(super) stdout: &'a OwnedFd,
    pub(super) stderr: &'a OwnedFd,
    pub(super) is_terminal: bool,
}

/// Enough for the child's few calls; its frames hold no buffers.
const STACK_BYTES: usize = 16 * 1024;

/// Everything that the child reads, and the one place that it writes.
struct Plan {
    programs: Vec<*const c_char>,
    args: Vec<*const c_char>,
    env: Vec<*const c_char>,
    directory: *const c_char,
    may_fall_back: bool,
    stdio: [RawFd; 3],
    is_terminal: bool,
    uid: u32,
    gid: u32,
    groups: (*const u32, usize),
    failure: Failure,
}

#[derive(Clone, Copy)]
struct Failure {
    stage: Stage,
    errno: c_int,
}

#[derive(Clone, Copy)]
enum Stage {
    None,
    Setup,
    Directory,
    Exec,
}

/// Starts the command in a session and process group of its own.
pub(super) fn spawn(command: &Command, stdio: &Stdio<'_>) -> Result<Child, SpawnError> {
    match try_spawn(command, &command.programs, &command.args, stdio) {
        Err(SpawnError::Exec(error)) if error.raw_os_error() == Some(libc::ENOEXEC) => {
            spawn_script(command, stdio)
        }
        result => result,
    }
}

/// A text file without an interpreter line is a script, as for every shell.
fn spawn_script(command: &Command, stdio: &Stdio<'_>) -> Result<Child, SpawnError> {
    let shell = c"/bin/sh".to_owned();
    // The first that exists is the one that could not be executed: earlier ones were passed over.
    for program in &command.programs {
        let mut args = vec![shell.clone(), program.clone()];
        args.extend(command.args.iter().skip(1).cloned());
        let path = std::path::Path::new(std::str::from_utf8(program.as_bytes()).unwrap_or(""));
        if path.is_file() {
            return try_spawn(command, std::slice::from_ref(&shell), &args, stdio);
        }
    }
    Err(SpawnError::Exec(io::Error::from_raw_os_error(libc::ENOEXEC)))
}

fn try_spawn(
    command: &Command,
    programs: &[CString],
    args: &[CString],
    stdio: &Stdio<'_>,
) -> Result<Child, SpawnError> {
    let (directory, may_fall_back) = match &command.directory {
        Directory::Named(path) => (path.as_ptr(), false),
        Directory::Home(path) => (path.as_ptr(), true),
    };
    let mut plan = Plan {
        programs: pointers(programs),
        args: pointers(args),
        env: pointers(&command.env),
        directory,
        may_fall_back,
        stdio: [stdio.stdin, stdio.stdout, stdio.stderr].map(AsRawFd::as_raw_fd),
        is_terminal: stdio.is_terminal,
        uid: command.user.uid,
        gid: command.user.gid,
        groups: (command.user.groups.as_ptr(), command.user.groups.len()),
        failure: Failure { stage: Stage::None, errno: 0 },
    };
    let child = clone_child(&mut plan).map_err(SpawnError::Clone)?;
    // Through a volatile read: the compiler does not know that the child wrote it.
    #[expect(unsafe_code, reason = "memory that another process wrote")]
    // SAFETY: a valid, initialised place; the child is past its last write.
    let failure = unsafe { ptr::read_volatile(&raw const plan.failure) };
    let error = || io::Error::from_raw_os_error(failure.errno);
    let error = match failure.stage {
        Stage::None => return Ok(child),
        Stage::Setup => SpawnError::Setup(error()),
        Stage::Directory => SpawnError::Directory(error()),
        Stage::Exec => SpawnError::Exec(error()),
    };
    // It has left or is leaving; nothing of it must stay.
    let _ = super::reap(&child);
    Err(error)
}

fn pointers(texts: &[CString]) -> Vec<*const c_char> {
    texts.iter().map(|text| text.as_ptr()).chain([ptr::null()]).collect()
}

#[expect(unsafe_code, reason = "no safe form of clone")]
fn clone_child(plan: &mut Plan) -> io::Result<Child> {
    let mut stack: Vec<u8> = Vec::with_capacity(STACK_BYTES + 16);
    let mut pidfd: c_int = -1;
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD | libc::SIGCHLD;
    // SAFETY: the stack is live and unused until the child has executed or ended, because
    // CLONE_VFORK holds this thread until then; the same is true of the plan and all that it points
    // to. Signals are blocked meanwhile, so that no handler runs on the child's stack.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        let mut before: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
        let top = stack.as_mut_ptr().add(STACK_BYTES + 16);
        let top = top.sub(top.addr() % 16);
        let argument = ptr::from_mut(plan).cast::<c_void>();
        let pid = libc::clone(child_main, top.cast(), flags, argument, &raw mut pidfd);
        let error = io::Error::last_os_error();
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, ptr::null_mut());
        if pid < 0 {
            return Err(error);
        }
        Ok(Child { pid, pidfd: OwnedFd::from_raw_fd(pidfd) })
    }
}

/// The child, from its first instruction to `exec`. System calls only: no allocation, no lock, no
/// unwinding.
#[expect(unsafe_code, reason = "runs between clone and exec")]
extern "C" fn child_main(plan: *mut c_void) -> c_int {
    let plan = plan.cast::<Plan>();
    // SAFETY: the parent waits and its plan is live; see `clone_child`.
    let failure = unsafe { prepare_and_exec(&*plan) };
    // SAFETY: as above; no reference into the plan is live. `_exit` runs no handlers of the parent.
    unsafe {
        ptr::write_volatile(&raw mut (*plan).failure, failure);
        libc::_exit(127)
    }
}

#[expect(unsafe_code, reason = "runs between clone and exec")]
unsafe fn prepare_and_exec(plan: &Plan) -> Failure {
    // SAFETY: every pointer was made from a live value by `try_spawn`, every list of pointers ends
    // with a null.
    unsafe {
        let fail = |stage| Failure { stage, errno: *libc::__errno_location() };
        if libc::setsid() < 0 {
            return fail(Stage::Setup);
        }
        for (target, &fd) in (0..).zip(&plan.stdio) {
            if libc::dup2(fd, target) < 0 {
                return fail(Stage::Setup);
            }
        }
        if plan.is_terminal && libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
            return fail(Stage::Setup);
        }
        let (groups, count) = plan.groups;
        // Raw calls: the library's own would try to change all threads of the parent.
        let is_root = plan.uid == 0 && plan.gid == 0 && count == 0;
        if !is_root
            && (libc::syscall(libc::SYS_setgroups, count, groups) < 0
                || libc::syscall(libc::SYS_setresgid, plan.gid, plan.gid, plan.gid) < 0
                || libc::syscall(libc::SYS_setresuid, plan.uid, plan.uid, plan.uid) < 0)
        {
            return fail(Stage::Setup);
        }
        // As the user, who may not be allowed in.
        let is_there = libc::chdir(plan.directory) == 0;
        let is_there = is_there || (plan.may_fall_back && libc::chdir(c"/".as_ptr()) == 0);
        if !is_there {
            return fail(Stage::Directory);
        }
        libc::umask(0o022);
        restore_signals();
        exec_first(plan)
    }
}

/// Std ignores `SIGPIPE`, and an ignored signal would stay ignored.
#[expect(unsafe_code, reason = "runs between clone and exec")]
unsafe fn restore_signals() {
    // SAFETY: plain calls on local values; the child has its own table of handlers.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut());
    }
}

/// Tries each program; where none can be executed, a refusal counts more than an absence.
#[expect(unsafe_code, reason = "runs between clone and exec")]
unsafe fn exec_first(plan: &Plan) -> Failure {
    let mut errno = libc::ENOENT;
    for &program in plan.programs.iter().take_while(|program| !program.is_null()) {
        // SAFETY: see `prepare_and_exec`.
        let error = unsafe {
            libc::execve(program, plan.args.as_ptr(), plan.env.as_ptr());
            *libc::__errno_location()
        };
        match error {
            libc::ENOENT | libc::ENOTDIR => {}
            libc::EACCES => errno = error,
            _ => return Failure { stage: Stage::Exec, errno: error },
        }
    }
    Failure { stage: Stage::Exec, errno }
}
