//! The embedded store: entries in a SQLite file, and the latest of them in memory.
//!
//! ```text
//!   append ──► orders ──► Writer: commit ──► Ring ──► followers that keep up
//!                            │                 └─ head (watch) wakes them
//!                            ▼
//!                          file ──► queries, and followers that lag or begin in the past
//! ```
//!
//! Invariants
//! - Numbers have no holes: they are given in the commit, entries go from the beginning only.
//! - The ring has what was committed and nothing else, so a follower may change between it and
//!   the file at any number.
//! - Queries and followers have connections of their own; neither takes those of the other.

mod follow;
mod keep;
mod read;
mod ring;
mod rows;
mod writer;

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use sqlx::SqlitePool;
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
};

use crate::{
    FollowFrom, LogAnswer, LogEntry, LogError, LogFilter, LogFollower, LogQuery, LogStore,
    error::Context as _,
};
use follow::Follower;
use keep::Span;
use ring::Ring;
use writer::{Order, Writer};

/// Appends that wait for the writer; more wait for a place.
const ORDERS_MAX: usize = 64;
const QUERIES_AT_ONCE: u32 = 2;
/// A query that gets no connection within this is refused.
const QUERY_WAIT: Duration = Duration::from_secs(5);
const DISK_FOLLOWERS_AT_ONCE: u32 = 2;
/// A follower that gets no connection within this tries again.
const FOLLOWER_WAIT: Duration = Duration::from_mins(1);

#[derive(Debug, Clone)]
pub struct EmbeddedConfig {
    /// Of the file; where it is larger, the oldest entries go.
    pub bytes_max: u64,
    /// Entries that are older go.
    pub age_max: Option<Duration>,
    /// Of the latest entries in memory.
    pub ring_bytes_max: usize,
    /// Of one query.
    pub query_limit: Duration,
}

impl Default for EmbeddedConfig {
    fn default() -> Self {
        Self {
            bytes_max: 1 << 30,
            age_max: Some(Duration::from_hours(7 * 24)),
            ring_bytes_max: 32 << 20,
            query_limit: Duration::from_secs(10),
        }
    }
}

#[derive(Debug)]
pub struct EmbeddedStore {
    orders: mpsc::Sender<Order>,
    ring: Arc<Ring>,
    oldest: Arc<AtomicU64>,
    queries: SqlitePool,
    followers: SqlitePool,
    query_limit: Duration,
    writer: JoinHandle<()>,
}

impl EmbeddedStore {
    /// Opens the file, and makes or migrates its tables. One process at a time has it open.
    pub async fn open(path: &Path, config: EmbeddedConfig) -> Result<Self, LogError> {
        let mut db = rows::open(path).await?;
        let span = span(&mut db).await?;
        let ring = Arc::new(Ring::new(span.next - 1, config.ring_bytes_max));
        let oldest = Arc::new(AtomicU64::new(span.first));
        let query_limit = config.query_limit;
        let (orders, received) = mpsc::channel(ORDERS_MAX);
        let writer = Writer {
            db,
            orders: received,
            ring: Arc::clone(&ring),
            config,
            span,
            oldest: Arc::clone(&oldest),
            put_back: None,
        };
        Ok(Self {
            orders,
            ring,
            oldest,
            queries: rows::readers(path, QUERIES_AT_ONCE, QUERY_WAIT),
            followers: rows::readers(path, DISK_FOLLOWERS_AT_ONCE, FOLLOWER_WAIT),
            query_limit,
            writer: tokio::spawn(writer.run()),
        })
    }

    /// The lowest number that is kept; what comes next where nothing is.
    pub(crate) fn oldest(&self) -> u64 {
        self.oldest.load(Ordering::Acquire)
    }

    /// The number of the last entry.
    pub(crate) fn head(&self) -> u64 {
        self.ring.head()
    }

    pub(crate) async fn note(&self, name: &'static str, value: String) -> Result<(), LogError> {
        let (done, written) = oneshot::channel();
        self.order(Order::Note { name, value, done }).await?;
        written.await.map_err(|_| LogError::Closed)?
    }

    pub(crate) async fn fact(&self, name: &str) -> Result<Option<String>, LogError> {
        read::fact(&self.queries, name).await
    }

    /// The number of the first entry that is kept of this time or later, and the next one's where
    /// there is none.
    pub(crate) async fn number_at(&self, time_ns: i64) -> Result<u64, LogError> {
        // Before the look at the file: what comes between is of the follower.
        let next = self.ring.head() + 1;
        let found = read::first_since(&self.queries, time_ns, self.query_limit).await?;
        Ok(found.unwrap_or(next).min(next))
    }

    /// From number `next` on, entries of `floor_ns` and later.
    pub(crate) fn follow_at(
        &self,
        filter: LogFilter,
        next: u64,
        floor_ns: Option<i64>,
    ) -> Box<dyn LogFollower> {
        Box::new(Follower {
            head: self.ring.watch(),
            ring: Arc::clone(&self.ring),
            disk: self.followers.clone(),
            filter,
            floor_ns,
            next,
            ready: None,
        })
    }

    async fn order(&self, order: Order) -> Result<(), LogError> {
        self.orders.send(order).await.map_err(|_| LogError::Closed)
    }
}

impl Drop for EmbeddedStore {
    fn drop(&mut self) {
        // What was acknowledged is in the file.
        self.writer.abort();
        self.ring.close();
    }
}

/// What an earlier process left.
async fn span(db: &mut sqlx::SqliteConnection) -> Result<Span, LogError> {
    let (first, last): (Option<i64>, Option<i64>) =
        sqlx::query_as("select min(seq), max(seq) from entries")
            .fetch_one(db)
            .await
            .context("read what is kept")?;
    let next = last.map_or(1, |last| rows::unsigned(last) + 1);
    Ok(Span { first: first.map_or(next, rows::unsigned), next })
}

#[async_trait]
impl LogStore for EmbeddedStore {
    async fn append(&self, entries: Vec<LogEntry>) -> Result<(), LogError> {
        if entries.is_empty() {
            return Ok(());
        }
        let (done, written) = oneshot::channel();
        self.order(Order::Append { entries, done }).await?;
        written.await.map_err(|_| LogError::Closed)?
    }

    async fn query(&self, query: &LogQuery) -> Result<LogAnswer, LogError> {
        query.check()?;
        read::latest(&self.queries, query, self.query_limit).await
    }

    async fn follow(
        &self,
        filter: LogFilter,
        from: FollowFrom,
    ) -> Result<Box<dyn LogFollower>, LogError> {
        filter.check()?;
        let (next, floor) = match from {
            FollowFrom::Now => (self.head() + 1, None),
            FollowFrom::After(sequence) => (sequence.min(self.head()) + 1, None),
            FollowFrom::Time(time) => (self.number_at(time).await?, Some(time)),
        };
        Ok(self.follow_at(filter, next, floor))
    }

    async fn check(&self) -> Result<(), LogError> {
        if self.writer.is_finished() { Err(LogError::Closed) } else { Ok(()) }
    }

    async fn close(&self) {
        let (done, closed) = oneshot::channel();
        if self.order(Order::Close { done }).await.is_ok() {
            let _ = closed.await;
        }
        self.queries.close().await;
        self.followers.close().await;
    }
}
