//! Stable error codes, and the fault that is stored with a task and shown to its owner.

use serde::{Deserialize, Serialize};

macro_rules! codes {
    ($($(#[$doc:meta])* $variant:ident = $text:literal),+ $(,)?) => {
        /// A stable, machine-readable reason. Clients branch on these; texts may change.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
        #[serde(rename_all = "snake_case")]
        pub enum ErrorCode { $($(#[$doc])* $variant),+ }

        impl ErrorCode {
            /// Every code, for documentation and tests.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text),+ }
            }
        }
    };
}

codes! {
    /// A field is missing, malformed or outside its limits.
    InvalidRequest = "invalid_request",
    /// The body is not JSON of the expected shape.
    MalformedBody = "malformed_body",
    UnsupportedMediaType = "unsupported_media_type",
    BodyTooLarge = "body_too_large",
    Unauthorized = "unauthorized",
    /// The key is good, and may not do this.
    Forbidden = "forbidden",
    /// More requests than the key or the address may send; `retry_after_s`.
    RateLimited = "rate_limited",
    RouteNotFound = "route_not_found",
    MethodNotAllowed = "method_not_allowed",
    VmNotFound = "vm_not_found",
    TaskNotFound = "task_not_found",
    WorkerNotFound = "worker_not_found",
    QueueNotFound = "queue_not_found",
    ExecutionNotFound = "execution_not_found",
    ImageNotFound = "image_not_found",
    SnapshotNotFound = "snapshot_not_found",
    TemplateNotFound = "template_not_found",
    KeyNotFound = "key_not_found",
    ProjectNotFound = "project_not_found",
    /// The project still has something in it, or is the default one.
    ProjectInUse = "project_in_use",
    /// The snapshot or template is not ready, or something still needs it.
    SnapshotStateConflict = "snapshot_state_conflict",
    /// A file of the snapshot is missing, changed, or not this platform's; the text names it.
    SnapshotDamaged = "snapshot_damaged",
    /// The snapshot was taken on another VMM, processor or machine layout than there is here.
    SnapshotIncompatible = "snapshot_incompatible",
    /// A step of the template, or its ready check, failed or took too long.
    TemplateBuildFailed = "template_build_failed",
    /// The catalogue has no tool of this name; the text has the closest ones.
    ToolNotFound = "tool_not_found",
    /// The tool has no version that fits; the text has the closest ones.
    ToolVersionNotFound = "tool_version_not_found",
    /// A tool could not be fetched, installed or run; the text has the installer's last lines.
    ToolBuildFailed = "tool_build_failed",
    /// A live VM, snapshot or project has this name.
    NameTaken = "name_taken",
    /// The VM's state does not allow the request.
    VmStateConflict = "vm_state_conflict",
    /// The task has already ended.
    TaskEnded = "task_ended",
    /// The same idempotency key came with another body.
    IdempotencyConflict = "idempotency_conflict",
    /// The host cannot give what was asked for: memory, processors, disk, addresses.
    InsufficientCapacity = "insufficient_capacity",
    /// As many VMs as the platform is configured for are there or being made; try again later.
    TooManyVms = "too_many_vms",
    /// The project has as many keys as there may be; revoke some.
    TooManyKeys = "too_many_keys",
    /// The project may not have so much; the problem says of what, how much there may be and is.
    QuotaExceeded = "quota_exceeded",
    /// The driver asked for is not configured or does not work on this host.
    DriverUnavailable = "driver_unavailable",
    /// A part of the platform does not answer or is full; try again later.
    Unavailable = "unavailable",
    /// The VM could not be made or started.
    VmStartFailed = "vm_start_failed",
    /// The guest did not become ready in time.
    VmStartTimeout = "vm_start_timeout",
    /// The guest's kernel panicked.
    GuestPanic = "guest_panic",
    /// The guest rebooted or powered off by itself.
    GuestShutdown = "guest_shutdown",
    /// The agent in the guest died; the guest itself lives.
    GuestAgentLost = "guest_agent_lost",
    /// The VM's process on the host ended or was killed.
    VmmExited = "vmm_exited",
    /// The worker that had the VM does not answer any more; nobody knows what became of the VM.
    WorkerLost = "worker_lost",
    /// The worker that has the VM cannot be reached from the gateway that was asked; try again later.
    WorkerUnreachable = "worker_unreachable",
    /// The VM was stopped or deleted while the work ran.
    VmStopped = "vm_stopped",
    /// The guest does not answer on its channel.
    GuestUnreachable = "guest_unreachable",
    /// The guest broke the protocol.
    GuestProtocol = "guest_protocol",
    /// The guest refused the request: no such user or directory, and the like.
    GuestRefused = "guest_refused",
    /// The command ran past its time limit and was killed.
    ExecutionTimeout = "execution_timeout",
    /// The platform cannot tell whether the command ran to its end.
    ExecutionLost = "execution_lost",
    /// The client that held the interactive session went away.
    ClientGone = "client_gone",
    Cancelled = "cancelled",
    /// The task used up its attempts.
    AttemptsExhausted = "attempts_exhausted",
    FileNotFound = "file_not_found",
    FilePermissionDenied = "file_permission_denied",
    FileConflict = "file_conflict",
    NoSpace = "no_space",
    /// A defect or an unexpected failure of the platform.
    Internal = "internal",
}

impl std::fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::str::FromStr for ErrorCode {
    type Err = UnknownCode;

    fn from_str(text: &str) -> Result<Self, UnknownCode> {
        Self::ALL.iter().copied().find(|c| c.as_str() == text).ok_or(UnknownCode)
    }
}

/// The text names no error code of this version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("unknown error code")]
pub struct UnknownCode;

/// Why something ended badly, in words for its owner. Never carries internals or secrets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[error("{message}")]
pub struct Fault {
    pub code: ErrorCode,
    pub message: String,
}

impl Fault {
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_has_one_spelling() {
        for code in ErrorCode::ALL {
            let json = serde_json::to_string(code).unwrap();
            assert_eq!(json, format!("\"{code}\""));
            assert_eq!(code.as_str().parse::<ErrorCode>(), Ok(*code));
        }
    }
}
