//! Where lines are dropped off by those who cannot wait: a command's output, the platform's own
//! log. What finds no place is counted, and an entry says so where the lines are missing.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{sync::mpsc, task::JoinHandle, time::timeout};
use tokio_util::sync::CancellationToken;

use crate::{LogEntry, LogService, LogStore};

/// Lines that wait to be stored. At 16 KiB each at most, 128 MiB; usually some 100 bytes.
const WAITING_MAX: usize = 8192;
/// Lines of one append.
const BATCH_ENTRIES: usize = 256;
/// For what is in hand at the end.
const CLOSE_LIMIT: Duration = Duration::from_secs(2);

/// Cheap to clone.
#[derive(Debug, Clone)]
pub struct LogSink {
    entries: mpsc::Sender<LogEntry>,
    lost: Arc<AtomicU64>,
}

/// The other half: carries lines from the sink to the store.
#[derive(Debug)]
pub struct LogPipe {
    closing: CancellationToken,
    carrier: JoinHandle<()>,
}

impl LogSink {
    #[must_use]
    pub fn new(store: Arc<dyn LogStore>) -> (Self, LogPipe) {
        let (sink, entries) = Self::unconnected();
        (sink, entries.connect(store))
    }

    /// Takes lines from now on, as many as wait at most, and has a store later.
    #[must_use]
    pub fn unconnected() -> (Self, LogBacklog) {
        let (entries, received) = mpsc::channel(WAITING_MAX);
        let lost = Arc::new(AtomicU64::new(0));
        (Self { entries, lost: Arc::clone(&lost) }, LogBacklog { received, lost })
    }

    /// Never waits.
    pub fn write(&self, entry: LogEntry) {
        if self.entries.try_send(entry).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Lines that found no place, and that no entry has told of yet.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}

/// Lines that no store has yet.
#[derive(Debug)]
pub struct LogBacklog {
    received: mpsc::Receiver<LogEntry>,
    lost: Arc<AtomicU64>,
}

impl LogBacklog {
    #[must_use]
    pub fn connect(self, store: Arc<dyn LogStore>) -> LogPipe {
        let closing = CancellationToken::new();
        let carrier = tokio::spawn(carry(self, store, closing.clone()));
        LogPipe { closing, carrier }
    }
}

impl LogPipe {
    /// Stores what is in hand. The store itself is closed by whoever has it.
    pub async fn close(self) {
        self.closing.cancel();
        if timeout(CLOSE_LIMIT, self.carrier).await.is_err() {
            tracing::warn!("log lines were still waiting when the time was over");
        }
    }
}

async fn carry(mut backlog: LogBacklog, store: Arc<dyn LogStore>, closing: CancellationToken) {
    let mut batch = Vec::with_capacity(BATCH_ENTRIES);
    loop {
        let count = tokio::select! {
            biased;
            count = backlog.received.recv_many(&mut batch, BATCH_ENTRIES) => count,
            () = closing.cancelled() => {
                // What stands in the channel is drained; then `recv_many` says 0.
                backlog.received.close();
                continue;
            }
        };
        // Swapped before they are told: lines that are lost meanwhile are told of the next time.
        let lost = backlog.lost.swap(0, Ordering::Relaxed);
        if lost > 0 {
            batch.push(LogEntry::gap(LogService::Platform, lost, "they came too fast"));
        }
        if count == 0 && lost == 0 {
            return;
        }
        if let Err(error) = store.append(std::mem::take(&mut batch)).await {
            backlog.lost.fetch_add(lost + count as u64, Ordering::Relaxed);
            tracing::warn!(target: "aether_logs", %error, lines = count, "log lines are lost");
            if count == 0 {
                return;
            }
        }
    }
}
