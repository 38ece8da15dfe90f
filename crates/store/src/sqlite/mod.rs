//! The store on SQLite.
//!
//! One connection writes, behind a mutex, in transactions that begin `IMMEDIATE`: writers queue
//! here, never on the file's lock, and no transaction fails because it read before it wrote. A few
//! connections read; the write-ahead log lets them read while one writes, and what was
//! acknowledged is seen at once.
//!
//! Cancellation: a method's future may be dropped at any point. The transaction is then rolled
//! back, or was committed whole.
//!
//! Statements that write and answer with rows are read to their end (`fetch_all`): the commit of a
//! lone statement happens at its last step, and an error of it must not be lost.

mod attempts;
mod create;
mod executions;
mod keys;
mod requests;
mod rows;
mod snapshots;
mod tasks;
mod templates;
mod vms;
mod write;

use std::{fs::OpenOptions, os::unix::fs::OpenOptionsExt, path::Path, time::Duration};

use aether_types::{
    Execution, ExecutionId, Fault, OutputStream, RetainedOutput, Snapshot, SnapshotId, StateChange,
    Task, TaskId, Template, TemplateId, TemplateProgress, Timestamp, ToolRequest, Vm, VmId,
    WorkerId,
};
use async_trait::async_trait;
use sqlx::{
    ConnectOptions, SqliteConnection, SqlitePool,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};
use tokio::sync::Mutex;

use crate::{
    Accepted, AcceptedBuild, ApiKey, AttemptEnd, Begin, CancelOutcome, Capacity, Forked,
    Idempotency, NewExecution, NewSnapshot, NewTask, NewTemplate, NewVm, Page, PageRequest,
    SnapshotFilter, Store, StoreError, TaskFilter, TemplateFilter, VmChange, VmFilter, VmPatch,
    error::Context,
};

/// Enough for a gateway on a few processors; each costs a thread and a page cache.
const READERS_MAX: u32 = 4;

/// For the lock that another process may hold for a moment (a backup); our own writers wait on
/// the mutex.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// The log is cut to this size after a checkpoint, so that one burst does not keep the room.
const LOG_BYTES_KEPT: &str = "67108864";

/// 32 MiB of log. The commit that fills it does the checkpoint and waits for the disk; SQLite's
/// own 1000 pages would make that many more commits wait.
const CHECKPOINT_PAGES: &str = "8000";

/// More than there are statements: each is prepared once.
const STATEMENTS_CACHED: usize = 256;

static MIGRATIONS: sqlx::migrate::Migrator = sqlx::migrate!("./migrations/sqlite");

/// What an acknowledged change survives. Either way it survives the death of the process, SIGKILL
/// included: a commit is written to the log, which the kernel has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Durability {
    /// The death of the process (`synchronous=NORMAL`). After a power loss the last moments may be
    /// missing; nothing is damaged.
    #[default]
    Process,
    /// Power loss too (`synchronous=FULL`): each transaction waits for one flush of the disk.
    Power,
}

#[derive(Debug)]
pub struct SqliteStore {
    writer: Mutex<SqliteConnection>,
    readers: SqlitePool,
}

impl SqliteStore {
    /// Opens the store, made with mode 0600 where there is none, and brings its tables up to date.
    pub async fn open(path: &Path, durability: Durability) -> Result<Self, StoreError> {
        // SQLite gives its log the mode of the file, and the file holds environments.
        OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(path)
            .map_err(sqlx::Error::Io)
            .context("make the store's file")?;
        let synchronous = match durability {
            Durability::Process => SqliteSynchronous::Normal,
            Durability::Power => SqliteSynchronous::Full,
        };
        let options = SqliteConnectOptions::new()
            .filename(path)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(synchronous)
            .foreign_keys(true)
            .busy_timeout(BUSY_TIMEOUT)
            .statement_cache_capacity(STATEMENTS_CACHED)
            .pragma("wal_autocheckpoint", CHECKPOINT_PAGES)
            .pragma("journal_size_limit", LOG_BYTES_KEPT)
            .pragma("temp_store", "memory")
            .disable_statement_logging();
        let mut writer = options.clone().connect().await.context("open the store")?;
        // Not `run`: its future is not `Send` for every lifetime, and callers spawn.
        MIGRATIONS
            .run_direct(None, &mut writer, false)
            .await
            .map_err(|e| StoreError::Migration(Box::new(e)))?;
        let readers = SqlitePoolOptions::new()
            .max_connections(READERS_MAX)
            .min_connections(1)
            .acquire_timeout(BUSY_TIMEOUT)
            .idle_timeout(None)
            .max_lifetime(None)
            .test_before_acquire(false)
            .connect_with(options.read_only(true))
            .await
            .context("open the store for reading")?;
        Ok(Self { writer: Mutex::new(writer), readers })
    }

