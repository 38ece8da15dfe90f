//! Lines that nobody waits for.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering::SeqCst},
};

use aether_logs::{
    EmbeddedStore, FollowFrom, Lines, LogAnswer, LogEntry, LogError, LogFilter, LogFollower,
    LogQuery, LogService, LogSink, LogStore, LogStream,
};
use aether_types::{TaskId, VmId, limits::LOG_LINE_BYTES_MAX};
use async_trait::async_trait;
use tokio::sync::Semaphore;

use crate::support::{open, take, texts};

/// A real store whose appends wait at a gate, or fail.
struct Gated {
    store: EmbeddedStore,
    gate: Semaphore,
    fail: AtomicU32,
}

#[async_trait]
impl LogStore for Gated {
    async fn append(&self, entries: Vec<LogEntry>) -> Result<(), LogError> {
        self.gate.acquire().await.map_err(|_| LogError::Closed)?.forget();
        if self.fail.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)).is_ok() {
            return Err(LogError::Busy);
        }
        self.store.append(entries).await
    }

    async fn query(&self, query: &LogQuery) -> Result<LogAnswer, LogError> {
        self.store.query(query).await
    }

    async fn follow(
        &self,
        filter: LogFilter,
        from: FollowFrom,
    ) -> Result<Box<dyn LogFollower>, LogError> {
        self.store.follow(filter, from).await
    }

    async fn check(&self) -> Result<(), LogError> {
        self.store.check().await
    }

    async fn close(&self) {
        self.store.close().await;
    }
}

#[tokio::test]
async fn output_becomes_lines_that_are_bounded() {
    let folder = tempfile::tempdir().unwrap();
    let store = Arc::new(open(&folder.path().join("logs.db")).await);
    let (sink, pipe) = LogSink::new(Arc::clone(&store) as Arc<dyn LogStore>);
    let (vm, task) = (VmId::new(), TaskId::new());
    let mut lines = Lines::new(sink, LogService::Guest, LogStream::Stderr).of(Some(vm), Some(task));
    lines.push(b"one\ntw");
    lines.push(b"o\r\n\nbad \xff\n");
    lines.push(&vec![b'x'; LOG_LINE_BYTES_MAX + 5]);
    lines.push(b"yz\nlast");
    lines.finish();
    lines.finish();
    drop(lines);
    pipe.close().await;

    let answer = store.query(&LogQuery::default()).await.unwrap();
    let long = "x".repeat(LOG_LINE_BYTES_MAX);
    assert_eq!(texts(&answer), ["one", "two", "", "bad \u{fffd}", &long, "last"]);
    let cut: Vec<_> = answer.entries.iter().map(|logged| logged.entry.cut_bytes()).collect();
    assert_eq!(cut, [0, 0, 0, 0, 7, 0]);
    let entry = &answer.entries[0].entry;
    assert_eq!((entry.vm_id, entry.task_id), (Some(vm), Some(task)));
    assert_eq!(entry.stream, LogStream::Stderr);
}

#[tokio::test]
async fn a_guest_that_prints_without_end_is_cut_short_and_it_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let store = Arc::new(open(&folder.path().join("logs.db")).await);
    let (sink, pipe) = LogSink::new(Arc::clone(&store) as Arc<dyn LogStore>);
    let mut lines = Lines::new(sink, LogService::Guest, LogStream::Stdout);
    let line = vec![b'x'; LOG_LINE_BYTES_MAX];
    for _ in 0..4000 {
        lines.push(&line);
        lines.push(b"\n");
    }
    lines.finish();
    drop(lines);
    pipe.close().await;
    let mut follower = store.follow(LogFilter::default(), FollowFrom::After(0)).await.unwrap();
    let (mut kept, mut missing) = (0, 0);
    while kept + missing < 4000 {
        let aether_logs::Followed::Entries(entries) = crate::support::next(&mut follower).await
        else {
            panic!("no entries")
        };
        for logged in entries {
            missing += logged.entry.missing;
            kept += u64::from(logged.entry.text().starts_with('x'));
        }
    }
    assert_eq!(kept + missing, 4000);
    assert!(missing > 1000, "{missing}");
}

#[tokio::test]
async fn lines_that_find_no_place_are_counted_where_they_are_missing() {
    let folder = tempfile::tempdir().unwrap();
    let store = Arc::new(Gated {
        store: open(&folder.path().join("logs.db")).await,
        gate: Semaphore::new(0),
        fail: AtomicU32::new(1),
    });
    let (sink, pipe) = LogSink::new(Arc::clone(&store) as Arc<dyn LogStore>);
    for _ in 0..20_000 {
        sink.write(crate::support::line("kept or not"));
    }
    let lost = sink.lost();
    assert!(lost >= 20_000 - 8192, "{lost}");
    store.gate.add_permits(1000);
    drop(sink);
    pipe.close().await;
    let mut follower = store.follow(LogFilter::default(), FollowFrom::After(0)).await.unwrap();
    let (mut kept, mut missing) = (0, 0);
    while kept + missing < 20_000 {
        let aether_logs::Followed::Entries(entries) = crate::support::next(&mut follower).await
        else {
            panic!("no entries")
        };
        for logged in entries {
            missing += logged.entry.missing;
            kept += u64::from(logged.entry.text() == "kept or not");
        }
    }
    // Those of the append that failed are among them.
    assert!(missing > lost, "{missing}");
    assert_eq!(kept + missing, 20_000);
}

#[tokio::test]
async fn lines_wait_for_a_store_that_comes_later() {
    let folder = tempfile::tempdir().unwrap();
    let (sink, backlog) = LogSink::unconnected();
    sink.write(crate::support::line("early"));
    let store = Arc::new(open(&folder.path().join("logs.db")).await);
    let pipe = backlog.connect(Arc::clone(&store) as Arc<dyn LogStore>);
    let mut follower = store.follow(LogFilter::default(), FollowFrom::After(0)).await.unwrap();
    assert_eq!(take(&mut follower, 1).await, ["early"]);
    pipe.close().await;
}
