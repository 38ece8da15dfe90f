//! Loki as the store: entries go into an embedded store first, which is the spool, and from there
//! to Loki in batches.
//!
//! - Queries: Loki's latest and the spool's latest, joined by their numbers, so that nothing comes
//!   twice and what was not shipped yet is there.
//! - Followers: the spool; where they begin before its oldest entry, Loki up to the middle of what
//!   both have, and then the spool.
//!
//! The embedded store's bounds are those of the spool.

mod answer;
mod client;
mod logql;
mod past;
mod push;
mod ship;

use std::{
    collections::{HashSet, VecDeque},
    path::Path,
    sync::Arc,
    time::Duration,
};

use aether_types::limits::LOG_QUERY_LIMIT_MAX;
use async_trait::async_trait;
use tokio::{sync::Mutex, task::JoinHandle, time::timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    EmbeddedConfig, EmbeddedStore, FollowFrom, LogAnswer, LogEntry, LogError, LogFilter,
    LogFollower, LogQuery, LogStore, Logged,
};
use answer::Found;
use client::{LokiClient, Order, Range};
use past::LokiFollower;
use ship::{Shared, Shipper};

pub use ship::ShipReport;

/// Facts in the spool.
const SHIPPED: &str = "loki_shipped";
const ORIGIN: &str = "loki_origin";
/// For the last batch, at the end.
const CLOSE_LIMIT: Duration = Duration::from_secs(3);

#[derive(Clone)]
pub struct LokiConfig {
    /// Such as `http://loki:3100`; may have a user and a password, which are never shown.
    pub url: String,
    pub batch_entries: usize,
    /// From the first entry of a batch to when it goes, full or not.
    pub batch_interval: Duration,
    /// Of one request.
    pub request_limit: Duration,
    /// Between two tries; doubled each time, up to the other.
    pub retry_min: Duration,
    pub retry_max: Duration,
    pub spool: EmbeddedConfig,
}

impl LokiConfig {
    #[must_use]
    pub fn new(url: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            batch_entries: 100,
            batch_interval: Duration::from_secs(5),
            request_limit: Duration::from_secs(10),
            retry_min: Duration::from_millis(500),
            retry_max: Duration::from_secs(30),
            spool: EmbeddedConfig::default(),
        }
    }
}

// The address may have a password.
impl std::fmt::Debug for LokiConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LokiConfig")
            .field("batch_entries", &self.batch_entries)
            .field("batch_interval", &self.batch_interval)
            .field("spool", &self.spool)
            .finish_non_exhaustive()
    }
}

#[derive(Debug)]
pub struct LokiStore {
    spool: Arc<EmbeddedStore>,
    client: LokiClient,
    origin: String,
    shared: Arc<Shared>,
    closing: CancellationToken,
    shipper: Mutex<Option<JoinHandle<()>>>,
}

impl LokiStore {
    /// Opens the spool, and begins to ship what is in it. Loki need not be there yet.
    pub async fn open(path: &Path, config: LokiConfig) -> Result<Self, LogError> {
        let client = LokiClient::new(&config.url, config.request_limit)?;
        let spool = Arc::new(EmbeddedStore::open(path, config.spool.clone()).await?);
        let origin = if let Some(origin) = spool.fact(ORIGIN).await? {
            origin
        } else {
            let origin = Uuid::new_v4().simple().to_string();
            spool.note(ORIGIN, origin.clone()).await?;
            origin
        };
        let shipped = spool.fact(SHIPPED).await?.and_then(|text| text.parse().ok()).unwrap_or(0);
        let shared = Arc::new(Shared::default());
        shared.change(|report| report.shipped = shipped);
        let closing = CancellationToken::new();
        let shipper = Shipper {
            client: client.clone(),
            follower: spool.follow_at(LogFilter::default(), shipped + 1, None),
            spool: Arc::clone(&spool),
            config,
            origin: origin.clone(),
            shared: Arc::clone(&shared),
            closing: closing.clone(),
            waiting: VecDeque::new(),
            is_over: false,
        };
        let shipper = Mutex::new(Some(tokio::spawn(shipper.run())));
        Ok(Self { spool, client, origin, shared, closing, shipper })
    }

