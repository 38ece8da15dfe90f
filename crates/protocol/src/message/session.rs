//! The two envelopes, the first exchange, errors, and what concerns the guest as a whole.

use std::fmt;

use bytes::Bytes;

use super::{
    Attach, Cancel, Configure, Configured, Data, Done, End, Exited, FileStat, Forget, List,
    ListRuns, Listing, Mkdir, Move, Output, ReadFile, Remove, Resize, Run, Runs, Signal, Started,
    Stat, Stdin, StdinEof, StdinTaken, WriteFile,
};

/// A frame from the host.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ToGuest {
    #[prost(oneof = "ToGuestBody", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9")]
    pub body: Option<ToGuestBody>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
#[expect(clippy::large_enum_variant, reason = "one at a time exists, and most are the largest")]
pub enum ToGuestBody {
    #[prost(message, tag = "1")]
    Hello(Hello),
    #[prost(message, tag = "2")]
    Request(Request),
    #[prost(message, tag = "3")]
    Stdin(Stdin),
    #[prost(message, tag = "4")]
    StdinEof(StdinEof),
    #[prost(message, tag = "5")]
    Signal(Signal),
    #[prost(message, tag = "6")]
    Resize(Resize),
    #[prost(message, tag = "7")]
    Cancel(Cancel),
    #[prost(message, tag = "8")]
    Data(Data),
    #[prost(message, tag = "9")]
    End(End),
}

/// A frame from the guest.
#[derive(Clone, PartialEq, prost::Message)]
pub struct FromGuest {
    #[prost(
        oneof = "FromGuestBody",
        tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16"
    )]
    pub body: Option<FromGuestBody>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub enum FromGuestBody {
    #[prost(message, tag = "1")]
    Welcome(Welcome),
    #[prost(message, tag = "2")]
    Refused(Refused),
    #[prost(message, tag = "3")]
    Failed(Failed),
    #[prost(message, tag = "4")]
    Started(Started),
    #[prost(message, tag = "5")]
    Output(Output),
    #[prost(message, tag = "6")]
    Exited(Exited),
    #[prost(message, tag = "7")]
    StdinTaken(StdinTaken),
    #[prost(message, tag = "8")]
    Data(Data),
    #[prost(message, tag = "9")]
    End(End),
    #[prost(message, tag = "10")]
    FileStat(FileStat),
    #[prost(message, tag = "11")]
    Listing(Listing),
    #[prost(message, tag = "12")]
    Done(Done),
    #[prost(message, tag = "13")]
    Configured(Configured),
    #[prost(message, tag = "14")]
    Pong(Pong),
    #[prost(message, tag = "15")]
    Runs(Runs),
    #[prost(message, tag = "16")]
    ShuttingDown(ShuttingDown),
}

/// First frame of every connection.
#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
pub struct Hello {
    /// Newest generation that the host speaks.
    #[prost(uint32, tag = "1")]
    pub generation: u32,
    /// Oldest generation that the host speaks.
    #[prost(uint32, tag = "2")]
    pub generation_min: u32,
    #[prost(bytes = "bytes", tag = "3")]
    pub token: Bytes,
}

impl fmt::Debug for Hello {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hello")
            .field("generation", &self.generation)
            .field("generation_min", &self.generation_min)
            .finish_non_exhaustive()
    }
}

/// Second frame of every connection: what the connection is for.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Request {
    #[prost(oneof = "RequestBody", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14")]
    pub body: Option<RequestBody>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub enum RequestBody {
    #[prost(message, tag = "1")]
    Ping(Ping),
    #[prost(message, tag = "2")]
    Configure(Configure),
    #[prost(message, tag = "3")]
    Shutdown(Shutdown),
    #[prost(message, tag = "4")]
    Run(Run),
    #[prost(message, tag = "5")]
    Attach(Attach),
    #[prost(message, tag = "6")]
    Forget(Forget),
    #[prost(message, tag = "7")]
    ListRuns(ListRuns),
    #[prost(message, tag = "8")]
    ReadFile(ReadFile),
    #[prost(message, tag = "9")]
    WriteFile(WriteFile),
    #[prost(message, tag = "10")]
    List(List),
    #[prost(message, tag = "11")]
    Stat(Stat),
    #[prost(message, tag = "12")]
    Mkdir(Mkdir),
    #[prost(message, tag = "13")]
    Move(Move),
    #[prost(message, tag = "14")]
    Remove(Remove),
}

