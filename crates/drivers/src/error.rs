//! What goes wrong with machines, in one enum.

use std::{io, path::PathBuf};

use aether_types::{ErrorCode, MachineId};

/// Context is a present-tense action; sources are chained, not repeated in the text.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    #[error("machine {0} is not known to the driver")]
    UnknownVm(MachineId),
    #[error("machine {id} is {state}; cannot {action}")]
    WrongState { id: MachineId, state: &'static str, action: &'static str },
    #[error("{action}")]
    Io { action: String, source: io::Error },
    #[error("{action} {path}", path = path.display())]
    File { action: &'static str, path: PathBuf, source: io::Error },
    #[error("{program} failed: {detail}")]
    Program { program: &'static str, detail: String },
    /// The VMM refused a request or broke its own API.
    #[error("the VMM refuses to {action}: {detail}")]
    Vmm { action: String, detail: String },
    #[error("the guest was not ready within {limit_ms} ms")]
    StartTimeout { limit_ms: u128 },
    #[error("the VMM ended while the guest was starting: {detail}")]
    ExitedDuringStart { detail: String },
    #[error("the guest does not answer on port {port} within {limit_ms} ms")]
    ConnectTimeout { port: u32, limit_ms: u128 },
    #[error("the guest refuses the connection to port {port}")]
    ConnectRefused { port: u32 },
    #[error("no address is left in {range}")]
    NoAddress { range: String },
    #[error("the range {range} overlaps {with} on this host; configure another")]
    RangeOverlaps { range: String, with: String },
    /// What a snapshot was taken of is not what there is here.
    #[error("the snapshot cannot be restored here: its {what} is {snapshot}, here it is {machine}")]
    Incompatible { what: &'static str, snapshot: String, machine: String },
    /// A file of a snapshot is not what it was when it was checked.
    #[error("the snapshot's file {path} is damaged: {detail}", path = path.display())]
    Damaged { path: PathBuf, detail: String },
    /// Layers of tools that are not what they must be, or that are too many.
    #[error("the tools cannot be attached: {0}")]
    Layers(String),
    /// This host cannot run this driver; the text says what is missing and how to mend it.
    #[error("{0}")]
    Unavailable(String),
    /// Asked for by a test of the simulated driver.
    #[error("injected failure at {0}")]
    Injected(String),
}

impl DriverError {
    /// What the owner of the task is told.
    #[must_use]
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::UnknownVm(_) => ErrorCode::VmNotFound,
            Self::WrongState { .. } => ErrorCode::VmStateConflict,
            Self::StartTimeout { .. } => ErrorCode::VmStartTimeout,
            Self::ConnectTimeout { .. } | Self::ConnectRefused { .. } => {
                ErrorCode::GuestUnreachable
            }
            Self::NoAddress { .. } | Self::Layers(_) => ErrorCode::InsufficientCapacity,
            Self::Incompatible { .. } => ErrorCode::SnapshotIncompatible,
            Self::Damaged { .. } => ErrorCode::SnapshotDamaged,
            Self::RangeOverlaps { .. } | Self::Unavailable(_) => ErrorCode::DriverUnavailable,
            Self::Io { .. }
            | Self::File { .. }
            | Self::Program { .. }
            | Self::Vmm { .. }
            | Self::ExitedDuringStart { .. }
            | Self::Injected(_) => ErrorCode::VmStartFailed,
        }
    }

    /// Another attempt may do better.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::UnknownVm(_)
            | Self::WrongState { .. }
            | Self::NoAddress { .. }
            | Self::Layers(_)
            | Self::RangeOverlaps { .. }
            | Self::Incompatible { .. }
            | Self::Damaged { .. }
            | Self::Unavailable(_) => false,
            Self::Io { .. }
            | Self::File { .. }
            | Self::Program { .. }
            | Self::Vmm { .. }
            | Self::StartTimeout { .. }
            | Self::ExitedDuringStart { .. }
            | Self::ConnectTimeout { .. }
            | Self::ConnectRefused { .. }
            | Self::Injected(_) => true,
        }
    }
}
