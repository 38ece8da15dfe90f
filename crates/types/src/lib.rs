//! The nouns of Aetherium: ids, state machines, specifications, limits and error codes.
//!
//! No I/O and no async: the gateway, the worker and the client all decide with the same pure code
//! which request is legal and which transition exists.

pub mod error;
pub mod execution;
pub mod id;
pub mod limits;
pub mod network;
pub mod task;
pub mod time;
pub mod vm;

pub use error::{ErrorCode, Fault};
pub use execution::{
    Execution, ExecutionSpec, ExecutionState, ExitStatus, OutputStream, RetainedOutput, TtySize,
};
pub use id::{ExecutionId, KeyId, TaskId, VmId, WorkerId};
pub use network::{AllowRule, Egress, NetworkPolicy, PortRange, TransportProtocol};
pub use task::{Priority, Task, TaskKind, TaskState};
pub use time::Timestamp;
pub use vm::{DriverKind, StateChange, Vm, VmEvent, VmSpec, VmState};
