//! The queue on Redis beside what the server can do at most, and beside BullMQ, on one server in
//! one run.
//!
//! Of a task's way only the queue's part is measured: the store, which has acknowledged it before,
//! has its own part in `exec` and `start`. BullMQ needs node and `BULLMQ`, a folder with it
//! installed; `./dev bench queue` sees to that.

#![expect(clippy::print_stdout, reason = "the figures")]
#![expect(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

use std::{
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use aether_queue::{Entry, Lane, Queue, RedisQueue, SqliteQueue};
use aether_redis::{
    Link, Listener,
    redis::{Cmd, Pipeline, cmd, pipe},
    testing::Server,
};
use aether_types::{Priority, TaskId, WorkerId};
use futures::future::join_all;

const ROUNDS: usize = 2000;
const TASKS: usize = 20_000;
const AT_ONCE: usize = 64;
const BATCH: usize = 256;
const LEASE: Duration = Duration::from_secs(30);
const LONG: Duration = Duration::from_mins(10);

struct Deaf;

impl Listener for Deaf {
    fn message(&self, _text: &str) {}

    fn connected(&self, _restarted: bool) {}
}

struct Bench {
    server: Server,
    link: Link,
    gateway: Arc<RedisQueue>,
    worker: Arc<RedisQueue>,
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    sqlite().await;
    if !aether_redis::testing::available() {
        return;
    }
    for durable in ["no", "yes"] {
        println!("Redis with appendonly {durable}");
        let bench = Bench::start(durable).await;
        bench.latency().await;
        bench.commands().await;
        bench.in_flight().await;
        bench.throughput().await;
    }
}

/// The queue of one process, for which nothing has to run beside it.
async fn sqlite() {
    let folder = tempfile::tempdir().unwrap();
    let queue = SqliteQueue::open(&folder.path().join("queue.db")).await.unwrap();
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        let begun = Instant::now();
        queue.enqueue(&[entry()]).await.unwrap();
        let lease = queue.claim(WorkerId::new(), LEASE, Duration::ZERO).await.unwrap().unwrap();
        queue.complete(&lease).await.unwrap();
        times.push(begun.elapsed());
    }
    times.sort();
    let at = |part: usize| times[times.len() * part / 100].as_micros();
    println!("SQLite: enqueue, claim and complete in {} us at p50, {} us at p99", at(50), at(99));
}

fn entry() -> Entry {
    let (task, lane) = (TaskId::new(), Lane::Shared);
    Entry { task, lane, priority: Priority::Default, delay: Duration::ZERO }
}

fn verdict(name: &str, figure: f64, bar: f64, holds: bool) {
    let word = if holds { "holds" } else { "DOES NOT HOLD" };
    println!("  {name:58} {figure:7.2}  bar {bar:5.2}  {word}");
}

fn at_most(name: &str, figure: f64, bar: f64) {
    verdict(name, figure, bar, figure <= bar);
}

fn at_least(name: &str, figure: f64, bar: f64) {
    verdict(name, figure, bar, figure >= bar);
}

impl Bench {
    async fn start(durable: &str) -> Self {
        let server = Server::start(&["--appendonly", durable, "--appendfsync", "everysec"]);
        let open = async || Arc::new(RedisQueue::open(server.config(), "bench").await.unwrap());
        let (gateway, worker) = (open().await, open().await);
        let link = Link::open(server.config(), Arc::new(Deaf)).await.unwrap();
        Self { server, link, gateway, worker }
    }

