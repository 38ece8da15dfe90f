//! A task: what a client asked for, and how far it has come.
//!
//! ```text
//!   pending ── begin ──► running ── end ──► completed | failed | cancelled
//!      ▲                   │ retry (infrastructure only)
//!      └───────────────────┘          pending ── cancel ──► cancelled
//! ```

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{ExecutionId, Fault, ProjectId, SnapshotId, TaskId, Timestamp, VmId, VmTool, WorkerId};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum TaskKind {
    #[serde(rename = "vm:create")]
    VmCreate,
    #[serde(rename = "vm:start")]
    VmStart,
    #[serde(rename = "vm:stop")]
    VmStop,
    #[serde(rename = "vm:pause")]
    VmPause,
    #[serde(rename = "vm:resume")]
    VmResume,
    /// Stop with the memory kept, so that a start goes on where it was.
    #[serde(rename = "vm:suspend")]
    VmSuspend,
    #[serde(rename = "vm:snapshot")]
    VmSnapshot,
    /// Build a template in the task's VM, which exists for that.
    #[serde(rename = "template:build")]
    TemplateBuild,
    /// Build layers of tools, for VMs to come. The one kind that is of no VM.
    #[serde(rename = "tool:build")]
    ToolBuild,
    #[serde(rename = "vm:execute")]
    VmExecute,
    #[serde(rename = "vm:delete")]
    VmDelete,
}

impl TaskKind {
    pub const ALL: &'static [Self] = &[
        Self::VmCreate,
        Self::VmStart,
        Self::VmStop,
        Self::VmPause,
        Self::VmResume,
        Self::VmSuspend,
        Self::VmSnapshot,
        Self::TemplateBuild,
        Self::ToolBuild,
        Self::VmExecute,
        Self::VmDelete,
    ];

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::VmCreate => "vm:create",
            Self::VmStart => "vm:start",
            Self::VmStop => "vm:stop",
            Self::VmPause => "vm:pause",
            Self::VmResume => "vm:resume",
            Self::VmSuspend => "vm:suspend",
            Self::VmSnapshot => "vm:snapshot",
            Self::TemplateBuild => "template:build",
            Self::ToolBuild => "tool:build",
            Self::VmExecute => "vm:execute",
            Self::VmDelete => "vm:delete",
        }
    }
}

impl fmt::Display for TaskKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for TaskKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.iter().copied().find(|k| k.as_str() == text).ok_or_else(|| {
            let known: Vec<_> = Self::ALL.iter().map(|k| k.as_str()).collect();
            format!("unknown task kind; one of {}", known.join(", "))
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum TaskState {
    /// Recorded; waits for a worker.
    Pending,
    Running,
    Completed,
    Failed,
    Cancelled,
}

impl TaskState {
    pub const ALL: &'static [Self] =
        &[Self::Pending, Self::Running, Self::Completed, Self::Failed, Self::Cancelled];

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Running => "running",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    #[must_use]
    pub fn is_end(self) -> bool {
        match self {
            Self::Pending | Self::Running => false,
            Self::Completed | Self::Failed | Self::Cancelled => true,
        }
    }
}

impl fmt::Display for TaskState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for TaskState {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.iter().copied().find(|s| s.as_str() == text).ok_or_else(|| {
            "unknown task state; one of pending, running, completed, failed, cancelled".to_owned()
        })
    }
}

/// Weighted, so that none starves.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize,
)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Priority {
    Critical,
    High,
    #[default]
    Default,
    Low,
}

impl Priority {
    pub const ALL: &'static [Self] = &[Self::Critical, Self::High, Self::Default, Self::Low];

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Critical => "critical",
            Self::High => "high",
            Self::Default => "default",
            Self::Low => "low",
        }
    }

    /// Shares of the claims while every priority has work.
    #[must_use]
    pub fn weight(self) -> u32 {
        match self {
            Self::Critical => 8,
            Self::High => 4,
            Self::Default => 2,
            Self::Low => 1,
        }
    }
}

impl FromStr for Priority {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .iter()
            .copied()
            .find(|p| p.as_str() == text)
            .ok_or_else(|| "unknown priority; one of critical, high, default, low".to_owned())
    }
}

/// Where tasks wait: one queue is every worker's, and each worker has one for its own VMs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum QueueName {
    Shared,
    Worker(WorkerId),
}

impl QueueName {
    #[must_use]
    pub fn of(worker: Option<WorkerId>) -> Self {
        worker.map_or(Self::Shared, Self::Worker)
    }
}

impl fmt::Display for QueueName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shared => f.write_str("shared"),
            Self::Worker(worker) => worker.fmt(f),
        }
    }
}

impl FromStr for QueueName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "shared" {
            return Ok(Self::Shared);
        }
        let worker = text.parse().map(Self::Worker);
        worker.map_err(|_| "unknown queue; `shared`, or the id of a worker".to_owned())
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    pub id: TaskId,
    /// Its VM's, where it is of one.
    pub project_id: ProjectId,
    pub kind: TaskKind,
    pub state: TaskState,
    pub priority: Priority,
    /// Of every kind but `tool:build`.
    pub vm_id: Option<VmId>,
    pub execution_id: Option<ExecutionId>,
    /// The snapshot that it makes: of `vm:snapshot`, `vm:suspend` and `template:build`.
    pub snapshot_id: Option<SnapshotId>,
    /// Attempts begun so far.
    pub attempts: u32,
    pub max_attempts: u32,
    /// Of the worker that has, or had, the last attempt.
    pub worker_id: Option<WorkerId>,
    /// Fence: the answer of an attempt counts only while its epoch is this one.
    pub epoch: i64,
    pub cancel_requested: bool,
    pub created_at: Timestamp,
    pub started_at: Option<Timestamp>,
    pub finished_at: Option<Timestamp>,
    pub error: Option<Fault>,
    /// Of `tool:build`: what is to be built, with what came of it once it is done.
    pub tools: Vec<VmTool>,
    /// Of work that can take minutes and says how far it is.
    pub progress: Option<TaskProgress>,
}

/// How far a task has come: the layers of tools that it waits for or builds.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct TaskProgress {
    /// What is done now, in words.
    pub now: String,
    /// The end of what the installers said.
    pub log: String,
    /// Counts every change.
    pub generation: i64,
}
