//! Lines of guests and of the platform.

use aether_types::{LogLevel, LogService, LogStream, PreciseTime, TaskId, VmId};
use serde::{Deserialize, Serialize};

pub const EVENT_STREAM_MEDIA_TYPE: &str = "text/event-stream";

/// Everything that is given must fit. Empty: the latest lines of all.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct QueryLogs {
    /// An id or a name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vm_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub task_id: Option<TaskId>,
    /// This level and those that weigh more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub level: Option<LogLevel>,
    /// In the line, as it is written.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(max = aether_types::limits::LOG_TEXT_BYTES_MAX)))]
    pub text: Option<String>,
    /// Not before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start: Option<PreciseTime>,
    /// Before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub end: Option<PreciseTime>,
    /// At most this many, the latest.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = aether_types::limits::LOG_QUERY_LIMIT_MAX)))]
    pub limit: Option<u32>,
}

/// What a query found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct LogsView {
    /// Oldest first.
    pub items: Vec<LogEntryView>,
    /// There are earlier ones: ask again with `end` as the time of the first.
    pub more: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct LogEntryView {
    /// Rises by one from each line that the server takes to the next.
    pub sequence: u64,
    pub time: PreciseTime,
    pub service: LogService,
    pub level: LogLevel,
    pub stream: LogStream,
    pub vm_id: Option<VmId>,
    pub task_id: Option<TaskId>,
    pub text: String,
    /// Of the line, beyond `text`.
    pub cut_bytes: u64,
    /// Lines that should stand before this one and were lost.
    pub missing: u64,
}

/// What a client that follows logs is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum LogEvent {
    Entry(LogEntryView),
    /// This many lines, of all that the server took, were removed before the client came to them.
    Missed {
        lines: u64,
    },
    /// The server shuts down; go on later after the last line's number.
    Detached,
}
