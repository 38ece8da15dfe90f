//! Every method of the store, on whichever engine; and what is repeated where the engine asks for
//! it.

use std::time::Duration;

use aether_postgres::Trouble;
use aether_types::{
    Execution, ExecutionId, Fault, KeyId, OutputStream, Project, ProjectId, QueueName,
    RetainedOutput, Snapshot, SnapshotId, StateChange, Task, TaskId, Template, TemplateId,
    TemplateProgress, Timestamp, ToolRequest, Vm, VmId, Worker, WorkerId, WorkerLoad,
    project::{Quota, Usage},
};
use async_trait::async_trait;

use super::{
    Sql, attempts, audit, create, events, executions, keys, orphans, place, projects, query::query,
    queues, quotas, requests, snapshots, tasks, templates, vms, workers,
};
use crate::{
    Accepted, AcceptedBuild, ApiKey, AttemptEnd, AuditEntry, AuditFilter, Begin, CancelOutcome,
    Capacity, EventBatch, EventFilter, EventsFrom, Forked, Idempotency, KeyFilter, NewExecution,
    NewSnapshot, NewTask, NewTemplate, NewVm, NewWorker, Orphan, Page, PageRequest, QueueStatus,
    Registration, SnapshotFilter, Store, StoreError, TaskFilter, TemplateFilter, VmChange,
    VmFilter, VmPatch, error::Context,
};

/// For all tries of one call. The pool and the server end waits before that; this is for a network
/// that swallows what is sent.
const CALL_MAX: Duration = Duration::from_secs(30);

/// A store that is nothing but its database.
pub(crate) trait OnSql: Send + Sync + 'static {
    fn sql(&self) -> &Sql;
}

/// Does it again where the server undid it for another's sake, or the connection went before it
/// was committed. SQLite does neither.
async fn repeated<T, F>(sql: &Sql, mut once: impl FnMut() -> F) -> Result<T, StoreError>
where
    F: Future<Output = Result<T, StoreError>>,
{
    match sql {
        Sql::Sqlite { .. } => once().await,
        Sql::Postgres(_) => {
            let tries = tokio::time::timeout(CALL_MAX, aether_postgres::repeated(once, trouble));
            let late = |_| StoreError::InDoubt { context: "wait for the database", source: None };
            tries.await.map_err(late)?
        }
    }
}

fn trouble(error: &StoreError) -> Trouble {
    match error {
        StoreError::Unreachable { .. } => Trouble::Lost,
        StoreError::Collided { .. } => Trouble::Conflict,
        _ => Trouble::Other,
    }
}

#[async_trait]
impl<S: OnSql> Store for S {
    async fn create_vm(
        &self,
        vm: NewVm,
        task: NewTask,
        capacity: Capacity,
        idempotency: Option<Idempotency>,
    ) -> Result<Accepted, StoreError> {
        let sql = self.sql();
        repeated(sql, || {
            create::create_vm(sql, vm.clone(), task.clone(), capacity, idempotency.clone())
        })
        .await
    }

    async fn request_on_vm(
        &self,
        vm: VmId,
        task: NewTask,
        idempotency: Option<Idempotency>,
    ) -> Result<Accepted, StoreError> {
        let sql = self.sql();
        repeated(sql, || requests::request_on_vm(sql, vm, task.clone(), idempotency.clone())).await
    }

    async fn request_snapshot(
        &self,
        vm: VmId,
        snapshot: NewSnapshot,
        task: NewTask,
        idempotency: Option<Idempotency>,
    ) -> Result<(Accepted, Snapshot), StoreError> {
        let sql = self.sql();
        repeated(sql, || {
            snapshots::request(sql, vm, snapshot.clone(), task.clone(), idempotency.clone())
        })
        .await
    }

