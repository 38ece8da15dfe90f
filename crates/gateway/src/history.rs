//! The history of events, told to those who follow.
//!
//! ```text
//!  the bus: something happened ──► [watch] reads what is new, once for all ──► recent
//!                                                                               │
//!  a follower: from the store up to where `recent` begins, then from `recent` ◄─┘
//! ```
//!
//! Nothing is read while nobody follows.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use aether_events::Received;
use aether_store::{EventBatch, EventFilter, EventRecord, EventsFrom, StoreError};
use aether_types::{EventPattern, Timestamp, limits};
use futures::FutureExt as _;
use tokio::{
    sync::watch,
    time::{MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;

use crate::{parts::App, problem::chain};

/// Events that are kept at hand. A follower that is further behind reads the store.
const RECENT: usize = 2048;

/// What another process did and could not tell is seen after this long.
const LOOK: Duration = Duration::from_secs(5);

/// Old events are taken away this often.
const PRUNE: Duration = Duration::from_mins(10);

/// What was read last.
#[derive(Debug, Default)]
struct Recent {
    /// Everything after this number, and up to `head`, is in `events`.
    from: u64,
    head: u64,
    events: VecDeque<Arc<EventRecord>>,
}

/// What a follower gets.
pub(crate) struct Caught {
    pub(crate) events: Vec<Arc<EventRecord>>,
    pub(crate) missed: bool,
}

#[derive(Debug)]
pub(crate) struct History {
    recent: Mutex<Recent>,
    /// The number of the newest event that is known.
    head: watch::Sender<u64>,
}

impl Default for History {
    fn default() -> Self {
        Self { recent: Mutex::default(), head: watch::Sender::new(0) }
    }
}

impl History {
    fn take(&self, batch: EventBatch) {
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        recent.head = batch.next;
        recent.events.extend(batch.events.into_iter().map(Arc::new));
        while recent.events.len() > RECENT {
            if let Some(gone) = recent.events.pop_front() {
                recent.from = gone.sequence;
            }
        }
        let head = recent.head;
        drop(recent);
        self.head.send_replace(head);
    }

    /// Begins anew: what happened while nobody followed is in the store.
    fn begin(&self, at: u64) {
        *self.recent.lock().unwrap_or_else(PoisonError::into_inner) =
            Recent { from: at, head: at, events: VecDeque::new() };
    }

    /// What there is after `after`, and how far that goes; `None`: the store knows.
    fn recent(&self, after: u64) -> Option<(Vec<Arc<EventRecord>>, u64)> {
        let recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        if after < recent.from || recent.head == 0 {
            return None;
        }
        let begin = recent.events.partition_point(|event| event.sequence <= after);
        Some((recent.events.range(begin..).cloned().collect(), recent.head.max(after)))
    }
}

/// A place in the history.
pub(crate) struct Place {
    app: App,
    filter: EventFilter,
    after: u64,
    head: watch::Receiver<u64>,
}

impl Place {
    pub(crate) async fn new(
        app: &App,
        filter: EventFilter,
        from: EventsFrom,
    ) -> Result<Self, StoreError> {
        // From here on somebody follows.
        let head = app.history.head.subscribe();
        let after = app.store().events_begin(from).await?;
        Ok(Self { app: app.clone(), filter, after, head })
    }

    /// What comes next of what is asked for: something at least, or nothing where there is no more
    /// and the follower does not want to wait. Cancel-safe.
    pub(crate) async fn next(&mut self, waits: bool) -> Result<Caught, StoreError> {
        loop {
            self.head.mark_unchanged();
            let recent = self.app.history.recent(self.after);
            let (caught, next) = if let Some((mut events, head)) = recent {
                events.retain(|event| fits(&self.filter, event));
                (Caught { events, missed: false }, head)
            } else {
                let read = self.app.store().events_after(self.after, &self.filter).await?;
                let events = read.events.into_iter().map(Arc::new).collect();
                (Caught { events, missed: read.missed }, read.next)
            };
            let came_further = next > self.after;
            self.after = next;
            let is_something = !caught.events.is_empty() || caught.missed;
            if is_something || !(waits || came_further) {
                return Ok(caught);
            }
            if !came_further {
                // The sender lives as long as the app.
                let _ = self.head.changed().await;
            }
        }
    }
}

/// The same as the store finds.
fn fits(filter: &EventFilter, event: &EventRecord) -> bool {
    let EventFilter { project, topics, vm, task } = filter;
    let fits = |pattern: &EventPattern| pattern.fits(&event.topic);
    (project.is_none() || *project == event.project_id)
        && (vm.is_none() || *vm == event.vm_id)
        && (task.is_none() || *task == event.task_id)
        && (topics.is_empty() || topics.iter().any(fits))
}

/// Reads what is new for all followers, and holds the history to its bounds. Until it is told to
/// stop.
pub(crate) async fn watch(app: App, stop: CancellationToken) {
    let mut told = app.parts.bus.subscribe();
    let mut fleet = app.fleet_changed.subscribe();
    let mut looks = interval(LOOK);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut prunes = interval(PRUNE);
    prunes.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut is_followed = false;
    loop {
        let wants_prune = tokio::select! {
            () = stop.cancelled() => return,
            received = told.next() => match received {
                Received::Event(_) | Received::Missed => false,
                Received::Closed => return,
            },
            _ = fleet.changed() => false,
            _ = looks.tick() => false,
            _ = prunes.tick() => true,
        };
        let work = async {
            if wants_prune {
                prune(&app).await?;
            }
            let was_followed = is_followed;
            is_followed = app.history.head.receiver_count() > 0;
            read(&app, was_followed).await
        };
        // Dropped in the middle, the store has everything as it was.
        let done = tokio::select! {
            () = stop.cancelled() => return,
            done = work => done,
        };
        // Whatever was told until the read began is read.
        while let Some(Received::Event(_) | Received::Missed) = told.next().now_or_never() {}
        if let Err(error) = done {
            is_followed = false;
            tracing::warn!(error = chain(&error), "read the history of events");
        }
    }
}

async fn read(app: &App, goes_on: bool) -> Result<(), StoreError> {
    if app.history.head.receiver_count() == 0 {
        return Ok(());
    }
    if !goes_on {
        let head = app.store().events_begin(EventsFrom::Now).await?;
        app.history.begin(head);
        app.history.head.send_replace(head);
        return Ok(());
    }
    loop {
        let head = *app.history.head.borrow();
        let batch = app.store().events_after(head, &EventFilter::default()).await?;
        if batch.next == head {
            return Ok(());
        }
        let more = batch.more;
        if batch.missed {
            // Others have pruned what was not read here: followers ask the store.
            app.history.begin(head.max(batch.next));
            app.history.head.send_replace(batch.next);
        } else {
            app.history.take(batch);
        }
        if !more {
            return Ok(());
        }
    }
}

async fn prune(app: &App) -> Result<(), StoreError> {
    let kept = i64::from(limits::EVENTS_KEPT_DAYS) * 24 * 3600 * 1000;
    let before = Timestamp::now().plus_ms(-kept);
    while app.store().prune_events(before).await? > 0 {}
    Ok(())
}
