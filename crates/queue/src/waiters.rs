//! Who waits for work. An entry that becomes ready wakes one waiter that may have it.
//!
//! No wake-up is lost: a waiter that was woken and goes away without having looked for work (its
//! future was dropped, its time was up) passes the wake-up on. Being woken for nothing is
//! harmless. A queue that can may give a waiter its lease with the wake-up; one that nobody takes
//! is to be given back.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use aether_types::WorkerId;
use tokio::sync::Notify;

use crate::{Lane, Lease};

#[derive(Debug, Default)]
pub(crate) struct Waiters {
    /// The one that waits longest first.
    waiting: Mutex<VecDeque<Entry>>,
    /// What was for nobody here.
    unused: Mutex<Unused>,
    is_unused: Notify,
}

/// Another process may have use for it.
#[derive(Debug, Default)]
pub(crate) struct Unused {
    /// Somebody is to look for work.
    pub(crate) wake: bool,
    pub(crate) leases: Vec<Lease>,
}

#[derive(Debug)]
struct Entry {
    worker: WorkerId,
    place: Arc<Place>,
}

#[derive(Debug, Default)]
struct Place {
    woken: Notify,
    given: Mutex<Option<Lease>>,
}

impl Place {
    fn given(&self) -> MutexGuard<'_, Option<Lease>> {
        self.given.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place in the line. Dropping it gives the place up.
#[derive(Debug)]
pub(crate) struct Waiter<'w> {
    waiters: &'w Waiters,
    worker: WorkerId,
    place: Arc<Place>,
    /// Whoever wakes another has looked, or the wake-up was passed on.
    done: bool,
}

impl Waiters {
    /// Waits from now on. Call this while no entry can become ready unseen.
    pub(crate) fn join(&self, worker: WorkerId) -> Waiter<'_> {
        let place = Arc::new(Place::default());
        self.lock().push_back(Entry { worker, place: Arc::clone(&place) });
        Waiter { waiters: self, worker, place, done: false }
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
            entry.place.woken.notify_one();
        }
        entry.is_some()
    }

    /// Wakes one of the lease's worker, with it.
    pub(crate) fn give(&self, lease: Lease) {
        let mut waiting = self.lock();
        let place = waiting.iter().position(|w| w.worker == lease.worker);
        let Some(entry) = place.and_then(|p| waiting.remove(p)) else {
            drop(waiting);
            self.leave_over(|unused| unused.leases.push(lease));
            return;
        };
        *entry.place.given() = Some(lease);
        entry.place.woken.notify_one();
    }

    /// How many of this worker wait here.
    pub(crate) fn count(&self, worker: WorkerId) -> usize {
        self.lock().iter().filter(|waiter| waiter.worker == worker).count()
    }

    /// As [`Waiters::wake`]; where there is none, [`Waiters::unused`] tells.
    pub(crate) fn wake_or_pass(&self, lane: Lane) {
        if !self.try_wake(lane) {
            self.leave_over(|unused| unused.wake = true);
        }
    }

    /// Wakes another that may take what this worker may.
    pub(crate) fn wake_another(&self, worker: WorkerId) {
        let own = self.try_wake(Lane::Worker(worker));
        let shared = self.try_wake(Lane::Shared);
        if !own && !shared {
            self.leave_over(|unused| unused.wake = true);
        }
    }

    fn leave_over(&self, what: impl FnOnce(&mut Unused)) {
        what(&mut self.unused.lock().unwrap_or_else(PoisonError::into_inner));
        self.is_unused.notify_one();
    }

    /// Completes when something was for nobody here.
    pub(crate) async fn unused(&self) -> Unused {
        self.is_unused.notified().await;
        std::mem::take(&mut *self.unused.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Wakes everybody: something may have become ready that nobody told.
    pub(crate) fn wake_all(&self) {
        for entry in self.lock().drain(..) {
            entry.place.woken.notify_one();
        }
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Entry>> {
        // Nothing in here panics half-way.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiter<'_> {
    pub(crate) async fn woken(&self) {
        self.place.woken.notified().await;
    }

    pub(crate) fn has_lease(&self) -> bool {
        self.place.given().is_some()
    }

    /// What came with the wake-up, if anything did. Whoever waits for anything between this and
    /// its use may be dropped with it.
    pub(crate) fn take(&self) -> Option<Lease> {
        self.place.given().take()
    }

    /// The wake-up, if there was one, has been used: its owner has looked for work.
    pub(crate) fn looked(mut self) {
        self.leave();
        self.done = true;
    }

    /// Whether it was still in line.
    fn leave(&self) -> bool {
        let mut waiting = self.waiters.lock();
        let place = waiting.iter().position(|w| Arc::ptr_eq(&w.place, &self.place));
        place.and_then(|p| waiting.remove(p)).is_some()
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        if self.done || self.leave() {
            return;
        }
        match self.take() {
            Some(lease) => self.waiters.give(lease),
            // It cannot tell which lane it was woken for.
            None => self.waiters.wake_another(self.worker),
        }
    }
}
