//! What every queue keeps, whatever is under it. A new implementation is done when this passes:
//! give it a `Rig` and a line at the end.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{collections::HashMap, sync::Arc, time::Duration};

use aether_postgres::{Database, Extent, testing, testing::TestDatabase};
use aether_queue::{
    Depth, Entry, Lane, Lease, ManualClock, PostgresQueue, Queue, QueueError, RedisQueue,
    SqliteQueue, postgres::SCHEMA,
};
use aether_redis::testing::Server;
use aether_types::{Priority, TaskId, WorkerId};
use async_trait::async_trait;

const LEASE: Duration = Duration::from_secs(10);
const NO_WAIT: Duration = Duration::ZERO;
const HANGS_AFTER: Duration = Duration::from_secs(30);
/// Longer than any test.
const LONG: Duration = Duration::from_hours(1);

/// A queue with a clock in hand.
#[async_trait]
trait Rig: Sized + Send + Sync {
    type Queue: Queue;

    /// `None`: it cannot be had on this host, and that was said.
    async fn new() -> Option<Self>;

    fn queue(&self) -> Arc<Self::Queue>;

    /// Lets time pass.
    async fn pass(&self, time: Duration);

    /// Ends the process that has the queue, and starts it again.
    async fn restart(&mut self);
}

struct SqliteRig {
    folder: tempfile::TempDir,
    clock: Arc<ManualClock>,
    queue: Option<Arc<SqliteQueue>>,
}

#[async_trait]
impl Rig for SqliteRig {
    type Queue = SqliteQueue;

    async fn new() -> Option<Self> {
        let clock = Arc::new(ManualClock::new());
        let mut rig = Self { folder: tempfile::tempdir().unwrap(), clock, queue: None };
        rig.restart().await;
        Some(rig)
    }

    fn queue(&self) -> Arc<SqliteQueue> {
        Arc::clone(self.queue.as_ref().unwrap())
    }

    async fn pass(&self, time: Duration) {
        self.clock.advance(time);
    }

    async fn restart(&mut self) {
        drop(self.queue.take());
        let path = self.folder.path().join("queue.db");
        let queue = SqliteQueue::open_with_clock(&path, self.clock.clone()).await.unwrap();
        self.queue = Some(Arc::new(queue));
    }
}

struct PostgresRig {
    clock: Arc<ManualClock>,
    queue: Option<Arc<PostgresQueue>>,
    test: TestDatabase,
}

#[async_trait]
impl Rig for PostgresRig {
    type Queue = PostgresQueue;

    async fn new() -> Option<Self> {
        if !testing::available() {
            return None;
        }
        let test = testing::database("queue", async |config| {
            aether_postgres::up(&config, &[SCHEMA], Extent::Expand).await.unwrap();
        })
        .await;
        let mut rig = Self { clock: Arc::new(ManualClock::new()), queue: None, test };
        rig.restart().await;
        Some(rig)
    }

    fn queue(&self) -> Arc<PostgresQueue> {
        Arc::clone(self.queue.as_ref().unwrap())
    }

    async fn pass(&self, time: Duration) {
        self.clock.advance(time);
    }

    async fn restart(&mut self) {
        drop(self.queue.take());
        let database = Database::open(self.test.config.clone()).await.unwrap();
        let queue = PostgresQueue::open_with_clock(&database, self.clock.clone()).await.unwrap();
        self.queue = Some(Arc::new(queue));
    }
}

struct RedisRig {
    clock: Arc<ManualClock>,
    queue: Option<Arc<RedisQueue>>,
    server: Server,
}

#[async_trait]
impl Rig for RedisRig {
    type Queue = RedisQueue;

    async fn new() -> Option<Self> {
        if !aether_redis::testing::available() {
            return None;
        }
        let clock = Arc::new(ManualClock::new());
        let mut rig = Self { clock, queue: None, server: Server::forgetful() };
        rig.restart().await;
        Some(rig)
    }

    fn queue(&self) -> Arc<RedisQueue> {
        Arc::clone(self.queue.as_ref().unwrap())
    }

    async fn pass(&self, time: Duration) {
        self.clock.advance(time);
    }

    async fn restart(&mut self) {
        drop(self.queue.take());
        let config = self.server.config();
        let queue = RedisQueue::open_with_clock(config, "test", self.clock.clone()).await.unwrap();
        self.queue = Some(Arc::new(queue));
    }
}

fn entry(lane: Lane, priority: Priority) -> Entry {
    Entry { task: TaskId::new(), lane, priority, delay: Duration::ZERO }
}

