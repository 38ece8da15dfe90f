//! The seam to the queue: a hint with a lease. The truth is the store; an entry that is lost is
//! dispatched again by a reconciler, and one that is delivered twice is fenced there.
//!
//! Semantics that every implementation keeps
//! - At least once. A claim is a lease with an epoch; each claim of an entry has a higher epoch.
//! - A lease that is not renewed in time is taken back by `sweep` and claimed again.
//! - Priorities are weighted (8, 4, 2, 1): while all have work each gets its share, none starves.
//! - `claim` waits for an event (a hand-off or a timer at the next due time), never by polling.
//! - A `Lane::Worker` entry goes to that worker alone; a worker takes from its own lane and from
//!   the shared one.
//! - `enqueue` is idempotent by task id.

pub mod clock;
mod error;
pub mod postgres;
pub mod redis;
mod schedule;
mod share;
pub mod sqlite;
mod waiters;

use std::time::Duration;

use aether_types::{Priority, TaskId, WorkerId};
use async_trait::async_trait;

pub use clock::{Clock, ManualClock, SystemClock};
pub use error::QueueError;
pub use postgres::PostgresQueue;
pub use redis::RedisQueue;
pub use sqlite::SqliteQueue;

/// Who may claim an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Lane {
    /// Any worker.
    Shared,
    /// The worker that has the VM.
    Worker(WorkerId),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    pub task: TaskId,
    pub lane: Lane,
    pub priority: Priority,
    /// Not claimed before this long from now.
    pub delay: Duration,
}

/// A claimed entry. Dropping it does nothing: the lease runs out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    pub task: TaskId,
    pub worker: WorkerId,
    /// Rises with each claim of the task, over restarts too.
    pub epoch: i64,
    pub duration: Duration,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Depth {
    pub ready: u64,
    pub delayed: u64,
    pub leased: u64,
}

#[async_trait]
pub trait Queue: Send + Sync + 'static {
    /// A task that is here already keeps its entry, or its lease, as it is.
    async fn enqueue(&self, entries: &[Entry]) -> Result<(), QueueError>;

    /// Waits up to `wait` for work for `worker`. Cancel-safe: a future that is dropped claims
    /// nothing, or a lease that runs out.
    async fn claim(
        &self,
        worker: WorkerId,
        lease: Duration,
        wait: Duration,
    ) -> Result<Option<Lease>, QueueError>;

    /// The lease runs for its whole duration from now. `Lost` where it has run out and was taken
    /// back.
    async fn renew(&self, lease: &Lease) -> Result<(), QueueError>;

    /// The task has ended (in the store); the entry goes. `Lost` as above.
    async fn complete(&self, lease: &Lease) -> Result<(), QueueError>;

    /// Gives the entry back for another attempt after `delay`.
    async fn release(&self, lease: &Lease, delay: Duration) -> Result<(), QueueError>;

    /// Removes an entry that nobody has claimed. `false`: none such.
    async fn remove(&self, task: TaskId) -> Result<bool, QueueError>;

    /// Takes back leases that ran out. Returns how many. They keep their place in the order.
    async fn sweep(&self) -> Result<u64, QueueError>;

    /// In how long the next lease runs out: when to sweep. `None`: nothing is leased.
    async fn next_lease_end(&self) -> Result<Option<Duration>, QueueError>;

    /// Takes back every lease of a worker that starts anew under the same id: a process that has
    /// just started holds none.
    async fn reclaim(&self, worker: WorkerId) -> Result<u64, QueueError>;

    /// Puts an entry where it belongs now, whatever lane it was in. `false`: somebody has it in
    /// hand; ask again when that has ended.
    async fn relocate(&self, entry: Entry) -> Result<bool, QueueError> {
        if !self.remove(entry.task).await? && self.contains(entry.task).await? {
            return Ok(false);
        }
        self.enqueue(&[entry]).await?;
        Ok(true)
    }

    async fn contains(&self, task: TaskId) -> Result<bool, QueueError>;

    async fn depth(&self) -> Result<Depth, QueueError>;

    /// Completes when entries that were acknowledged may be gone: what the queue is on came back
    /// with less than it had. Who has the truth enqueues it again. One caller at a time is told.
    async fn may_have_lost(&self) {
        std::future::pending::<()>().await;
    }
}
