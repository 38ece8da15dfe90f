//! The queue on Redis, for any number of processes.
//!
//! Every step is a script, so that whose turn it is among the priorities is one for all. Nobody
//! polls: a claim that finds nothing puts its worker in a line in the same step, and the script that
//! makes an entry ready takes the first out of the line, leases the entry to it and tells its
//! process. Where others were ready before, it only tells it to look. Entries that come together
//! wake as many as they are. Nothing is asked while nothing happens.
//!
//! ```text
//!   enqueue ─┐            ┌─ line not empty ──► lease, publish ─► process ─► waiter
//!   release ─┼─► script ──┼─ ready
//!   sweep   ─┘            └─ delayed ──► timer of the process ──► ready
//! ```
//!
//! What is lost on the way costs a moment: a message to a process that is gone goes to the next in
//! line; one that nobody there waits for is passed on; who was away looks again when it is back; and
//! each sweep wakes one where something is ready. A server that comes back as another process may
//! have lost its last second, or all: `may_have_lost` tells who has the truth.
//!
//! Time is the server's. Epochs begin no lower than its clock in microseconds.
//!
//! Claims that come while one is under way share the next script, and so do completions.

mod claim;
mod scripts;
mod together;
mod wake;

use std::{sync::Arc, time::Duration};

use aether_redis::{
    CallError, Config, Link, Trouble,
    redis::{Cmd, FromRedisValue, Script, cmd},
};
use aether_types::{TaskId, WorkerId};
use async_trait::async_trait;
use tokio::{task::JoinHandle, time::sleep};

use self::{
    claim::{Claim, Given, InLine, confirm},
    scripts::millis,
    together::Together,
    wake::Wake,
};
use crate::{
    Clock, Depth, Entry, Lane, Lease, Queue, QueueError, SystemClock, schedule::index,
    waiters::Waiter,
};

/// Entries, leases or delays of one script: others wait meanwhile, for a millisecond or two.
const BATCH: usize = 256;

/// Delays that a claim ends before it looks.
const DELAYS_OF_A_CLAIM: usize = 64;

/// A lease that was handed to a process runs so long, until that says that it has it: one that
/// stands still, or is beyond a broken network, keeps nobody waiting for longer.
const CONFIRMED_WITHIN: Duration = Duration::from_secs(2);

/// Between questions to a server that cannot answer.
const AWAY_PAUSE: Duration = Duration::from_millis(500);

#[derive(Debug)]
pub struct RedisQueue {
    shared: Arc<Shared>,
    tasks: [JoinHandle<()>; 2],
}

#[derive(Debug)]
struct Shared {
    link: Link,
    wake: Arc<Wake>,
    root: String,
    clock: Arc<dyn Clock>,
    time: Time,
    confirmed_within: Duration,
    claims: Arc<Together<Claim, Given>>,
    /// Of leases whose tasks have ended: whether each was held.
    completions: Arc<Together<Lease, bool>>,
}

/// Whose time counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Time {
    Server,
    /// For tests, which let it pass.
    Clock,
}

impl RedisQueue {
    /// `owner` names the store that the tasks are in: a queue is one store's.
    pub async fn open(config: Config, owner: &str) -> Result<Self, QueueError> {
        Self::start(config, owner, Arc::new(SystemClock::new()), Time::Server).await
    }

    /// For tests: time is what the clock says, for the entries too.
    pub async fn open_with_clock(
        config: Config,
        owner: &str,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, QueueError> {
        Self::start(config, owner, clock, Time::Clock).await
    }

    async fn start(
        config: Config,
        owner: &str,
        clock: Arc<dyn Clock>,
        time: Time,
    ) -> Result<Self, QueueError> {
        let root = format!("{}:queue:", config.root());
        let wake = Arc::new(Wake::default());
        let link = Link::open(config, wake.clone())
            .await
            .map_err(|error| QueueError::Open(Box::new(error)))?;
        let confirmed_within = match time {
            Time::Server => CONFIRMED_WITHIN,
            // Between a hand-over and its confirmation a test would let any time pass.
            Time::Clock => Duration::MAX,
        };
        let shared = Arc::new(Shared {
            link,
            wake,
            root,
            clock,
            time,
            confirmed_within,
            claims: Arc::default(),
            completions: Arc::default(),
        });
        shared.take_possession(owner).await?;
        let tasks = [
            tokio::spawn(wake::end_delays(Arc::clone(&shared))),
            tokio::spawn(wake::pass_on(Arc::clone(&shared))),
        ];
        Ok(Self { shared, tasks })
    }
}

impl Drop for RedisQueue {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl Shared {
    async fn run<T: FromRedisValue>(
        &self,
        context: &'static str,
        script: &Script,
        values: &[String],
    ) -> Result<T, QueueError> {
        self.call(script, values).await.map_err(|error| failed(context, error))
    }

    async fn call<T: FromRedisValue>(
        &self,
        script: &Script,
        values: &[String],
    ) -> Result<T, CallError> {
        let now = match self.time {
            Time::Server => String::new(),
            Time::Clock => millis(self.clock.now()).to_string(),
        };
        self.link
            .call(|connection| scripts::run(script, connection, &self.root, &now, values))
            .await
    }

