//! From the outbox to the queue.
//!
//! A request enqueues its own task at once, and this loop only confirms that, many in one
//! transaction and off the way of the answer. What could not be enqueued, or was given back by a
//! worker, or was recorded by a gateway that died before the next line, is enqueued here: at the
//! start, when woken, and at a slow beat. Enqueueing is idempotent, so nothing is lost by doing it
//! twice, and a task that is confirmed late may only be offered once more and be refused.

use std::{collections::HashMap, sync::Arc, time::Duration};

use aether_queue::{Entry, Lane, Queue};
use aether_store::Store;
use aether_types::{Task, TaskId, VmId, WorkerId};
use tokio::{
    sync::{Notify, mpsc},
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

use crate::problem::chain;

/// Confirmations gathered for one transaction. They compete with the workers' writes, and nobody
/// waits for them.
const GATHER: Duration = Duration::from_millis(100);
const CONFIRMATIONS_MAX: usize = 1024;

/// Tasks read from the outbox at once.
const BATCH: u32 = 256;

/// After a failure: doubled each time. Tasks wait for a queue that was away and is back.
const RETRY_MIN: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_millis(800);

/// The outbox is looked at this often though nobody said that there is something in it.
const BEAT: Duration = Duration::from_secs(5);

#[derive(Clone)]
pub(crate) struct Dispatcher(Arc<Inner>);

struct Inner {
    queue: Arc<dyn Queue>,
    owed: Arc<Notify>,
    changed: Arc<Notify>,
    confirmed: mpsc::Sender<TaskId>,
}

pub(crate) struct DispatchLoop {
    store: Arc<dyn Store>,
    queue: Arc<dyn Queue>,
    owed: Arc<Notify>,
    changed: Arc<Notify>,
    confirmed: mpsc::Receiver<TaskId>,
}

impl Dispatcher {
    pub(crate) fn new(store: Arc<dyn Store>, queue: Arc<dyn Queue>) -> (Self, DispatchLoop) {
        let (sender, confirmed) = mpsc::channel(CONFIRMATIONS_MAX);
        let owed = Arc::new(Notify::new());
        let changed = Arc::new(Notify::new());
        let inner = Inner {
            queue: Arc::clone(&queue),
            owed: Arc::clone(&owed),
            changed: Arc::clone(&changed),
            confirmed: sender,
        };
        (Self(Arc::new(inner)), DispatchLoop { store, queue, owed, changed, confirmed })
    }

    /// Enqueues a task that was just recorded; leaves it to the loop where that fails, and where its
    /// VM waits for a worker, which its progress says.
    pub(crate) async fn dispatch(&self, task: &Task, worker: Option<WorkerId>) {
        if worker.is_none() && task.progress.is_some() {
            self.look();
            return;
        }
        match self.0.queue.enqueue(&[entry(task, worker)]).await {
            // Where there is no room the loop finds it in the outbox once more.
            Ok(()) => drop(self.0.confirmed.try_send(task.id)),
            Err(error) => {
                tracing::warn!(task.id = %task.id, error = chain(&error), "enqueue later");
                self.0.owed.notify_one();
            }
        }
    }

    /// There may be something to dispatch, or room for what waits: the loop looks at once.
    pub(crate) fn look(&self) {
        self.0.changed.notify_one();
    }

    /// A task ended before it was claimed.
    pub(crate) async fn withdraw(&self, task: TaskId) {
        // An entry that stays is refused when it is claimed.
        if let Err(error) = self.0.queue.remove(task).await {
            tracing::debug!(task.id = %task, error = chain(&error), "an entry stays");
        }
    }
}

fn entry(task: &Task, worker: Option<WorkerId>) -> Entry {
    Entry {
        task: task.id,
        lane: worker.map_or(Lane::Shared, Lane::Worker),
        priority: task.priority,
        delay: Duration::ZERO,
    }
}

impl DispatchLoop {
    /// Runs until it is told to stop, and confirms what is left then.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let mut gathered = Vec::new();
        let mut gather_until = None;
        let mut retry = RETRY_MIN;
        let mut next_sweep = Instant::now();
        loop {
            // Cancel-safe, each arm.
            tokio::select! {
                () = stop.cancelled() => break,
                count = self.confirmed.recv_many(&mut gathered, CONFIRMATIONS_MAX),
                    if gathered.len() < CONFIRMATIONS_MAX =>
                {
                    if count == 0 {
                        break;
                    }
                    gather_until.get_or_insert_with(|| Instant::now() + GATHER);
                }
                () = at(gather_until) => {
                    self.confirm(&mut gathered).await;
                    gather_until = None;
                }
                () = self.changed.notified() => next_sweep = Instant::now(),
                () = self.owed.notified() => {
                    next_sweep = next_sweep.min(Instant::now() + retry);
                }
                () = sleep_until(next_sweep) => {
                    self.confirm(&mut gathered).await;
                    gather_until = None;
                    let wait = if self.sweep().await {
                        retry = RETRY_MIN;
                        BEAT
                    } else {
                        retry = (retry * 2).min(RETRY_MAX);
                        retry
                    };
                    next_sweep = Instant::now() + wait;
                }
            }
        }
        while let Ok(id) = self.confirmed.try_recv() {
            gathered.push(id);
        }
        self.confirm(&mut gathered).await;
    }

    async fn confirm(&self, gathered: &mut Vec<TaskId>) {
        if gathered.is_empty() {
            return;
        }
        let ids = std::mem::take(gathered);
        if let Err(error) = self.store.confirm_dispatched(&ids).await {
            // The outbox still has them; a sweep enqueues them once more, to no effect.
            tracing::warn!(error = chain(&error), "confirm dispatched tasks");
        }
    }

    /// Empties the outbox. `false`: something failed, try again soon.
    async fn sweep(&self) -> bool {
        if let Err(error) = self.store.place_waiting(BATCH).await {
            tracing::warn!(error = chain(&error), "give VMs that wait a worker");
            return false;
        }
        loop {
            match self.sweep_page().await {
                Ok(count) if count < BATCH as usize => return true,
                Ok(_) => {}
                Err(error) => {
                    tracing::warn!(error, "dispatch tasks");
                    return false;
                }
            }
        }
    }

    async fn sweep_page(&self) -> Result<usize, String> {
        let tasks = self.store.undispatched(BATCH).await.map_err(|e| chain(&e))?;
        if tasks.is_empty() {
            return Ok(0);
        }
        let mut workers: HashMap<VmId, Option<WorkerId>> = HashMap::new();
        let mut dispatched = Vec::with_capacity(tasks.len());
        for task in &tasks {
            let worker = match task.vm_id {
                // Any worker takes it.
                None => None,
                Some(id) => {
                    if let Some(worker) = workers.get(&id) {
                        *worker
                    } else {
                        let vm = self.store.vm(id).await.map_err(|e| chain(&e))?;
                        let worker = vm.and_then(|vm| vm.worker_id);
                        workers.insert(id, worker);
                        worker
                    }
                }
            };
            // It may have an entry in the lane of a worker that it was for before. While that one
            // has it in hand it is owed still.
            let moved = self.queue.relocate(entry(task, worker)).await;
            if moved.map_err(|e| chain(&e))? {
                dispatched.push(task.id);
            }
        }
        if dispatched.is_empty() {
            return Ok(0);
        }
        self.store.confirm_dispatched(&dispatched).await.map_err(|e| chain(&e))?;
        tracing::debug!(count = dispatched.len(), "dispatched tasks from the outbox");
        Ok(tasks.len())
    }
}

async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}
