//! What an attempt at a task is answered, and what it says.

use aether_types::{
    ExecutionState, ExitStatus, Fault, RetainedOutput, StartReport, Task, TaskState, VmEvent,
    VmTool, WorkerId,
};

/// Facts about a VM that a worker learns.
#[derive(Debug, Clone, Default)]
pub struct VmPatch {
    pub worker_id: Option<WorkerId>,
    pub address: Option<std::net::IpAddr>,
    pub start: Option<StartReport>,
    /// What it got of what its specification asks for.
    pub tools: Option<Vec<VmTool>>,
}

#[derive(Debug, Clone)]
pub struct VmChange {
    pub event: VmEvent,
    pub reason: Option<Fault>,
    pub patch: VmPatch,
}

#[derive(Debug, Clone)]
pub struct ExecutionEnd {
    pub state: ExecutionState,
    pub exit: Option<ExitStatus>,
    pub error: Option<Fault>,
    pub duration_us: Option<u64>,
    pub stdout: RetainedOutput,
    pub stderr: RetainedOutput,
}

/// A snapshot that was sealed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotFacts {
    pub size_bytes: u64,
    /// Of its manifest, BLAKE3 in hex.
    pub digest: String,
    pub paused_us: u64,
}

/// How an attempt ended; all of it is written in one transaction, or, fenced, none of it.
#[derive(Debug, Clone)]
pub struct AttemptEnd {
    pub state: TaskState,
    pub error: Option<Fault>,
    /// Applied where the VM's state still allows it, else skipped: a VM that is being deleted
    /// must not come back because its creation ended.
    pub vm: Option<VmChange>,
    pub execution: Option<ExecutionEnd>,
    /// The task's snapshot is ready, with this attempt's worker. A task that fails fails its
    /// snapshot.
    pub snapshot: Option<SnapshotFacts>,
    /// The digest of what the task's template was built from: the template is ready, and takes its
    /// name from an older one. A task that fails fails its template.
    pub template: Option<String>,
    /// What a `tool:build` came to.
    pub tools: Option<Vec<VmTool>>,
}

#[derive(Debug, Clone)]
pub enum Begin {
    /// The attempt may go on; the task is `running` with this epoch.
    Go(Task),
    /// The task ended before (or its attempts are used up, which ends it now).
    Ended(Task),
    /// A later attempt has begun, or the worker is not in the registry as it says.
    Fenced,
    /// The task's VM is another worker's, or waits for one. The task's dispatch is owed again.
    Elsewhere(Task),
}

#[derive(Debug, Clone)]
pub enum CancelOutcome {
    /// It had not begun; it is cancelled, and so is its execution.
    Cancelled(Task),
    /// It runs; its worker is to be told.
    Requested(Task),
    AlreadyEnded(Task),
}