fn shared() -> Entry {
    entry(Lane::Shared, Priority::Default)
}

async fn claim(queue: &impl Queue, worker: WorkerId) -> Option<Lease> {
    queue.claim(worker, LEASE, NO_WAIT).await.unwrap()
}

fn is_lost(answer: &Result<(), QueueError>) -> bool {
    matches!(answer, Err(QueueError::Lost))
}

async fn an_entry_is_claimed_once_and_gone_when_complete<R: Rig>(rig: R) {
    let (queue, worker) = (rig.queue(), WorkerId::new());
    let entry = shared();
    assert_eq!(claim(&*queue, worker).await, None);
    queue.enqueue(&[entry]).await.unwrap();
    assert!(queue.contains(entry.task).await.unwrap());
    let lease = claim(&*queue, worker).await.unwrap();
    assert_eq!((lease.task, lease.worker, lease.duration), (entry.task, worker, LEASE));
    assert_eq!(claim(&*queue, worker).await, None);
    assert_eq!(queue.depth().await.unwrap(), Depth { leased: 1, ..Depth::default() });
    queue.complete(&lease).await.unwrap();
    assert!(is_lost(&queue.complete(&lease).await));
    assert!(!queue.contains(entry.task).await.unwrap());
    assert_eq!(queue.depth().await.unwrap(), Depth::default());
}

async fn enqueueing_again_changes_nothing<R: Rig>(rig: R) {
    let (queue, worker) = (rig.queue(), WorkerId::new());
    let first = shared();
    let again = Entry { priority: Priority::Critical, ..first };
    queue.enqueue(&[first, again, first]).await.unwrap();
    queue.enqueue(&[again]).await.unwrap();
    assert_eq!(queue.depth().await.unwrap().ready, 1);
    let lease = claim(&*queue, worker).await.unwrap();
    queue.enqueue(&[again]).await.unwrap();
    assert_eq!(claim(&*queue, worker).await, None);
    queue.complete(&lease).await.unwrap();
}

async fn entries_of_one_priority_come_in_order<R: Rig>(rig: R) {
    let (queue, worker) = (rig.queue(), WorkerId::new());
    let entries: Vec<_> = (0..20).map(|_| shared()).collect();
    queue.enqueue(&entries[..7]).await.unwrap();
    for entry in &entries[7..] {
        queue.enqueue(std::slice::from_ref(entry)).await.unwrap();
    }
    for entry in entries {
        assert_eq!(claim(&*queue, worker).await.unwrap().task, entry.task);
    }
}

async fn priorities_share_by_weight_and_none_starves<R: Rig>(rig: R) {
    let (queue, worker) = (rig.queue(), WorkerId::new());
    let entries: Vec<_> = (0..60).map(|i| entry(Lane::Shared, Priority::ALL[i % 4])).collect();
    let priority: HashMap<_, _> = entries.iter().map(|e| (e.task, e.priority)).collect();
    queue.enqueue(&entries).await.unwrap();
    let mut counts = HashMap::new();
    for _ in 0..15 {
        let lease = claim(&*queue, worker).await.unwrap();
        *counts.entry(priority[&lease.task]).or_insert(0_u32) += 1;
    }
    for priority in Priority::ALL {
        assert_eq!(counts[priority], priority.weight(), "{priority:?}");
    }
}

async fn a_workers_lane_is_its_own<R: Rig>(rig: R) {
    let queue = rig.queue();
    let (one, two) = (WorkerId::new(), WorkerId::new());
    let own = entry(Lane::Worker(one), Priority::Low);
    let any = entry(Lane::Shared, Priority::Critical);
    queue.enqueue(&[any, own]).await.unwrap();
    assert_eq!(claim(&*queue, one).await.unwrap().task, own.task, "its own lane goes first");
    assert_eq!(claim(&*queue, two).await.unwrap().task, any.task);
    queue.enqueue(&[entry(Lane::Worker(one), Priority::Critical)]).await.unwrap();
    assert_eq!(claim(&*queue, two).await, None);
}

async fn a_workers_lane_does_not_starve_the_shared_one<R: Rig>(rig: R) {
    let (queue, worker) = (rig.queue(), WorkerId::new());
    let any = shared();
    queue.enqueue(&[any]).await.unwrap();
    let own: Vec<_> = (0..40).map(|_| entry(Lane::Worker(worker), Priority::Critical)).collect();
    queue.enqueue(&own).await.unwrap();
    let mut claims = 0;
    while claim(&*queue, worker).await.unwrap().task != any.task {
        claims += 1;
        assert!(claims < 16, "the shared lane waits for ever");
    }
}

