//! What only a server can go through: several processes on one queue, a server that goes away
//! under those that wait, forgets what it had, or is full; and how much it is asked.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, Instant},
};

use aether_queue::{Depth, Entry, Lane, Lease, ManualClock, Queue, QueueError, RedisQueue};
use aether_redis::{Config, Parts, testing, testing::Server};
use aether_types::{ErrorCode, Priority, TaskId, WorkerId};
use tokio::{task::JoinHandle, time::timeout};

const LEASE: Duration = Duration::from_secs(30);
/// Longer than any test: who is woken by it was not woken at all.
const LONG: Duration = Duration::from_hours(1);
const HANGS_AFTER: Duration = Duration::from_secs(20);
const OWNER: &str = "test";

fn entry(lane: Lane) -> Entry {
    Entry { task: TaskId::new(), lane, priority: Priority::Default, delay: Duration::ZERO }
}

/// As a process of its own has it.
async fn process(config: &Config) -> Arc<RedisQueue> {
    Arc::new(RedisQueue::open(config.clone(), OWNER).await.unwrap())
}

fn waiting(queue: &Arc<RedisQueue>, worker: WorkerId) -> JoinHandle<TaskId> {
    let queue = Arc::clone(queue);
    tokio::spawn(async move {
        let lease = queue.claim(worker, LEASE, LONG).await.unwrap().unwrap();
        queue.complete(&lease).await.unwrap();
        lease.task
    })
}

async fn in_time<T>(work: impl Future<Output = T>) -> T {
    timeout(HANGS_AFTER, work).await.expect("the test hangs")
}

/// Completes when so many workers are in the server's line.
async fn in_line(server: &Server, count: usize) {
    let key = "{aetherium}:queue:line";
    let there = async {
        while server.ask(&["ZCARD", key]) != count.to_string() {
            tokio::task::yield_now().await;
        }
    };
    in_time(there).await;
}

