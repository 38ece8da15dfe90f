use std::fmt;

use aether_types::{ErrorCode, TaskId, VmId, VmState, project::Shortage};
use serde::{Deserialize, Serialize};

pub const PROBLEM_MEDIA_TYPE: &str = "application/problem+json";

/// An error, as RFC 9457 has it. Programs branch on `code`; texts may change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Problem {
    /// `urn:aetherium:problem:` and the code.
    #[serde(rename = "type")]
    pub kind: String,
    /// The same for every problem of this code.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// What was wrong this time.
    pub detail: String,
    /// The id of the request.
    #[serde(default)]
    pub instance: String,
    /// It never changes its meaning. Text, since a server may be newer than its client.
    pub code: String,
    /// The field or parameter that is at fault.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    /// The state that does not allow the request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm_state: Option<VmState>,
    /// The task that failed, where there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task_id: Option<TaskId>,
    /// Its VM, which may have to be deleted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm_id: Option<VmId>,
    /// Of a fork: every VM that it made, those that run too.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub vm_ids: Vec<VmId>,
    /// What the project may not have more of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quota: Option<Shortage>,
    /// Try again after this long.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_s: Option<u64>,
}

impl Problem {
    /// The code, where this version knows it.
    #[must_use]
    pub fn error_code(&self) -> Option<ErrorCode> {
        self.code.parse().ok()
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.detail, self.code)
    }
}