async fn a_delayed_entry_waits_for_its_time<R: Rig>(rig: R) {
    let (queue, worker) = (rig.queue(), WorkerId::new());
    let entry = Entry { delay: Duration::from_secs(5), ..shared() };
    queue.enqueue(&[entry]).await.unwrap();
    assert_eq!(queue.depth().await.unwrap(), Depth { delayed: 1, ..Depth::default() });
    rig.pass(Duration::from_millis(4999)).await;
    assert_eq!(claim(&*queue, worker).await, None);
    rig.pass(Duration::from_millis(1)).await;
    assert_eq!(claim(&*queue, worker).await.unwrap().task, entry.task);
}

async fn a_waiting_claim_is_woken_by_an_entry<R: Rig>(rig: R) {
    let queue = rig.queue();
    let waiting = tokio::spawn({
        let queue = Arc::clone(&queue);
        async move { queue.claim(WorkerId::new(), LEASE, LONG).await.unwrap() }
    });
    tokio::task::yield_now().await;
    let entry = shared();
    queue.enqueue(&[entry]).await.unwrap();
    assert_eq!(waiting.await.unwrap().unwrap().task, entry.task);
}

async fn a_waiting_claim_is_woken_when_a_delay_ends<R: Rig>(rig: R) {
    let queue = rig.queue();
    let far = Entry { delay: Duration::from_secs(50), ..shared() };
    let near = Entry { delay: Duration::from_secs(5), ..shared() };
    queue.enqueue(&[far]).await.unwrap();
    let waiting = tokio::spawn({
        let queue = Arc::clone(&queue);
        async move { queue.claim(WorkerId::new(), LEASE, LONG).await.unwrap() }
    });
    tokio::task::yield_now().await;
    queue.enqueue(&[near]).await.unwrap();
    rig.pass(Duration::from_secs(5)).await;
    assert_eq!(waiting.await.unwrap().unwrap().task, near.task);
}

async fn a_claim_gives_up_when_its_time_is_over<R: Rig>(rig: R) {
    let queue = rig.queue();
    let waiting = tokio::spawn({
        let queue = Arc::clone(&queue);
        async move { queue.claim(WorkerId::new(), LEASE, Duration::from_secs(3)).await.unwrap() }
    });
    while !waiting.is_finished() {
        rig.pass(Duration::from_secs(1)).await;
        tokio::task::yield_now().await;
    }
    assert_eq!(waiting.await.unwrap(), None);
    queue.enqueue(&[shared()]).await.unwrap();
    assert!(claim(&*queue, WorkerId::new()).await.is_some());
}

async fn a_lease_that_runs_out_is_claimed_again_with_a_higher_epoch<R: Rig>(rig: R) {
    let queue = rig.queue();
    queue.enqueue(&[shared()]).await.unwrap();
    assert_eq!(queue.next_lease_end().await.unwrap(), None);
    let first = claim(&*queue, WorkerId::new()).await.unwrap();
    assert_eq!(queue.next_lease_end().await.unwrap(), Some(LEASE));
    rig.pass(LEASE / 2).await;
    assert_eq!(queue.sweep().await.unwrap(), 0);
    queue.renew(&first).await.unwrap();
    rig.pass(LEASE / 2).await;
    assert_eq!(queue.sweep().await.unwrap(), 0, "it was renewed");
    rig.pass(LEASE / 2).await;
    assert_eq!(queue.sweep().await.unwrap(), 1);
    assert!(is_lost(&queue.renew(&first).await));
    let second = claim(&*queue, WorkerId::new()).await.unwrap();
    assert!(second.epoch > first.epoch);
    assert!(is_lost(&queue.renew(&first).await));
    assert!(is_lost(&queue.complete(&first).await));
    assert!(is_lost(&queue.release(&first, NO_WAIT).await));
    queue.complete(&second).await.unwrap();
}

async fn a_sweep_wakes_a_waiting_claim<R: Rig>(rig: R) {
    let queue = rig.queue();
    queue.enqueue(&[shared()]).await.unwrap();
    let first = claim(&*queue, WorkerId::new()).await.unwrap();
    let waiting = tokio::spawn({
        let queue = Arc::clone(&queue);
        async move { queue.claim(WorkerId::new(), LEASE, LONG).await.unwrap() }
    });
    tokio::task::yield_now().await;
    rig.pass(LEASE).await;
    queue.sweep().await.unwrap();
    assert_eq!(waiting.await.unwrap().unwrap().task, first.task);
}

