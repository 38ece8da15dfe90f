//! What has happened.

use aether_types::{
    ErrorCode, EventTopic, ExecutionId, ProjectId, SnapshotId, TaskId, TemplateId, Timestamp, VmId,
    WorkerId,
};
use serde::{Deserialize, Serialize};

/// Of the form of [`EventView`]. It rises where a field changes its meaning or goes; new fields
/// come without.
pub const EVENT_VERSION: u32 = 1;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct EventView {
    pub version: u32,
    /// Rises from event to event; go on after it. Numbers may be left out.
    pub sequence: u64,
    /// Such as `vm.running`.
    pub topic: EventTopic,
    pub at: Timestamp,
    /// `null`: of the platform.
    pub project_id: Option<ProjectId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vm_id: Option<VmId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub task_id: Option<TaskId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub execution_id: Option<ExecutionId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snapshot_id: Option<SnapshotId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub template_id: Option<TemplateId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub worker_id: Option<WorkerId>,
    /// Of a VM or a snapshot; `NAME:TAG` of a template; the host of a worker.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Of a task, such as `vm:create`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub code: Option<ErrorCode>,
}

/// What a client that follows events is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum EventMessage {
    Event(Box<EventView>),
    /// Events that the client has not seen are not kept any more.
    Missed,
    /// The server shuts down; go on later after the last number.
    Detached,
}
