//! The queue on PostgreSQL, for any number of processes.
//!
//! Everything that must outlive a process is in one table; `FOR UPDATE SKIP LOCKED` lets claims go
//! on beside one another. Whose turn it is among the priorities is each process' own (`share`).
//!
//! Nobody polls. An entry that becomes ready is told to all with NOTIFY, in the transaction that
//! makes it so; each process wakes one waiter of the lane, and one that got something wakes the
//! next, since one word may stand for many entries. A timer sleeps until the next delay ends. When
//! the connection that listens was away, everybody looks again.
//!
//! ```text
//!   enqueue ─┐                       ┌─ listener ─► waiters ─► claim: look, take
//!   release ─┼─► table ── NOTIFY ──► ┤
//!   sweep   ─┘     ▲                 └─ timer ─► delays that are over become ready
//!                  └────────────────────────────────────────────────────┘
//! ```
//!
//! Time is the server's, one clock for all processes. Epochs come from a sequence that begins no
//! lower than the clock in microseconds, so that they also rise over a change from another queue.
//!
//! Cancellation: whoever is dropped while it claims may have claimed already, as far as the server
//! is concerned. The claim is therefore a task of its own, and a lease that nobody is there to take
//! is given back at once.

mod listen;
mod sql;

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use aether_postgres::{Database, Listening, Schema, Trouble};
use aether_types::{TaskId, WorkerId};
use async_trait::async_trait;
use sqlx::PgPool;
use tokio::{sync::Notify, task::JoinHandle};

use crate::{
    Clock, Depth, Entry, Lease, Queue, QueueError, SystemClock,
    error::Context as _,
    share::Turns,
    waiters::{Waiter, Waiters},
};

static MIGRATIONS: sqlx::migrate::Migrator = sqlx::migrate!("./migrations/postgres");

/// The queue's tables in PostgreSQL.
pub const SCHEMA: Schema = Schema { part: "queue", migrator: &MIGRATIONS };

/// For all tries of one call, but for the wait of a claim. The pool and the server end waits before
/// that; this is for a network that swallows what is sent.
const CALL_MAX: Duration = Duration::from_secs(30);

#[derive(Debug)]
pub struct PostgresQueue {
    shared: Arc<Shared>,
    listener: JoinHandle<()>,
    timer: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    pool: PgPool,
    waiters: Waiters,
    turns: Mutex<Turns>,
    clock: Arc<dyn Clock>,
    time: Time,
    /// The timer may be set too late.
    delayed: Notify,
}

/// Whose time counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Time {
    Server,
    /// For tests, which let it pass.
    Clock,
}

impl PostgresQueue {
    /// On a database whose tables are up to date: see `aether_postgres::up` with [`SCHEMA`].
    pub async fn open(database: &Database) -> Result<Self, QueueError> {
        Self::start(database, Arc::new(SystemClock::new()), Time::Server).await
    }

    /// For tests: time is what the clock says, for the entries too.
    pub async fn open_with_clock(
        database: &Database,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, QueueError> {
        Self::start(database, clock, Time::Clock).await
    }

    async fn start(
        database: &Database,
        clock: Arc<dyn Clock>,
        time: Time,
    ) -> Result<Self, QueueError> {
        aether_postgres::check(database, SCHEMA)
            .await
            .map_err(|error| QueueError::Schema(Box::new(error)))?;
        sql::raise_epochs(database.pool()).await?;
        let shared = Arc::new(Shared {
            pool: database.pool().clone(),
            waiters: Waiters::default(),
            turns: Mutex::default(),
            clock,
            time,
            delayed: Notify::new(),
        });
        let listening =
            Listening::open(database, listen::CHANNEL).await.context("listen for entries")?;
        let hearer = Arc::clone(&shared);
        let listener = tokio::spawn(async move { listening.run(&*hearer).await });
        let timer = tokio::spawn(listen::wake_when_due(Arc::clone(&shared)));
        Ok(Self { shared, listener, timer })
    }
}

impl Drop for PostgresQueue {
    fn drop(&mut self) {
        self.listener.abort();
        self.timer.abort();
    }
}

/// Does it again where the server undid it, or went away before it was done. All statements here
/// may be repeated: a claim that is made twice is a lease that runs out.
async fn call<T, F>(once: impl FnMut() -> F) -> Result<T, QueueError>
where
    F: Future<Output = Result<T, QueueError>>,
{
    let tries = aether_postgres::repeated(once, trouble);
    let late = |_| QueueError::Unreachable { context: "wait for the database", source: None };
    tokio::time::timeout(CALL_MAX, tries).await.map_err(late)?
}

async fn claim_or_give_back(
    shared: &Arc<Shared>,
    worker: WorkerId,
    length: Duration,
) -> Result<Option<Lease>, QueueError> {
    let shared = Arc::clone(shared);
    // Ends by itself within `CALL_MAX`. Where nobody waits for it any more, what it comes to is
    // dropped as it ends.
    let claim = tokio::spawn(async move {
        let lease = call(|| shared.try_claim(worker, length)).await?;
        Ok(lease.map(|lease| Given { shared, lease: Some(lease) }))
    });
    match claim.await {
        Ok(given) => Ok(given?.and_then(Given::taken)),
        Err(_) => Err(QueueError::Unreachable { context: "claim an entry", source: None }),
    }
}

/// A lease on its way to who claimed it.
struct Given {
    shared: Arc<Shared>,
    lease: Option<Lease>,
}

impl Given {
    fn taken(mut self) -> Option<Lease> {
        self.lease.take()
    }
}

impl Drop for Given {
    fn drop(&mut self) {
        let Some(lease) = self.lease.take() else { return };
        // Without a runtime everything ends, and the lease runs out.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let shared = Arc::clone(&self.shared);
        runtime.spawn(async move {
            let now_ms = shared.now_ms();
            let back = || sql::release(&shared.pool, &lease, Duration::ZERO, now_ms);
            if let Err(error) = call(back).await {
                tracing::warn!(%error, "give back what nobody is there to take; it runs out");
            }
        });
    }
}

fn trouble(error: &QueueError) -> Trouble {
    match error {
        QueueError::Unreachable { .. } => Trouble::Lost,
        QueueError::Collided { .. } => Trouble::Conflict,
        QueueError::Busy
        | QueueError::Lost
        | QueueError::Corrupt(_)
        | QueueError::Full { .. }
        | QueueError::Redis { .. }
        | QueueError::Open(_)
        | QueueError::Foreign { .. }
        | QueueError::Database { .. }
        | QueueError::Migration(_)
        | QueueError::Schema(_) => Trouble::Other,
    }
}

impl Shared {
    /// In milliseconds; `None` where the server's clock counts.
    fn now_ms(&self) -> Option<i64> {
        match self.time {
            Time::Server => None,
            Time::Clock => Some(sql::millis(self.clock.now())),
        }
    }