async fn a_released_entry_comes_back_after_its_delay<R: Rig>(rig: R) {
    let (queue, worker) = (rig.queue(), WorkerId::new());
    queue.enqueue(&[shared()]).await.unwrap();
    let first = claim(&*queue, worker).await.unwrap();
    queue.release(&first, Duration::from_secs(2)).await.unwrap();
    assert!(is_lost(&queue.complete(&first).await));
    assert_eq!(claim(&*queue, worker).await, None);
    rig.pass(Duration::from_secs(2)).await;
    let second = claim(&*queue, worker).await.unwrap();
    assert_eq!(second.task, first.task);
    assert!(second.epoch > first.epoch);
    queue.release(&second, NO_WAIT).await.unwrap();
    assert_eq!(claim(&*queue, worker).await.unwrap().task, first.task);
}

async fn only_an_entry_that_nobody_has_is_removed<R: Rig>(rig: R) {
    let (queue, worker) = (rig.queue(), WorkerId::new());
    let ready = shared();
    let delayed = Entry { delay: LONG, ..shared() };
    queue.enqueue(&[ready, delayed]).await.unwrap();
    assert!(queue.remove(delayed.task).await.unwrap());
    assert!(!queue.remove(delayed.task).await.unwrap());
    let lease = claim(&*queue, worker).await.unwrap();
    assert!(!queue.remove(ready.task).await.unwrap());
    queue.release(&lease, NO_WAIT).await.unwrap();
    assert!(queue.remove(ready.task).await.unwrap());
    assert_eq!(queue.depth().await.unwrap(), Depth::default());
}

async fn a_worker_that_starts_anew_gets_its_leases_back<R: Rig>(mut rig: R) {
    let (one, two) = (WorkerId::new(), WorkerId::new());
    rig.queue().enqueue(&[shared(), shared(), shared()]).await.unwrap();
    let mine = [claim(&*rig.queue(), one).await.unwrap(), claim(&*rig.queue(), one).await.unwrap()];
    let other = claim(&*rig.queue(), two).await.unwrap();
    rig.restart().await;
    let queue = rig.queue();
    assert_eq!(queue.depth().await.unwrap(), Depth { leased: 3, ..Depth::default() });
    assert_eq!(queue.reclaim(one).await.unwrap(), 2);
    assert_eq!(queue.reclaim(one).await.unwrap(), 0);
    for old in &mine {
        assert!(is_lost(&queue.renew(old).await));
        let new = claim(&*queue, one).await.unwrap();
        assert_eq!(new.task, old.task, "in the order in which they came");
        assert!(new.epoch > other.epoch);
    }
    queue.renew(&other).await.unwrap();
    queue.complete(&other).await.unwrap();
}

async fn epochs_rise_after_completion_and_restart<R: Rig>(mut rig: R) {
    let (entry, worker) = (shared(), WorkerId::new());
    let mut last = 0;
    for _ in 0..3 {
        for _ in 0..3 {
            rig.queue().enqueue(&[entry]).await.unwrap();
            let lease = claim(&*rig.queue(), worker).await.unwrap();
            assert!(lease.epoch > last);
            last = lease.epoch;
            rig.queue().complete(&lease).await.unwrap();
        }
        rig.restart().await;
    }
}

async fn what_was_acknowledged_survives_a_restart<R: Rig>(mut rig: R) {
    let worker = WorkerId::new();
    let delayed = Entry { delay: LONG, ..shared() };
    let entries = [entry(Lane::Shared, Priority::Low), shared(), shared(), delayed];
    rig.queue().enqueue(&entries).await.unwrap();
    let done = claim(&*rig.queue(), worker).await.unwrap();
    rig.queue().complete(&done).await.unwrap();
    assert!(rig.queue().remove(entries[2].task).await.unwrap());
    rig.restart().await;
    let queue = rig.queue();
    let expected = Depth { ready: 1, delayed: 1, leased: 0 };
    assert_eq!(queue.depth().await.unwrap(), expected);
    assert_eq!(claim(&*queue, worker).await.unwrap().task, entries[0].task);
    rig.pass(LONG).await;
    assert_eq!(claim(&*queue, worker).await.unwrap().task, delayed.task);
}

