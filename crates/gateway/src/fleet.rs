//! Watches over the workers: one that was silent for its lease is declared lost, and its VMs are
//! settled. Every gateway watches, and each loss is one gateway's: the store tells whose.
//!
//! A worker is lost where the store's clock says that its lease is over *and* this process has seen
//! no heartbeat for as long, by its own clock, without having been away itself. So a clock that
//! jumps, a database that was gone for a while, or a host that slept with gateway and worker on it
//! cost no VM its life.

use std::{collections::HashMap, time::Duration};

use aether_store::{Registration, StoreError};
use aether_types::{Origin, Presence, Timestamp, Worker, WorkerId};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::{
    parts::App,
    problem::chain,
    submit::{publish_task, snapshot_event, template_event, vm_event},
};

/// Looks at the workers are no further apart; nothing tells of a process that has died.
const LOOK_MAX: Duration = Duration::from_secs(5);
const LOOK_MIN: Duration = Duration::from_millis(50);

/// VMs of lost workers that are asked for at once.
const ORPHANS: u32 = 100;

/// What this process has seen of the workers.
#[derive(Debug, Default)]
struct Watch {
    seen: HashMap<WorkerId, Seen>,
    looked_at: Option<Instant>,
    /// As they were at the last look.
    registered: Vec<(WorkerId, i64, Presence)>,
}

#[derive(Debug, Clone, Copy)]
struct Seen {
    epoch: i64,
    heartbeat_at: Timestamp,
    since: Instant,
}

impl Watch {
    /// Takes in what the store says now, and answers with the workers that were silent for their
    /// whole lease.
    fn look<'w>(&mut self, workers: &'w [Worker], now: Instant) -> Vec<&'w Worker> {
        // Who was away itself has seen nothing in between.
        let gap_max = look_interval(workers).saturating_mul(3);
        if self.looked_at.is_none_or(|at| now.saturating_duration_since(at) > gap_max) {
            self.seen.clear();
        }
        self.looked_at = Some(now);
        let present = |worker: &&Worker| worker.standing.presence == Presence::Present;
        let present: Vec<&Worker> = workers.iter().filter(present).collect();
        self.seen.retain(|id, _| present.iter().any(|worker| worker.id == *id));
        let mut silent = Vec::new();
        for worker in present {
            let Worker { epoch, heartbeat_at, .. } = *worker;
            let fresh = Seen { epoch, heartbeat_at, since: now };
            let seen = self.seen.entry(worker.id).or_insert(fresh);
            if (seen.epoch, seen.heartbeat_at) != (epoch, heartbeat_at) {
                *seen = fresh;
            }
            if now.saturating_duration_since(seen.since) >= lease(worker) {
                silent.push(worker);
            }
        }
        silent
    }

    /// Whether a worker has come, gone or was lost since this was asked last.
    fn takes_note(&mut self, workers: &[Worker]) -> bool {
        let registered: Vec<_> = workers
            .iter()
            .map(|worker| (worker.id, worker.epoch, worker.standing.presence))
            .collect();
        let changed = registered != self.registered;
        self.registered = registered;
        changed
    }
}

fn lease(worker: &Worker) -> Duration {
    Duration::from_millis(u64::try_from(worker.lease_ms).unwrap_or(0))
}

/// Short against the shortest lease, so that a loss is found soon after it.
fn look_interval(workers: &[Worker]) -> Duration {
    let shortest = workers.iter().map(lease).min().unwrap_or(LOOK_MAX);
    (shortest / 6).clamp(LOOK_MIN, LOOK_MAX)
}

/// Runs until it is told to stop.
pub(crate) async fn watch(app: App, stop: CancellationToken) {
    let mut watch = Watch::default();
    let mut pause = LOOK_MIN;
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = sleep(pause) => {}
        }
        // Dropped in the middle of settling, the next look of any gateway goes on with it.
        let looked = tokio::select! {
            () = stop.cancelled() => return,
            looked = look(&app, &mut watch) => looked,
        };
        pause = looked.unwrap_or_else(|error| {
            tracing::warn!(error = chain(&error), "look at the workers");
            watch.looked_at = None;
            LOOK_MAX
        });
    }
}

