//! The seam to the truth: VMs, tasks, executions and keys, and the transitions between their
//! states. Whatever was acknowledged to a client is here first.
//!
//! Each method is one transaction. Methods are named by what happens in the world, not by rows:
//! a caller cannot write half of a change. Transitions are decided by the pure state machines of
//! `aether-types`, inside the transaction.
//!
//! Fence: an attempt at a task holds an epoch. The store refuses what an attempt says once a
//! later attempt has begun, or the task has ended.

mod attempt;
mod audit;
mod error;
mod event;
mod fleet;
mod key;
mod page;
pub mod postgres;
mod sql;
pub mod sqlite;

use aether_types::{
    DriverKind, Execution, ExecutionId, ExecutionSpec, Fault, KeyId, OutputStream, Priority,
    Project, ProjectId, QueueName, RetainedOutput, Snapshot, SnapshotId, SnapshotPurpose,
    SnapshotState, StateChange, Task, TaskId, TaskKind, TaskState, Template, TemplateId,
    TemplateProgress, TemplateSpec, TemplateState, Timestamp, ToolRequest, Vm, VmId, VmSpec,
    VmState, Worker, WorkerId, WorkerLoad,
    project::{Quota, Usage},
};
use async_trait::async_trait;

pub use attempt::{
    AttemptEnd, Begin, CancelOutcome, ExecutionEnd, SnapshotFacts, VmChange, VmPatch,
};
pub use audit::{AuditEntry, AuditFilter, Outcome};
pub use error::StoreError;
pub use event::{EventBatch, EventFilter, EventRecord, EventsFrom};
pub use fleet::{NewWorker, Orphan, QueueStatus, Registration};
pub use key::{ApiKey, KeyFilter};
pub use page::{Cursor, Page, PageRequest};
pub use postgres::PostgresStore;
pub use sqlite::{Durability, SqliteStore};

/// A task to record. Its dispatch to the queue is recorded with it (the outbox).
#[derive(Debug, Clone)]
pub struct NewTask {
    pub id: TaskId,
    pub kind: TaskKind,
    pub priority: Priority,
    pub max_attempts: u32,
    /// Who asks: a VM of another project is one that there is not. `None`: the platform itself, about
    /// any VM; what it makes on its own is the default project's.
    pub project: Option<ProjectId>,
}

#[derive(Debug, Clone)]
pub struct NewVm {
    pub id: VmId,
    pub name: String,
    pub spec: VmSpec,
}

/// How many VMs there may be, checked in the transaction that records one more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Capacity {
    /// VMs that are not deleted. `None`: no bound.
    pub vms_max: Option<u32>,
    /// VMs that are being created or started.
    pub starting_max: Option<u32>,
}

#[derive(Debug, Clone)]
pub struct NewSnapshot {
    pub id: SnapshotId,
    /// Only of a user's snapshot.
    pub name: Option<String>,
    pub purpose: SnapshotPurpose,
}

#[derive(Debug, Clone)]
pub struct NewTemplate {
    pub id: TemplateId,
    pub name: String,
    pub tag: String,
    pub spec: TemplateSpec,
}

/// A VM's clones, recorded with the snapshot that they are made from.
#[derive(Debug, Clone)]
pub struct Forked {
    /// Of the snapshot; its VM is the source.
    pub accepted: Accepted,
    pub snapshot: Snapshot,
    pub clones: Vec<(Vm, Task)>,
}

#[derive(Debug, Clone)]
pub struct NewExecution {
    pub id: ExecutionId,
    pub spec: ExecutionSpec,
}