/// The request was taken.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Welcome {
    /// Generation that the guest speaks on this connection.
    #[prost(uint32, tag = "1")]
    pub generation: u32,
    #[prost(string, tag = "2")]
    pub agent_version: String,
    /// Opaque; it changes when the guest boots again and when its agent is replaced, and so tells
    /// that runs known from before are gone. Clones of one snapshot share it until they are
    /// configured as restored.
    #[prost(string, tag = "3")]
    pub boot_id: String,
}

/// The request was not taken and nothing was done. Stands in the place of `Welcome`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Refused {
    #[prost(enumeration = "ErrorCode", tag = "1")]
    pub code: i32,
    #[prost(string, tag = "2")]
    pub message: String,
}

/// The request was taken and did not come to its end.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Failed {
    #[prost(enumeration = "ErrorCode", tag = "1")]
    pub code: i32,
    #[prost(string, tag = "2")]
    pub message: String,
}

/// Stable codes of `Refused` and `Failed`. A code that is not known reads as `Unspecified`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum ErrorCode {
    Unspecified = 0,
    /// The token is wrong, or the peer may not connect at all.
    Unauthorized = 1,
    UnsupportedGeneration = 2,
    UnknownRequest = 3,
    /// Bytes that are no frame, or a frame that has no place here.
    BadMessage = 4,
    /// A list, text or file is past its limit.
    TooLarge = 5,
    /// A value has no meaning: an address that is none, a name with a zero byte.
    InvalidArgument = 6,
    TooManyConnections = 7,
    RunExists = 20,
    UnknownRun = 21,
    TooManyRuns = 22,
    /// Forget was asked for a run that has not ended.
    RunActive = 23,
    NoSuchUser = 24,
    NoSuchDirectory = 25,
    /// The guest could not start a process: no memory, no process ids.
    SpawnFailed = 26,
    /// Another connection has attached to the run.
    Replaced = 27,
    NotFound = 40,
    PermissionDenied = 41,
    IsADirectory = 42,
    NotADirectory = 43,
    Exists = 44,
    NotEmpty = 45,
    NoSpace = 46,
    InvalidPath = 47,
    /// A device, socket or pipe, where only a file will do.
    NotAFile = 48,
    ReadOnly = 49,
    Io = 60,
    Internal = 61,
}

impl ErrorCode {
    /// The name that reaches people and programs; never changed.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unspecified => "unspecified",
            Self::Unauthorized => "unauthorized",
            Self::UnsupportedGeneration => "unsupported_generation",
            Self::UnknownRequest => "unknown_request",
            Self::BadMessage => "bad_message",
            Self::TooLarge => "too_large",
            Self::InvalidArgument => "invalid_argument",
            Self::TooManyConnections => "too_many_connections",
            Self::RunExists => "run_exists",
            Self::UnknownRun => "unknown_run",
            Self::TooManyRuns => "too_many_runs",
            Self::RunActive => "run_active",
            Self::NoSuchUser => "no_such_user",
            Self::NoSuchDirectory => "no_such_directory",
            Self::SpawnFailed => "spawn_failed",
            Self::Replaced => "replaced",
            Self::NotFound => "not_found",
            Self::PermissionDenied => "permission_denied",
            Self::IsADirectory => "is_a_directory",
            Self::NotADirectory => "not_a_directory",
            Self::Exists => "exists",
            Self::NotEmpty => "not_empty",
            Self::NoSpace => "no_space",
            Self::InvalidPath => "invalid_path",
            Self::NotAFile => "not_a_file",
            Self::ReadOnly => "read_only",
            Self::Io => "io",
            Self::Internal => "internal",
        }
    }
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Ping {}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Pong {
    #[prost(string, tag = "1")]
    pub boot_id: String,
    #[prost(uint64, tag = "2")]
    pub uptime_ms: u64,
    /// Runs that have not ended.
    #[prost(uint32, tag = "3")]
    pub runs: u32,
}

/// End the guest.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Shutdown {
    /// Between `SIGTERM` and `SIGKILL` to every process.
    #[prost(uint32, tag = "1")]
    pub grace_ms: u32,
    /// Ask the machine to reboot instead of to power off. A VMM without a power button ends on one
    /// of the two only, and its driver knows which.
    #[prost(bool, tag = "2")]
    pub reboot: bool,
}

/// The shutdown has begun; the machine ends without a further word.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ShuttingDown {}