    /// Claims what is ready for this worker, if anything is.
    async fn try_claim(
        &self,
        worker: WorkerId,
        length: Duration,
    ) -> Result<Option<Lease>, QueueError> {
        loop {
            let ready = sql::look(&self.pool, worker, self.now_ms()).await?;
            if ready.due {
                sql::promote(&self.pool, self.now_ms()).await?;
                continue;
            }
            let turn = {
                let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
                turns.take(worker, ready.own, ready.shared)
            };
            let Some((lane, priority)) = turn else { return Ok(None) };
            let taken =
                sql::take(&self.pool, lane, priority, worker, length, self.now_ms()).await?;
            if taken.is_some() {
                return Ok(taken);
            }
            // Another was faster, and has it; each time round, somebody got something.
        }
    }
}

#[async_trait]
impl Queue for PostgresQueue {
    async fn enqueue(&self, entries: &[Entry]) -> Result<(), QueueError> {
        if entries.is_empty() {
            return Ok(());
        }
        let shared = &*self.shared;
        call(|| sql::insert(&shared.pool, entries, shared.now_ms())).await
    }

    async fn claim(
        &self,
        worker: WorkerId,
        lease: Duration,
        wait: Duration,
    ) -> Result<Option<Lease>, QueueError> {
        let shared = &*self.shared;
        let deadline = shared.clock.now().saturating_add(wait);
        let mut woken: Option<Waiter<'_>> = None;
        loop {
            // In line before it looks: nothing becomes ready unseen.
            let waiter = shared.waiters.join(worker);
            let claimed = claim_or_give_back(&self.shared, worker, lease).await?;
            let was_woken = woken.take().map(Waiter::looked).is_some();
            if claimed.is_some() {
                drop(waiter);
                // What woke this one may stand for more.
                if was_woken {
                    shared.waiters.wake_another(worker);
                }
                return Ok(claimed);
            }
            if wait.is_zero() {
                return Ok(None);
            }
            tokio::select! {
                biased;
                () = waiter.woken() => woken = Some(waiter),
                () = shared.clock.sleep_until(deadline) => return Ok(None),
            }
        }
    }

    async fn renew(&self, lease: &Lease) -> Result<(), QueueError> {
        let shared = &*self.shared;
        held(call(|| sql::renew(&shared.pool, lease, shared.now_ms())).await?)
    }

    async fn complete(&self, lease: &Lease) -> Result<(), QueueError> {
        let shared = &*self.shared;
        held(call(|| sql::complete(&shared.pool, lease)).await?)
    }

    async fn release(&self, lease: &Lease, delay: Duration) -> Result<(), QueueError> {
        let shared = &*self.shared;
        held(call(|| sql::release(&shared.pool, lease, delay, shared.now_ms())).await?)
    }

    async fn remove(&self, task: TaskId) -> Result<bool, QueueError> {
        let shared = &*self.shared;
        Ok(call(|| sql::remove(&shared.pool, task)).await? > 0)
    }

    async fn sweep(&self) -> Result<u64, QueueError> {
        let shared = &*self.shared;
        call(|| sql::sweep(&shared.pool, shared.now_ms())).await
    }

    async fn next_lease_end(&self) -> Result<Option<Duration>, QueueError> {
        let shared = &*self.shared;
        call(|| sql::next_lease_end(&shared.pool, shared.now_ms())).await
    }

    async fn reclaim(&self, worker: WorkerId) -> Result<u64, QueueError> {
        let shared = &*self.shared;
        call(|| sql::reclaim(&shared.pool, worker)).await
    }

    async fn contains(&self, task: TaskId) -> Result<bool, QueueError> {
        let shared = &*self.shared;
        call(|| sql::contains(&shared.pool, task)).await
    }

    async fn depth(&self) -> Result<Depth, QueueError> {
        let shared = &*self.shared;
        call(|| sql::depth(&shared.pool, shared.now_ms())).await
    }
}

fn held(rows: u64) -> Result<(), QueueError> {
    if rows == 0 { Err(QueueError::Lost) } else { Ok(()) }
}
