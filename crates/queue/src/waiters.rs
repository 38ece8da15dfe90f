//! Who waits for work. An entry that becomes ready wakes one waiter that may have it.
//!
//! No wake-up is lost: a waiter that was woken and goes away without having looked for work (its
//! future was dropped, its time was up) passes the wake-up on. Being woken for nothing is
//! harmless.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use aether_types::WorkerId;
use tokio::sync::Notify;

use crate::Lane;

#[derive(Debug, Default)]
pub(crate) struct Waiters {
    /// The one that waits longest first.
    waiting: Mutex<VecDeque<Entry>>,
    /// A wake-up was for nobody here.
    unused: Notify,
}

#[derive(Debug)]
struct Entry {
    worker: WorkerId,
    woken: Arc<Notify>,
}

/// A place in the line. Dropping it gives the place up.
#[derive(Debug)]
pub(crate) struct Waiter<'w> {
    waiters: &'w Waiters,
    worker: WorkerId,
    woken: Arc<Notify>,
    /// Whoever wakes another has looked, or the wake-up was passed on.
    done: bool,
}

impl Waiters {
    /// Waits from now on. Call this while no entry can become ready unseen.
    pub(crate) fn join(&self, worker: WorkerId) -> Waiter<'_> {
        let woken = Arc::new(Notify::new());
        self.lock().push_back(Entry { worker, woken: Arc::clone(&woken) });
        Waiter { waiters: self, worker, woken, done: false }
    }

    /// Wakes one that may take from the lane.
    pub(crate) fn wake(&self, lane: Lane) {
        self.try_wake(lane);
    }

    /// `false`: there is none.
    fn try_wake(&self, lane: Lane) -> bool {
        let mut waiting = self.lock();
        let place = waiting.iter().position(|w| match lane {
            Lane::Shared => true,
            Lane::Worker(worker) => w.worker == worker,
        });
        let entry = place.and_then(|p| waiting.remove(p));
        if let Some(entry) = &entry {
            entry.woken.notify_one();
        }
        entry.is_some()
    }

    /// As [`Waiters::wake`]; where there is none, [`Waiters::unused`] completes.
    pub(crate) fn wake_or_pass(&self, lane: Lane) {
        if !self.try_wake(lane) {
            self.unused.notify_one();
        }
    }

    /// Wakes another that may take what this worker may.
    pub(crate) fn wake_another(&self, worker: WorkerId) {
        let own = self.try_wake(Lane::Worker(worker));
        let shared = self.try_wake(Lane::Shared);
        if !own && !shared {
            self.unused.notify_one();
        }
    }

    /// Completes when a wake-up was for nobody here: another process may have use for it.
    pub(crate) async fn unused(&self) {
        self.unused.notified().await;
    }

    /// Wakes everybody: something may have become ready that nobody told.
    pub(crate) fn wake_all(&self) {
        for entry in self.lock().drain(..) {
            entry.woken.notify_one();
        }
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Entry>> {
        // Nothing in here panics half-way.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiter<'_> {
    pub(crate) async fn woken(&self) {
        self.woken.notified().await;
    }

    /// The wake-up, if there was one, has been used: its owner has looked for work.
    pub(crate) fn looked(mut self) {
        self.leave();
        self.done = true;
    }

    /// Whether it was still in line.
    fn leave(&self) -> bool {
        let mut waiting = self.waiters.lock();
        let place = waiting.iter().position(|w| Arc::ptr_eq(&w.woken, &self.woken));
        place.and_then(|p| waiting.remove(p)).is_some()
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        if self.done || self.leave() {
            return;
        }
        // It cannot tell which lane it was woken for.
        self.waiters.wake_another(self.worker);
    }
}
