//! The seam to the truth: VMs, tasks, executions and keys, and the transitions between their
//! states. Whatever was acknowledged to a client is here first.
//!
//! Each method is one transaction. Methods are named by what happens in the world, not by rows:
//! a caller cannot write half of a change. Transitions are decided by the pure state machines of
//! `aether-types`, inside the transaction.
//!
//! Fence: an attempt at a task holds an epoch. The store refuses what an attempt says once a
//! later attempt has begun, or the task has ended.

mod error;
mod page;
pub mod sqlite;

use aether_types::{
    DriverKind, Execution, ExecutionId, ExecutionSpec, ExecutionState, ExitStatus, Fault, KeyId,
    OutputStream, Priority, RetainedOutput, StateChange, Task, TaskId, TaskKind, TaskState,
    Timestamp, Vm, VmEvent, VmId, VmSpec, VmState, WorkerId,
};
use async_trait::async_trait;

pub use error::StoreError;
pub use page::{Cursor, Page, PageRequest};
pub use sqlite::{Durability, SqliteStore};

/// A task to record. Its dispatch to the queue is recorded with it (the outbox).
#[derive(Debug, Clone)]
pub struct NewTask {
    pub id: TaskId,
    pub kind: TaskKind,
    pub priority: Priority,
    pub max_attempts: u32,
}

#[derive(Debug, Clone)]
pub struct NewVm {
    pub id: VmId,
    pub name: String,
    pub spec: VmSpec,
}

#[derive(Debug, Clone)]
pub struct NewExecution {
    pub id: ExecutionId,
    pub spec: ExecutionSpec,
}

/// A client's idempotency key, with a digest of the request it came with. Kept 24 hours.
#[derive(Debug, Clone)]
pub struct Idempotency {
    /// The API key that it belongs to and the key's text, joined by the caller.
    pub key: String,
    pub request_digest: [u8; 32],
}

/// The answer to a request that records a task.
#[derive(Debug, Clone)]
pub struct Accepted {
    pub vm: Vm,
    pub task: Task,
    /// This is the answer to an earlier request with the same idempotency key, or to an earlier
    /// deletion of the same VM.
    pub repeated: bool,
    /// Tasks of the VM that this request ended (a stop, a deletion), as they are now. Their
    /// queue entries may be removed, and their ends published.
    pub cancelled: Vec<Task>,
}

/// Facts about a VM that a worker learns.
#[derive(Debug, Clone, Default)]
pub struct VmPatch {
    pub worker_id: Option<WorkerId>,
    pub address: Option<std::net::IpAddr>,
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

/// How an attempt ended; all of it is written in one transaction, or, fenced, none of it.
#[derive(Debug, Clone)]
pub struct AttemptEnd {
    pub state: TaskState,
    pub error: Option<Fault>,
    /// Applied where the VM's state still allows it, else skipped: a VM that is being deleted
    /// must not come back because its creation ended.
    pub vm: Option<VmChange>,
    pub execution: Option<ExecutionEnd>,
}

#[derive(Debug, Clone)]
pub enum Begin {
    /// The attempt may go on; the task is `running` with this epoch.
    Go(Task),
    /// The task ended before (or its attempts are used up, which ends it now).
    Ended(Task),
    /// A later attempt has begun.
    Fenced,
}

#[derive(Debug, Clone)]
pub enum CancelOutcome {
    /// It had not begun; it is cancelled, and so is its execution.
    Cancelled(Task),
    /// It runs; its worker is to be told.
    Requested(Task),
    AlreadyEnded(Task),
}

#[derive(Debug, Clone, Default)]
pub struct VmFilter {
    /// Empty: every state but deleted.
    pub states: Vec<VmState>,
    pub driver: Option<DriverKind>,
    pub name: Option<String>,
    /// All of these labels with these values.
    pub labels: Vec<(String, String)>,
    pub worker_id: Option<WorkerId>,
}

#[derive(Debug, Clone, Default)]
pub struct TaskFilter {
    pub states: Vec<TaskState>,
    pub kind: Option<TaskKind>,
    pub vm_id: Option<VmId>,
    pub worker_id: Option<WorkerId>,
}

/// An API key as it is kept: a keyed hash, never the key.
#[derive(Debug, Clone)]
pub struct ApiKey {
    pub id: KeyId,
    pub name: String,
    /// The first characters of the key, to recognise it by.
    pub prefix: String,
    pub hash: [u8; 32],
    pub created_at: Timestamp,
}

#[async_trait]
pub trait Store: Send + Sync + 'static {
    // --- requests, from the gateway ---

    /// Records a VM in `creating` with its task. Fails with `NameTaken` where a VM that is not
    /// deleted has the name.
    async fn create_vm(
        &self,
        vm: NewVm,
        task: NewTask,
        idempotency: Option<Idempotency>,
    ) -> Result<Accepted, StoreError>;

    /// Records a task on a VM, and applies `event` to the VM where it is given (stop: to
    /// `stopping`, start: to `starting`, delete: to `deleting`). Pause and resume change the
    /// state only when they are done; the store checks with the state machine that they could
    /// be done now. Fails with `VmNotFound`, or `WrongState` with the VM as it is.
    /// A deletion of a VM that is being or has been deleted answers with the earlier task; where
    /// that task gave up and the VM is still `deleting`, this is another try.
    ///
    /// A deletion cancels the VM's pending tasks and asks its running ones to end. A stop fails
    /// its pending executions, pauses and resumptions. Both return them in `cancelled`.
    async fn request_on_vm(
        &self,
        vm: VmId,
        task: NewTask,
        idempotency: Option<Idempotency>,
    ) -> Result<Accepted, StoreError>;