    /// By turns, so that a noisy moment meets both.
    async fn latency(&self) {
        let (mut pings, mut handed) = (Vec::new(), Vec::new());
        let worker = WorkerId::new();
        for _ in 0..ROUNDS {
            let begun = Instant::now();
            self.ask(&cmd("PING")).await;
            pings.push(begun.elapsed());

            let queue = Arc::clone(&self.worker);
            let waiting = tokio::spawn(async move {
                let lease = queue.claim(worker, LEASE, LONG).await.unwrap().unwrap();
                (lease, Instant::now())
            });
            self.until_in_line().await;
            let begun = Instant::now();
            self.gateway.enqueue(&[entry()]).await.unwrap();
            let (lease, started) = waiting.await.unwrap();
            handed.push(started - begun);
            self.worker.complete(&lease).await.unwrap();
        }
        let us = |times: &mut Vec<Duration>, part: usize| {
            times.sort();
            times[times.len() * part / 100].as_secs_f64() * 1e6
        };
        for (part, bar) in [(50, 4.0), (99, 12.0)] {
            let (ping, hand) = (us(&mut pings, part), us(&mut handed, part));
            println!("  p{part}: PING {ping:.0} us, enqueue to start {hand:.0} us");
            at_most(&format!("enqueue to start, in PINGs, p{part}"), hand / ping, bar);
        }
    }

    /// A claim that waits has told the server so.
    async fn until_in_line(&self) {
        let mut command = cmd("HLEN");
        command.arg(format!("{}:queue:idle", self.server.config().root()));
        loop {
            let (link, command) = (&self.link, &command);
            let waiting: u64 = link
                .call(|mut connection| async move { command.query_async(&mut connection).await })
                .await
                .unwrap();
            if waiting > 0 {
                return;
            }
        }
    }

    /// What is sent, with a worker that waits, and what the scripts do with it.
    async fn commands(&self) {
        const COUNTED: u64 = 200;
        self.server.ask(&["CONFIG", "RESETSTAT"]);
        let worker = WorkerId::new();
        for _ in 0..COUNTED {
            self.gateway.enqueue(&[entry()]).await.unwrap();
            let lease = self.worker.claim(worker, LEASE, LONG).await.unwrap().unwrap();
            self.worker.complete(&lease).await.unwrap();
        }
        let stats = self.server.ask(&["INFO", "commandstats"]);
        let calls = |line: &str| {
            let (name, rest) = line.trim().strip_prefix("cmdstat_")?.split_once(":calls=")?;
            Some((name.to_owned(), rest.split(',').next()?.parse::<u64>().ok()?))
        };
        let (mut sent, mut within) = (0, 0);
        for (name, calls) in stats.lines().filter_map(calls) {
            match name.as_str() {
                "evalsha" => sent += calls,
                name if name.starts_with("config") || name == "info" => {}
                _ => within += calls,
            }
        }
        println!("  a task: {} commands sent, {} within scripts", sent / COUNTED, within / COUNTED);
    }

    /// The server's processor time for a task's whole way, beside few others and beside many.
    async fn in_flight(&self) {
        const STEPS: usize = 2000;
        let mut costs = Vec::new();
        for others in [10, 5000, 10, 5000] {
            let worker = WorkerId::new();
            let mut held = Vec::new();
            for _ in 0..others / 10 {
                let entries: Vec<_> = (0..10).map(|_| entry()).collect();
                self.gateway.enqueue(&entries).await.unwrap();
                for _ in 0..10 {
                    held.push(self.worker.claim(worker, LONG, LONG).await.unwrap().unwrap());
                }
            }
            let before = self.server_cpu();
            for _ in 0..STEPS {
                self.gateway.enqueue(&[entry()]).await.unwrap();
                let lease = self.worker.claim(worker, LEASE, LONG).await.unwrap().unwrap();
                self.worker.complete(&lease).await.unwrap();
            }
            #[expect(clippy::cast_precision_loss, reason = "a small number")]
            costs.push((self.server_cpu() - before) / STEPS as f64 * 1e6);
            for lease in &held {
                self.worker.complete(lease).await.unwrap();
            }
        }
        let (few, many) = (costs[0] + costs[2], costs[1] + costs[3]);
        println!(
            "  server time of a task: {:.1} us beside 10, {:.1} us beside 5,000",
            few / 2.0,
            many / 2.0
        );
        at_most("cost beside 5,000 in flight, of that beside 10", many / few, 1.1);
    }

