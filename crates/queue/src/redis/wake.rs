//! Who is woken, and by what.

use std::{sync::Arc, time::Duration};

use aether_redis::Listener;
use aether_types::WorkerId;
use tokio::{sync::Notify, time::sleep};

use super::{AWAY_PAUSE, Shared, scripts};
use crate::{
    Lane, Lease,
    waiters::{Unused, Waiters},
};

/// What comes from the server by itself.
#[derive(Debug, Default)]
pub(super) struct Wake {
    pub(super) waiters: Waiters,
    /// The timer may be set too late.
    pub(super) delayed: Notify,
    /// The server may have forgotten what it was told.
    pub(super) lost: Notify,
}

impl Listener for Wake {
    /// The script that made an entry ready chose this worker of ours, and may have leased it.
    fn message(&self, text: &str) {
        let mut words = text.split(' ');
        let Some(worker) = words.next().and_then(|word| word.parse::<WorkerId>().ok()) else {
            return;
        };
        match lease(worker, words) {
            Some(lease) => self.waiters.give(lease),
            None => self.waiters.wake_or_pass(Lane::Worker(worker)),
        }
    }

    fn connected(&self, restarted: bool) {
        if restarted {
            self.lost.notify_one();
        }
        // Those who wait are no longer in the server's line, or were called in vain.
        self.waiters.wake_all();
        self.delayed.notify_one();
    }
}

/// `TASK EPOCH LENGTH`.
fn lease<'a>(worker: WorkerId, mut words: impl Iterator<Item = &'a str>) -> Option<Lease> {
    let task = words.next()?.parse().ok()?;
    let epoch = words.next()?.parse().ok()?;
    let duration = Duration::from_millis(words.next()?.parse().ok()?);
    Some(Lease { task, worker, epoch, duration })
}

/// Passes on what nobody here was there to take. Where that cannot be said the server is away, and
/// all look again when it is back.
pub(super) async fn pass_on(shared: Arc<Shared>) {
    loop {
        let Unused { wake, leases } = shared.wake.waiters.unused().await;
        for lease in leases {
            // Where this cannot be said the lease runs out.
            if let Err(error) = shared.held("give back", &scripts::RELEASE, &lease, Some(0)).await {
                tracing::debug!(%error, "give back what nobody here was there to take");
            }
        }
        if wake && let Err(error) = shared.pass().await {
            tracing::debug!(%error, "pass a wake-up on");
        }
    }
}

/// Ends the delays that this process knows of when they are over. Those of a process that is gone
/// are ended by a sweep, or by whoever claims.
pub(super) async fn end_delays(shared: Arc<Shared>) {
    loop {
        // Before the question, which takes time: too early is put right by asking again.
        let asked = shared.clock.now();
        match shared.promote().await {
            Ok(Some(left)) => {
                let due = asked.saturating_add(left);
                tokio::select! {
                    () = shared.clock.sleep_until(due) => {}
                    () = shared.wake.delayed.notified() => {}
                }
            }
            // A delay that begins after the question leaves its permit.
            Ok(None) => shared.wake.delayed.notified().await,
            Err(error) => {
                tracing::debug!(%error, "look for entries that fall due");
                sleep(AWAY_PAUSE).await;
            }
        }
    }
}
