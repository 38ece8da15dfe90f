//! A follower: a number, and what it wants. It reads from the ring where that reaches back far
//! enough, and from the disk else, so it can be as slow as it likes.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use sqlx::SqlitePool;
use tokio::sync::watch;

use super::{
    read,
    ring::{Head, Ring},
};
use crate::{Followed, LogError, LogFilter, LogFollower, Logged};

/// Entries given, or looked at, in one step.
const STEP_ENTRIES: usize = 256;
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// Tries before a disk that cannot be read ends the follower.
const TRIES: u32 = 10;

#[derive(Debug)]
pub(super) struct Follower {
    pub(super) ring: Arc<Ring>,
    pub(super) head: watch::Receiver<Head>,
    pub(super) disk: SqlitePool,
    pub(super) filter: LogFilter,
    /// Entries of an earlier time are not given.
    pub(super) floor_ns: Option<i64>,
    /// The number of the entry that is looked at next.
    pub(super) next: u64,
    /// Found behind a gap, which was given first.
    pub(super) ready: Option<Followed>,
}

impl Follower {
    /// Something to give, or nothing yet; `None`: nothing comes. What is found is given, or kept,
    /// with no await between.
    async fn advance(&mut self) -> Option<Option<Followed>> {
        let Head { last: head, is_closed } = *self.head.borrow_and_update();
        if self.next > head {
            if is_closed {
                return None;
            }
            return self.head.changed().await.ok().map(|()| None);
        }
        let read = self.ring.read(self.next, STEP_ENTRIES, |logged| self.fits(logged));
        if let Some((fitting, next)) = read {
            self.next = next;
            if fitting.is_empty() {
                // A long run of entries for others is walked through without holding up anybody.
                tokio::task::yield_now().await;
                return Some(None);
            }
            return Some(Some(Followed::Entries(fitting)));
        }
        let walked = self.walk(head).await?;
        self.next = walked.next;
        let found = (!walked.entries.is_empty()).then_some(Followed::Entries(walked.entries));
        if walked.missed == 0 {
            return Some(found);
        }
        self.ready = found;
        Some(Some(Followed::Missed(walked.missed)))
    }

    async fn walk(&self, head: u64) -> Option<read::Walked> {
        for _ in 0..TRIES {
            let (filter, floor) = (&self.filter, self.floor_ns);
            match read::walk(&self.disk, filter, floor, self.next, head, STEP_ENTRIES).await {
                Ok(walked) => return Some(walked),
                Err(LogError::Closed) => return None,
                Err(LogError::Busy) => {}
                Err(error) => {
                    tracing::warn!(%error, "a follower cannot read the log store");
                    tokio::time::sleep(RETRY_INTERVAL).await;
                }
            }
        }
        None
    }

    fn fits(&self, logged: &Logged) -> bool {
        self.floor_ns.is_none_or(|floor| logged.entry.time_ns >= floor)
            && self.filter.fits(&logged.entry)
    }
}

#[async_trait]
impl LogFollower for Follower {
    async fn next(&mut self) -> Followed {
        loop {
            if let Some(followed) = self.ready.take() {
                return followed;
            }
            match self.advance().await {
                Some(Some(followed)) => return followed,
                Some(None) => {}
                None => return Followed::Closed,
            }
        }
    }
}
