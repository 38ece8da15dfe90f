//! What went wrong, in words for the owner of the task. Details of this host go to the log only.

use std::{io, path::Path};

use aether_drivers::{DriverError, ExitReason};
use aether_images::SnapshotError;
use aether_protocol::{ErrorCode as GuestCode, host::ClientError};
use aether_types::{ErrorCode, Fault};

pub(crate) fn from_driver(error: &DriverError) -> Fault {
    if is_disk_full(error) {
        return no_space();
    }
    let message = match error {
        // Paths and system errors of the host are not for the client.
        DriverError::Io { .. } | DriverError::File { .. } => {
            "the worker could not prepare the VM; its log says why".to_owned()
        }
        DriverError::Program { program, .. } => {
            format!("{program} failed on the worker; its log says why")
        }
        DriverError::Damaged { path, detail } => {
            format!("the file `{}` of the snapshot is damaged: {detail}", entry_name(path))
        }
        DriverError::UnknownVm(_)
        | DriverError::WrongState { .. }
        | DriverError::Vmm { .. }
        | DriverError::StartTimeout { .. }
        | DriverError::ExitedDuringStart { .. }
        | DriverError::ConnectTimeout { .. }
        | DriverError::ConnectRefused { .. }
        | DriverError::NoAddress { .. }
        | DriverError::RangeOverlaps { .. }
        | DriverError::Incompatible { .. }
        | DriverError::Layers(_)
        | DriverError::Unavailable(_)
        | DriverError::Injected(_) => error.to_string(),
    };
    Fault::new(error.code(), message)
}

/// The host's disk, not a guest's.
pub(crate) fn is_disk_full(error: &DriverError) -> bool {
    match error {
        DriverError::Io { source, .. } | DriverError::File { source, .. } => {
            matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
        }
        DriverError::Program { .. }
        | DriverError::UnknownVm(_)
        | DriverError::WrongState { .. }
        | DriverError::Vmm { .. }
        | DriverError::StartTimeout { .. }
        | DriverError::ExitedDuringStart { .. }
        | DriverError::ConnectTimeout { .. }
        | DriverError::ConnectRefused { .. }
        | DriverError::NoAddress { .. }
        | DriverError::RangeOverlaps { .. }
        | DriverError::Incompatible { .. }
        | DriverError::Damaged { .. }
        | DriverError::Layers(_)
        | DriverError::Unavailable(_)
        | DriverError::Injected(_) => false,
    }
}

fn no_space() -> Fault {
    Fault::new(ErrorCode::NoSpace, "the worker's disk is full; delete snapshots or VMs")
}

pub(crate) fn from_snapshot(error: &SnapshotError) -> Fault {
    let damaged = |file: &Path, reason: &str| {
        let text = format!("the file `{}` of the snapshot is {reason}", entry_name(file));
        Fault::new(ErrorCode::SnapshotDamaged, text)
    };
    match error {
        SnapshotError::Unknown { id } => Fault::new(
            ErrorCode::SnapshotDamaged,
            format!("the files of the snapshot `{id}` are gone"),
        ),
        SnapshotError::Damaged { file, reason } => damaged(file, &format!("damaged: {reason}")),
        SnapshotError::Foreign { file, reason } => {
            damaged(file, &format!("not of this platform: {reason}"))
        }
        SnapshotError::Format { file, found, known } => Fault::new(
            ErrorCode::SnapshotIncompatible,
            format!("`{}` has format {found}; this program knows {known}", entry_name(file)),
        ),
        SnapshotError::NoSpace { .. } => no_space(),
        // Paths and system errors of the host are not for the client.
        _ => crate::failure::internal("keep the snapshot's files"),
    }
}

/// A snapshot's file as `entry/file`: where the store is on this host is not for the client.
fn entry_name(file: &Path) -> String {
    let parts: Vec<_> = file.components().map(|part| part.as_os_str().to_string_lossy()).collect();
    parts[parts.len().saturating_sub(2)..].join("/")
}

pub(crate) fn from_client(error: &ClientError) -> Fault {
    match error {
        ClientError::Io { .. } | ClientError::Timeout { .. } | ClientError::Closed { .. } => {
            Fault::new(ErrorCode::GuestUnreachable, "the guest does not answer")
        }
        ClientError::Protocol(_) => Fault::new(
            ErrorCode::GuestProtocol,
            "the guest broke the protocol; its agent may have been tampered with",
        ),
        ClientError::Request(request) => Fault::new(ErrorCode::InvalidRequest, request.to_string()),
        ClientError::Refused { code, message } | ClientError::Failed { code, message } => {
            Fault::new(from_guest_code(*code), format!("the guest refused: {message}"))
        }
    }
}

fn from_guest_code(code: GuestCode) -> ErrorCode {
    match code {
        GuestCode::NotFound => ErrorCode::FileNotFound,
        GuestCode::PermissionDenied => ErrorCode::FilePermissionDenied,
        GuestCode::NoSpace => ErrorCode::NoSpace,
        GuestCode::UnknownRun => ErrorCode::ExecutionLost,
        GuestCode::Unauthorized | GuestCode::UnsupportedGeneration | GuestCode::BadMessage => {
            ErrorCode::GuestProtocol
        }
        _ => ErrorCode::GuestRefused,
    }
}

/// Why a command ended when its machine did.
pub(crate) fn from_exit(reason: ExitReason) -> Fault {
    match reason {
        ExitReason::Killed => {
            Fault::new(ErrorCode::VmStopped, "the VM was stopped while the work ran")
        }
        ExitReason::GuestShutdown => {
            Fault::new(ErrorCode::GuestShutdown, "the guest powered itself off or rebooted")
        }
        ExitReason::GuestPanic => Fault::new(ErrorCode::GuestPanic, "the guest's kernel panicked"),
        ExitReason::VmmDied => {
            Fault::new(ErrorCode::VmmExited, "the VM's process on the host ended unexpectedly")
        }
    }
}

/// An error with its causes, for the log.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