    async fn complete_all(&self, leases: Vec<Lease>) -> Result<Vec<bool>, CallError> {
        let values =
            leases.iter().flat_map(|lease| [lease.task.to_string(), lease.epoch.to_string()]);
        self.call(&scripts::COMPLETE, &values.collect::<Vec<_>>()).await
    }

    /// The first that comes owns it.
    async fn take_possession(&self, owner: &str) -> Result<(), QueueError> {
        let mut command = cmd("SET");
        command.arg(format!("{}owner", self.root)).arg(owner).arg("NX").arg("GET");
        let before: Option<String> = self.ask("own the queue", &command).await?;
        if before.is_some_and(|before| before != owner) {
            let place = self.link.config().place().clone();
            return Err(QueueError::Foreign { place });
        }
        Ok(())
    }

    async fn ask<T: FromRedisValue>(
        &self,
        context: &'static str,
        command: &Cmd,
    ) -> Result<T, QueueError> {
        self.link
            .call(|mut connection| async move { command.query_async(&mut connection).await })
            .await
            .map_err(|error| failed(context, error))
    }

    /// Runs a script of a lease, which says whether it held.
    async fn held(
        &self,
        context: &'static str,
        script: &Script,
        lease: &Lease,
        more: Option<i64>,
    ) -> Result<(), QueueError> {
        let mut values = vec![lease.task.to_string(), lease.epoch.to_string()];
        values.extend(more.map(|value| value.to_string()));
        match self.run::<i64>(context, script, &values).await? {
            0 => Err(QueueError::Lost),
            _ => Ok(()),
        }
    }

    /// Does it in batches until one is not full; how much that was.
    async fn in_batches(&self, context: &'static str, script: &Script) -> Result<u64, QueueError> {
        let mut all = 0;
        loop {
            let done: u64 = self.run(context, script, &[BATCH.to_string()]).await?;
            all += done;
            if done < BATCH as u64 {
                return Ok(all);
            }
        }
    }

    /// Ends the delays that are over. In how long the next one is.
    async fn promote(&self) -> Result<Option<Duration>, QueueError> {
        loop {
            let (ended, left): (usize, i64) =
                self.run("end delays", &scripts::PROMOTE, &[BATCH.to_string()]).await?;
            if ended < BATCH {
                return Ok(u64::try_from(left).ok().map(Duration::from_millis));
            }
        }
    }

    /// Out of the server's line, unless more than these of its claims wait here. One that is left
    /// in it is told of an entry in vain, which is given back then.
    async fn leave(&self, worker: WorkerId, ours: usize) {
        if self.wake.waiters.count(worker) > ours {
            return;
        }
        let left = self.run::<i64>("leave the line", &scripts::LEAVE, &[worker.to_string()]).await;
        if let Err(error) = left {
            tracing::debug!(%error, "leave the line");
        }
    }

    async fn pass(&self) -> Result<(), QueueError> {
        self.run("wake another", &scripts::PASS, &[]).await
    }

