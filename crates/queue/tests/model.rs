//! Random interleavings against a model: no entry is lost, no two leases live, epochs rise, order
//! is kept, and a restart changes nothing that was acknowledged.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use aether_postgres::{Database, Extent, testing::TestDatabase};
use aether_queue::{
    Clock, Depth, Entry, Lane, Lease, ManualClock, PostgresQueue, Queue, QueueError, RedisQueue,
    SqliteQueue, postgres::SCHEMA,
};
use aether_redis::{Parts, testing::Server};
use aether_types::{Priority, TaskId, WorkerId};
use proptest::{prelude::*, test_runner::TestRunner};

const LEASE: Duration = Duration::from_secs(10);
const WORKERS: usize = 3;

#[derive(Debug, Clone)]
enum Op {
    /// `lane` past the workers is the shared one.
    Enqueue {
        lane: usize,
        priority: usize,
        delay_s: u64,
    },
    EnqueueAgain(usize),
    Claim(usize),
    /// The claim's future is polled once and dropped.
    DropClaim(usize),
    Renew(usize),
    Complete(usize),
    Release {
        lease: usize,
        delay_s: u64,
    },
    Remove(usize),
    Pass(u64),
    Sweep,
    Reclaim(usize),
    Restart,
}

fn op() -> impl Strategy<Value = Op> {
    // Mostly one lane and one priority, and short delays: order shows only among equals.
    let delay = prop_oneof![2 => Just(0_u64), 2 => 1..4_u64, 1 => 4..20_u64];
    let lane = prop_oneof![3 => Just(WORKERS), 1 => 0..WORKERS];
    let priority = prop_oneof![3 => Just(2_usize), 1 => 0..4_usize];
    prop_oneof![
        8 => (lane, priority, delay.clone())
            .prop_map(|(lane, priority, delay_s)| Op::Enqueue { lane, priority, delay_s }),
        1 => any::<usize>().prop_map(Op::EnqueueAgain),
        8 => (0..WORKERS).prop_map(Op::Claim),
        1 => (0..WORKERS).prop_map(Op::DropClaim),
        2 => any::<usize>().prop_map(Op::Renew),
        3 => any::<usize>().prop_map(Op::Complete),
        2 => (any::<usize>(), delay).prop_map(|(lease, delay_s)| Op::Release { lease, delay_s }),
        1 => any::<usize>().prop_map(Op::Remove),
        3 => (1..8_u64).prop_map(Op::Pass),
        2 => Just(Op::Sweep),
        1 => (0..WORKERS).prop_map(Op::Reclaim),
        1 => Just(Op::Restart),
    ]
}

#[derive(Debug, Clone, Copy)]
enum Place {
    Waiting { due: Duration },
    Leased { worker: usize, epoch: i64, until: Duration },
}

#[derive(Debug, Clone, Copy)]
struct Modelled {
    entry: Entry,
    seq: usize,
    place: Place,
    /// The last delay it was given, which a restart begins anew: the tests' clock stands apart
    /// from the wall clock that a restart goes by.
    delay: Duration,
}

/// What is under a queue.
enum Engine {
    Sqlite(tempfile::TempDir),
    Postgres(TestDatabase),
    Redis(aether_redis::Config),
}

impl Engine {
    async fn open(&self, clock: Arc<ManualClock>) -> Box<dyn Queue> {
        match self {
            Self::Sqlite(folder) => {
                let path = folder.path().join("queue.db");
                Box::new(SqliteQueue::open_with_clock(&path, clock).await.unwrap())
            }
            Self::Postgres(test) => {
                let database = Database::open(test.config.clone()).await.unwrap();
                Box::new(PostgresQueue::open_with_clock(&database, clock).await.unwrap())
            }
            Self::Redis(config) => {
                let opened = RedisQueue::open_with_clock(config.clone(), "test", clock).await;
                Box::new(opened.unwrap())
            }
        }
    }

    /// Whether leases and delays are in the process, and begin anew with it. Else they are a
    /// server's, with which a call goes on though nobody waits for its answer.
    fn is_in_process(&self) -> bool {
        matches!(self, Self::Sqlite(_))
    }
}

struct World {
    engine: Engine,
    clock: Arc<ManualClock>,
    queue: Option<Box<dyn Queue>>,
    workers: Vec<WorkerId>,
    entries: BTreeMap<TaskId, Modelled>,
    leases: Vec<Lease>,
    made: Vec<Entry>,
    last_epoch: i64,
}

/// A little less than whole seconds, as time passes in whole ones: what the wall clock adds in a
/// test never reaches the next.
fn delay(seconds: u64) -> Duration {
    if seconds == 0 { Duration::ZERO } else { Duration::from_millis(seconds * 1000 - 100) }
}

fn pick<T: Clone>(of: &[T], at: usize) -> Option<T> {
    (!of.is_empty()).then(|| of[at % of.len()].clone())
}

