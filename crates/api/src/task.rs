use aether_types::{
    ExecutionId, Fault, Priority, SnapshotId, Task, TaskId, TaskKind, TaskProgress, TaskState,
    TemplateId, Timestamp, VmId, VmTool, WorkerId,
};
use serde::{Deserialize, Serialize};

/// The answer 202: the request is recorded and will be carried out. Also what a request with
/// `?wait=` answers when the time is over first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Accepted {
    pub task_id: TaskId,
    pub vm_id: VmId,
    /// Of the task.
    pub status: TaskState,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub execution_id: Option<ExecutionId>,
    /// The snapshot that the task makes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot_id: Option<SnapshotId>,
    /// The template that the task builds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template_id: Option<TemplateId>,
}

impl Accepted {
    /// `vm_id` is the task's.
    #[must_use]
    pub fn new(task: &Task, vm_id: VmId) -> Self {
        Self {
            task_id: task.id,
            vm_id,
            status: task.state,
            execution_id: task.execution_id,
            snapshot_id: task.snapshot_id,
            template_id: None,
        }
    }
}

/// A task as it is now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct TaskView {
    pub id: TaskId,
    pub kind: TaskKind,
    pub status: TaskState,
    pub priority: Priority,
    /// `null` for `tool:build` alone.
    pub vm_id: Option<VmId>,
    pub execution_id: Option<ExecutionId>,
    /// The snapshot that it makes.
    #[serde(default)]
    pub snapshot_id: Option<SnapshotId>,
    /// Attempts begun so far.
    pub attempts: u32,
    pub max_attempts: u32,
    pub worker_id: Option<WorkerId>,
    pub cancel_requested: bool,
    pub error: Option<Fault>,
    pub created_at: Timestamp,
    pub started_at: Option<Timestamp>,
    pub finished_at: Option<Timestamp>,
    /// Of `tool:build`: what is to be built, and what came of it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tools: Vec<VmTool>,
    /// Of work that waits for tools to be built, or builds them. The log is empty in lists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<TaskProgress>,
}

impl TaskView {
    /// Without what can be long: for lists.
    #[must_use]
    pub fn brief(task: Task) -> Self {
        let mut view = Self::from(task);
        if let Some(progress) = &mut view.progress {
            progress.log.clear();
        }
        view
    }
}

impl From<Task> for TaskView {
    fn from(task: Task) -> Self {
        let Task {
            id,
            // That of the key that asks.
            project_id: _,
            kind,
            state,
            priority,
            vm_id,
            execution_id,
            snapshot_id,
            attempts,
            max_attempts,
            worker_id,
            epoch: _,
            cancel_requested,
            created_at,
            started_at,
            finished_at,
            error,
            tools,
            progress,
        } = task;
        Self {
            id,
            kind,
            status: state,
            priority,
            vm_id,
            execution_id,
            snapshot_id,
            attempts,
            max_attempts,
            worker_id,
            cancel_requested,
            error,
            created_at,
            started_at,
            finished_at,
            tools,
            progress,
        }
    }
}