    /// Waits for transactions under way and closes the file; the log is merged into it.
    pub async fn close(self) -> Result<(), StoreError> {
        use sqlx::Connection;
        self.readers.close().await;
        self.writer.into_inner().close().await.context("close the store")
    }
}

#[async_trait]
impl Store for SqliteStore {
    async fn create_vm(
        &self,
        vm: NewVm,
        task: NewTask,
        capacity: Capacity,
        idempotency: Option<Idempotency>,
    ) -> Result<Accepted, StoreError> {
        create::create_vm(self, vm, task, capacity, idempotency).await
    }

    async fn request_on_vm(
        &self,
        vm: VmId,
        task: NewTask,
        idempotency: Option<Idempotency>,
    ) -> Result<Accepted, StoreError> {
        requests::request_on_vm(self, vm, task, idempotency).await
    }

    async fn request_snapshot(
        &self,
        vm: VmId,
        snapshot: NewSnapshot,
        task: NewTask,
        idempotency: Option<Idempotency>,
    ) -> Result<(Accepted, Snapshot), StoreError> {
        snapshots::request(self, vm, snapshot, task, idempotency).await
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
        create::fork_vm(self, vm, snapshot, task, clones, capacity, idempotency).await
    }

    async fn build_template(
        &self,
        template: NewTemplate,
        snapshot: NewSnapshot,
        builder: NewVm,
        task: NewTask,
        idempotency: Option<Idempotency>,
    ) -> Result<(Accepted, Template), StoreError> {
        templates::build(self, template, snapshot, builder, task, idempotency).await
    }

    async fn build_tools(
        &self,
        tools: Vec<ToolRequest>,
        task: NewTask,
        idempotency: Option<Idempotency>,
    ) -> Result<AcceptedBuild, StoreError> {
        requests::build_tools(self, &tools, task, idempotency).await
    }

    async fn delete_snapshot(&self, id: SnapshotId) -> Result<Snapshot, StoreError> {
        snapshots::delete(self, id).await
    }

    async fn delete_template(&self, id: TemplateId) -> Result<Template, StoreError> {
        templates::delete(self, id).await
    }

    async fn template_progress(
        &self,
        task: TaskId,
        epoch: i64,
        progress: TemplateProgress,
    ) -> Result<Template, StoreError> {
        templates::progress(self, task, epoch, progress).await
    }

    async fn task_progress(
        &self,
        task: TaskId,
        epoch: i64,
        now: String,
        log: String,
    ) -> Result<Task, StoreError> {
        tasks::progress(self, task, epoch, now, log).await
    }

    async fn snapshot(&self, id: SnapshotId) -> Result<Option<Snapshot>, StoreError> {
        snapshots::get(self, id).await
    }

    async fn snapshot_by_name(&self, name: &str) -> Result<Option<Snapshot>, StoreError> {
        snapshots::by_name(self, name).await
    }

    async fn snapshots(
        &self,
        filter: SnapshotFilter,
        page: PageRequest,
    ) -> Result<Page<Snapshot>, StoreError> {
        snapshots::list(self, &filter, page).await
    }

    async fn template(&self, id: TemplateId) -> Result<Option<Template>, StoreError> {
        templates::get(self, id).await
    }

    async fn template_by_name(
        &self,
        name: &str,
        tag: &str,
    ) -> Result<Option<Template>, StoreError> {
        templates::by_name(self, name, tag).await
    }

    async fn templates(
        &self,
        filter: TemplateFilter,
        page: PageRequest,
    ) -> Result<Page<Template>, StoreError> {
        templates::list(self, &filter, page).await
    }

    async fn retire_snapshots(&self) -> Result<Vec<Snapshot>, StoreError> {
        snapshots::retire(self).await
    }

