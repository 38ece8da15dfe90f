//! The queue on SQLite.

use std::{path::Path, time::Duration};

use aether_types::*;
use async_trait::async_trait;

use crate::*;

#[derive(Debug)]
pub struct SqliteQueue {}

impl SqliteQueue {
    /// Opens the queue, and makes or migrates its tables.
    pub async fn open(_path: &Path) -> Result<Self, QueueError> {
        unimplemented!()
    }
}

#[async_trait]
impl Queue for SqliteQueue {
    async fn enqueue(&self, _entries: &[Entry]) -> Result<(), QueueError> {
        unimplemented!()
    }

    async fn claim(
        &self,
        _worker: WorkerId,
        _lease: Duration,
        _wait: Duration,
    ) -> Result<Option<Lease>, QueueError> {
        unimplemented!()
    }

    async fn renew(&self, _lease: &Lease) -> Result<(), QueueError> {
        unimplemented!()
    }

    async fn complete(&self, _lease: &Lease) -> Result<(), QueueError> {
        unimplemented!()
    }

    async fn release(&self, _lease: &Lease, _delay: Duration) -> Result<(), QueueError> {
        unimplemented!()
    }

    async fn remove(&self, _task: TaskId) -> Result<bool, QueueError> {
        unimplemented!()
    }

    async fn sweep(&self) -> Result<u64, QueueError> {
        unimplemented!()
    }

    async fn reclaim(&self, _worker: WorkerId) -> Result<u64, QueueError> {
        unimplemented!()
    }

    async fn contains(&self, _task: TaskId) -> Result<bool, QueueError> {
        unimplemented!()
    }

    async fn depth(&self) -> Result<Depth, QueueError> {
        unimplemented!()
    }
}
