//! The latest entries in memory, shared by all followers. There is no buffer for each of them: a
//! follower is a number, so a thousand of them cost no more than what they read, and one that
//! stands still costs nothing.

use std::{
    collections::VecDeque,
    sync::{Arc, PoisonError, RwLock},
};

use tokio::sync::watch;

use crate::Logged;

/// Entries besides the bound in bytes.
const ENTRIES_MAX: usize = 65_536;

pub(super) struct Ring {
    held: RwLock<Held>,
    bytes_max: usize,
    head: watch::Sender<Head>,
}

// What guests say is for those who ask for it.
impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").field("head", &*self.head.borrow()).finish_non_exhaustive()
    }
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Head {
    /// The number of the last entry that was committed.
    pub(super) last: u64,
    /// None comes after it.
    pub(super) is_closed: bool,
}

#[derive(Default)]
struct Held {
    entries: VecDeque<Arc<Logged>>,
    bytes: usize,
}

impl Ring {
    pub(super) fn new(last: u64, bytes_max: usize) -> Self {
        let head = watch::Sender::new(Head { last, is_closed: false });
        Self { held: RwLock::default(), bytes_max, head }
    }

    /// Committed entries, which follow the last ones without a hole.
    pub(super) fn push(&self, entries: Vec<Arc<Logged>>) {
        let Some(last) = entries.last().map(|logged| logged.sequence) else { return };
        {
            let mut held = self.held.write().unwrap_or_else(PoisonError::into_inner);
            held.bytes += entries.iter().map(|logged| logged.entry.weight()).sum::<usize>();
            held.entries.extend(entries);
            while held.bytes > self.bytes_max || held.entries.len() > ENTRIES_MAX {
                let Some(gone) = held.entries.pop_front() else { break };
                held.bytes -= gone.entry.weight();
            }
        }
        self.head.send_modify(|head| head.last = last);
    }

    pub(super) fn close(&self) {
        self.head.send_modify(|head| head.is_closed = true);
    }

    /// Of up to `max` entries from number `from` on those that fit, and the number after the last
    /// that was looked at; `None` where the ring no longer has the first.
    pub(super) fn read(
        &self,
        from: u64,
        max: usize,
        fits: impl Fn(&Logged) -> bool,
    ) -> Option<(Vec<Arc<Logged>>, u64)> {
        let held = self.held.read().unwrap_or_else(PoisonError::into_inner);
        let first = held.entries.front()?.sequence;
        let skip = usize::try_from(from.checked_sub(first)?).ok()?;
        let end = held.entries.len().min(skip.saturating_add(max));
        if skip >= end {
            return Some((Vec::new(), from));
        }
        let looked_at = held.entries.range(skip..end);
        let next = from + looked_at.len() as u64;
        Some((looked_at.filter(|logged| fits(logged)).cloned().collect(), next))
    }

    pub(super) fn head(&self) -> u64 {
        self.head.borrow().last
    }

    pub(super) fn watch(&self) -> watch::Receiver<Head> {
        self.head.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{LogEntry, LogLevel, LogService, LogStream};

    fn logged(sequence: u64) -> Arc<Logged> {
        let entry = LogEntry::new(LogService::Guest, LogLevel::Info, LogStream::Stdout, "line");
        Arc::new(Logged { sequence, entry })
    }

    /// Even numbers fit.
    fn numbers(ring: &Ring, from: u64, max: usize) -> Option<(Vec<u64>, u64)> {
        let (read, next) = ring.read(from, max, |logged| logged.sequence % 2 == 0)?;
        Some((read.iter().map(|logged| logged.sequence).collect(), next))
    }

    #[test]
    fn the_oldest_go_and_whoever_wants_them_is_told() {
        let weight = logged(1).entry.weight();
        let ring = Ring::new(6, weight * 3);
        assert_eq!(numbers(&ring, 7, 9), None);
        ring.push((7..=10).map(logged).collect());
        assert_eq!(ring.head(), 10);
        assert_eq!(numbers(&ring, 7, 9), None);
        assert_eq!(numbers(&ring, 8, 2), Some((vec![8], 10)));
        assert_eq!(numbers(&ring, 8, 9), Some((vec![8, 10], 11)));
        assert_eq!(numbers(&ring, 11, 9), Some((vec![], 11)));
    }
}