    async fn fork_vm(
        &self,
        vm: VmId,
        snapshot: NewSnapshot,
        task: NewTask,
        clones: Vec<(NewVm, NewTask)>,
        capacity: Capacity,
        idempotency: Option<Idempotency>,
    ) -> Result<Forked, StoreError> {
        let sql = self.sql();
        repeated(sql, || {
            create::fork_vm(
                sql,
                vm,
                snapshot.clone(),
                task.clone(),
                clones.clone(),
                capacity,
                idempotency.clone(),
            )
        })
        .await
    }

    async fn build_template(
        &self,
        template: NewTemplate,
        snapshot: NewSnapshot,
        builder: NewVm,
        task: NewTask,
        idempotency: Option<Idempotency>,
    ) -> Result<(Accepted, Template), StoreError> {
        let sql = self.sql();
        repeated(sql, || {
            templates::build(
                sql,
                template.clone(),
                snapshot.clone(),
                builder.clone(),
                task.clone(),
                idempotency.clone(),
            )
        })
        .await
    }

    async fn build_tools(
        &self,
        tools: Vec<ToolRequest>,
        task: NewTask,
        idempotency: Option<Idempotency>,
    ) -> Result<AcceptedBuild, StoreError> {
        let sql = self.sql();
        repeated(sql, || requests::build_tools(sql, &tools, task.clone(), idempotency.clone()))
            .await
    }

    async fn delete_snapshot(&self, id: SnapshotId) -> Result<Snapshot, StoreError> {
        let sql = self.sql();
        repeated(sql, || snapshots::delete(sql, id)).await
    }

    async fn delete_template(&self, id: TemplateId) -> Result<Template, StoreError> {
        let sql = self.sql();
        repeated(sql, || templates::delete(sql, id)).await
    }

    async fn template_progress(
        &self,
        task: TaskId,
        epoch: i64,
        progress: TemplateProgress,
    ) -> Result<Template, StoreError> {
        let sql = self.sql();
        repeated(sql, || templates::progress(sql, task, epoch, progress.clone())).await
    }

    async fn task_progress(
        &self,
        task: TaskId,
        epoch: i64,
        now: String,
        log: String,
    ) -> Result<Task, StoreError> {
        let sql = self.sql();
        repeated(sql, || tasks::progress(sql, task, epoch, now.clone(), log.clone())).await
    }

    async fn snapshot(&self, id: SnapshotId) -> Result<Option<Snapshot>, StoreError> {
        let sql = self.sql();
        repeated(sql, || snapshots::get(sql, id)).await
    }

    async fn snapshot_by_name(
        &self,
        project: ProjectId,
        name: &str,
    ) -> Result<Option<Snapshot>, StoreError> {
        let sql = self.sql();
        repeated(sql, || snapshots::by_name(sql, project, name)).await
    }

    async fn snapshots(
        &self,
        filter: SnapshotFilter,
        page: PageRequest,
    ) -> Result<Page<Snapshot>, StoreError> {
        let sql = self.sql();
        repeated(sql, || snapshots::list(sql, &filter, page)).await
    }

    async fn template(&self, id: TemplateId) -> Result<Option<Template>, StoreError> {
        let sql = self.sql();
        repeated(sql, || templates::get(sql, id)).await
    }

    async fn template_by_name(
        &self,
        project: ProjectId,
        name: &str,
        tag: &str,
    ) -> Result<Option<Template>, StoreError> {
        let sql = self.sql();
        repeated(sql, || templates::by_name(sql, project, name, tag)).await
    }

    async fn templates(
        &self,
        filter: TemplateFilter,
        page: PageRequest,
    ) -> Result<Page<Template>, StoreError> {
        let sql = self.sql();
        repeated(sql, || templates::list(sql, &filter, page)).await
    }

    async fn retire_snapshots(&self) -> Result<Vec<Snapshot>, StoreError> {
        let sql = self.sql();
        repeated(sql, || snapshots::retire(sql)).await
    }

    async fn request_execution(
        &self,
        vm: VmId,
        execution: NewExecution,
        task: NewTask,
        idempotency: Option<Idempotency>,
    ) -> Result<(Accepted, Execution), StoreError> {
        let sql = self.sql();
        repeated(sql, || {
            requests::request_execution(
                sql,
                vm,
                execution.clone(),
                task.clone(),
                idempotency.clone(),
            )
        })
        .await
    }