    /// Records an execution and its task. Fails unless the VM takes commands.
    async fn request_execution(
        &self,
        vm: VmId,
        execution: NewExecution,
        task: NewTask,
        idempotency: Option<Idempotency>,
    ) -> Result<(Accepted, Execution), StoreError>;

    /// Asks that a task end. A pending one ends now; the VM of a creation has then failed, with
    /// the reason `cancelled`. Only creations and executions can be cancelled, others fail with
    /// `NotCancellable`.
    async fn cancel_task(&self, id: TaskId) -> Result<CancelOutcome, StoreError>;

    // --- outbox ---

    /// Pending tasks whose dispatch was recorded and not confirmed, oldest first.
    async fn undispatched(&self, limit: u32) -> Result<Vec<Task>, StoreError>;

    async fn confirm_dispatched(&self, ids: &[TaskId]) -> Result<(), StoreError>;

    // --- attempts, from the worker ---

    /// Counts the attempt. The epoch must be greater than that of every attempt before. Where the
    /// attempts are used up the task ends as failed with `attempts_exhausted`; a VM that it was
    /// creating, starting or stopping has failed, its execution is failed as lost.
    async fn begin_attempt(
        &self,
        id: TaskId,
        worker: WorkerId,
        epoch: i64,
    ) -> Result<Begin, StoreError>;

    /// The command is about to be handed to the guest with this boot id: from now on it is never
    /// started a second time. Said again with the same boot id it changes nothing; with another it
    /// fails with `AlreadyStarted`. `Fenced` where a later attempt has begun or the task has ended.
    async fn execution_started(
        &self,
        task: TaskId,
        epoch: i64,
        execution: ExecutionId,
        boot_id: &str,
    ) -> Result<(), StoreError>;

    /// Ends the attempt and the task. `Fenced` where a later attempt has begun or it has ended.
    /// An execution ends with its task: without `end.execution` it is failed or cancelled with the
    /// task's error.
    async fn end_attempt(
        &self,
        id: TaskId,
        epoch: i64,
        end: AttemptEnd,
    ) -> Result<Task, StoreError>;

    /// Gives the task back after a failure of the infrastructure: pending again and in the
    /// outbox. Where its attempts are used up it ends with `otherwise`, and where it was asked to
    /// end, as cancelled with the effects of `otherwise`.
    async fn retry_attempt(
        &self,
        id: TaskId,
        epoch: i64,
        fault: Fault,
        otherwise: AttemptEnd,
    ) -> Result<Task, StoreError>;

    /// A change that no task asked for: the guest died, a paused VM was found running.
    /// `WrongState` where the state machine has no such transition.
    async fn change_vm(&self, id: VmId, change: VmChange) -> Result<Vm, StoreError>;

    /// Facts learnt about a VM, without a change of state; they count as a change (the generation
    /// rises), and are not in the history.
    async fn patch_vm(&self, id: VmId, patch: VmPatch) -> Result<(), StoreError>;

    // --- reading ---

    async fn vm(&self, id: VmId) -> Result<Option<Vm>, StoreError>;

    /// The VM with this name that is not deleted.
    async fn vm_by_name(&self, name: &str) -> Result<Option<Vm>, StoreError>;

    /// Newest first.
    async fn vms(&self, filter: VmFilter, page: PageRequest) -> Result<Page<Vm>, StoreError>;

    /// Oldest first.
    async fn vm_history(&self, id: VmId) -> Result<Vec<StateChange>, StoreError>;

    async fn task(&self, id: TaskId) -> Result<Option<Task>, StoreError>;

    /// Newest first.
    async fn tasks(&self, filter: TaskFilter, page: PageRequest) -> Result<Page<Task>, StoreError>;

    async fn execution(&self, id: ExecutionId) -> Result<Option<Execution>, StoreError>;

    /// Newest first.
    async fn executions(&self, vm: VmId, page: PageRequest) -> Result<Page<Execution>, StoreError>;

    /// What was kept of an execution's output; empty while it runs.
    async fn output(
        &self,
        id: ExecutionId,
        stream: OutputStream,
    ) -> Result<RetainedOutput, StoreError>;

    // --- reconciling ---

    /// VMs past their time to live that are not being deleted.
    async fn expired_vms(&self, now: Timestamp) -> Result<Vec<VmId>, StoreError>;

    /// When the next VM expires.
    async fn next_expiry(&self) -> Result<Option<Timestamp>, StoreError>;

    /// Tasks that have not ended, oldest first.
    async fn open_tasks(&self) -> Result<Vec<Task>, StoreError>;

    // --- keys ---

    async fn insert_key(&self, key: ApiKey) -> Result<(), StoreError>;

    async fn keys(&self) -> Result<Vec<ApiKey>, StoreError>;

    // --- health ---

    /// One cheap round trip.
    async fn ping(&self) -> Result<(), StoreError>;
}
