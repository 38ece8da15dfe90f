//! A follower that begins before the spool does: Loki's part in pages, then the spool's.

use std::{collections::HashSet, mem, sync::Arc};

use async_trait::async_trait;

use super::{
    answer::Found,
    client::{LokiClient, Order, Range},
    sort,
};
use crate::{Followed, LogError, LogFilter, LogFollower};

/// Entries of one page.
const PAGE_ENTRIES: u32 = 1000;

#[derive(Debug)]
pub(super) struct LokiFollower {
    past: Option<Past>,
    ready: Vec<Found>,
    spool: Spool,
}

struct Spool(Box<dyn LogFollower>);

impl std::fmt::Debug for Spool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Spool")
    }
}

#[derive(Debug)]
struct Past {
    client: LokiClient,
    origin: String,
    filter: LogFilter,
    /// Ours of this number and later are the spool's part.
    first: u64,
    /// Of the last entry of the page before, from which the next begins ...
    from_ns: i64,
    /// ... and which of that time were given.
    given: HashSet<(String, u64)>,
}

impl LokiFollower {
    /// Reads the first page: a Loki that is away is said at once.
    pub(super) async fn begin(
        client: LokiClient,
        origin: String,
        filter: LogFilter,
        start_ns: i64,
        first: u64,
        spool: Box<dyn LogFollower>,
    ) -> Result<Self, LogError> {
        let mut past =
            Past { client, origin, filter, first, from_ns: start_ns, given: HashSet::new() };
        let page = past.read().await?;
        let (ready, is_last) = past.keep(page);
        Ok(Self { past: (!is_last).then_some(past), ready, spool: Spool(spool) })
    }
}

impl Past {
    async fn read(&self) -> Result<Vec<Found>, LogError> {
        let range = Range {
            start_ns: Some(self.from_ns),
            end_ns: None,
            limit: PAGE_ENTRIES,
            order: Order::EarliestFirst,
        };
        self.client.query(&self.filter, range).await
    }

    /// What is new of a page, and whether it is the last.
    fn keep(&mut self, mut page: Vec<Found>) -> (Vec<Found>, bool) {
        let is_full = page.len() >= PAGE_ENTRIES as usize;
        sort(&mut page);
        let last_ns = page.last().map_or(self.from_ns, |found| found.logged.entry.time_ns);
        let key = |found: &Found| (found.origin.clone(), found.logged.sequence);
        let at_end: HashSet<_> =
            page.iter().filter(|found| found.logged.entry.time_ns == last_ns).map(key).collect();
        page.retain(|found| {
            let is_spooled = found.origin == self.origin && found.logged.sequence >= self.first;
            !is_spooled && !self.given.contains(&key(found))
        });
        if last_ns == self.from_ns && is_full {
            // More entries of one nanosecond than a page holds: Loki gives no way past them.
            self.from_ns = last_ns.saturating_add(1);
            self.given.clear();
        } else {
            self.from_ns = last_ns;
            self.given = at_end;
        }
        (page, !is_full)
    }
}

#[async_trait]
impl LogFollower for LokiFollower {
    async fn next(&mut self) -> Followed {
        loop {
            if !self.ready.is_empty() {
                let ready = mem::take(&mut self.ready);
                return Followed::Entries(
                    ready.into_iter().map(|found| Arc::clone(&found.logged)).collect(),
                );
            }
            let Some(past) = &mut self.past else { return self.spool.0.next().await };
            match past.read().await {
                Ok(page) => {
                    let (ready, is_last) = past.keep(page);
                    self.ready = ready;
                    if is_last {
                        self.past = None;
                    }
                }
                Err(error) => {
                    // How many these are nobody knows; all of ours that are not in the spool is
                    // the most.
                    tracing::warn!(%error, "a follower cannot read the past from Loki");
                    let missed = past.first.saturating_sub(1);
                    self.past = None;
                    return Followed::Missed(missed);
                }
            }
        }
    }
}