    /// Seconds of the server's processor time so far.
    fn server_cpu(&self) -> f64 {
        let info = self.server.ask(&["INFO", "cpu"]);
        let of = |name: &str| -> f64 {
            let line = info.lines().find_map(|line| line.trim().strip_prefix(name));
            line.unwrap().parse().unwrap()
        };
        of("used_cpu_sys:") + of("used_cpu_user:")
    }

    async fn throughput(&self) {
        let (added, consumed) = (self.added().await, self.consumed().await);
        let (bare_added, bare_consumed) = (self.bare_added().await, self.bare_consumed().await);
        println!(
            "  a second: added {added:.0} (bare {bare_added:.0}), consumed {consumed:.0} (bare {bare_consumed:.0})"
        );
        at_least("added in batches, of the bare commands", added / bare_added, 0.5);
        at_least("claimed and completed, of the bare commands", consumed / bare_consumed, 0.5);
        let Some((theirs_added, theirs_consumed)) = self.bullmq() else {
            println!("  BullMQ is not there: set BULLMQ to a folder that has it");
            return;
        };
        println!("  BullMQ, a second: added {theirs_added:.0}, consumed {theirs_consumed:.0}");
        at_least("added, of BullMQ's", added / theirs_added, 10.0);
        at_least("consumed, of BullMQ's", consumed / theirs_consumed, 10.0);
    }

    async fn added(&self) -> f64 {
        let entries: Vec<_> = (0..TASKS).map(|_| entry()).collect();
        let begun = Instant::now();
        self.gateway.enqueue(&entries).await.unwrap();
        rate(begun)
    }

    async fn consumed(&self) -> f64 {
        let id = WorkerId::new();
        let begun = Instant::now();
        join_all((0..AT_ONCE).map(|n| async move {
            for _ in (n..TASKS).step_by(AT_ONCE) {
                let lease = self.worker.claim(id, LEASE, LONG).await.unwrap().unwrap();
                self.worker.complete(&lease).await.unwrap();
            }
        }))
        .await;
        rate(begun)
    }

    /// What an entry is at least: a row, and its place in an order.
    async fn bare_added(&self) -> f64 {
        let begun = Instant::now();
        for first in (0..TASKS).step_by(BATCH) {
            let mut batch = pipe();
            for task in first..TASKS.min(first + BATCH) {
                batch.cmd("HSETNX").arg("bare").arg(task).arg("x").ignore();
                batch.cmd("ZADD").arg("bare:order").arg(task).arg(task).ignore();
            }
            self.ask_all(&batch).await;
        }
        rate(begun)
    }

    /// What it is to take one and to end it: two commands, as ours are.
    async fn bare_consumed(&self) -> f64 {
        let begun = Instant::now();
        join_all((0..AT_ONCE).map(|n| async move {
            for task in (n..TASKS).step_by(AT_ONCE) {
                self.ask(cmd("ZPOPMIN").arg("bare:order")).await;
                self.ask(cmd("HDEL").arg("bare").arg(task)).await;
            }
        }))
        .await;
        rate(begun)
    }

    fn bullmq(&self) -> Option<(f64, f64)> {
        let folder = std::env::var_os("BULLMQ")?;
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/bullmq.mjs");
        let output = Command::new("node")
            .arg(script)
            .args([usize::from(self.server.port()), TASKS, AT_ONCE, BATCH].map(|n| n.to_string()))
            .env("BULLMQ", folder)
            .output()
            .ok()?;
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).ok()?;
        let figure = |name: &str| {
            let (_, rest) = text.split_once(&format!("\"{name}\":"))?;
            rest.split([',', '}']).next()?.trim().parse().ok()
        };
        Some((figure("added")?, figure("consumed")?))
    }

    async fn ask(&self, command: &Cmd) {
        self.link
            .call::<(), _>(|mut line| async move { command.query_async(&mut line).await })
            .await
            .unwrap();
    }

    async fn ask_all(&self, commands: &Pipeline) {
        self.link
            .call::<(), _>(|mut line| async move { commands.query_async(&mut line).await })
            .await
            .unwrap();
    }
}

fn rate(begun: Instant) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a small number")]
    let tasks = TASKS as f64;
    tasks / begun.elapsed().as_secs_f64()
}