    async fn look(&self) -> Result<(Depth, Option<Duration>), QueueError> {
        let (ready, delayed, leased, left): (u64, u64, u64, i64) =
            self.run("look at the queue", &scripts::LOOK, &[]).await?;
        let left = u64::try_from(left).ok().map(Duration::from_millis);
        Ok((Depth { ready, delayed, leased }, left))
    }
}

fn failed(context: &'static str, error: impl Into<Arc<CallError>>) -> QueueError {
    let source = error.into();
    match source.trouble {
        Trouble::Away => QueueError::Unreachable { context, source: Some(Box::new(source)) },
        Trouble::Full => QueueError::Full { context, source },
        Trouble::Refused | Trouble::Other => QueueError::Redis { context, source },
    }
}

fn lane(lane: Lane) -> String {
    match lane {
        Lane::Shared => "s".to_owned(),
        Lane::Worker(worker) => worker.to_string(),
    }
}

impl RedisQueue {
    /// Another of the worker's claims is to take its place in the line.
    fn handed(&self, waiter: Waiter<'_>, lease: Lease) -> Lease {
        waiter.looked();
        self.shared.wake.waiters.wake(Lane::Worker(lease.worker));
        confirm(&self.shared, &lease);
        lease
    }
}

#[async_trait]
impl Queue for RedisQueue {
    async fn enqueue(&self, entries: &[Entry]) -> Result<(), QueueError> {
        let shared = &*self.shared;
        for batch in entries.chunks(BATCH) {
            let value = |entry: &Entry| {
                let (priority, delay) = (index(entry.priority), millis(entry.delay));
                let (task, lane) = (entry.task.to_string(), lane(entry.lane));
                [task, lane, priority.to_string(), delay.to_string()]
            };
            let values: Vec<String> = batch.iter().flat_map(value).collect();
            let delayed: u64 = shared.run("enqueue", &scripts::ENQUEUE, &values).await?;
            if delayed > 0 {
                shared.wake.delayed.notify_one();
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
        let mut line = InLine { shared: &self.shared, worker, is_left: wait.is_zero() };
        let mut woken: Option<Waiter<'_>> = None;
        loop {
            // In line here before it is in line there: no word comes unheard.
            let waiter = shared.wake.waiters.join(worker);
            let claim = Claim { worker, length: lease, waits: !wait.is_zero() };
            let claimed = claim::claim(&self.shared, claim).await;
            let was_woken = woken.take().map(Waiter::looked).is_some();
            let is_away = match claimed {
                Ok(Some(lease)) => {
                    drop(waiter);
                    line.is_left = true;
                    // There is one word for a worker, however many of its claims wait.
                    if was_woken {
                        shared.wake.waiters.wake(Lane::Worker(worker));
                    }
                    return Ok(Some(lease));
                }
                Ok(None) if wait.is_zero() => return Ok(None),
                Ok(None) => {
                    // It was handed one before that claim, which put it into the line again.
                    if waiter.has_lease() {
                        shared.leave(worker, 0).await;
                        if let Some(lease) = waiter.take() {
                            line.is_left = true;
                            return Ok(Some(self.handed(waiter, lease)));
                        }
                    }
                    false
                }
                Err(QueueError::Unreachable { .. }) if !wait.is_zero() => true,
                Err(error) => return Err(error),
            };
            tokio::select! {
                biased;
                () = waiter.woken() => match waiter.take() {
                    Some(lease) => {
                        line.is_left = true;
                        return Ok(Some(self.handed(waiter, lease)));
                    }
                    None => woken = Some(waiter),
                },
                // It may be there and not serve yet, of which no word comes.
                () = sleep(AWAY_PAUSE), if is_away => {}
                () = shared.clock.sleep_until(deadline) => {
                    // What was handed before the server knew has come when it answers.
                    shared.leave(worker, 1).await;
                    line.is_left = true;
                    return Ok(waiter.take().map(|lease| self.handed(waiter, lease)));
                }
            }
        }
    }

    async fn renew(&self, lease: &Lease) -> Result<(), QueueError> {
        self.shared.held("renew a lease", &scripts::RENEW, lease, None).await
    }

    async fn complete(&self, lease: &Lease) -> Result<(), QueueError> {
        const CONTEXT: &str = "remove an entry";
        let shared = Arc::clone(&self.shared);
        let complete = move |leases| {
            let shared = Arc::clone(&shared);
            async move { shared.complete_all(leases).await }
        };
        match self.shared.completions.ask(lease.clone(), complete).await {
            Some(Ok(true)) => Ok(()),
            Some(Ok(false)) => Err(QueueError::Lost),
            Some(Err(error)) => Err(failed(CONTEXT, error)),
            None => Err(QueueError::Unreachable { context: CONTEXT, source: None }),
        }
    }

    async fn release(&self, lease: &Lease, delay: Duration) -> Result<(), QueueError> {
        let delay = millis(delay);
        self.shared.held("give an entry back", &scripts::RELEASE, lease, Some(delay)).await?;
        if delay > 0 {
            self.shared.wake.delayed.notify_one();
        }
        Ok(())
    }

    async fn remove(&self, task: TaskId) -> Result<bool, QueueError> {
        let removed: u64 =
            self.shared.run("remove an entry", &scripts::REMOVE, &[task.to_string()]).await?;
        Ok(removed > 0)
    }

    async fn sweep(&self) -> Result<u64, QueueError> {
        self.shared.in_batches("take back leases", &scripts::SWEEP).await
    }

    async fn next_lease_end(&self) -> Result<Option<Duration>, QueueError> {
        Ok(self.shared.look().await?.1)
    }

    async fn reclaim(&self, worker: WorkerId) -> Result<u64, QueueError> {
        // What is leased by then is seen whatever changes meanwhile, some of it twice.
        let (shared, name) = (&*self.shared, worker.to_string());
        let (mut cursor, mut all) = ("0".to_owned(), 0);
        loop {
            let mut command = cmd("HSCAN");
            command.arg(format!("{}h", shared.root)).arg(&cursor).arg("COUNT").arg(BATCH);
            let (next, page): (String, Vec<(String, String)>) =
                shared.ask("look for a worker's leases", &command).await?;
            let its = page.into_iter().filter(|(_, lease)| lease.ends_with(&name));
            let values: Vec<_> =
                std::iter::once(name.clone()).chain(its.map(|(task, _)| task)).collect();
            if values.len() > 1 {
                let taken: u64 =
                    shared.run("take back a worker's leases", &scripts::RECLAIM, &values).await?;
                all += taken;
            }
            if next == "0" {
                return Ok(all);
            }
            cursor = next;
        }
    }

    async fn contains(&self, task: TaskId) -> Result<bool, QueueError> {
        let mut command = cmd("HEXISTS");
        command.arg(format!("{}e", self.shared.root)).arg(task.to_string());
        self.shared.ask("look for a task", &command).await
    }

    async fn depth(&self) -> Result<Depth, QueueError> {
        Ok(self.shared.look().await?.0)
    }

    async fn may_have_lost(&self) {
        self.shared.wake.lost.notified().await;
    }
}
