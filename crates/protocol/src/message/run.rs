//! Commands: starting, attaching, feeding, watching.

use std::fmt;

use bytes::Bytes;

/// One variable of an environment.
#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
pub struct EnvVar {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(string, tag = "2")]
    pub value: String,
}

impl EnvVar {
    pub fn new(name: impl Into<String>, value: impl Into<String>) -> Self {
        Self { name: name.into(), value: value.into() }
    }
}

// Values may be secrets.
impl fmt::Debug for EnvVar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}=..", self.name)
    }
}

/// Run a command. Answered by `Started`, `Output`s and one `Exited`.
///
/// A command that is not found still runs, as in a shell: it exits with 127 (126 if it may not be
/// executed) and one line on stderr.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Run {
    /// Names the run for `Attach`; may be empty unless the run is detached.
    #[prost(string, tag = "1")]
    pub run_id: String,
    /// A path, or a name that is looked up in the run's `PATH`.
    #[prost(string, tag = "2")]
    pub command: String,
    #[prost(string, repeated, tag = "3")]
    pub args: Vec<String>,
    /// Laid over the guest's default environment.
    #[prost(message, repeated, tag = "4")]
    pub env: Vec<EnvVar>,
    /// Default: the user's home, or `/` where there is none.
    #[prost(string, optional, tag = "5")]
    pub cwd: Option<String>,
    /// `name`, `name:group`, `uid` or `uid:gid`. Default: root.
    #[prost(string, optional, tag = "6")]
    pub user: Option<String>,
    /// 0: no limit. At the limit the process group gets `SIGTERM`, and `SIGKILL` after the grace.
    #[prost(uint64, tag = "7")]
    pub timeout_ms: u64,
    /// Whether the host will send standard input; otherwise it is `/dev/null`.
    #[prost(bool, tag = "8")]
    pub stdin: bool,
    /// A terminal; all output is then on `Stream::Stdout`, and stdin is always open.
    #[prost(message, optional, tag = "9")]
    pub tty: Option<TtySize>,
    /// Survives the loss of the connection and can be attached to.
    #[prost(bool, tag = "10")]
    pub detached: bool,
    /// Between `SIGTERM` and `SIGKILL`; absent: two seconds.
    #[prost(uint32, optional, tag = "11")]
    pub kill_grace_ms: Option<u32>,
}

#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct TtySize {
    #[prost(uint32, tag = "1")]
    pub rows: u32,
    #[prost(uint32, tag = "2")]
    pub cols: u32,
}

/// Watch a detached run from the given offsets. The newest attachment replaces an older one, so
/// that a worker that restarted need not wait for its old connection to be found dead.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Attach {
    #[prost(string, tag = "1")]
    pub run_id: String,
    #[prost(uint64, tag = "2")]
    pub stdout_offset: u64,
    #[prost(uint64, tag = "3")]
    pub stderr_offset: u64,
}

/// Drop a finished detached run and what is retained of its output.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Forget {
    #[prost(string, tag = "1")]
    pub run_id: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct ListRuns {}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Runs {
    #[prost(message, repeated, tag = "1")]
    pub runs: Vec<RunSummary>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct RunSummary {
    #[prost(string, tag = "1")]
    pub run_id: String,
    #[prost(enumeration = "RunState", tag = "2")]
    pub state: i32,
    #[prost(bool, tag = "3")]
    pub detached: bool,
    #[prost(uint32, tag = "4")]
    pub pid: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum RunState {
    Unspecified = 0,
    Running = 1,
    Exited = 2,
}

/// The command's process exists.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Started {
    /// 0 where no process could be made because the command was not found.
    #[prost(uint32, tag = "1")]
    pub pid: u32,
    /// First offset that follows. For an attachment it is later than asked for where the guest no
    /// longer has all of the output.
    #[prost(uint64, tag = "2")]
    pub stdout_offset: u64,
    #[prost(uint64, tag = "3")]
    pub stderr_offset: u64,
    /// Standard input that the host may send before the first `StdinTaken`.
    #[prost(uint32, tag = "4")]
    pub stdin_window: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Output {
    #[prost(enumeration = "Stream", tag = "1")]
    pub stream: i32,
    /// Of the first byte of `data`, counted from the start of the stream.
    #[prost(uint64, tag = "2")]
    pub offset: u64,
    #[prost(bytes = "bytes", tag = "3")]
    pub data: Bytes,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum Stream {
    Unspecified = 0,
    Stdout = 1,
    Stderr = 2,
}

/// Last message of a run.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Exited {
    #[prost(int32, optional, tag = "1")]
    pub exit_code: Option<i32>,
    #[prost(int32, optional, tag = "2")]
    pub signal: Option<i32>,
    #[prost(enumeration = "Cause", tag = "3")]
    pub cause: i32,
    #[prost(uint64, tag = "4")]
    pub duration_us: u64,
    /// Length of the whole stream.
    #[prost(uint64, tag = "5")]
    pub stdout_bytes: u64,
    #[prost(uint64, tag = "6")]
    pub stderr_bytes: u64,
}

/// Why a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum Cause {
    Unspecified = 0,
    /// By itself.
    Exited = 1,
    TimedOut = 2,
    Cancelled = 3,
    ConnectionLost = 4,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExitStatus {
    Code(i32),
    Signal(i32),
}

impl Exited {
    /// A signal wins over a code; a message with neither reads as code 0.
    pub fn status(&self) -> ExitStatus {
        match (self.signal, self.exit_code) {
            (Some(signal), _) => ExitStatus::Signal(signal),
            (None, code) => ExitStatus::Code(code.unwrap_or(0)),
        }
    }
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Stdin {
    #[prost(bytes = "bytes", tag = "1")]
    pub data: Bytes,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct StdinEof {}

/// Credit for standard input: the command has taken this much, counted over the connection. The
/// host sends at most `Started::stdin_window` more than that, so that a command that reads nothing
/// cannot hold up a `Cancel` behind its input.
#[derive(Clone, PartialEq, prost::Message)]
pub struct StdinTaken {
    #[prost(uint64, tag = "1")]
    pub bytes: u64,
}

/// A signal to the process group.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Signal {
    #[prost(int32, tag = "1")]
    pub number: i32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Resize {
    #[prost(uint32, tag = "1")]
    pub rows: u32,
    #[prost(uint32, tag = "2")]
    pub cols: u32,
}

/// End the run: `SIGTERM` to the process group, `SIGKILL` after the grace.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Cancel {}
