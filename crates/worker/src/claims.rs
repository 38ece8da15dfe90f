//! Taking tasks from the queue, and keeping them.

use std::{sync::Arc, time::Duration};

use aether_events::{Event, Received, Subscription};
use aether_queue::QueueError;
use aether_store::{PageRequest, StoreError, TaskFilter};
use aether_types::{TaskState, limits};
use tokio::{sync::Semaphore, time::MissedTickBehavior};

use crate::{fault, worker::Core};

/// A claim waits this long in the queue before it is asked again; nothing happens in between.
const CLAIM_WAIT: Duration = Duration::from_mins(1);
/// After a failure of the queue itself.
const FAILURE_PAUSE: Duration = Duration::from_millis(500);

pub(crate) async fn claim(core: Arc<Core>) {
    let places = Arc::new(Semaphore::new(core.parts.config.tasks_at_once));
    let mut claiming = core.claiming.subscribe();
    loop {
        tokio::select! {
            () = core.draining.cancelled() => return,
            // The sender lives as long as the worker.
            _ = claiming.wait_for(|may| *may) => {}
        }
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let claim = core.parts.queue.claim(core.parts.id, core.parts.config.lease, CLAIM_WAIT);
        let claimed = tokio::select! {
            biased;
            () = core.draining.cancelled() => return,
            // What it claimed in this moment is a lease that runs out.
            _ = claiming.wait_for(|may| !*may) => continue,
            claimed = claim => claimed,
        };
        match claimed {
            Ok(Some(lease)) => {
                core.spawn(Arc::clone(&core).attempt(lease, place));
            }
            Ok(None) => {}
            Err(error) => {
                tracing::error!(error = fault::chain(&error), "claim from the queue");
                tokio::select! {
                    () = core.draining.cancelled() => return,
                    () = tokio::time::sleep(FAILURE_PAUSE) => {}
                }
            }
        }
    }
}

/// Renews leases in a task of its own, so that no work however busy lets one run out.
pub(crate) async fn renew(core: Arc<Core>) {
    let mut ticks = tokio::time::interval(core.parts.config.lease / 3);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = core.closing.cancelled() => return,
            _ = ticks.tick() => {}
        }
        for lease in core.attempts.leases() {
            match core.parts.queue.renew(&lease).await {
                Ok(()) => {}
                Err(QueueError::Lost) => {
                    // The store refuses the attempt's answer where another has begun.
                    tracing::debug!(task.id = %lease.task, "the lease was lost or has ended");
                }
                Err(error) => {
                    tracing::warn!(task.id = %lease.task, error = fault::chain(&error), "renew");
                }
            }
        }
    }
}

/// Hears of cancellations.
pub(crate) async fn listen(core: Arc<Core>, mut events: Box<dyn Subscription>) {
    loop {
        let received = tokio::select! {
            () = core.closing.cancelled() => return,
            received = events.next() => received,
        };
        match received {
            Received::Event(Event::CancelRequested { task_id, .. }) => {
                core.attempts.cancel(task_id);
            }
            Received::Event(_) => {}
            Received::Missed => reread(&core).await,
            Received::Closed => return,
        }
    }
}

/// Requests whose events were lost on their way from other processes, or told by none: the store has
/// them.
pub(crate) async fn reread_cancelled(core: &Core) -> Result<(), StoreError> {
    if core.attempts.leases().is_empty() {
        return Ok(());
    }
    let filter = TaskFilter {
        states: vec![TaskState::Running],
        worker_id: Some(core.parts.id),
        ..TaskFilter::default()
    };
    let mut page = PageRequest { limit: limits::PAGE_LIMIT_MAX, after: None };
    loop {
        let tasks = core.parts.store.tasks(filter.clone(), page).await?;
        for task in tasks.items.iter().filter(|task| task.cancel_requested) {
            core.attempts.cancel(task.id);
        }
        match tasks.next {
            Some(cursor) => page.after = Some(cursor),
            None => return Ok(()),
        }
    }
}

/// Too much happened at once for the bus; the store has it all.
async fn reread(core: &Core) {
    for lease in core.attempts.leases() {
        if let Ok(Some(task)) = core.parts.store.task(lease.task).await
            && task.cancel_requested
        {
            core.attempts.cancel(task.id);
        }
    }
}
