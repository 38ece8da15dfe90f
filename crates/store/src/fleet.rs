//! What the store is told of workers, and what it says of the VMs of those that are lost, and of
//! what waits for them.

use std::{collections::BTreeMap, time::Duration};

use aether_types::{
    Priority, QueueName, Task, Timestamp, Vm, Worker, WorkerCapacity, WorkerDriver, WorkerId,
};

/// A worker that registers.
#[derive(Debug, Clone)]
pub struct NewWorker {
    /// The same for as long as its data directory lives.
    pub id: WorkerId,
    pub host: String,
    pub zone: Option<String>,
    pub labels: BTreeMap<String, String>,
    pub drivers: Vec<WorkerDriver>,
    pub capacity: WorkerCapacity,
    pub template_folder: Option<String>,
    pub stream_address: Option<String>,
    pub version: String,
    pub lease: Duration,
}

/// Who writes: a worker, as it registered. What an earlier registration of the same worker writes
/// is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Registration {
    pub worker: WorkerId,
    pub epoch: i64,
}

/// A worker that is in no registry.
impl From<WorkerId> for Registration {
    fn from(worker: WorkerId) -> Self {
        Self { worker, epoch: 0 }
    }
}

impl From<&Worker> for Registration {
    fn from(worker: &Worker) -> Self {
        Self { worker: worker.id, epoch: worker.epoch }
    }
}

/// What became of a VM of a lost worker.
#[derive(Debug, Clone)]
pub struct Orphan {
    pub vm: Vm,
    /// Their queue entries may be removed, and their ends published.
    pub ended: Vec<Task>,
    /// A creation or a deletion is taken up by another worker; its dispatch is owed.
    pub goes_on: bool,
}

/// What waits in a queue, and what it has given out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueueStatus {
    pub name: QueueName,
    /// By priority; one that nothing has is not there.
    pub pending: BTreeMap<Priority, u64>,
    pub running: u64,
    /// Of those that are pending: for a worker to take their VM, and after an attempt that failed.
    pub waiting: u64,
    pub again: u64,
    /// Failed with their attempts used up, and not retried since.
    pub dead: u64,
    /// When the oldest that is pending was recorded.
    pub oldest_at: Option<Timestamp>,
}

impl QueueStatus {
    pub(crate) fn new(name: QueueName) -> Self {
        let pending = BTreeMap::new();
        Self { name, pending, running: 0, waiting: 0, again: 0, dead: 0, oldest_at: None }
    }
}