async fn a_dropped_claim_loses_no_wake_up<R: Rig>(rig: R) {
    let queue = rig.queue();
    for _ in 0..50 {
        // Two wait; the one that is woken goes away at the same moment.
        let waiting: Vec<_> = (0..2)
            .map(|_| {
                let queue = Arc::clone(&queue);
                tokio::spawn(
                    async move { queue.claim(WorkerId::new(), LEASE, LONG).await.unwrap() },
                )
            })
            .collect();
        for _ in 0..4 {
            tokio::task::yield_now().await;
        }
        queue.enqueue(&[shared()]).await.unwrap();
        waiting[0].abort();
        let mut answers = waiting.into_iter();
        let lease = match answers.next().unwrap().await {
            // It was faster than its end; another entry frees the second.
            Ok(lease) => {
                queue.enqueue(&[shared()]).await.unwrap();
                let second = answers.next().unwrap().await.unwrap().unwrap();
                queue.complete(&second).await.unwrap();
                lease.unwrap()
            }
            Err(_) => answers.next().unwrap().await.unwrap().unwrap(),
        };
        queue.complete(&lease).await.unwrap();
        assert_eq!(queue.depth().await.unwrap(), Depth::default());
    }
}

/// Many workers and many producers at once: each entry is had exactly once.
async fn every_entry_is_had_once_by_one_of_many<R: Rig>(rig: R) {
    const ENTRIES: usize = 400;
    let queue = rig.queue();
    let mut workers = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let queue = Arc::clone(&queue);
        workers.spawn(async move {
            let (worker, mut had) = (WorkerId::new(), Vec::new());
            // Cut short now and then, as a worker that is asked for something else does.
            loop {
                let claim = queue.claim(worker, LEASE, Duration::from_secs(1));
                let Some(lease) = claim.await.unwrap() else { return had };
                had.push(lease.task);
                queue.complete(&lease).await.unwrap();
            }
        });
    }
    let mut producers = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let queue = Arc::clone(&queue);
        producers.spawn(async move {
            let mut made = Vec::new();
            for i in 0..ENTRIES / 4 {
                let entry = entry(Lane::Shared, Priority::ALL[i % 4]);
                queue.enqueue(&[entry]).await.unwrap();
                made.push(entry.task);
            }
            made
        });
    }
    let mut made: Vec<_> = producers.join_all().await.concat();
    while queue.depth().await.unwrap() != Depth::default() {
        tokio::task::yield_now().await;
    }
    // A worker may begin its last wait after the clock was moved, so it is moved until all are done.
    let mut ended = std::pin::pin!(workers.join_all());
    let mut had: Vec<_> = loop {
        tokio::select! {
            biased;
            had = &mut ended => break had.concat(),
            () = rig.pass(Duration::from_secs(2)) => tokio::task::yield_now().await,
        }
    };
    made.sort();
    had.sort();
    assert_eq!(had, made);
}

macro_rules! contract {
    ($rig:ty: $($test:ident),+ $(,)?) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $test() {
                let Some(rig) = <$rig as super::Rig>::new().await else { return };
                // A wake-up that is lost shows as a test that waits for ever.
                let test = super::$test(rig);
                tokio::time::timeout(super::HANGS_AFTER, test).await.expect("the test hangs");
            }
        )+
    };
    ($rig:ty) => {
        contract! {
            $rig:
            an_entry_is_claimed_once_and_gone_when_complete,
            enqueueing_again_changes_nothing,
            entries_of_one_priority_come_in_order,
            priorities_share_by_weight_and_none_starves,
            a_workers_lane_is_its_own,
            a_workers_lane_does_not_starve_the_shared_one,
            a_delayed_entry_waits_for_its_time,
            a_waiting_claim_is_woken_by_an_entry,
            a_waiting_claim_is_woken_when_a_delay_ends,
            a_claim_gives_up_when_its_time_is_over,
            a_lease_that_runs_out_is_claimed_again_with_a_higher_epoch,
            a_sweep_wakes_a_waiting_claim,
            a_released_entry_comes_back_after_its_delay,
            only_an_entry_that_nobody_has_is_removed,
            a_worker_that_starts_anew_gets_its_leases_back,
            epochs_rise_after_completion_and_restart,
            what_was_acknowledged_survives_a_restart,
            a_dropped_claim_loses_no_wake_up,
            every_entry_is_had_once_by_one_of_many,
        }
    };
}

mod sqlite {
    contract!(super::SqliteRig);
}

mod postgres {
    contract!(super::PostgresRig);
}

mod redis {
    contract!(super::RedisRig);
}