impl World {
    async fn new(engine: Engine) -> Self {
        let mut world = Self {
            engine,
            clock: Arc::new(ManualClock::new()),
            queue: None,
            workers: (0..WORKERS).map(|_| WorkerId::new()).collect(),
            entries: BTreeMap::new(),
            leases: Vec::new(),
            made: Vec::new(),
            last_epoch: 0,
        };
        world.reopen().await;
        world
    }

    fn queue(&self) -> &dyn Queue {
        &**self.queue.as_ref().unwrap()
    }

    fn now(&self) -> Duration {
        self.clock.now()
    }

    fn is_ready(&self, m: &Modelled) -> bool {
        matches!(m.place, Place::Waiting { due } if due <= self.now())
    }

    /// Whether the lease is the one that holds its entry.
    fn is_live(&self, lease: &Lease) -> bool {
        matches!(
            self.entries.get(&lease.task).map(|m| m.place),
            Some(Place::Leased { epoch, .. }) if epoch == lease.epoch
        )
    }

    async fn reopen(&mut self) {
        drop(self.queue.take());
        self.queue = Some(self.engine.open(self.clock.clone()).await);
    }

    async fn claim(&mut self, worker: usize) -> Option<Lease> {
        let id = self.workers[worker];
        let claimed = self.queue().claim(id, LEASE, Duration::ZERO).await.unwrap();
        let mine = |lane: Lane| lane == Lane::Shared || lane == Lane::Worker(id);
        let Some(lease) = claimed else {
            let missed: Vec<_> =
                self.entries.values().filter(|m| mine(m.entry.lane) && self.is_ready(m)).collect();
            assert!(missed.is_empty(), "nothing was claimed, though there was {missed:?}");
            return None;
        };
        self.claimed(worker, lease.clone());
        Some(lease)
    }

    fn claimed(&mut self, worker: usize, lease: Lease) {
        let id = self.workers[worker];
        let mine = |lane: Lane| lane == Lane::Shared || lane == Lane::Worker(id);
        let had = self.entries[&lease.task];
        assert!(self.is_ready(&had) && mine(had.entry.lane), "claimed {had:?}");
        let before = self.entries.values().find(|m| {
            m.entry.lane == had.entry.lane
                && m.entry.priority == had.entry.priority
                && m.seq < had.seq
                && self.is_ready(m)
        });
        assert!(before.is_none(), "{before:?} came before {had:?}");
        assert!(lease.epoch > self.last_epoch);
        self.last_epoch = lease.epoch;
        let until = self.now() + LEASE;
        self.entries.get_mut(&lease.task).unwrap().place =
            Place::Leased { worker, epoch: lease.epoch, until };
        self.leases.push(lease);
    }

    fn expect(&self, lease: &Lease, answer: &Result<(), QueueError>) -> bool {
        let live = self.is_live(lease);
        match answer {
            Ok(()) => assert!(live, "{lease:?} was taken back"),
            Err(QueueError::Lost) => assert!(!live, "{lease:?} was lost"),
            Err(other) => panic!("{other}"),
        }
        live
    }

    fn take_back(&mut self, which: impl Fn(&Place) -> bool) -> u64 {
        let now = self.clock.now();
        let mut count = 0;
        for m in self.entries.values_mut().filter(|m| which(&m.place)) {
            m.place = Place::Waiting { due: now };
            m.delay = Duration::ZERO;
            count += 1;
        }
        count
    }