async fn look(app: &App, watch: &mut Watch) -> Result<Duration, StoreError> {
    let workers: Vec<Worker> =
        app.store().workers().await?.into_iter().map(|(worker, _)| worker).collect();
    let mut some_are_lost = workers.iter().any(|worker| worker.standing.presence == Presence::Lost);
    for worker in watch.look(&workers, Instant::now()) {
        let seen = Registration::from(worker);
        if let Some(lost) = app.store().lose_worker(seen, worker.heartbeat_at).await? {
            tracing::error!(worker.id = %lost.id, host = lost.host, "a worker is lost");
            some_are_lost = true;
            // What it had in hand is free at once; the store refuses what it says of it.
            if let Err(error) = app.parts.queue.reclaim(lost.id).await {
                tracing::warn!(error = chain(&error), "its leases run out by themselves");
            }
        }
    }
    if some_are_lost {
        settle_orphans(app).await?;
    }
    if watch.takes_note(&workers) {
        app.fleet_changed.send_replace(());
    }
    Ok(look_interval(&workers))
}

async fn settle_orphans(app: &App) -> Result<(), StoreError> {
    loop {
        let vms = app.store().orphans(ORPHANS).await?;
        if vms.is_empty() {
            return Ok(());
        }
        let mut settled = 0;
        for vm in &vms {
            let Some(orphan) = app.store().settle_orphan(*vm).await? else { continue };
            settled += 1;
            tracing::warn!(vm.id = %vm, state = %orphan.vm.state, goes_on = orphan.goes_on,
                "settled a VM of a lost worker");
            for task in &orphan.ended {
                publish_task(app, task).await;
                app.dispatcher.withdraw(task.id).await;
                tell_what_failed_with(app, task.snapshot_id).await?;
            }
            app.publish(vm_event(&orphan.vm)).await;
            if let Origin::Builder(template) = orphan.vm.spec.origin
                && let Some(template) = app.store().template(template).await?
            {
                app.publish(template_event(&template)).await;
            }
        }
        app.dispatcher.look();
        if settled == 0 {
            // Others settle them, or their worker is back.
            return Ok(());
        }
    }
}

async fn tell_what_failed_with(
    app: &App,
    snapshot: Option<aether_types::SnapshotId>,
) -> Result<(), StoreError> {
    if let Some(id) = snapshot
        && let Some(snapshot) = app.store().snapshot(id).await?
    {
        app.publish(snapshot_event(&snapshot)).await;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use aether_types::{Standing, WorkerCapacity};

    use super::*;

    fn worker(heartbeat: i64) -> Worker {
        Worker {
            id: WorkerId::new(),
            host: "h".into(),
            zone: None,
            labels: std::collections::BTreeMap::new(),
            drivers: Vec::new(),
            capacity: WorkerCapacity::default(),
            template_folder: None,
            stream_address: None,
            version: String::new(),
            standing: Standing { presence: Presence::Present, draining: false },
            epoch: 1,
            registered_at: Timestamp::from_unix_ms(0),
            heartbeat_at: Timestamp::from_unix_ms(heartbeat),
            lease_ms: 15_000,
        }
    }

    fn is_silent(watch: &mut Watch, worker: &Worker, now: Instant) -> bool {
        !watch.look(std::slice::from_ref(worker), now).is_empty()
    }

    #[test]
    fn a_worker_is_silent_once_its_lease_was_watched_to_its_end() {
        let (start, worker) = (Instant::now(), worker(0));
        let mut watch = Watch::default();
        let at = |s| start + Duration::from_secs(s);
        for s in (0..15).step_by(2) {
            assert!(!is_silent(&mut watch, &worker, at(s)), "{s}");
        }
        assert!(is_silent(&mut watch, &worker, at(15)));
        let beaten = Worker { heartbeat_at: Timestamp::from_unix_ms(1), ..worker.clone() };
        assert!(!is_silent(&mut watch, &beaten, at(16)));
        let anew = Worker { epoch: 2, ..beaten };
        assert!(!is_silent(&mut watch, &anew, at(18)));
    }

    #[test]
    fn who_was_away_itself_watches_anew() {
        let (start, worker) = (Instant::now(), worker(0));
        let mut watch = Watch::default();
        assert!(!is_silent(&mut watch, &worker, start));
        // The host slept, or the store did not answer.
        assert!(!is_silent(&mut watch, &worker, start + Duration::from_hours(8)));
        let back = start + Duration::from_hours(8);
        let silent =
            (1..=8).filter(|n| is_silent(&mut watch, &worker, back + Duration::from_secs(n * 2)));
        assert_eq!(silent.collect::<Vec<_>>(), [8]);
    }

    #[test]
    fn only_workers_that_are_there_can_be_lost() {
        let start = Instant::now();
        for presence in [Presence::Left, Presence::Lost] {
            let standing = Standing { presence, draining: false };
            let gone = Worker { standing, ..worker(0) };
            let mut watch = Watch::default();
            for s in 0..30 {
                assert!(!is_silent(&mut watch, &gone, start + Duration::from_secs(s)));
            }
        }
    }
}
