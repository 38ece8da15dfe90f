//! What only a server can go through: several processes on one queue, and a server that goes away
//! under those that wait.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{sync::Arc, time::Duration};

use aether_postgres::{
    Database, Extent,
    testing::{self, Server, ServerOptions},
};
use aether_queue::{Entry, Lane, PostgresQueue, Queue, postgres::SCHEMA};
use aether_types::{Priority, TaskId, WorkerId};

const LEASE: Duration = Duration::from_secs(30);
/// Longer than any test: who is woken by it was not woken at all.
const LONG: Duration = Duration::from_hours(1);
const HANGS_AFTER: Duration = Duration::from_secs(20);

fn entry(lane: Lane) -> Entry {
    Entry { task: TaskId::new(), lane, priority: Priority::Default, delay: Duration::ZERO }
}

/// As a process of its own has it.
async fn process(config: &aether_postgres::Config) -> Arc<PostgresQueue> {
    let database = Database::open(config.clone()).await.unwrap();
    Arc::new(PostgresQueue::open(&database).await.unwrap())
}

fn waiting(queue: &Arc<PostgresQueue>, worker: WorkerId) -> tokio::task::JoinHandle<TaskId> {
    let queue = Arc::clone(queue);
    tokio::spawn(async move {
        let lease = queue.claim(worker, LEASE, LONG).await.unwrap().unwrap();
        queue.complete(&lease).await.unwrap();
        lease.task
    })
}

async fn in_time<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(HANGS_AFTER, work).await.expect("the test hangs")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_entry_of_one_process_wakes_the_worker_in_another() {
    if !testing::available() {
        return;
    }
    let test = testing::database("queue", async |config| {
        aether_postgres::up(&config, &[SCHEMA], Extent::Expand).await.unwrap();
    })
    .await;
    let (gateway, worker) = (process(&test.config).await, process(&test.config).await);
    let id = WorkerId::new();
    in_time(async {
        for round in 0..20_u64 {
            let waits = waiting(&worker, id);
            let lane = if round % 2 == 0 { Lane::Worker(id) } else { Lane::Shared };
            let delay = Duration::from_millis(if round % 5 == 0 { 30 } else { 0 });
            let entry = Entry { delay, ..entry(lane) };
            gateway.enqueue(&[entry]).await.unwrap();
            assert_eq!(waits.await.unwrap(), entry.task);
        }
    })
    .await;
}

/// One word stands for many entries: who got one wakes the next.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_entries_at_once_wake_all_who_wait() {
    if !testing::available() {
        return;
    }
    let test = testing::database("queue", async |config| {
        aether_postgres::up(&config, &[SCHEMA], Extent::Expand).await.unwrap();
    })
    .await;
    let processes = [process(&test.config).await, process(&test.config).await];
    let waits: Vec<_> = (0..12).map(|i| waiting(&processes[i % 2], WorkerId::new())).collect();
    let entries: Vec<_> = (0..12).map(|_| entry(Lane::Shared)).collect();
    processes[0].enqueue(&entries).await.unwrap();
    let mut had = Vec::new();
    for wait in waits {
        had.push(in_time(wait).await.unwrap());
    }
    had.sort();
    let mut tasks: Vec<_> = entries.iter().map(|entry| entry.task).collect();
    tasks.sort();
    assert_eq!(had, tasks);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_waits_is_woken_after_the_server_was_away() {
    if !testing::available() {
        return;
    }
    let mut server = Server::start(&ServerOptions::default());
    aether_postgres::up(&server.config(), &[SCHEMA], Extent::Expand).await.unwrap();
    let queue = process(&server.config_tcp("127.0.0.1")).await;
    let before = entry(Lane::Shared);
    queue.enqueue(&[before]).await.unwrap();
    let worker = WorkerId::new();
    let lease = queue.claim(worker, LEASE, Duration::ZERO).await.unwrap().unwrap();
    let waits = waiting(&queue, worker);
    server.stop();
    server.start_again();
    // What was acknowledged is there, and a lease goes on.
    in_time(queue.renew(&lease)).await.unwrap();
    let after = entry(Lane::Shared);
    in_time(queue.enqueue(&[after])).await.unwrap();
    assert_eq!(in_time(waits).await.unwrap(), after.task);
    let next = entry(Lane::Shared);
    let waits = waiting(&queue, worker);
    queue.enqueue(&[next]).await.unwrap();
    assert_eq!(in_time(waits).await.unwrap(), next.task);
}
