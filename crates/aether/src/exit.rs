//! Exit statuses, as `aether help` documents them.

use std::process::ExitCode;

use aether_types::ErrorCode;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    Success,
    Failure,
    /// The request itself is wrong: the command line, or a value that the server refuses.
    Usage,
    NotFound,
    Conflict,
    Unauthorized,
    /// The server does not answer, is full or lacks what was asked for.
    Unavailable,
    /// A time limit ended the command.
    TimeLimit,
    /// `exec` and `shell`: the platform could not run the command to its end.
    Platform,
    /// The command's own status, or 128 and the signal that ended it.
    Command(u8),
}

impl Exit {
    pub(crate) fn status(self) -> u8 {
        match self {
            Self::Success => 0,
            Self::Failure => 1,
            Self::Usage => 2,
            Self::NotFound => 3,
            Self::Conflict => 4,
            Self::Unauthorized => 5,
            Self::Unavailable => 6,
            Self::TimeLimit => 124,
            Self::Platform => 125,
            Self::Command(status) => status,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        exit.status().into()
    }
}

impl From<ErrorCode> for Exit {
    fn from(code: ErrorCode) -> Self {
        match code {
            ErrorCode::InvalidRequest
            | ErrorCode::MalformedBody
            | ErrorCode::UnsupportedMediaType
            | ErrorCode::BodyTooLarge => Self::Usage,
            ErrorCode::VmNotFound
            | ErrorCode::TaskNotFound
            | ErrorCode::WorkerNotFound
            | ErrorCode::QueueNotFound
            | ErrorCode::ExecutionNotFound
            | ErrorCode::ImageNotFound
            | ErrorCode::SnapshotNotFound
            | ErrorCode::TemplateNotFound
            | ErrorCode::KeyNotFound
            | ErrorCode::ProjectNotFound
            | ErrorCode::ToolNotFound
            | ErrorCode::ToolVersionNotFound
            | ErrorCode::FileNotFound
            | ErrorCode::RouteNotFound => Self::NotFound,
            ErrorCode::NameTaken
            | ErrorCode::VmStateConflict
            | ErrorCode::SnapshotStateConflict
            | ErrorCode::TaskEnded
            | ErrorCode::IdempotencyConflict
            | ErrorCode::TooManyKeys
            | ErrorCode::ProjectInUse
            | ErrorCode::QuotaExceeded
            | ErrorCode::FileConflict => Self::Conflict,
            ErrorCode::Unauthorized | ErrorCode::Forbidden => Self::Unauthorized,
            ErrorCode::InsufficientCapacity
            | ErrorCode::TooManyVms
            | ErrorCode::RateLimited
            | ErrorCode::SnapshotIncompatible
            | ErrorCode::DriverUnavailable
            | ErrorCode::WorkerUnreachable
            | ErrorCode::Unavailable => Self::Unavailable,
            ErrorCode::ExecutionTimeout => Self::TimeLimit,
            ErrorCode::MethodNotAllowed
            | ErrorCode::SnapshotDamaged
            | ErrorCode::TemplateBuildFailed
            | ErrorCode::ToolBuildFailed
            | ErrorCode::VmStartFailed
            | ErrorCode::VmStartTimeout
            | ErrorCode::GuestPanic
            | ErrorCode::GuestShutdown
            | ErrorCode::GuestAgentLost
            | ErrorCode::VmmExited
            | ErrorCode::WorkerLost
            | ErrorCode::VmStopped
            | ErrorCode::GuestUnreachable
            | ErrorCode::GuestProtocol
            | ErrorCode::GuestRefused
            | ErrorCode::ExecutionLost
            | ErrorCode::ClientGone
            | ErrorCode::Cancelled
            | ErrorCode::AttemptsExhausted
            | ErrorCode::FilePermissionDenied
            | ErrorCode::NoSpace
            | ErrorCode::Internal => Self::Failure,
        }
    }
}