    async fn request_execution(
        &self,
        vm: VmId,
        execution: NewExecution,
        task: NewTask,
        idempotency: Option<Idempotency>,
    ) -> Result<(Accepted, Execution), StoreError> {
        requests::request_execution(self, vm, execution, task, idempotency).await
    }

    async fn cancel_task(&self, id: TaskId) -> Result<CancelOutcome, StoreError> {
        requests::cancel_task(self, id).await
    }

    async fn undispatched(&self, limit: u32) -> Result<Vec<Task>, StoreError> {
        tasks::undispatched(self, limit).await
    }

    async fn confirm_dispatched(&self, ids: &[TaskId]) -> Result<(), StoreError> {
        tasks::confirm_dispatched(self, ids).await
    }

    async fn begin_attempt(
        &self,
        id: TaskId,
        worker: WorkerId,
        epoch: i64,
    ) -> Result<Begin, StoreError> {
        attempts::begin(self, id, worker, epoch).await
    }

    async fn execution_started(
        &self,
        task: TaskId,
        epoch: i64,
        execution: ExecutionId,
        boot_id: &str,
    ) -> Result<(), StoreError> {
        attempts::execution_started(self, task, epoch, execution, boot_id).await
    }

    async fn end_attempt(
        &self,
        id: TaskId,
        epoch: i64,
        end: AttemptEnd,
    ) -> Result<Task, StoreError> {
        attempts::end(self, id, epoch, end).await
    }

    async fn retry_attempt(
        &self,
        id: TaskId,
        epoch: i64,
        fault: Fault,
        otherwise: AttemptEnd,
    ) -> Result<Task, StoreError> {
        attempts::retry(self, id, epoch, fault, otherwise).await
    }

    async fn change_vm(&self, id: VmId, change: VmChange) -> Result<Vm, StoreError> {
        vms::change(self, id, change).await
    }

    async fn patch_vm(&self, id: VmId, patch: VmPatch) -> Result<(), StoreError> {
        vms::patch(self, id, patch).await
    }

    async fn vm(&self, id: VmId) -> Result<Option<Vm>, StoreError> {
        vms::get(self, id).await
    }

    async fn vm_by_name(&self, name: &str) -> Result<Option<Vm>, StoreError> {
        vms::by_name(self, name).await
    }

    async fn vms(&self, filter: VmFilter, page: PageRequest) -> Result<Page<Vm>, StoreError> {
        vms::list(self, &filter, page).await
    }

    async fn vm_history(&self, id: VmId) -> Result<Vec<StateChange>, StoreError> {
        vms::history(self, id).await
    }

    async fn task(&self, id: TaskId) -> Result<Option<Task>, StoreError> {
        tasks::get(self, id).await
    }

    async fn tasks(&self, filter: TaskFilter, page: PageRequest) -> Result<Page<Task>, StoreError> {
        tasks::list(self, &filter, page).await
    }

    async fn execution(&self, id: ExecutionId) -> Result<Option<Execution>, StoreError> {
        executions::get(self, id).await
    }

    async fn executions(&self, vm: VmId, page: PageRequest) -> Result<Page<Execution>, StoreError> {
        executions::list(self, vm, page).await
    }

    async fn output(
        &self,
        id: ExecutionId,
        stream: OutputStream,
    ) -> Result<RetainedOutput, StoreError> {
        executions::output(self, id, stream).await
    }

    async fn expired_vms(&self, now: Timestamp) -> Result<Vec<VmId>, StoreError> {
        vms::expired(self, now).await
    }

    async fn next_expiry(&self) -> Result<Option<Timestamp>, StoreError> {
        vms::next_expiry(self).await
    }

    async fn open_tasks(&self) -> Result<Vec<Task>, StoreError> {
        tasks::open(self).await
    }

    async fn insert_key(&self, key: ApiKey) -> Result<(), StoreError> {
        keys::insert(self, key).await
    }

    async fn keys(&self) -> Result<Vec<ApiKey>, StoreError> {
        keys::list(self).await
    }

    async fn ping(&self) -> Result<(), StoreError> {
        sqlx::query("select 1").fetch_one(&self.readers).await.context("ping the store")?;
        Ok(())
    }
}