/// A client's idempotency key, with a digest of the request it came with. Kept 24 hours.
#[derive(Debug, Clone)]
pub struct Idempotency {
    /// The project that it belongs to and the key's text, joined by the caller.
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

/// The answer to a request for layers, which is of no VM.
#[derive(Debug, Clone)]
pub struct AcceptedBuild {
    pub task: Task,
    /// This is the answer to an earlier request with the same idempotency key.
    pub repeated: bool,
}

#[derive(Debug, Clone, Default)]
pub struct VmFilter {
    /// `None`: of every project.
    pub project: Option<ProjectId>,
    /// Empty: every state but deleted.
    pub states: Vec<VmState>,
    pub driver: Option<DriverKind>,
    pub name: Option<String>,
    /// All of these labels with these values.
    pub labels: Vec<(String, String)>,
    pub worker_id: Option<WorkerId>,
    /// The VMs in which templates are built too: for who keeps order, not for clients.
    pub builders: bool,
}

#[derive(Debug, Clone, Default)]
pub struct TaskFilter {
    /// `None`: of every project.
    pub project: Option<ProjectId>,
    pub states: Vec<TaskState>,
    pub kind: Option<TaskKind>,
    pub vm_id: Option<VmId>,
    pub worker_id: Option<WorkerId>,
}

#[derive(Debug, Clone, Default)]
pub struct SnapshotFilter {
    /// `None`: of every project.
    pub project: Option<ProjectId>,
    /// Empty: every state but deleted.
    pub states: Vec<SnapshotState>,
    /// Empty: every purpose.
    pub purposes: Vec<SnapshotPurpose>,
    pub vm_id: Option<VmId>,
    pub worker_id: Option<WorkerId>,
}

#[derive(Debug, Clone, Default)]
pub struct TemplateFilter {
    /// `None`: of every project.
    pub project: Option<ProjectId>,
    /// Empty: every state but deleted.
    pub states: Vec<TemplateState>,
    pub name: Option<String>,
}

#[async_trait]
pub trait Store: Send + Sync + 'static {
    // --- requests, from the gateway ---
    //
    // Whatever records a task fails with `QuotaExceeded` where the project that asks may not have so
    // much more. A repetition is no more, and what gives back (a stop, a deletion) is always taken.

