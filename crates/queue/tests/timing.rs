//! How long each method takes. Ignored: figures are read by people, and compared within one run.
//! `cargo test --release -p aether-queue --test timing -- --ignored --nocapture`

#![expect(clippy::print_stdout, reason = "figures for people")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use aether_queue::{Entry, Lane, Queue, RedisQueue, SqliteQueue};
use aether_redis::{
    Link, Listener,
    redis::{Cmd, cmd},
    testing::Server,
};
use aether_types::{Priority, TaskId, WorkerId};

const ROUNDS: usize = 3000;
const LEASE: Duration = Duration::from_secs(30);

fn print(name: &str, mut times: Vec<Duration>) {
    times.sort();
    let at = |part: usize| times[times.len() * part / 100].as_micros();
    println!("{name:24} {:6} us median {:6} us p99", at(50), at(99));
}

fn entry() -> Entry {
    Entry {
        task: TaskId::new(),
        lane: Lane::Shared,
        priority: Priority::Default,
        delay: Duration::ZERO,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "measures"]
async fn methods() {
    let folder = tempfile::tempdir().unwrap();
    let queue = Arc::new(SqliteQueue::open(&folder.path().join("queue.db")).await.unwrap());
    println!("-- SQLite");
    measure(Arc::clone(&queue), queue).await;
}

/// Against the round trip of a `PING`, on the same server in the same run; and what the server
/// could do at most, asked for nothing but a push and a pop.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "measures"]
async fn methods_on_redis() {
    if !aether_redis::testing::available() {
        return;
    }
    for file in ["no", "yes"] {
        println!("-- Redis, appendonly {file}");
        on_redis(Server::start(&["--appendonly", file, "--appendfsync", "everysec"])).await;
    }
}

async fn on_redis(server: Server) {
    let [gateway, worker] = [&server, &server]
        .map(|server| async { Arc::new(RedisQueue::open(server.config(), "t").await.unwrap()) });
    let (gateway, worker) = (gateway.await, worker.await);
    let link = Link::open(server.config(), Arc::new(Deaf)).await.unwrap();
    print("PING", times(&link, || cmd("PING")).await);
    measure(Arc::clone(&gateway), Arc::clone(&worker)).await;
    commands_of_a_task(&server, &*worker).await;
    throughput(&link, gateway, worker).await;
}

struct Deaf;

impl Listener for Deaf {
    fn message(&self, _text: &str) {}

    fn connected(&self, _restarted: bool) {}
}

async fn times(link: &Link, command: impl Fn() -> Cmd) -> Vec<Duration> {
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        let begun = Instant::now();
        ask(link, command()).await;
        times.push(begun.elapsed());
    }
    times
}

async fn ask(link: &Link, command: Cmd) {
    let command = &command;
    link.call::<(), _>(|mut connection| async move { command.query_async(&mut connection).await })
        .await
        .unwrap();
}

/// What is sent, and what the scripts do with it.
async fn commands_of_a_task(server: &Server, queue: &impl Queue) {
    const TASKS: u64 = 100;
    server.ask(&["CONFIG", "RESETSTAT"]);
    for _ in 0..TASKS {
        queue.enqueue(&[entry()]).await.unwrap();
        let lease = queue.claim(WorkerId::new(), LEASE, Duration::ZERO).await.unwrap().unwrap();
        queue.complete(&lease).await.unwrap();
    }
    let stats = server.ask(&["INFO", "commandstats"]);
    let calls = |line: &str| {
        let (name, rest) = line.trim().strip_prefix("cmdstat_")?.split_once(":calls=")?;
        Some((name.to_owned(), rest.split(',').next()?.parse::<u64>().ok()?))
    };
    let all: Vec<_> = stats.lines().filter_map(calls).collect();
    let sum = |sent: bool| -> u64 {
        let wanted = |name: &str| (name == "evalsha") == sent && !name.starts_with("config");
        all.iter().filter(|(name, _)| wanted(name)).map(|(_, calls)| calls).sum()
    };
    println!("a task: {} commands sent, {} within scripts", sum(true) / TASKS, sum(false) / TASKS);
}

async fn throughput(link: &Link, gateway: Arc<RedisQueue>, worker: Arc<RedisQueue>) {
    const TASKS: u32 = 40_000;
    const AT_ONCE: u32 = 64;
    let per_second = |begun: Instant| f64::from(TASKS) / begun.elapsed().as_secs_f64();
    let entries: Vec<_> = (0..TASKS).map(|_| entry()).collect();
    let begun = Instant::now();
    gateway.enqueue(&entries).await.unwrap();
    println!("added in batches: {:.0} a second", per_second(begun));
    let id = WorkerId::new();
    let begun = Instant::now();
    let consumers = (0..AT_ONCE).map(|_| async {
        for _ in 0..TASKS / AT_ONCE {
            let lease = worker.claim(id, LEASE, LEASE).await.unwrap().unwrap();
            worker.complete(&lease).await.unwrap();
        }
    });
    futures::future::join_all(consumers).await;
    println!("claimed and completed, {AT_ONCE} at once: {:.0} a second", per_second(begun));
    let begun = Instant::now();
    let bare = (0..AT_ONCE).map(|_| async {
        for _ in 0..TASKS / AT_ONCE {
            ask(link, cmd("LPUSH").arg("bare").arg("x").to_owned()).await;
            ask(link, cmd("LPOP").arg("bare").to_owned()).await;
        }
    });
    futures::future::join_all(bare).await;
    println!("bare push and pop, {AT_ONCE} at once: {:.0} a second", per_second(begun));
}

/// As gateway and worker, of one process or two.
async fn measure<Q: Queue>(gateway: Arc<Q>, queue: Arc<Q>) {
    let worker = WorkerId::new();
    let [mut enqueues, mut claims, mut renewals, mut completes, mut all, mut handed] =
        [const { Vec::new() }; 6];
    for _ in 0..ROUNDS {
        let begun = Instant::now();
        gateway.enqueue(&[entry()]).await.unwrap();
        let enqueued = Instant::now();
        let lease = queue.claim(worker, LEASE, Duration::ZERO).await.unwrap().unwrap();
        let claimed = Instant::now();
        queue.complete(&lease).await.unwrap();
        let completed = Instant::now();
        enqueues.push(enqueued - begun);
        claims.push(claimed - enqueued);
        completes.push(completed - claimed);
        all.push(completed - begun);
    }
    for _ in 0..ROUNDS {
        let waiting = tokio::spawn({
            let queue = Arc::clone(&queue);
            async move {
                let lease = queue.claim(worker, LEASE, LEASE).await.unwrap().unwrap();
                (lease, Instant::now())
            }
        });
        // It is to wait when the entry comes.
        tokio::time::sleep(Duration::from_millis(1)).await;
        let begun = Instant::now();
        gateway.enqueue(&[entry()]).await.unwrap();
        let (lease, had) = waiting.await.unwrap();
        handed.push(had - begun);
        let begun = Instant::now();
        queue.renew(&lease).await.unwrap();
        renewals.push(begun.elapsed());
        queue.complete(&lease).await.unwrap();
    }
    print("enqueue", enqueues);
    print("claim", claims);
    print("complete", completes);
    print("the three", all);
    print("renew", renewals);
    print("enqueue to a waiter", handed);
}
