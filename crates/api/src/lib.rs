//! The REST interface in types: what a client sends, what it gets, and, under the feature
//! `client`, the client itself.
//!
//! Requests refuse fields that they do not know, so that a misspelt one is named and not ignored.
//! Answers do not: an older client reads a newer server. Both are plain data; what is legal is
//! decided by `aether-types` and the gateway.
//!
//! Every path is below [`PREFIX`]. Errors are [`Problem`] documents.

mod audit;
#[cfg(feature = "client")]
pub mod client;
mod event;
mod execution;
mod file;
mod health;
mod key;
mod log;
mod page;
mod pool;
mod problem;
mod project;
mod queue;
mod snapshot;
mod stream;
mod task;
mod template;
mod tool;
mod vm;
mod wait;
mod worker;

pub use audit::AuditView;
pub use event::{EVENT_VERSION, EventMessage, EventView};
pub use execution::{ExecuteRequest, ExecutionView, KeptOutput};
pub use file::{
    FileEntry, FileKind, FileListing, FileView, FileWritten, MkdirRequest, MoveRequest,
};
pub use health::{ComponentHealth, Health, HealthStatus};
pub use key::{CreateKey, KeyCreated, KeyView};
pub use log::{EVENT_STREAM_MEDIA_TYPE, LogEntryView, LogEvent, LogsView, QueryLogs};
pub use page::Page;
pub use pool::PoolView;
pub use problem::{PROBLEM_MEDIA_TYPE, Problem};
pub use project::{CreateProject, ProjectView, QuotaView};
pub use queue::{QueueView, Retried};
pub use snapshot::{CloneAccepted, CreateSnapshot, ForkAccepted, ForkVm, Forked, SnapshotView};
pub use stream::{
    CHANNEL_STDERR, CHANNEL_STDIN, CHANNEL_STDOUT, NDJSON_MEDIA_TYPE, STDIN_WINDOW_BYTES,
    StreamEnd, StreamEvent, TerminalControl, TerminalStart,
};
pub use task::{Accepted, TaskView};
pub use template::{BuildTemplate, TemplateFileView, TemplateSpecView, TemplateView};
pub use tool::{
    BuildTools, CachedToolView, LockedToolView, PruneTools, ToolBuildAccepted, ToolVersionView,
    ToolVersionsView, ToolView, ToolsPruned, ToolsRefreshed,
};
pub use vm::{CreateVm, OriginKind, OriginView, PhaseView, StartView, VmView};
pub use wait::{ParseWaitError, format_wait, parse_wait};
pub use worker::{ClusterStats, WorkerShare, WorkerView};

/// Of every path.
pub const PREFIX: &str = "/api/v1";

/// What every API key begins with, so that people and scanners recognise one.
pub const KEY_PREFIX: &str = "aeth_";

/// What keys began with before they had a check in them. They are good as ever.
pub const KEY_PREFIX_EARLIER: &str = "ae_";

/// A request with the same key and the same content is carried out once.
pub const IDEMPOTENCY_KEY_HEADER: &str = "idempotency-key";

/// Given by the client or made by the server; in every answer.
pub const REQUEST_ID_HEADER: &str = "x-request-id";

/// Of output that is read raw: bytes written in all, bytes of them not kept, and where in the
/// answer those are missing.
pub const OUTPUT_BYTES_HEADER: &str = "x-output-bytes";
pub const OUTPUT_CUT_BYTES_HEADER: &str = "x-output-cut-bytes";
pub const OUTPUT_CUT_AT_HEADER: &str = "x-output-cut-at";

/// Of a file that is read: its size and its permission bits (octal) when it was opened.
pub const FILE_SIZE_HEADER: &str = "x-file-size";
pub const FILE_MODE_HEADER: &str = "x-file-mode";
