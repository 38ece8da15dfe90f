//! What went wrong, in words for the owner of the task. Details of this host go to the log only.

use aether_drivers::{DriverError, ExitReason};
use aether_protocol::{ErrorCode as GuestCode, host::ClientError};
use aether_types::{ErrorCode, Fault};

pub(crate) fn from_driver(error: &DriverError) -> Fault {
    let message = match error {
        // Paths and system errors of the host are not for the client.
        DriverError::Io { .. } | DriverError::File { .. } => {
            "the worker could not prepare the VM; its log says why".to_owned()
        }
        DriverError::Program { program, .. } => {
            format!("{program} failed on the worker; its log says why")
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
        | DriverError::Unavailable(_)
        | DriverError::Injected(_) => error.to_string(),
    };
    Fault::new(error.code(), message)
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
