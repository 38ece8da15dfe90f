//! The seam to logs: lines of guests and of the platform, kept for a while, searched and followed.
//!
//! ```text
//!   guest output, consoles, gateway, worker ──► LogSink ──► LogStore::append
//!                                                              │
//!        EmbeddedStore: file (SQLite), ring of the latest ◄────┤
//!        LokiStore:     the same as spool ──► batches ──► Loki ┘
//! ```
//!
//! Semantics that every implementation keeps
//! - An entry has a sequence number; numbers have no holes, and a follower goes by them. So the
//!   past and the live part join with no gap and no repeat.
//! - What was appended survives SIGKILL.
//! - Nothing is lost in silence: where entries are missing, an entry or a follower says how many.
//! - Writers never wait for readers: a follower that lags reads from the disk, and is told what
//!   was removed from there before it came.
//! - Everything has a bound: lines, batches, the ring, the file, an answer, a query's time.
//!
//! What this crate does not do: it reads no configuration and knows nothing of who may see what.

mod embedded;
mod entry;
mod error;
mod lines;
mod loki;
mod query;
mod sink;

use std::sync::Arc;

use async_trait::async_trait;

pub use aether_types::{LogLevel, LogService, LogStream};
pub use embedded::{EmbeddedConfig, EmbeddedStore};
pub use entry::{LogEntry, Logged, now_ns};
pub use error::LogError;
pub use lines::Lines;
pub use loki::{LokiConfig, LokiStore, ShipReport};
pub use query::{FollowFrom, LogAnswer, LogFilter, LogQuery};
pub use sink::{LogBacklog, LogPipe, LogSink};

#[async_trait]
pub trait LogStore: Send + Sync + 'static {
    /// The entries are kept, in this order, when this returns; all of them, or none where it
    /// fails. Not cancel-safe: entries of a future that was dropped may be kept.
    async fn append(&self, entries: Vec<LogEntry>) -> Result<(), LogError>;

    /// The latest entries that fit, oldest first.
    async fn query(&self, query: &LogQuery) -> Result<LogAnswer, LogError>;

    /// Entries that fit, from a point on and then as they come.
    async fn follow(
        &self,
        filter: LogFilter,
        from: FollowFrom,
    ) -> Result<Box<dyn LogFollower>, LogError>;

    /// Whether lines are kept and, where they go elsewhere, arrive there.
    async fn check(&self) -> Result<(), LogError>;

    /// Writes and ships what is in hand, as far as that is quick, and takes no more.
    async fn close(&self);
}

/// What a follower gets next.
#[derive(Debug, Clone)]
pub enum Followed {
    /// One or more, in order.
    Entries(Vec<Arc<Logged>>),
    /// This many entries, of all that were logged, were removed before this follower came to them.
    Missed(u64),
    /// The store has ended.
    Closed,
}

#[async_trait]
pub trait LogFollower: Send {
    /// Cancel-safe.
    async fn next(&mut self) -> Followed;
}
