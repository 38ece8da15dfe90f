//! How long each method takes. Ignored: figures are read by people, and compared within one run.
//! `cargo test --release -p aether-queue --test timing -- --ignored --nocapture`

#![expect(clippy::print_stdout, reason = "figures for people")]

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use aether_queue::{Entry, Lane, Queue, SqliteQueue};
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
    let worker = WorkerId::new();
    let [mut enqueues, mut claims, mut renewals, mut completes, mut all, mut handed] =
        [const { Vec::new() }; 6];
    for _ in 0..ROUNDS {
        let begun = Instant::now();
        queue.enqueue(&[entry()]).await.unwrap();
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
        tokio::task::yield_now().await;
        let begun = Instant::now();
        queue.enqueue(&[entry()]).await.unwrap();
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