    /// Records a VM in `creating` with its task, and gives it a worker where one fits and has room;
    /// else its dispatch waits (see [`Store::place_waiting`]). Fails with `NameTaken` where a VM of
    /// the project that is not deleted has the name, with `TooManyVms` where there is no room for
    /// one more, and with `SnapshotNotFound`, `TemplateNotFound`, `SnapshotNotReady` or
    /// `TemplateNotReady` where its origin is gone or will never be ready (one that is still being
    /// made is waited for). Only a user's snapshot is an origin here.
    async fn create_vm(
        &self,
        vm: NewVm,
        task: NewTask,
        capacity: Capacity,
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
    /// its pending executions, pauses, resumptions and snapshots. Both return them in `cancelled`;
    /// what such a task was to make has failed.
    async fn request_on_vm(
        &self,
        vm: VmId,
        task: NewTask,
        idempotency: Option<Idempotency>,
    ) -> Result<Accepted, StoreError>;

    /// Records a snapshot in `creating` and the task that makes it: `vm:snapshot` (a user's) of a
    /// running or paused VM, or `vm:suspend` (of its memory), which moves the VM to `stopping` and
    /// ends pending work as a stop does. Fails as [`Store::request_on_vm`], and with `NameTaken`.
    async fn request_snapshot(
        &self,
        vm: VmId,
        snapshot: NewSnapshot,
        task: NewTask,
        idempotency: Option<Idempotency>,
    ) -> Result<(Accepted, Snapshot), StoreError>;

    /// Records a snapshot of a running or paused VM, its task, and VMs in `creating` that begin as
    /// it (which is written into their specifications) with theirs: all or nothing.
    async fn fork_vm(
        &self,
        vm: VmId,
        snapshot: NewSnapshot,
        task: NewTask,
        clones: Vec<(NewVm, NewTask)>,
        capacity: Capacity,
        idempotency: Option<Idempotency>,
    ) -> Result<Forked, StoreError>;

    /// Records a template in `building`, its snapshot, the VM in which it is built, and the task.
    /// Where the same name and tag are being built from an equal specification, that one is the
    /// answer, as a repetition.
    async fn build_template(
        &self,
        template: NewTemplate,
        snapshot: NewSnapshot,
        builder: NewVm,
        task: NewTask,
        idempotency: Option<Idempotency>,
    ) -> Result<(Accepted, Template), StoreError>;

    /// Records a `tool:build`, which is of no VM.
    async fn build_tools(
        &self,
        tools: Vec<ToolRequest>,
        task: NewTask,
        idempotency: Option<Idempotency>,
    ) -> Result<AcceptedBuild, StoreError>;

    /// Deletes a user's snapshot; its files go a little later. Repeating it is harmless. Fails with
    /// `SnapshotNotReady` while it is being made, or a VM that is being created begins as it, and
    /// for one that is not a user's, which goes with what it is for.
    async fn delete_snapshot(&self, id: SnapshotId) -> Result<Snapshot, StoreError>;

    /// Deletes a template and its snapshot (where a VM that is being created begins as it, that
    /// is left to [`Store::retire_snapshots`]). Repeating it is harmless. Fails with
    /// `TemplateNotReady` while it is being built.
    async fn delete_template(&self, id: TemplateId) -> Result<Template, StoreError>;

    /// Records an execution and its task. Fails unless the VM takes commands.
    async fn request_execution(
        &self,
        vm: VmId,
        execution: NewExecution,
        task: NewTask,
        idempotency: Option<Idempotency>,
    ) -> Result<(Accepted, Execution), StoreError>;

    /// Asks that a task end. A pending one ends now; the VM of a creation or a build, and what it
    /// was to make, has then failed, with the reason `cancelled`. Only creations, executions,
    /// snapshots that leave their VM as it is, and builds can be cancelled, others fail with
    /// `NotCancellable`.
    async fn cancel_task(&self, id: TaskId) -> Result<CancelOutcome, StoreError>;

    // --- outbox ---

    /// Pending tasks whose dispatch was recorded and not confirmed, oldest first. Forgets those of
    /// tasks that have ended: whoever dispatched them died before it could say so.
    async fn undispatched(&self, limit: u32) -> Result<Vec<Task>, StoreError>;

    async fn confirm_dispatched(&self, ids: &[TaskId]) -> Result<(), StoreError>;

    // --- attempts, from the worker ---

    /// Counts the attempt. The epoch must be greater than that of every attempt before. Where the
    /// attempts are used up the task ends as failed with `attempts_exhausted`; a VM that it was
    /// creating, starting or stopping has failed, its execution is failed as lost, and what it was
    /// to make has failed.
    ///
    /// A worker in the registry begins only tasks of its own VMs, deletions of VMs that are nobody's,
    /// and creations that no worker has, where it has room for them: those are its own then.
    async fn begin_attempt(
        &self,
        id: TaskId,
        by: Registration,
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

    /// Ends the attempt and the task. `Fenced` where a later attempt has begun, it has ended, or the
    /// worker that began the attempt was declared lost or has registered anew since.
    /// An execution ends with its task: without `end.execution` it is failed or cancelled with the
    /// task's error. So does what it was to make. A suspended VM that is stopped then has its
    /// memory; the end of a start uses it up.
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

    /// How far the build of the task's template has come. `Fenced` as for the end of an attempt.
    async fn template_progress(
        &self,
        task: TaskId,
        epoch: i64,
        progress: TemplateProgress,
    ) -> Result<Template, StoreError>;

    /// How far a task has come that waits for tools, or builds them: what is done now, and the end
    /// of what the installers said. `Fenced` as for the end of an attempt.
    async fn task_progress(
        &self,
        task: TaskId,
        epoch: i64,
        now: String,
        log: String,
    ) -> Result<Task, StoreError>;

    /// A change that no task asked for: the guest died, a paused VM was found running.
    /// `WrongState` where the state machine has no such transition. `Fenced` where it is a worker's
    /// word (`by`) and the VM is another's, or that worker is lost or has registered anew.
    async fn change_vm(
        &self,
        id: VmId,
        by: Option<Registration>,
        change: VmChange,
    ) -> Result<Vm, StoreError>;

    /// Facts learnt about a VM, without a change of state; they count as a change (the generation
    /// rises), and are not in the history.
    async fn patch_vm(&self, id: VmId, patch: VmPatch) -> Result<(), StoreError>;

    // --- reading ---

    async fn vm(&self, id: VmId) -> Result<Option<Vm>, StoreError>;

    /// The project's VM with this name that is not deleted.
    async fn vm_by_name(&self, project: ProjectId, name: &str) -> Result<Option<Vm>, StoreError>;

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

    async fn snapshot(&self, id: SnapshotId) -> Result<Option<Snapshot>, StoreError>;

    /// The project's snapshot with this name that is not deleted.
    async fn snapshot_by_name(
        &self,
        project: ProjectId,
        name: &str,
    ) -> Result<Option<Snapshot>, StoreError>;

    /// Newest first.
    async fn snapshots(
        &self,
        filter: SnapshotFilter,
        page: PageRequest,
    ) -> Result<Page<Snapshot>, StoreError>;

    async fn template(&self, id: TemplateId) -> Result<Option<Template>, StoreError>;

    /// The project's ready template of this name, else the newest that is being built, else the
    /// newest that failed.
    async fn template_by_name(
        &self,
        project: ProjectId,
        name: &str,
        tag: &str,
    ) -> Result<Option<Template>, StoreError>;

    /// Newest first.
    async fn templates(
        &self,
        filter: TemplateFilter,
        page: PageRequest,
    ) -> Result<Page<Template>, StoreError>;

    // --- reconciling ---

    /// Marks as deleted what nothing will use any more: snapshots of forks whose VMs have all come
    /// to run or ended, memories of VMs that have none or are deleted, snapshots of templates that
    /// are deleted or failed, and whatever failed; but nothing that a VM begins as which is being
    /// created or started. Returns them, with the reason where they had failed.
    async fn retire_snapshots(&self) -> Result<Vec<Snapshot>, StoreError>;

    /// VMs past their time to live that are not being deleted.
    async fn expired_vms(&self, now: Timestamp) -> Result<Vec<VmId>, StoreError>;

    /// When the next VM expires.
    async fn next_expiry(&self) -> Result<Option<Timestamp>, StoreError>;

    /// Tasks that have not ended, oldest first.
    async fn open_tasks(&self) -> Result<Vec<Task>, StoreError>;

    // --- workers ---

    /// The worker is there, with a higher epoch than ever before. Whether it drains is as it was.
    async fn register_worker(&self, worker: NewWorker) -> Result<Worker, StoreError>;

    /// The worker's lease begins anew, by the store's clock. `Fenced` where it is lost, has left, or
    /// has registered anew.
    async fn heartbeat(&self, by: Registration) -> Result<Worker, StoreError>;

    /// The worker ends. Creations that were placed on it and have not begun wait for another.
    /// `Fenced` as [`Store::heartbeat`].
    async fn leave(&self, by: Registration) -> Result<Worker, StoreError>;

    /// The worker gets no new VMs; once this is answered none is placed on it. Creations that have
    /// not begun go elsewhere. Repeating it is harmless.
    async fn drain_worker(&self, id: WorkerId) -> Result<Worker, StoreError>;

    async fn activate_worker(&self, id: WorkerId) -> Result<Worker, StoreError>;

    async fn worker(&self, id: WorkerId) -> Result<Option<(Worker, WorkerLoad)>, StoreError>;

    /// All of them, with what they have promised. What has been gone for a month and has no VM is
    /// forgotten.
    async fn workers(&self) -> Result<Vec<(Worker, WorkerLoad)>, StoreError>;

    /// Declares a worker lost whose lease has run out since this heartbeat, which was its last.
    /// `None`: it is not so, or another was faster: it is answered once.
    async fn lose_worker(
        &self,
        seen: Registration,
        heartbeat_at: Timestamp,
    ) -> Result<Option<Worker>, StoreError>;

    /// VMs of lost workers, with something left to settle.
    async fn orphans(&self, limit: u32) -> Result<Vec<VmId>, StoreError>;

    /// Fails a VM of a lost worker and ends its tasks; a creation goes to another worker, and a
    /// deletion to any. `None`: it is settled, or the worker is back.
    async fn settle_orphan(&self, vm: VmId) -> Result<Option<Orphan>, StoreError>;

    /// Gives workers to VMs that wait for one, oldest first, and says how many. Their tasks are in
    /// [`Store::undispatched`] from then on.
    async fn place_waiting(&self, limit: u32) -> Result<u64, StoreError>;

    /// How many VMs wait for a worker.
    async fn waiting_vms(&self) -> Result<u64, StoreError>;

    // --- queues ---

    /// Of every worker, and the shared one.
    async fn queues(&self) -> Result<Vec<QueueStatus>, StoreError>;

    /// Tasks that failed with their attempts used up and were not retried since, newest first.
    async fn dead_tasks(
        &self,
        queue: QueueName,
        page: PageRequest,
    ) -> Result<Page<Task>, StoreError>;

    /// `again` does what the dead one did not: that is a dead letter no more. The first counts.
    async fn retried(&self, dead: TaskId, again: TaskId) -> Result<(), StoreError>;

    // --- projects ---

    /// Fails with `NameTaken` where a project that is not deleted has the name.
    async fn create_project(&self, project: Project) -> Result<(), StoreError>;

    async fn project(&self, id: ProjectId) -> Result<Option<Project>, StoreError>;

    async fn project_by_name(&self, name: &str) -> Result<Option<Project>, StoreError>;

    /// Newest first.
    async fn projects(&self, page: PageRequest) -> Result<Page<Project>, StoreError>;

    /// Counts from now on; what there is stays. Fails with `ProjectNotFound`.
    async fn set_quota(&self, id: ProjectId, quota: Quota) -> Result<(), StoreError>;

    async fn project_usage(&self, id: ProjectId) -> Result<Usage, StoreError>;

    /// Deletes a project with its keys; history of it stays, seen by nobody. Fails with
    /// `ProjectInUse` while there is anything else of it, and for the default one.
    async fn delete_project(&self, id: ProjectId) -> Result<(), StoreError>;

    // --- keys ---

    /// Fails with `ProjectNotFound` and `TooManyKeys`. Forgets keys that have been of no use for `KEY_KEPT_DAYS`.
    async fn insert_key(&self, key: ApiKey) -> Result<(), StoreError>;

    async fn key(&self, id: KeyId) -> Result<Option<ApiKey>, StoreError>;

    /// The key that has this hash, unless it is revoked: what is written anywhere counts at once.
    async fn key_by_hash(&self, hash: &[u8; 32]) -> Result<Option<ApiKey>, StoreError>;

    /// Newest first.
    async fn keys(&self, filter: KeyFilter, page: PageRequest) -> Result<Page<ApiKey>, StoreError>;

    /// It opens nothing from now on, also where an older program looks. Repeating it is harmless.
    async fn revoke_key(&self, id: KeyId) -> Result<ApiKey, StoreError>;

    /// The key was used at `at`; written only where the last use that is known is at `stale` or
    /// earlier.
    async fn key_used(&self, id: KeyId, at: Timestamp, stale: Timestamp) -> Result<(), StoreError>;

    /// The secret of this name that all processes on the store share. The first one that asks makes
    /// it: `proposed` is kept where there is none, and ignored where there is one.
    async fn shared_secret(&self, name: &str, proposed: &[u8]) -> Result<Vec<u8>, StoreError>;

    // --- audit ---

    /// Writes an entry; the same one a second time changes nothing.
    async fn append_audit(&self, entry: AuditEntry) -> Result<(), StoreError>;

    /// Newest first.
    async fn audit_entries(
        &self,
        filter: AuditFilter,
        page: PageRequest,
    ) -> Result<Page<AuditEntry>, StoreError>;

    /// Takes away some of the entries from before this time, and some of those past
    /// `AUDIT_ROWS_MAX`. Gives how many went; none: there are no more of them.
    async fn prune_audit(&self, before: Timestamp) -> Result<u64, StoreError>;

    // --- events ---

    /// The number after which a reader goes on.
    async fn events_begin(&self, from: EventsFrom) -> Result<u64, StoreError>;

    /// What came after this number, `EVENTS_MAX` at most.
    async fn events_after(
        &self,
        after: u64,
        filter: &EventFilter,
    ) -> Result<EventBatch, StoreError>;

    /// Takes away some of the events from before this time, and some of those past
    /// `EVENT_ROWS_MAX`. Gives how many went; none: there are no more of them.
    async fn prune_events(&self, before: Timestamp) -> Result<u64, StoreError>;

    // --- health ---

    /// One cheap round trip.
    async fn ping(&self) -> Result<(), StoreError>;
}
