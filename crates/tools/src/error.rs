//! What can go wrong with a tool, in words for who asked for it.

use std::io;
use std::path::PathBuf;

use aether_types::{ErrorCode, Fault};

/// Why a tool could not be found, fetched, built or given out. `Clone`, as all who wait for a build
/// get its error.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ToolError {
    #[error("there is no tool {name}{}", list_after("; close to it: ", .closest))]
    UnknownTool { name: String, closest: Vec<String> },

    #[error(
        "{tool} has no version {asked}: {origin} has {}",
        if .closest.is_empty() { "none".to_owned() } else { list_after("", .closest) }
    )]
    UnknownVersion { tool: String, asked: String, origin: String, closest: Vec<String> },

    #[error("the version {asked} of {tool} cannot be read: {reason}")]
    InvalidVersion { tool: String, asked: String, reason: String },

    /// The source of a tool does not answer, answers wrongly, or is not configured.
    #[error("{tool} cannot be looked up: {reason}")]
    Source { tool: String, reason: String },

    #[error("{tool} {version} could not be fetched: {reason}")]
    Fetch { tool: String, version: String, reason: String },

    /// The installer, the verification, its time, its room.
    #[error("{tool} {version} could not be built: {reason}{}", with_last_lines(.last_lines))]
    Build { tool: String, version: String, reason: String, last_lines: String },

    /// Nothing that the tool did: asking again later may help.
    #[error("{tool} {version} could not be built: {reason}")]
    BuilderUnavailable { tool: String, version: String, reason: String },

    #[error("recipe {}: {reason}", path.display())]
    Recipe { path: PathBuf, reason: String },

    #[error("{action} {}: {reason}", path.display())]
    Io { action: &'static str, path: PathBuf, reason: String },

    #[error("{action} {}: the disk is full; free some room (`aether tools prune`)", path.display())]
    NoSpace { action: &'static str, path: PathBuf },
}

impl ToolError {
    #[must_use]
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::UnknownTool { .. } => ErrorCode::ToolNotFound,
            Self::UnknownVersion { .. } | Self::InvalidVersion { .. } => {
                ErrorCode::ToolVersionNotFound
            }
            Self::Source { .. }
            | Self::Fetch { .. }
            | Self::Build { .. }
            | Self::BuilderUnavailable { .. } => ErrorCode::ToolBuildFailed,
            Self::NoSpace { .. } => ErrorCode::NoSpace,
            Self::Recipe { .. } | Self::Io { .. } => ErrorCode::Internal,
        }
    }

    /// For the task. The text is for the user and has all that is known.
    #[must_use]
    pub fn to_fault(&self) -> Fault {
        Fault::new(self.code(), self.to_string())
    }

    /// Puts the step and the file to an I/O error, for `map_err`. A full disk is told apart.
    pub(crate) fn io(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |error: io::Error| match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::NoSpace { action, path }
            }
            _ => Self::Io { action, path, reason: error.to_string() },
        }
    }
}

fn list_after(before: &str, names: &[String]) -> String {
    if names.is_empty() { String::new() } else { format!("{before}{}", names.join(", ")) }
}

fn with_last_lines(lines: &str) -> String {
    if lines.is_empty() { String::new() } else { format!("; its last lines:\n{lines}") }
}