    async fn cancel_task(&self, id: TaskId) -> Result<CancelOutcome, StoreError> {
        let sql = self.sql();
        repeated(sql, || requests::cancel_task(sql, id)).await
    }

    async fn undispatched(&self, limit: u32) -> Result<Vec<Task>, StoreError> {
        let sql = self.sql();
        repeated(sql, || tasks::undispatched(sql, limit)).await
    }

    async fn confirm_dispatched(&self, ids: &[TaskId]) -> Result<(), StoreError> {
        let sql = self.sql();
        repeated(sql, || tasks::confirm_dispatched(sql, ids)).await
    }

    async fn begin_attempt(
        &self,
        id: TaskId,
        by: Registration,
        epoch: i64,
    ) -> Result<Begin, StoreError> {
        let sql = self.sql();
        repeated(sql, || attempts::begin(sql, id, by, epoch)).await
    }

    async fn execution_started(
        &self,
        task: TaskId,
        epoch: i64,
        execution: ExecutionId,
        boot_id: &str,
    ) -> Result<(), StoreError> {
        let sql = self.sql();
        repeated(sql, || attempts::execution_started(sql, task, epoch, execution, boot_id)).await
    }

    async fn end_attempt(
        &self,
        id: TaskId,
        epoch: i64,
        end: AttemptEnd,
    ) -> Result<Task, StoreError> {
        let sql = self.sql();
        repeated(sql, || attempts::end(sql, id, epoch, &end)).await
    }

    async fn retry_attempt(
        &self,
        id: TaskId,
        epoch: i64,
        fault: Fault,
        otherwise: AttemptEnd,
    ) -> Result<Task, StoreError> {
        let sql = self.sql();
        repeated(sql, || attempts::retry(sql, id, epoch, fault.clone(), &otherwise)).await
    }

    async fn change_vm(
        &self,
        id: VmId,
        by: Option<Registration>,
        change: VmChange,
    ) -> Result<Vm, StoreError> {
        let sql = self.sql();
        repeated(sql, || vms::change(sql, id, by, change.clone())).await
    }

    async fn patch_vm(&self, id: VmId, patch: VmPatch) -> Result<(), StoreError> {
        let sql = self.sql();
        repeated(sql, || vms::patch(sql, id, patch.clone())).await
    }

    async fn vm(&self, id: VmId) -> Result<Option<Vm>, StoreError> {
        let sql = self.sql();
        repeated(sql, || vms::get(sql, id)).await
    }

    async fn vm_by_name(&self, project: ProjectId, name: &str) -> Result<Option<Vm>, StoreError> {
        let sql = self.sql();
        repeated(sql, || vms::by_name(sql, project, name)).await
    }

    async fn vms(&self, filter: VmFilter, page: PageRequest) -> Result<Page<Vm>, StoreError> {
        let sql = self.sql();
        repeated(sql, || vms::list(sql, &filter, page)).await
    }

    async fn vm_history(&self, id: VmId) -> Result<Vec<StateChange>, StoreError> {
        let sql = self.sql();
        repeated(sql, || vms::history(sql, id)).await
    }

    async fn task(&self, id: TaskId) -> Result<Option<Task>, StoreError> {
        let sql = self.sql();
        repeated(sql, || tasks::get(sql, id)).await
    }

    async fn tasks(&self, filter: TaskFilter, page: PageRequest) -> Result<Page<Task>, StoreError> {
        let sql = self.sql();
        repeated(sql, || tasks::list(sql, &filter, page)).await
    }

    async fn execution(&self, id: ExecutionId) -> Result<Option<Execution>, StoreError> {
        let sql = self.sql();
        repeated(sql, || executions::get(sql, id)).await
    }

    async fn executions(&self, vm: VmId, page: PageRequest) -> Result<Page<Execution>, StoreError> {
        let sql = self.sql();
        repeated(sql, || executions::list(sql, vm, page)).await
    }

