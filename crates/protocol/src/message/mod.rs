//! Every message on the wire. `tests/schema.txt` is the frozen form of these files.

mod configure;
mod file;
mod run;
mod session;

pub use configure::{Configure, Configured, Dns, Environment, Hosts, HostsEntry, Interface, Layer};
pub use file::{
    Data, Done, End, Entry, FileKind, FileStat, List, Listing, Mkdir, Move, ReadFile, Remove, Stat,
    WriteFile,
};
pub use run::{
    Attach, Cancel, Cause, EnvVar, ExitStatus, Exited, Forget, ListRuns, Output, Resize, Run,
    RunState, RunSummary, Runs, Signal, Started, Stdin, StdinEof, StdinTaken, Stream, TtySize,
};
pub use session::{
    ErrorCode, Failed, FromGuest, FromGuestBody, Hello, Ping, Pong, Refused, Request, RequestBody,
    Shutdown, ShuttingDown, ToGuest, ToGuestBody, Welcome,
};
