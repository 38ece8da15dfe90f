//! What has happened, as it is kept.

use aether_types::{ErrorCode, EventPattern, EventTopic, ProjectId, TaskId, Timestamp, VmId};

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventRecord {
    /// Rises from event to event, of one subject in the order of its changes. Numbers may be left
    /// out, and none is given twice.
    pub sequence: u64,
    pub topic: EventTopic,
    pub at: Timestamp,
    /// `None`: of the platform.
    pub project_id: Option<ProjectId>,
    /// The id of what it happened to.
    pub subject: String,
    pub vm_id: Option<VmId>,
    pub task_id: Option<TaskId>,
    /// The kind of a task, the name of a VM, snapshot or template, the host of a worker.
    pub detail: Option<String>,
    /// Why it failed.
    pub code: Option<ErrorCode>,
}

#[derive(Debug, Clone, Default)]
pub struct EventFilter {
    /// `None`: of every project, and of the platform.
    pub project: Option<ProjectId>,
    /// One of them at least; none: all.
    pub topics: Vec<EventPattern>,
    pub vm: Option<VmId>,
    pub task: Option<TaskId>,
}

/// Some of what came after a number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventBatch {
    pub events: Vec<EventRecord>,
    /// Everything up to here was looked at; go on after it.
    pub next: u64,
    /// What stood right after the number that was asked for is not kept any more.
    pub missed: bool,
    /// There is more at once.
    pub more: bool,
}

/// Where a reader begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventsFrom {
    /// Only what is still to come.
    Now,
    After(u64),
    /// Not before; it may be some that are a little older.
    Time(Timestamp),
}