    async fn output(
        &self,
        id: ExecutionId,
        stream: OutputStream,
    ) -> Result<RetainedOutput, StoreError> {
        let sql = self.sql();
        repeated(sql, || executions::output(sql, id, stream)).await
    }

    async fn expired_vms(&self, now: Timestamp) -> Result<Vec<VmId>, StoreError> {
        let sql = self.sql();
        repeated(sql, || vms::expired(sql, now)).await
    }

    async fn next_expiry(&self) -> Result<Option<Timestamp>, StoreError> {
        let sql = self.sql();
        repeated(sql, || vms::next_expiry(sql)).await
    }

    async fn open_tasks(&self) -> Result<Vec<Task>, StoreError> {
        let sql = self.sql();
        repeated(sql, || tasks::open(sql)).await
    }

    async fn register_worker(&self, worker: NewWorker) -> Result<Worker, StoreError> {
        let sql = self.sql();
        repeated(sql, || workers::register(sql, &worker)).await
    }

    async fn heartbeat(&self, by: Registration) -> Result<Worker, StoreError> {
        let sql = self.sql();
        repeated(sql, || workers::heartbeat(sql, by)).await
    }

    async fn leave(&self, by: Registration) -> Result<Worker, StoreError> {
        let sql = self.sql();
        repeated(sql, || workers::leave(sql, by)).await
    }

    async fn drain_worker(&self, id: WorkerId) -> Result<Worker, StoreError> {
        let sql = self.sql();
        repeated(sql, || workers::drain(sql, id)).await
    }

    async fn activate_worker(&self, id: WorkerId) -> Result<Worker, StoreError> {
        let sql = self.sql();
        repeated(sql, || workers::activate(sql, id)).await
    }

    async fn worker(&self, id: WorkerId) -> Result<Option<(Worker, WorkerLoad)>, StoreError> {
        let sql = self.sql();
        repeated(sql, || workers::get(sql, id)).await
    }

    async fn workers(&self) -> Result<Vec<(Worker, WorkerLoad)>, StoreError> {
        let sql = self.sql();
        repeated(sql, || workers::list(sql)).await
    }

    async fn lose_worker(
        &self,
        seen: Registration,
        heartbeat_at: Timestamp,
    ) -> Result<Option<Worker>, StoreError> {
        let sql = self.sql();
        repeated(sql, || workers::lose(sql, seen, heartbeat_at)).await
    }

    async fn orphans(&self, limit: u32) -> Result<Vec<VmId>, StoreError> {
        let sql = self.sql();
        repeated(sql, || orphans::list(sql, limit)).await
    }

    async fn settle_orphan(&self, vm: VmId) -> Result<Option<Orphan>, StoreError> {
        let sql = self.sql();
        repeated(sql, || orphans::settle(sql, vm)).await
    }

    async fn place_waiting(&self, limit: u32) -> Result<u64, StoreError> {
        let sql = self.sql();
        repeated(sql, || place::place_waiting(sql, limit)).await
    }

    async fn waiting_vms(&self) -> Result<u64, StoreError> {
        let sql = self.sql();
        repeated(sql, || place::count_waiting(sql)).await
    }

    async fn queues(&self) -> Result<Vec<QueueStatus>, StoreError> {
        let sql = self.sql();
        repeated(sql, || queues::list(sql)).await
    }

    async fn dead_tasks(
        &self,
        queue: QueueName,
        page: PageRequest,
    ) -> Result<Page<Task>, StoreError> {
        let sql = self.sql();
        repeated(sql, || queues::dead(sql, queue, page)).await
    }

    async fn retried(&self, dead: TaskId, again: TaskId) -> Result<(), StoreError> {
        let sql = self.sql();
        repeated(sql, || queues::retried(sql, dead, again)).await
    }

    async fn create_project(&self, project: Project) -> Result<(), StoreError> {
        let sql = self.sql();
        repeated(sql, || projects::insert(sql, project.clone())).await
    }

