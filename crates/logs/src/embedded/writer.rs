//! The one who writes: takes what is waiting, commits it at once, and shows it to the followers.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use sqlx::{Connection as _, SqliteConnection};
use tokio::{
    sync::{mpsc, oneshot},
    time::{MissedTickBehavior, interval},
};

use super::{EmbeddedConfig, keep, keep::Span, ring::Ring, rows};
use crate::{LogEntry, LogError, Logged};

/// Entries of one commit; more wait for the next.
const ENTRIES_PER_COMMIT: usize = 512;
/// How often what is too old is looked for when nothing is written.
const TRIM_INTERVAL: Duration = Duration::from_mins(1);
/// Appended between two looks at the size.
const TRIM_ENTRIES: u64 = 256;

pub(super) enum Order {
    Append {
        entries: Vec<LogEntry>,
        done: oneshot::Sender<Result<(), LogError>>,
    },
    /// A fact for the next process.
    Note {
        name: &'static str,
        value: String,
        done: oneshot::Sender<Result<(), LogError>>,
    },
    Close {
        done: oneshot::Sender<()>,
    },
}

pub(super) struct Writer {
    pub(super) db: SqliteConnection,
    pub(super) orders: mpsc::Receiver<Order>,
    pub(super) ring: Arc<Ring>,
    pub(super) config: EmbeddedConfig,
    pub(super) span: Span,
    /// What `span.first` is, for readers.
    pub(super) oldest: Arc<AtomicU64>,
    /// Met while appends were collected, and carried out after them.
    pub(super) put_back: Option<Order>,
}

impl Writer {
    /// Ends when it is told to, or when nobody can order anything any more.
    pub(super) async fn run(mut self) {
        let mut tick = interval(TRIM_INTERVAL);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut since_trim = 0;
        let mut again = false;
        let closed = loop {
            let put_back = self.put_back.take();
            let order = tokio::select! {
                biased;
                () = std::future::ready(()), if put_back.is_some() => put_back,
                order = self.orders.recv() => order,
                _ = tick.tick() => {
                    again = self.trim().await;
                    continue;
                }
                () = std::future::ready(()), if again => {
                    again = self.trim().await;
                    continue;
                }
            };
            match order {
                None => break None,
                Some(Order::Close { done }) => break Some(done),
                Some(Order::Note { name, value, done }) => {
                    let _ = done.send(self.note(name, &value).await);
                }
                Some(Order::Append { entries, done }) => {
                    since_trim += self.append_with_others(entries, done).await;
                    if since_trim >= TRIM_ENTRIES {
                        since_trim = 0;
                        again = self.trim().await;
                    }
                }
            }
        };
        self.ring.close();
        if let Err(error) = self.db.close().await {
            tracing::warn!(%error, "close the log store");
        }
        if let Some(done) = closed {
            let _ = done.send(());
        }
    }

    async fn trim(&mut self) -> bool {
        let more = keep::trim(&mut self.db, &mut self.span, &self.config).await;
        self.oldest.store(self.span.first, Ordering::Release);
        more.unwrap_or_else(|error| {
            // The next look tries again.
            tracing::warn!(%error, "remove log entries that are too old or too many");
            false
        })
    }

    /// One commit for all appends that wait. Returns how many entries were kept.
    async fn append_with_others(
        &mut self,
        entries: Vec<LogEntry>,
        done: oneshot::Sender<Result<(), LogError>>,
    ) -> u64 {
        let mut waiting = vec![done];
        let mut batch = entries;
        while batch.len() < ENTRIES_PER_COMMIT {
            match self.orders.try_recv() {
                Ok(Order::Append { entries, done }) => {
                    batch.extend(entries);
                    waiting.push(done);
                }
                Ok(order) => {
                    self.put_back = Some(order);
                    break;
                }
                Err(_) => break,
            }
        }
        let next = self.span.next;
        let batch: Vec<Arc<Logged>> = batch
            .into_iter()
            .zip(next..)
            .map(|(entry, sequence)| Arc::new(Logged { sequence, entry }))
            .collect();
        let count = batch.len() as u64;
        let written = self.commit(&batch).await.map_err(Arc::new);
        if written.is_ok() {
            self.span.next += count;
            self.ring.push(batch);
        }
        for done in waiting {
            // An error means that nobody waits, which is no failure.
            let _ = done.send(written.clone().map_err(LogError::Write));
        }
        if written.is_ok() { count } else { 0 }
    }

    async fn commit(&mut self, batch: &[Arc<Logged>]) -> Result<(), sqlx::Error> {
        let mut change = self.db.begin_with("begin immediate").await?;
        rows::insert(&mut change, batch).await?;
        change.commit().await
    }

    async fn note(&mut self, name: &str, value: &str) -> Result<(), LogError> {
        sqlx::query(
            "insert into facts (name, value) values (?, ?)
             on conflict do update set value = excluded.value",
        )
        .bind(name)
        .bind(value)
        .execute(&mut self.db)
        .await
        .map(|_| ())
        .map_err(|source| LogError::Database { context: "write a fact", source })
    }
}
