//! 1,000 readers of one VM's lines, beside a bare tokio broadcast of the same lines to as many
//! receivers; and the same with one reader that stands still.
//!
//! Lines are written in batches of fifty, and never more than the window ahead of the readers'
//! average. The store also writes each line to its file, which the broadcast
//! does not.

#![expect(clippy::unwrap_used, reason = "a benchmark fails by panicking")]
#![expect(clippy::print_stdout, reason = "the figures")]

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use aether_logs::{
    EmbeddedConfig, EmbeddedStore, FollowFrom, Followed, LogEntry, LogFilter, LogFollower,
    LogLevel, LogService, LogStore, LogStream,
};
use aether_types::VmId;
use tokio::{
    sync::{
        Notify,
        broadcast::{self, error::RecvError},
    },
    task::JoinSet,
    time::timeout,
};

const READERS: u64 = 1000;
const LINES: u64 = 10_000;
const BATCH: u64 = 50;
const WINDOW: u64 = 500;
const ROUNDS: usize = 5;
const LIMIT: Duration = Duration::from_mins(1);

/// Lines that readers have got, and who waits for it.
#[derive(Default)]
struct Got {
    count: AtomicU64,
    changed: Notify,
}

impl Got {
    fn add(&self, lines: u64) {
        let before = self.count.fetch_add(lines, Ordering::AcqRel);
        if before / (READERS * BATCH) != (before + lines) / (READERS * BATCH) {
            self.changed.notify_one();
        }
    }

    async fn until(&self, wanted: u64) {
        let wait = async {
            while self.count.load(Ordering::Acquire) < wanted {
                self.changed.notified().await;
            }
        };
        timeout(LIMIT, wait).await.expect("the readers did not get everything");
    }
}

fn batch(vm: VmId) -> Vec<LogEntry> {
    let line = "a line such as a build writes by the thousand, some eighty bytes in length ....";
    let entry = LogEntry::new(LogService::Guest, LogLevel::Info, LogStream::Stdout, line);
    (0..BATCH).map(|_| entry.clone().of_vm(Some(vm))).collect()
}

/// Lines delivered per second.
fn rate(took: Duration) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
    let delivered = (READERS * LINES) as f64;
    delivered / took.as_secs_f64()
}

async fn bare() -> f64 {
    let (sender, _) = broadcast::channel::<Arc<LogEntry>>(1024);
    let got = Arc::new(Got::default());
    let mut readers = JoinSet::new();
    for _ in 0..READERS {
        let (mut receiver, got) = (sender.subscribe(), Arc::clone(&got));
        readers.spawn(async move {
            loop {
                match receiver.recv().await {
                    Ok(entry) => {
                        std::hint::black_box(&entry);
                        got.add(1);
                    }
                    // What it lost counts as if it had it: the store has to give every line.
                    Err(RecvError::Lagged(lost)) => got.add(lost),
                    Err(RecvError::Closed) => break,
                }
            }
        });
    }
    let vm = VmId::new();
    let start = Instant::now();
    for sent in (BATCH..=LINES).step_by(usize::try_from(BATCH).unwrap()) {
        for entry in batch(vm) {
            sender.send(Arc::new(entry)).unwrap();
        }
        got.until(sent.saturating_sub(WINDOW) * READERS).await;
    }
    got.until(LINES * READERS).await;
    let took = start.elapsed();
    drop(sender);
    while readers.join_next().await.is_some() {}
    rate(took)
}

async fn store(has_stalled: bool) -> f64 {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("logs.db");
    let store = EmbeddedStore::open(&path, EmbeddedConfig::default()).await.unwrap();
    let vm = VmId::new();
    let filter = LogFilter { vm_id: Some(vm), ..LogFilter::default() };
    let got = Arc::new(Got::default());
    let mut readers = JoinSet::new();
    for _ in 0..READERS {
        let follower = store.follow(filter.clone(), FollowFrom::Now).await.unwrap();
        readers.spawn(read(follower, Arc::clone(&got)));
    }
    // Has a place, and never reads.
    let stalled = store.follow(filter, FollowFrom::Now).await.unwrap();
    let stalled = has_stalled.then_some(stalled);
    let start = Instant::now();
    for sent in (BATCH..=LINES).step_by(usize::try_from(BATCH).unwrap()) {
        store.append(batch(vm)).await.unwrap();
        got.until(sent.saturating_sub(WINDOW) * READERS).await;
    }
    got.until(LINES * READERS).await;
    let took = start.elapsed();
    drop(stalled);
    store.close().await;
    while readers.join_next().await.is_some() {}
    rate(took)
}

async fn read(mut follower: Box<dyn LogFollower>, got: Arc<Got>) {
    while let Followed::Entries(entries) = follower.next().await {
        std::hint::black_box(&entries);
        got.add(entries.len() as u64);
    }
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

fn main() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (mut bares, mut stores, mut stalleds) = (Vec::new(), Vec::new(), Vec::new());
    // In turn, so that what else the machine does meets all of them.
    for _ in 0..ROUNDS {
        bares.push(runtime.block_on(bare()));
        stores.push(runtime.block_on(store(false)));
        stalleds.push(runtime.block_on(store(true)));
    }
    let (bare, store, stalled) = (median(bares), median(stores), median(stalleds));
    println!("{READERS} readers, {LINES} lines, median of {ROUNDS}");
    println!("bare broadcast     {bare:>12.0} lines/s");
    println!("embedded store     {store:>12.0} lines/s  {:.2} of bare", store / bare);
    println!("one stands still   {stalled:>12.0} lines/s  {:.3} of without", stalled / store);
}
