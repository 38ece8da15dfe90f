//! The nouns of Aetherium: ids, state machines, specifications, limits and error codes.
//!
//! No I/O and no async: the gateway, the worker and the client all decide with the same pure code
//! which request is legal and which transition exists.

pub mod access;
pub mod error;
mod event;
pub mod execution;
pub mod id;
pub mod limits;
pub mod log;
pub mod network;
mod password;
pub mod placement;
pub mod project;
#[cfg(feature = "schema")]
pub mod schema;
pub mod snapshot;
pub mod start;
pub mod task;
pub mod template;
pub mod time;
pub mod tool;
pub mod vm;
pub mod worker;

pub use access::{Access, Resource, Role, Scope, Verb};
pub use error::{ErrorCode, Fault};
pub use event::{EventPattern, EventTopic};
pub use execution::{
    Execution, ExecutionSpec, ExecutionState, ExitStatus, OutputStream, RetainedOutput, TtySize,
};
pub use id::{
    AuditId, ExecutionId, KeyId, MachineId, ProjectId, SnapshotId, TaskId, TemplateId, VmId,
    WorkerId,
};
pub use log::{LogLevel, LogService, LogStream};
pub use network::{AllowRule, Egress, NetworkPolicy, PortRange, TransportProtocol};
pub use password::Password;
pub use placement::Placement;
pub use project::Project;
pub use snapshot::{Snapshot, SnapshotPurpose, SnapshotState};
pub use start::{StartKind, StartPhase, StartReport};
pub use task::{Priority, QueueName, Task, TaskKind, TaskProgress, TaskState};
pub use template::{
    Template, TemplateFile, TemplateProgress, TemplateReady, TemplateSpec, TemplateState,
    TemplateStep,
};
pub use time::{PreciseTime, Timestamp};
pub use tool::{ToolRequest, VmTool};
pub use vm::{DriverKind, Origin, StateChange, Vm, VmEvent, VmSpec, VmState};
pub use worker::{
    Presence, Standing, Worker, WorkerCapacity, WorkerDriver, WorkerEvent, WorkerLoad, WorkerState,
};
