//! The store on SQLite.

use std::path::Path;

use aether_types::*;
use async_trait::async_trait;

use crate::*;

/// What a commit survives. Either way it survives the death of the process, SIGKILL included:
/// the kernel has the data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Durability {
    /// The death of the process. After a power loss the last moments may be missing, and nothing
    /// is damaged.
    #[default]
    Process,
    /// Power loss too: one disk flush for each transaction.
    Power,
}

#[derive(Debug)]
pub struct SqliteStore {}

impl SqliteStore {
    /// Opens the store, and makes or migrates its tables.
    pub async fn open(_path: &Path, _durability: Durability) -> Result<Self, StoreError> {
        unimplemented!()
    }
}

#[async_trait]
impl Store for SqliteStore {
    async fn create_vm(
        &self,
        _vm: NewVm,
        _task: NewTask,
        _idempotency: Option<Idempotency>,
    ) -> Result<Accepted, StoreError> {
        unimplemented!()
    }

    async fn request_on_vm(
        &self,
        _vm: VmId,
        _task: NewTask,
        _idempotency: Option<Idempotency>,
    ) -> Result<Accepted, StoreError> {
        unimplemented!()
    }

    async fn request_execution(
        &self,
        _vm: VmId,
        _execution: NewExecution,
        _task: NewTask,
        _idempotency: Option<Idempotency>,
    ) -> Result<(Accepted, Execution), StoreError> {
        unimplemented!()
    }

    async fn cancel_task(&self, _id: TaskId) -> Result<CancelOutcome, StoreError> {
        unimplemented!()
    }

    async fn undispatched(&self, _limit: u32) -> Result<Vec<Task>, StoreError> {
        unimplemented!()
    }

    async fn confirm_dispatched(&self, _ids: &[TaskId]) -> Result<(), StoreError> {
        unimplemented!()
    }

    async fn begin_attempt(
        &self,
        _id: TaskId,
        _worker: WorkerId,
        _epoch: i64,
    ) -> Result<Begin, StoreError> {
        unimplemented!()
    }

    async fn execution_started(
        &self,
        _task: TaskId,
        _epoch: i64,
        _execution: ExecutionId,
        _boot_id: &str,
    ) -> Result<(), StoreError> {
        unimplemented!()
    }

    async fn end_attempt(
        &self,
        _id: TaskId,
        _epoch: i64,
        _end: AttemptEnd,
    ) -> Result<Task, StoreError> {
        unimplemented!()
    }

    async fn retry_attempt(
        &self,
        _id: TaskId,
        _epoch: i64,
        _fault: Fault,
        _otherwise: AttemptEnd,
    ) -> Result<Task, StoreError> {
        unimplemented!()
    }

    async fn change_vm(&self, _id: VmId, _change: VmChange) -> Result<Vm, StoreError> {
        unimplemented!()
    }

    async fn patch_vm(&self, _id: VmId, _patch: VmPatch) -> Result<(), StoreError> {
        unimplemented!()
    }

    async fn vm(&self, _id: VmId) -> Result<Option<Vm>, StoreError> {
        unimplemented!()
    }

    async fn vm_by_name(&self, _name: &str) -> Result<Option<Vm>, StoreError> {
        unimplemented!()
    }

    async fn vms(&self, _filter: VmFilter, _page: PageRequest) -> Result<Page<Vm>, StoreError> {
        unimplemented!()
    }

    async fn vm_history(&self, _id: VmId) -> Result<Vec<StateChange>, StoreError> {
        unimplemented!()
    }

    async fn task(&self, _id: TaskId) -> Result<Option<Task>, StoreError> {
        unimplemented!()
    }

    async fn tasks(
        &self,
        _filter: TaskFilter,
        _page: PageRequest,
    ) -> Result<Page<Task>, StoreError> {
        unimplemented!()
    }

    async fn execution(&self, _id: ExecutionId) -> Result<Option<Execution>, StoreError> {
        unimplemented!()
    }

    async fn executions(
        &self,
        _vm: VmId,
        _page: PageRequest,
    ) -> Result<Page<Execution>, StoreError> {
        unimplemented!()
    }

    async fn output(
        &self,
        _id: ExecutionId,
        _stream: OutputStream,
    ) -> Result<RetainedOutput, StoreError> {
        unimplemented!()
    }

    async fn expired_vms(&self, _now: Timestamp) -> Result<Vec<VmId>, StoreError> {
        unimplemented!()
    }

    async fn next_expiry(&self) -> Result<Option<Timestamp>, StoreError> {
        unimplemented!()
    }

    async fn open_tasks(&self) -> Result<Vec<Task>, StoreError> {
        unimplemented!()
    }

    async fn insert_key(&self, _key: ApiKey) -> Result<(), StoreError> {
        unimplemented!()
    }

    async fn keys(&self) -> Result<Vec<ApiKey>, StoreError> {
        unimplemented!()
    }

    async fn ping(&self) -> Result<(), StoreError> {
        unimplemented!()
    }
}