    /// How the shipping goes.
    pub fn report(&self) -> ShipReport {
        self.shared.report()
    }

    /// What Loki has of it, the latest.
    async fn shipped(&self, query: &LogQuery) -> Result<Vec<Found>, LogError> {
        let range = Range {
            start_ns: query.start_ns,
            end_ns: query.end_ns,
            // One more, to know whether there are more.
            limit: query.limit.saturating_add(1).min(LOG_QUERY_LIMIT_MAX),
            order: Order::LatestFirst,
        };
        self.client.query(&query.filter, range).await
    }
}

/// In the order of time, and what was pushed twice once.
fn sort(found: &mut Vec<Found>) {
    found.sort_by(|a, b| {
        let key = |f: &Found| (f.logged.entry.time_ns, f.logged.sequence);
        key(a).cmp(&key(b)).then_with(|| a.origin.cmp(&b.origin))
    });
    // Marks of gaps have a number that an entry may have too; entries of others have none.
    found.dedup_by(|a, b| a.logged.sequence > 0 && a == b);
}

impl Drop for LokiStore {
    fn drop(&mut self) {
        if let Some(shipper) = self.shipper.get_mut().take() {
            // What it had in hand is in the spool.
            shipper.abort();
        }
    }
}

#[async_trait]
impl LogStore for LokiStore {
    async fn append(&self, entries: Vec<LogEntry>) -> Result<(), LogError> {
        self.spool.append(entries).await
    }

    async fn query(&self, query: &LogQuery) -> Result<LogAnswer, LogError> {
        query.check()?;
        let (mut found, spooled) = tokio::try_join!(self.shipped(query), self.spool.query(query))?;
        // Nobody can tell at one moment what Loki has of ours: what both have comes from the spool.
        // A mark of a gap may have the number of an entry that it stands for, and is no entry.
        let key = |logged: &Logged| (logged.sequence, logged.entry.missing);
        let ours: HashSet<_> = spooled.entries.iter().map(|logged| key(logged)).collect();
        found.retain(|found| found.origin != self.origin || !ours.contains(&key(&found.logged)));
        sort(&mut found);
        let mut all: Vec<_> = found.into_iter().map(|found| found.logged).collect();
        all.extend(spooled.entries);
        all.sort_by_key(|logged| (logged.entry.time_ns, logged.sequence));
        let surplus = all.len().saturating_sub(query.limit as usize);
        let more = surplus > 0 || spooled.more;
        all.drain(..surplus);
        Ok(LogAnswer { entries: all, more })
    }

    async fn follow(
        &self,
        filter: LogFilter,
        from: FollowFrom,
    ) -> Result<Box<dyn LogFollower>, LogError> {
        let FollowFrom::Time(start) = from else { return self.spool.follow(filter, from).await };
        filter.check()?;
        let oldest = self.spool.oldest();
        let begins = self.spool.number_at(start).await?;
        if oldest == 1 || begins > oldest {
            return Ok(self.spool.follow_at(filter, begins, Some(start)));
        }
        // Both sides are parted by this number. It lies in the middle of what both have: while
        // Loki's part is read, the spool goes on losing its oldest.
        let first = oldest + self.report().shipped.saturating_sub(oldest) / 2;
        let spool = self.spool.follow_at(filter.clone(), first, Some(start));
        let (client, origin) = (self.client.clone(), self.origin.clone());
        let follower = LokiFollower::begin(client, origin, filter, start, first, spool).await?;
        Ok(Box::new(follower))
    }

    async fn check(&self) -> Result<(), LogError> {
        self.spool.check().await?;
        match self.shared.report().trouble {
            Some(reason) => Err(LogError::LokiUnavailable { reason }),
            None => Ok(()),
        }
    }

    async fn close(&self) {
        self.closing.cancel();
        if let Some(mut shipper) = self.shipper.lock().await.take()
            && timeout(CLOSE_LIMIT, &mut shipper).await.is_err()
        {
            // The rest is shipped by the next process.
            shipper.abort();
        }
        self.spool.close().await;
    }
}
