use std::collections::BTreeMap;

use aether_types::{Priority, TaskId, TaskState, Timestamp, VmId};
use serde::{Deserialize, Serialize};

/// A queue: `shared`, or a worker's own. As the store knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct QueueView {
    /// `shared`, or a worker's id.
    pub name: String,
    /// Tasks that have not begun, by priority; one that none has is not there.
    pub pending: BTreeMap<Priority, u64>,
    pub running: u64,
    /// Of those that are pending: for a worker to take their VM.
    pub waiting: u64,
    /// Of those that are pending: after an attempt that failed.
    pub delayed: u64,
    /// Failed with their attempts used up, and not retried since.
    pub dead: u64,
    /// When the oldest pending one was recorded, and how long ago that is.
    pub oldest_at: Option<Timestamp>,
    pub oldest_age_ms: Option<i64>,
}

/// The answer to a retry: what was asked for is asked for again, as another task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Retried {
    pub task_id: TaskId,
    /// `null` for `tool:build` alone.
    pub vm_id: Option<VmId>,
    pub status: TaskState,
    /// The dead one.
    pub retry_of: TaskId,
}
