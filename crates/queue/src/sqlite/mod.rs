//! The queue on SQLite, for one process.
//!
//! What decides is in memory (`schedule`); each change is written to the file before it is made
//! there, so that a restart finds every acknowledged entry. Renewals are not written: a restart
//! begins every lease anew.
//!
//! Durability: `synchronous=NORMAL` with a write-ahead log. An acknowledged change survives
//! SIGKILL. A power loss may take the last moments, which the store dispatches again; `OFF` would
//! be no faster at a commit (neither flushes then), and could damage the file.
//!
//! Epochs come from one counter that is reserved in blocks, and that begins no lower than the
//! wall clock in microseconds: they rise over restarts, after `complete`, and even where the file
//! was lost, as long as the wall clock was not moved back at the same time.
//!
//! Cancellation: where a future is dropped while it writes, the file may have the change and the
//! memory not. An entry then comes at the next start or not at all, a lease that was to end runs
//! out: the caller was told nothing, and the store's reconciler repairs both.

mod rows;

use std::{
    collections::HashSet,
    fs::OpenOptions,
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use aether_types::{TaskId, WorkerId};
use async_trait::async_trait;
use sqlx::{
    ConnectOptions, SqliteConnection,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteLockingMode, SqliteSynchronous},
};
use tokio::{
    sync::{Mutex, Notify},
    task::JoinHandle,
};

use crate::{
    Clock, Depth, Entry, Lease, Queue, QueueError, SystemClock,
    error::Context,
    schedule::{Place, Schedule},
    waiters::{Waiter, Waiters},
};

/// For the lock of the process before, which may be closing still.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// One write for this many claims; what a restart leaves of a block is skipped.
const EPOCHS_RESERVED: i64 = 1000;

static MIGRATIONS: sqlx::migrate::Migrator = sqlx::migrate!("./migrations/sqlite");

#[derive(Debug)]
pub struct SqliteQueue {
    shared: Arc<Shared>,
    timer: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    inner: Mutex<Inner>,
    waiters: Waiters,
    clock: Arc<dyn Clock>,
    /// An entry was delayed: the timer may be set too late.
    delayed: Notify,
}

#[derive(Debug)]
struct Inner {
    db: SqliteConnection,
    schedule: Schedule,
    /// Of the entry that came last.
    seq: i64,
    epoch: i64,
    epoch_reserved: i64,
}

impl SqliteQueue {
    /// Opens the queue, and makes or migrates its tables.
    pub async fn open(path: &Path) -> Result<Self, QueueError> {
        Self::open_with_clock(path, Arc::new(SystemClock::new())).await
    }

    pub async fn open_with_clock(path: &Path, clock: Arc<dyn Clock>) -> Result<Self, QueueError> {
        // SQLite gives its log the mode of the file.
        OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(path)
            .map_err(sqlx::Error::Io)
            .context("open the queue")?;
        let mut db = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            // Held from the first read on: a second process would decide from another memory.
            .locking_mode(SqliteLockingMode::Exclusive)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Normal)
            .busy_timeout(BUSY_TIMEOUT)
            .disable_statement_logging()
            .connect()
            .await
            .context("open the queue")?;
        // Not `run`: its future is not `Send` for every lifetime, and callers spawn.
        MIGRATIONS
            .run_direct(None, &mut db, false)
            .await
            .map_err(|e| QueueError::Migration(Box::new(e)))?;
        let (schedule, seq) = rows::load(&mut db, clock.now(), wall_ms()).await?;
        let epoch = rows::reserved_epoch(&mut db).await?.max(wall_us());
        let inner = Inner { db, schedule, seq, epoch, epoch_reserved: epoch };
        let shared = Arc::new(Shared {
            inner: Mutex::new(inner),
            waiters: Waiters::default(),
            clock,
            delayed: Notify::new(),
        });
        let timer = tokio::spawn(wake_when_due(Arc::clone(&shared)));
        Ok(Self { shared, timer })
    }
}

impl Drop for SqliteQueue {
    fn drop(&mut self) {
        self.timer.abort();
    }
}

/// Wakes waiters when delayed entries fall due. Aborted with the queue; it holds nothing that an
/// abort could leave half done.
async fn wake_when_due(shared: Arc<Shared>) {
    loop {
        let due = {
            let mut inner = shared.inner.lock().await;
            shared.promote(&mut inner);
            inner.schedule.next_due()
        };
        // A delay that begins between the two lines leaves its permit in `delayed`.
        match due {
            Some(due) => {
                tokio::select! {
                    () = shared.clock.sleep_until(due) => {}
                    () = shared.delayed.notified() => {}
                }
            }
            None => shared.delayed.notified().await,
        }
    }
}

impl Shared {
    fn promote(&self, inner: &mut Inner) {
        for lane in inner.schedule.promote(self.clock.now()) {
            self.waiters.wake(lane);
        }
    }

    /// Claims what is ready for this worker, if anything is.
    async fn try_claim(
        &self,
        inner: &mut Inner,
        worker: WorkerId,
        length: Duration,
    ) -> Result<Option<Lease>, QueueError> {
        self.promote(inner);
        let Some(choice) = inner.schedule.choose(worker) else { return Ok(None) };
        if inner.epoch == inner.epoch_reserved {
            let up_to = inner.epoch + EPOCHS_RESERVED;
            rows::reserve_epochs(&mut inner.db, up_to).await?;
            inner.epoch_reserved = up_to;
        }
        inner.epoch += 1;
        let epoch = inner.epoch;
        // Where this is dropped or fails, the entry is ready still and the epoch is skipped.
        rows::lease(&mut inner.db, choice.task, worker, epoch, length).await?;
        inner.schedule.lease(choice, worker, epoch, length, self.clock.now());
        Ok(Some(Lease { task: choice.task, worker, epoch, duration: length }))
    }

