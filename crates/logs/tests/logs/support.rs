//! Entries, and readers with a time limit.

use std::{path::Path, time::Duration};

use aether_logs::{
    EmbeddedConfig, EmbeddedStore, Followed, LogAnswer, LogEntry, LogFollower, LogLevel,
    LogService, LogStream, now_ns,
};
use aether_types::VmId;
use tokio::time::timeout;

/// Far longer than anything here takes.
pub(crate) const LIMIT: Duration = Duration::from_secs(45);

pub(crate) fn line(text: &str) -> LogEntry {
    LogEntry::new(LogService::Guest, LogLevel::Info, LogStream::Stdout, text)
}

pub(crate) fn line_of(vm: VmId, text: &str) -> LogEntry {
    line(text).of_vm(Some(vm))
}

/// With the numbers as texts.
pub(crate) fn lines(numbers: std::ops::Range<u64>) -> Vec<LogEntry> {
    numbers.map(|number| line(&number.to_string())).collect()
}

pub(crate) async fn open(path: &Path) -> EmbeddedStore {
    EmbeddedStore::open(path, EmbeddedConfig::default()).await.unwrap()
}

pub(crate) fn texts(answer: &LogAnswer) -> Vec<&str> {
    answer.entries.iter().map(|logged| logged.entry.text()).collect()
}

pub(crate) async fn next(follower: &mut Box<dyn LogFollower>) -> Followed {
    timeout(LIMIT, follower.next()).await.expect("nothing came in time")
}

/// The texts of the next entries, which come with no gap.
pub(crate) async fn take(follower: &mut Box<dyn LogFollower>, count: usize) -> Vec<String> {
    let mut taken = Vec::new();
    while taken.len() < count {
        match next(follower).await {
            Followed::Entries(entries) => {
                taken.extend(entries.iter().map(|logged| logged.entry.text().to_owned()));
            }
            other => panic!("after {}: {other:?}", taken.len()),
        }
    }
    assert_eq!(taken.len(), count);
    taken
}

pub(crate) fn minutes_ago(minutes: i64) -> i64 {
    now_ns() - minutes * 60_000_000_000
}