async fn now(queue: &RedisQueue, worker: WorkerId) -> Option<Lease> {
    queue.claim(worker, LEASE, Duration::ZERO).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_entry_of_one_process_wakes_the_worker_in_another() {
    if !testing::available() {
        return;
    }
    let server = Server::forgetful();
    let (gateway, worker) = (process(&server.config()).await, process(&server.config()).await);
    let id = WorkerId::new();
    in_time(async {
        for round in 0..40_u64 {
            let waits = waiting(&worker, id);
            let lane = if round % 2 == 0 { Lane::Worker(id) } else { Lane::Shared };
            // Of a delay the process that made it knows, and tells the one that waits.
            let delay = Duration::from_millis(if round % 5 == 0 { 30 } else { 0 });
            let entry = Entry { delay, ..entry(lane) };
            gateway.enqueue(&[entry]).await.unwrap();
            assert_eq!(waits.await.unwrap(), entry.task);
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_entries_at_once_wake_all_who_wait() {
    if !testing::available() {
        return;
    }
    let server = Server::forgetful();
    let processes = [process(&server.config()).await, process(&server.config()).await];
    // Two claims of each worker: there is one word for both.
    let workers: Vec<_> = (0..6).map(|_| WorkerId::new()).collect();
    let waits: Vec<_> = (0..12).map(|i| waiting(&processes[i / 2 % 2], workers[i / 2])).collect();
    in_line(&server, 6).await;
    let entries: Vec<_> = (0..12).map(|_| entry(Lane::Shared)).collect();
    processes[0].enqueue(&entries).await.unwrap();
    let mut had = HashSet::new();
    for wait in waits {
        had.insert(in_time(wait).await.unwrap());
    }
    assert_eq!(had, entries.iter().map(|entry| entry.task).collect());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_that_is_dropped_leaves_the_line() {
    if !testing::available() {
        return;
    }
    let server = Server::forgetful();
    let (queue, id) = (process(&server.config()).await, WorkerId::new());
    // Two of one worker are one in the server's line: the first that goes leaves the other in it.
    let (first, second) = (waiting(&queue, id), waiting(&queue, id));
    let dropped: Vec<_> = (0..3).map(|_| waiting(&queue, WorkerId::new())).collect();
    in_line(&server, 4).await;
    for wait in dropped.into_iter().chain([first]) {
        wait.abort();
        assert!(wait.await.unwrap_err().is_cancelled());
    }
    in_line(&server, 1).await;
    let entry = entry(Lane::Shared);
    queue.enqueue(&[entry]).await.unwrap();
    assert_eq!(in_time(second).await.unwrap(), entry.task);
}

/// As a process leaves it that was killed: in line, with a channel that nobody listens to.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_gone_keeps_no_entry_from_who_waits() {
    if !testing::available() {
        return;
    }
    let server = Server::forgetful();
    let (here, gateway) = (process(&server.config()).await, process(&server.config()).await);
    for turn in 0..3 {
        let gone = WorkerId::new().to_string();
        let root = "{aetherium}:queue:";
        server.ask(&["HSET", &format!("{root}idle"), &gone, "30000:2000:nobody"]);
        server.ask(&["ZADD", &format!("{root}line"), &format!("-{turn}"), &gone]);
    }
    let waits = waiting(&here, WorkerId::new());
    in_line(&server, 4).await;
    let entry = entry(Lane::Shared);
    gateway.enqueue(&[entry]).await.unwrap();
    assert_eq!(in_time(waits).await.unwrap(), entry.task);
    in_line(&server, 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_waits_is_served_within_a_second_after_the_server_is_back() {
    if !testing::available() {
        return;
    }
    let mut server = Server::start(&["--appendonly", "yes", "--appendfsync", "always"]);
    let (gateway, worker) = (process(&server.config()).await, process(&server.config()).await);
    let id = WorkerId::new();
    for _ in 0..3 {
        let before = entry(Lane::Shared);
        gateway.enqueue(&[before]).await.unwrap();
        let lease = now(&worker, id).await.unwrap();
        let waits = waiting(&worker, id);
        in_line(&server, 1).await;
        server.stop();
        // Nothing is lost by asking meanwhile, and it is said soon.
        let refused = gateway.enqueue(&[entry(Lane::Shared)]).await.unwrap_err();
        assert!(matches!(refused, QueueError::Unreachable { .. }), "{refused:?}");
        server.start_again();
        let back = Instant::now();
        let after = entry(Lane::Shared);
        // As the loop over the outbox does.
        while gateway.enqueue(&[after]).await.is_err() {
            tokio::task::yield_now().await;
        }
        assert_eq!(in_time(waits).await.unwrap(), after.task);
        assert!(back.elapsed() < Duration::from_secs(1), "{:?}", back.elapsed());
        // What was acknowledged is there, and a lease goes on.
        worker.renew(&lease).await.unwrap();
        worker.complete(&lease).await.unwrap();
        assert_eq!(worker.depth().await.unwrap(), Depth::default());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_gone_is_said_to_be_gone_and_soon_at_once() {
    if !testing::available() {
        return;
    }
    let mut server = Server::forgetful();
    let queue = process(&server.config()).await;
    server.stop();
    for (call, longest) in [(0, Duration::from_secs(2)), (1, Duration::from_millis(300))] {
        let begun = Instant::now();
        let error = queue.enqueue(&[entry(Lane::Shared)]).await.unwrap_err();
        assert!(begun.elapsed() < longest, "{call}: {:?}", begun.elapsed());
        assert_eq!((error.code(), error.is_retryable()), (ErrorCode::Unavailable, true));
    }
    // A claim that does not wait says so too; one that waits goes on waiting.
    assert!(queue.claim(WorkerId::new(), LEASE, Duration::ZERO).await.is_err());
    let short = queue.claim(WorkerId::new(), LEASE, Duration::from_millis(20)).await;
    assert_eq!(short.unwrap(), None);
}

/// Killed without a file: everything is gone. The one with the truth hears of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_forgot_is_noticed_and_epochs_rise_all_the_same() {
    if !testing::available() {
        return;
    }
    let mut server = Server::forgetful();
    let queue = process(&server.config()).await;
    let worker = WorkerId::new();
    let (kept, lost) = (entry(Lane::Shared), entry(Lane::Shared));
    queue.enqueue(&[kept, lost]).await.unwrap();
    let lease = now(&queue, worker).await.unwrap();
    assert!(timeout(Duration::ZERO, queue.may_have_lost()).await.is_err());
    server.stop();
    server.start_again();
    in_time(queue.may_have_lost()).await;
    assert!(!queue.contains(lost.task).await.unwrap());
    assert!(matches!(queue.renew(&lease).await.unwrap_err(), QueueError::Lost));
    // From the store, as whoever heard of it does.
    queue.enqueue(&[kept, lost]).await.unwrap();
    let again = now(&queue, worker).await.unwrap();
    assert_eq!(again.task, kept.task);
    assert!(again.epoch > lease.epoch);
}

/// With `everysec` a server that is killed comes back as it was a second ago: its counters too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn epochs_rise_over_a_server_that_lost_its_last_second() {
    if !testing::available() {
        return;
    }
    let mut server = Server::start(&["--appendonly", "yes", "--appendfsync", "always"]);
    let queue = process(&server.config()).await;
    let worker = WorkerId::new();
    let claim = async || {
        queue.enqueue(&[entry(Lane::Shared)]).await.unwrap();
        now(&queue, worker).await.unwrap()
    };
    let before = claim().await;
    let file = server.folder().join("appendonlydir");
    let files = || std::fs::read_dir(&file).unwrap().map(|entry| entry.unwrap().path());
    let kept: Vec<_> = files().map(|path| (path.clone(), std::fs::read(path).unwrap())).collect();
    let mut last = before;
    for _ in 0..100 {
        last = claim().await;
    }
    server.stop();
    for (path, content) in kept {
        std::fs::write(path, content).unwrap();
    }
    server.start_again();
    in_time(queue.may_have_lost()).await;
    assert!(claim().await.epoch > last.epoch);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_server_takes_nothing_new_and_gives_what_it_has() {
    if !testing::available() {
        return;
    }
    let server = Server::forgetful();
    let queue = process(&server.config()).await;
    let first: Vec<_> = (0..500).map(|_| entry(Lane::Shared)).collect();
    queue.enqueue(&first).await.unwrap();
    assert_eq!(server.ask(&["CONFIG", "SET", "maxmemory", "1mb"]), "OK");
    let more = entry(Lane::Shared);
    let error = queue.enqueue(&[more]).await.unwrap_err();
    assert!(matches!(error, QueueError::Full { .. }), "{error:?}");
    assert_eq!((error.code(), error.is_retryable()), (ErrorCode::Unavailable, true));
    assert!(!queue.contains(more.task).await.unwrap(), "all or nothing");
    // What is there is claimed, kept, given back, waited for and ended.
    let worker = WorkerId::new();
    let lease = now(&queue, worker).await.unwrap();
    queue.renew(&lease).await.unwrap();
    queue.release(&lease, Duration::from_millis(1)).await.unwrap();
    for _ in 0..first.len() {
        let lease = queue.claim(worker, LEASE, LONG).await.unwrap().unwrap();
        queue.complete(&lease).await.unwrap();
    }
    let waits = waiting(&queue, worker);
    in_line(&server, 1).await;
    assert_eq!(server.ask(&["CONFIG", "SET", "maxmemory", "0"]), "OK");
    queue.enqueue(&[more]).await.unwrap();
    assert_eq!(in_time(waits).await.unwrap(), more.task);
}

/// How many commands of clients the server has seen; those of scripts are not sent.
fn commands(server: &Server) -> u64 {
    const SENT: &[&str] = &["evalsha", "script|load", "hscan", "ping", "subscribe", "hello"];
    let stats = server.ask(&["INFO", "commandstats"]);
    let calls = |line: &str| {
        let (name, rest) = line.trim().strip_prefix("cmdstat_")?.split_once(":calls=")?;
        let calls = rest.split(',').next()?.parse::<u64>().ok()?;
        SENT.contains(&name).then_some(calls)
    };
    stats.lines().filter_map(calls).sum()
}

/// As a worker does that has nothing to do: it waits, and sweeps every two seconds.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_worker_asks_at_most_once_a_second() {
    const WINDOW: u64 = 6;
    if !testing::available() {
        return;
    }
    let server = Server::forgetful();
    let queue = process(&server.config()).await;
    // Every script is known to the server before it is counted.
    queue.sweep().await.unwrap();
    assert_eq!(now(&queue, WorkerId::new()).await, None);
    let soon = Duration::from_millis(1);
    assert_eq!(queue.claim(WorkerId::new(), LEASE, soon).await.unwrap(), None);
    let before = commands(&server);
    let sweeping = tokio::spawn({
        let queue = Arc::clone(&queue);
        async move {
            let mut ticks = tokio::time::interval(Duration::from_secs(2));
            loop {
                ticks.tick().await;
                queue.sweep().await.unwrap();
            }
        }
    });
    let window = Duration::from_secs(WINDOW);
    assert_eq!(queue.claim(WorkerId::new(), LEASE, window).await.unwrap(), None);
    sweeping.abort();
    let sent = commands(&server) - before;
    assert!(sent <= WINDOW, "{sent} commands in {WINDOW} s");
    assert!(sent >= WINDOW / 2, "it was counted: {sent}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_thousand_that_are_due_at_once_jam_nothing() {
    const COUNT: usize = 100_000;
    if !testing::available() {
        return;
    }
    let server = Server::forgetful();
    let clock = Arc::new(ManualClock::new());
    let queue = RedisQueue::open_with_clock(server.config(), OWNER, clock.clone()).await.unwrap();
    let delay = Duration::from_mins(1);
    let late = Entry { priority: Priority::Low, delay, ..entry(Lane::Shared) };
    let late: Vec<_> = (0..COUNT).map(|_| Entry { task: TaskId::new(), ..late }).collect();
    queue.enqueue(&late).await.unwrap();
    clock.advance(delay);
    let worker = WorkerId::new();
    let mut slowest = Duration::ZERO;
    for _ in 0..50 {
        let urgent = Entry { priority: Priority::Critical, ..entry(Lane::Worker(worker)) };
        let begun = Instant::now();
        queue.enqueue(&[urgent]).await.unwrap();
        let mut lease = queue.claim(worker, LEASE, LONG).await.unwrap().unwrap();
        while lease.task != urgent.task {
            // In its turn one of the others.
            queue.complete(&lease).await.unwrap();
            lease = queue.claim(worker, LEASE, LONG).await.unwrap().unwrap();
        }
        slowest = slowest.max(begun.elapsed());
        queue.complete(&lease).await.unwrap();
    }
    assert!(slowest < Duration::from_secs(1), "{slowest:?}");
    let all_ready = async {
        while queue.depth().await.unwrap().delayed > 0 {
            tokio::task::yield_now().await;
        }
    };
    in_time(all_ready).await;
    let depth = queue.depth().await.unwrap();
    assert!(depth.ready > COUNT as u64 - 100, "{depth:?}");
}

#[tokio::test]
async fn a_queue_is_one_installations() {
    if !testing::available() {
        return;
    }
    let server = Server::forgetful();
    let queue = process(&server.config()).await;
    process(&server.config()).await;
    let other = RedisQueue::open(server.config(), "other").await.unwrap_err();
    assert!(matches!(other, QueueError::Foreign { .. }), "{other:?}");
    let apart = Parts { prefix: Some("second".to_owned()), ..Parts::default() };
    let apart = server.config().with(apart).unwrap();
    let apart = RedisQueue::open(apart, "other").await.unwrap();
    queue.enqueue(&[entry(Lane::Shared)]).await.unwrap();
    assert_eq!(apart.depth().await.unwrap(), Depth::default());
    assert_eq!(now(&apart, WorkerId::new()).await, None);
}