    async fn project(&self, id: ProjectId) -> Result<Option<Project>, StoreError> {
        let sql = self.sql();
        repeated(sql, || projects::get(sql, id)).await
    }

    async fn project_by_name(&self, name: &str) -> Result<Option<Project>, StoreError> {
        let sql = self.sql();
        repeated(sql, || projects::by_name(sql, name)).await
    }

    async fn projects(&self, page: PageRequest) -> Result<Page<Project>, StoreError> {
        let sql = self.sql();
        repeated(sql, || projects::list(sql, page)).await
    }

    async fn set_quota(&self, id: ProjectId, quota: Quota) -> Result<(), StoreError> {
        let sql = self.sql();
        repeated(sql, || quotas::set(sql, id, quota)).await
    }

    async fn project_usage(&self, id: ProjectId) -> Result<Usage, StoreError> {
        let sql = self.sql();
        repeated(sql, || quotas::used(sql, id)).await
    }

    async fn delete_project(&self, id: ProjectId) -> Result<(), StoreError> {
        let sql = self.sql();
        repeated(sql, || projects::delete(sql, id)).await
    }

    async fn insert_key(&self, key: ApiKey) -> Result<(), StoreError> {
        let sql = self.sql();
        repeated(sql, || keys::insert(sql, key.clone())).await
    }

    async fn key(&self, id: KeyId) -> Result<Option<ApiKey>, StoreError> {
        let sql = self.sql();
        repeated(sql, || keys::get(sql, id)).await
    }

    async fn key_by_hash(&self, hash: &[u8; 32]) -> Result<Option<ApiKey>, StoreError> {
        let sql = self.sql();
        repeated(sql, || keys::by_hash(sql, hash)).await
    }

    async fn keys(&self, filter: KeyFilter, page: PageRequest) -> Result<Page<ApiKey>, StoreError> {
        let sql = self.sql();
        repeated(sql, || keys::list(sql, &filter, page)).await
    }

    async fn revoke_key(&self, id: KeyId) -> Result<ApiKey, StoreError> {
        let sql = self.sql();
        repeated(sql, || keys::revoke(sql, id)).await
    }

    async fn key_used(&self, id: KeyId, at: Timestamp, stale: Timestamp) -> Result<(), StoreError> {
        let sql = self.sql();
        repeated(sql, || keys::used(sql, id, at, stale)).await
    }

    async fn shared_secret(&self, name: &str, proposed: &[u8]) -> Result<Vec<u8>, StoreError> {
        let sql = self.sql();
        repeated(sql, || keys::shared_secret(sql, name, proposed)).await
    }

    async fn append_audit(&self, entry: AuditEntry) -> Result<(), StoreError> {
        let sql = self.sql();
        repeated(sql, || audit::insert(sql, entry.clone())).await
    }

    async fn audit_entries(
        &self,
        filter: AuditFilter,
        page: PageRequest,
    ) -> Result<Page<AuditEntry>, StoreError> {
        let sql = self.sql();
        repeated(sql, || audit::list(sql, &filter, page)).await
    }

    async fn prune_audit(&self, before: Timestamp) -> Result<u64, StoreError> {
        let sql = self.sql();
        repeated(sql, || audit::prune(sql, before)).await
    }

    async fn events_begin(&self, from: EventsFrom) -> Result<u64, StoreError> {
        let sql = self.sql();
        repeated(sql, || events::begin(sql, from)).await
    }

    async fn events_after(
        &self,
        after: u64,
        filter: &EventFilter,
    ) -> Result<EventBatch, StoreError> {
        let sql = self.sql();
        repeated(sql, || events::after(sql, after, filter)).await
    }

    async fn prune_events(&self, before: Timestamp) -> Result<u64, StoreError> {
        let sql = self.sql();
        repeated(sql, || events::prune(sql, before)).await
    }

    async fn ping(&self) -> Result<(), StoreError> {
        let sql = self.sql();
        repeated(sql, || async move {
            query("select 1").fetch_one(sql).await.context("ping the store").map(drop)
        })
        .await
    }
}