    async fn apply(&mut self, op: Op) {
        match op {
            Op::Enqueue { lane, priority, delay_s } => {
                let entry = Entry {
                    task: TaskId::new(),
                    lane: self.workers.get(lane).copied().map_or(Lane::Shared, Lane::Worker),
                    priority: Priority::ALL[priority],
                    delay: delay(delay_s),
                };
                self.queue().enqueue(&[entry]).await.unwrap();
                let place = Place::Waiting { due: self.now() + entry.delay };
                let seq = self.made.len();
                let delay = entry.delay;
                self.made.push(entry);
                self.entries.insert(entry.task, Modelled { entry, seq, place, delay });
            }
            Op::EnqueueAgain(at) => {
                let live: Vec<_> = self.entries.values().map(|m| m.entry).collect();
                if let Some(entry) = pick(&live, at) {
                    self.queue().enqueue(&[entry]).await.unwrap();
                }
            }
            Op::Claim(worker) => {
                self.claim(worker).await;
            }
            // With a server it is not known when what is left of it ends.
            Op::DropClaim(_) if !self.engine.is_in_process() => {}
            Op::DropClaim(worker) => {
                let wait = Duration::from_secs(100);
                let mut claim = self.queue().claim(self.workers[worker], LEASE, wait);
                let early = std::future::poll_fn(|context| {
                    std::task::Poll::Ready(match claim.as_mut().poll(context) {
                        std::task::Poll::Ready(claimed) => claimed.unwrap(),
                        std::task::Poll::Pending => None,
                    })
                })
                .await;
                drop(claim);
                match early {
                    Some(lease) => self.claimed(worker, lease),
                    // What it was about to have is had by the next.
                    None => {
                        self.claim(worker).await;
                    }
                }
            }
            Op::Renew(at) => {
                let Some(lease) = pick(&self.leases, at) else { return };
                let answer = self.queue().renew(&lease).await;
                if self.expect(&lease, &answer) {
                    let renewed = self.now() + LEASE;
                    if let Some(Place::Leased { until, .. }) =
                        self.entries.get_mut(&lease.task).map(|m| &mut m.place)
                    {
                        *until = renewed;
                    }
                }
            }
            Op::Complete(at) => {
                let Some(lease) = pick(&self.leases, at) else { return };
                let answer = self.queue().complete(&lease).await;
                if self.expect(&lease, &answer) {
                    self.entries.remove(&lease.task);
                }
            }
            Op::Release { lease, delay_s } => {
                let Some(lease) = pick(&self.leases, lease) else { return };
                let answer = self.queue().release(&lease, delay(delay_s)).await;
                if self.expect(&lease, &answer) {
                    let due = self.now() + delay(delay_s);
                    let m = self.entries.get_mut(&lease.task).unwrap();
                    m.place = Place::Waiting { due };
                    m.delay = delay(delay_s);
                }
            }
            Op::Remove(at) => {
                let Some(entry) = pick(&self.made, at) else { return };
                let place = self.entries.get(&entry.task).map(|m| m.place);
                let waiting = matches!(place, Some(Place::Waiting { .. }));
                assert_eq!(self.queue().remove(entry.task).await.unwrap(), waiting);
                if waiting {
                    self.entries.remove(&entry.task);
                }
            }
            Op::Pass(seconds) => self.clock.advance(Duration::from_secs(seconds)),
            Op::Sweep => {
                let now = self.now();
                let swept = self.queue().sweep().await.unwrap();
                let expected =
                    self.take_back(|p| matches!(p, Place::Leased { until, .. } if *until <= now));
                assert_eq!(swept, expected);
            }
            Op::Reclaim(of) => {
                let reclaimed = self.queue().reclaim(self.workers[of]).await.unwrap();
                let expected =
                    self.take_back(|p| matches!(p, Place::Leased { worker, .. } if *worker == of));
                assert_eq!(reclaimed, expected);
            }
            Op::Restart => {
                self.reopen().await;
                if !self.engine.is_in_process() {
                    return;
                }
                let now = self.now();
                for m in self.entries.values_mut() {
                    match &mut m.place {
                        Place::Waiting { due } => *due = now + m.delay,
                        Place::Leased { until, .. } => *until = now + LEASE,
                    }
                }
            }
        }
    }

    async fn check(&self) {
        let mut expected = Depth::default();
        for m in self.entries.values() {
            match m.place {
                Place::Leased { .. } => expected.leased += 1,
                Place::Waiting { .. } if self.is_ready(m) => expected.ready += 1,
                Place::Waiting { .. } => expected.delayed += 1,
            }
        }
        assert_eq!(self.queue().depth().await.unwrap(), expected);
    }

    /// Everything that was acknowledged comes, once.
    async fn drain(&mut self) {
        self.apply(Op::Pass(100)).await;
        self.apply(Op::Sweep).await;
        for worker in 0..WORKERS {
            while let Some(lease) = self.claim(worker).await {
                self.queue().complete(&lease).await.unwrap();
                self.entries.remove(&lease.task);
            }
        }
        assert!(self.entries.is_empty(), "never claimed: {:?}", self.entries);
        assert_eq!(self.queue().depth().await.unwrap(), Depth::default());
    }
}

/// Runs random operations, each case on what `engine` gives.
fn check<F>(cases: u32, engine: impl Fn() -> F)
where
    F: Future<Output = Engine>,
{
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut runner = TestRunner::new(ProptestConfig { cases, ..ProptestConfig::default() });
    let all = prop::collection::vec(op(), 1..120);
    let outcome = runner.run(&all, |ops| {
        runtime.block_on(async {
            let mut world = World::new(engine().await).await;
            for op in ops {
                world.apply(op).await;
                world.check().await;
            }
            world.drain().await;
        });
        Ok(())
    });
    if let Err(error) = outcome {
        panic!("{error}");
    }
}

#[test]
fn the_queue_is_its_model_on_sqlite() {
    check(48, || async { Engine::Sqlite(tempfile::tempdir().unwrap()) });
}

#[test]
fn the_queue_is_its_model_on_postgres() {
    if !aether_postgres::testing::available() {
        return;
    }
    check(6, || async {
        let made = aether_postgres::testing::database("queue", async |config| {
            aether_postgres::up(&config, &[SCHEMA], Extent::Expand).await.unwrap();
        });
        Engine::Postgres(made.await)
    });
}

#[test]
fn the_queue_is_its_model_on_redis() {
    if !aether_redis::testing::available() {
        return;
    }
    let server = Server::forgetful();
    check(64, || async {
        let prefix = Some(WorkerId::new().to_string());
        Engine::Redis(server.config().with(Parts { prefix, ..Parts::default() }).unwrap())
    });
}
