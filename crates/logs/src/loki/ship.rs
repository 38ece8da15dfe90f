//! Carries entries from the spool to Loki, in order and each at least once.
//!
//! ```text
//!   Gather: 100 entries, or 5 s since the first ──► Push ──► taken: note the number, gather
//!                                                    │  ├──► refused: count, log, mark, gather
//!                                                    └──┴──► later: wait, push the same again
//! ```
//!
//! What a crash repeats has the same time, labels and line, which Loki keeps once.
//!
//! What Loki does not take waits in the spool, whose bound is the embedded store's. What goes
//! from there before it was shipped is told to Loki by an entry where it is missing.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::time::{Instant, sleep, timeout_at};
use tokio_util::sync::CancellationToken;

use super::{
    LokiConfig, SHIPPED,
    client::{LokiClient, Pushed},
    push,
};
use crate::{EmbeddedStore, Followed, LogEntry, LogFollower, LogService, Logged};

/// Of the lines of one batch; Loki's own bound of a request is 4 MiB and more.
const BATCH_BYTES_MAX: usize = 1 << 20;

/// What was shipped, since the start.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ShipReport {
    /// The number of the last entry that Loki has taken or refused.
    pub shipped: u64,
    pub entries_taken: u64,
    pub batches_taken: u64,
    pub entries_refused: u64,
    /// Removed from the spool before they were shipped.
    pub entries_missed: u64,
    pub tries_failed: u64,
    /// Why the present batch is not taken; none while all goes well.
    pub trouble: Option<String>,
    /// Why a batch was refused the last time.
    pub refusal: Option<String>,
}

#[derive(Debug, Default)]
pub(super) struct Shared(Mutex<ShipReport>);

impl Shared {
    pub(super) fn report(&self) -> ShipReport {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn change<T>(&self, change: impl FnOnce(&mut ShipReport) -> T) -> T {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

pub(super) struct Shipper {
    pub(super) client: LokiClient,
    pub(super) spool: Arc<EmbeddedStore>,
    pub(super) follower: Box<dyn LogFollower>,
    pub(super) config: LokiConfig,
    pub(super) origin: String,
    pub(super) shared: Arc<Shared>,
    pub(super) closing: CancellationToken,
    /// Read from the spool, and in no batch yet.
    pub(super) waiting: VecDeque<Arc<Logged>>,
    /// The follower has nothing more.
    pub(super) is_over: bool,
}

impl Shipper {
    pub(super) async fn run(mut self) {
        while let Some(batch) = self.gather().await {
            if !self.deliver(&batch).await {
                return;
            }
        }
    }

    /// `None`: nothing is left, and nothing comes.
    async fn gather(&mut self) -> Option<Vec<Arc<Logged>>> {
        while self.waiting.is_empty() {
            if self.is_over {
                return None;
            }
            let closing = self.closing.clone();
            tokio::select! {
                biased;
                followed = self.follower.next() => self.take(followed),
                () = closing.cancelled() => return None,
            }
        }
        let deadline = Instant::now() + self.config.batch_interval;
        while self.waiting.len() < self.config.batch_entries && !self.is_over {
            let closing = self.closing.clone();
            tokio::select! {
                biased;
                next = timeout_at(deadline, self.follower.next()) => match next {
                    Ok(followed) => self.take(followed),
                    Err(_) => break,
                },
                () = closing.cancelled() => break,
            }
        }
        let mut bytes = 0;
        let fitting = self.waiting.iter().take(self.config.batch_entries).take_while(|logged| {
            bytes += logged.entry.weight();
            bytes <= BATCH_BYTES_MAX
        });
        // A single line is far smaller than the bound.
        let count = fitting.count().max(1);
        Some(self.waiting.drain(..count.min(self.waiting.len())).collect())
    }

    fn take(&mut self, followed: Followed) {
        match followed {
            Followed::Entries(entries) => self.waiting.extend(entries),
            Followed::Missed(missed) => {
                self.shared.change(|report| report.entries_missed += missed);
                tracing::warn!(missed, "the log spool was full; lines are lost to Loki");
                let last = self
                    .waiting
                    .back()
                    .map_or_else(|| self.shared.report().shipped, |logged| logged.sequence);
                // The number of the last of those that are missing, which nothing else has.
                let mark = gap(missed, "Loki was away, and the spool was full");
                self.waiting.push_back(Arc::new(Logged { sequence: last + missed, entry: mark }));
            }
            Followed::Closed => self.is_over = true,
        }
    }

    /// `false`: it is time to end, and the batch stays in the spool.
    async fn deliver(&mut self, batch: &[Arc<Logged>]) -> bool {
        let Some(last) = batch.last().map(|logged| logged.sequence) else { return true };
        let body = match push::body(batch, &self.origin) {
            Ok(body) => body,
            Err(error) => {
                self.refused(batch, last, format!("the batch cannot be packed: {error}"));
                return true;
            }
        };
        let mut delay = self.config.retry_min;
        loop {
            match self.client.push(body.clone()).await {
                Pushed::Taken => {
                    self.taken(batch.len() as u64, last);
                    break;
                }
                Pushed::Refused(reason) => {
                    self.refused(batch, last, reason);
                    break;
                }
                Pushed::Later { reason, after } => {
                    self.failed(&reason);
                    let wait = after.unwrap_or(Duration::ZERO).max(delay);
                    tokio::select! {
                        () = self.closing.cancelled() => return false,
                        () = sleep(wait) => {}
                    }
                    delay = (delay * 2).min(self.config.retry_max);
                }
            }
        }
        if let Err(error) = self.spool.note(SHIPPED, last.to_string()).await {
            // The batch is shipped again after a restart, and Loki keeps it once.
            tracing::warn!(%error, "note what was shipped to Loki");
        }
        true
    }

    fn taken(&self, count: u64, last: u64) {
        let was_trouble = self.shared.change(|report| {
            report.shipped = last;
            report.entries_taken += count;
            report.batches_taken += 1;
            report.trouble.take().is_some()
        });
        if was_trouble {
            tracing::info!("Loki takes log lines again");
        }
    }

    fn failed(&self, reason: &str) {
        let is_new = self.shared.change(|report| {
            report.tries_failed += 1;
            report.trouble.replace(reason.to_owned()).is_none()
        });
        // Once, and not for each of many tries.
        if is_new {
            tracing::warn!(reason, "Loki does not take log lines; they wait on the disk");
        }
    }

    /// The batch is given up, and an entry says so where it is missing.
    fn refused(&mut self, batch: &[Arc<Logged>], last: u64, reason: String) {
        let count = batch.len() as u64;
        tracing::warn!(entries = count, reason, "Loki refused log lines; they are dropped");
        self.shared.change(|report| {
            report.shipped = last;
            report.entries_refused += count;
            report.trouble = None;
            report.refusal = Some(reason);
        });
        // A mark that is refused itself is not marked again.
        let only_mark = batch.len() == 1 && batch.iter().all(|logged| logged.entry.missing > 0);
        if !only_mark {
            let mark = gap(count, "Loki refused them");
            self.waiting.push_front(Arc::new(Logged { sequence: last, entry: mark }));
        }
    }
}

fn gap(missing: u64, why: &str) -> LogEntry {
    LogEntry::gap(LogService::Platform, missing, why)
}