    async fn take_back(&self, inner: &mut Inner, tasks: Vec<TaskId>) -> Result<u64, QueueError> {
        if tasks.is_empty() {
            return Ok(0);
        }
        rows::give_all_back(&mut inner.db, &tasks, wall_ms()).await?;
        for task in &tasks {
            self.give_back(inner, *task, None);
        }
        Ok(u64::try_from(tasks.len()).unwrap_or(u64::MAX))
    }

    fn give_back(&self, inner: &mut Inner, task: TaskId, due: Option<Duration>) {
        inner.schedule.give_back(task, due);
        match (due, inner.schedule.lane(task)) {
            (None, Some(lane)) => self.waiters.wake(lane),
            (Some(_), _) => self.delayed.notify_one(),
            (None, None) => {}
        }
    }
}

#[async_trait]
impl Queue for SqliteQueue {
    async fn enqueue(&self, entries: &[Entry]) -> Result<(), QueueError> {
        let mut inner = self.shared.inner.lock().await;
        let inner = &mut *inner;
        let mut seen = HashSet::new();
        let mut new = Vec::with_capacity(entries.len());
        for entry in entries {
            if !inner.schedule.contains(entry.task) && seen.insert(entry.task) {
                inner.seq += 1;
                new.push((*entry, inner.seq));
            }
        }
        if new.is_empty() {
            return Ok(());
        }
        rows::insert(&mut inner.db, &new, wall_ms()).await?;
        let now = self.shared.clock.now();
        for (entry, seq) in new {
            let Entry { task, lane, priority, delay } = entry;
            let place = if delay.is_zero() {
                Place::Ready
            } else {
                Place::Delayed { due: now.saturating_add(delay) }
            };
            inner.schedule.insert(task, lane, priority, seq, place);
            if delay.is_zero() {
                self.shared.waiters.wake(lane);
            } else {
                self.shared.delayed.notify_one();
            }
        }
        Ok(())
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
            let waiter = {
                let mut inner = shared.inner.lock().await;
                let claimed = shared.try_claim(&mut inner, worker, lease).await?;
                // An error or a drop before this line passes the wake-up on.
                if let Some(waiter) = woken.take() {
                    waiter.looked();
                }
                if claimed.is_some() || wait.is_zero() {
                    return Ok(claimed);
                }
                // In line before the lock goes: nothing becomes ready unseen.
                shared.waiters.join(worker)
            };
            tokio::select! {
                biased;
                () = waiter.woken() => woken = Some(waiter),
                () = shared.clock.sleep_until(deadline) => return Ok(None),
            }
        }
    }

    async fn renew(&self, lease: &Lease) -> Result<(), QueueError> {
        let mut inner = self.shared.inner.lock().await;
        if !inner.schedule.holds(lease.task, lease.epoch) {
            return Err(QueueError::Lost);
        }
        inner.schedule.extend(lease.task, self.shared.clock.now());
        Ok(())
    }

    async fn complete(&self, lease: &Lease) -> Result<(), QueueError> {
        let mut inner = self.shared.inner.lock().await;
        if !inner.schedule.holds(lease.task, lease.epoch) {
            return Err(QueueError::Lost);
        }
        rows::delete(&mut inner.db, lease.task).await?;
        inner.schedule.remove(lease.task);
        Ok(())
    }

    async fn release(&self, lease: &Lease, delay: Duration) -> Result<(), QueueError> {
        let mut inner = self.shared.inner.lock().await;
        if !inner.schedule.holds(lease.task, lease.epoch) {
            return Err(QueueError::Lost);
        }
        rows::give_back(&mut inner.db, lease.task, delay, wall_ms()).await?;
        let due = (!delay.is_zero()).then(|| self.shared.clock.now().saturating_add(delay));
        self.shared.give_back(&mut inner, lease.task, due);
        Ok(())
    }

    async fn remove(&self, task: TaskId) -> Result<bool, QueueError> {
        let mut inner = self.shared.inner.lock().await;
        if !inner.schedule.contains(task) || inner.schedule.is_leased(task) {
            return Ok(false);
        }
        rows::delete(&mut inner.db, task).await?;
        inner.schedule.remove(task);
        Ok(true)
    }

    async fn sweep(&self) -> Result<u64, QueueError> {
        let mut inner = self.shared.inner.lock().await;
        let run_out = inner.schedule.run_out(self.shared.clock.now());
        self.shared.take_back(&mut inner, run_out).await
    }

    async fn next_lease_end(&self) -> Result<Option<Duration>, QueueError> {
        let inner = self.shared.inner.lock().await;
        let now = self.shared.clock.now();
        Ok(inner.schedule.next_lease_end().map(|end| end.saturating_sub(now)))
    }

    async fn reclaim(&self, worker: WorkerId) -> Result<u64, QueueError> {
        let mut inner = self.shared.inner.lock().await;
        let held = inner.schedule.leases_of(worker);
        self.shared.take_back(&mut inner, held).await
    }

    async fn contains(&self, task: TaskId) -> Result<bool, QueueError> {
        Ok(self.shared.inner.lock().await.schedule.contains(task))
    }

    async fn depth(&self) -> Result<Depth, QueueError> {
        let mut inner = self.shared.inner.lock().await;
        self.shared.promote(&mut inner);
        Ok(inner.schedule.depth())
    }
}

fn since_epoch() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

fn wall_ms() -> i64 {
    i64::try_from(since_epoch().as_millis()).unwrap_or(i64::MAX)
}

fn wall_us() -> i64 {
    i64::try_from(since_epoch().as_micros()).unwrap_or(0)
}
