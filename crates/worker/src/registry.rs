//! This worker in the registry: it says that it is there, and finds out when nobody believes it.
//!
//! A worker that was silent for longer than its lease has been declared lost: its VMs have failed or
//! are created elsewhere, and the store refuses what it says of them. It then lets go of what it has
//! in hand, registers anew (from then on nothing more is decided about its VMs), ends the machines
//! of VMs that are not its own any more, and only then claims again.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use aether_store::{NewWorker, Registration, StoreError};
use aether_types::{Worker, WorkerCapacity, WorkerDriver, limits};
use tokio::time::{MissedTickBehavior, timeout};

use crate::{WorkerError, WorkerParts, claims, fault, reconcile, worker::Core};

/// What is in hand when the worker finds that it was declared lost is cancelled; whatever does not
/// hear that in this time is found by reconciling.
const LET_GO_LIMIT: Duration = Duration::from_secs(20);
/// Between tries to register with a store that does not answer.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// What the worker says of itself, and how often.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FleetConfig {
    /// The name of its host.
    pub host: String,
    pub zone: Option<String>,
    pub labels: BTreeMap<String, String>,
    /// What VMs may be promised here; `None`: not bounded.
    pub vcpus_max: Option<u32>,
    pub memory_mb_max: Option<u64>,
    pub vms_max: Option<u32>,
    /// Where templates are, where others may use the same folder.
    pub template_folder: Option<String>,
    /// `host:port` where it takes streams of other processes.
    pub stream_address: Option<String>,
    /// Between two heartbeats.
    pub heartbeat: Duration,
    /// Without a heartbeat for so long the worker is lost.
    pub lease: Duration,
}

impl Default for FleetConfig {
    fn default() -> Self {
        Self {
            host: "localhost".to_owned(),
            zone: None,
            labels: BTreeMap::new(),
            vcpus_max: None,
            memory_mb_max: None,
            vms_max: None,
            template_folder: None,
            stream_address: None,
            heartbeat: Duration::from_secs(5),
            lease: Duration::from_secs(15),
        }
    }
}

impl FleetConfig {
    /// Names the field and its bounds.
    pub fn validate(&self) -> Result<(), String> {
        aether_types::worker::validate_worker(&self.host, self.zone.as_deref(), &self.labels)?;
        let (min, max) = (
            Duration::from_millis(limits::WORKER_HEARTBEAT_MS_MIN),
            Duration::from_millis(limits::WORKER_HEARTBEAT_MS_MAX),
        );
        if self.heartbeat < min || self.heartbeat > max {
            return Err(format!("heartbeat: {min:?} to {max:?}"));
        }
        let least = self.heartbeat * limits::WORKER_LEASE_HEARTBEATS_MIN;
        let most = Duration::from_millis(limits::WORKER_LEASE_MS_MAX);
        if self.lease < least || self.lease > most {
            return Err(format!(
                "lease: {least:?} ({} heartbeats) to {most:?}",
                limits::WORKER_LEASE_HEARTBEATS_MIN
            ));
        }
        Ok(())
    }
}

/// The worker as it registers.
fn described(parts: &WorkerParts) -> NewWorker {
    let fleet = &parts.config.fleet;
    let driver = |driver: &Arc<dyn aether_drivers::Driver>| {
        let capabilities = driver.capabilities();
        WorkerDriver {
            kind: capabilities.kind,
            version: capabilities.version,
            accelerated: capabilities.accelerated,
            isolation: capabilities.isolation.to_owned(),
            takes_snapshots: capabilities.snapshot_format.is_some(),
        }
    };
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    NewWorker {
        id: parts.id,
        host: fleet.host.clone(),
        zone: fleet.zone.clone(),
        labels: fleet.labels.clone(),
        drivers: parts.drivers.iter().map(driver).collect(),
        capacity: WorkerCapacity {
            processors: u32::try_from(processors).unwrap_or(u32::MAX),
            host_memory_mb: crate::host_memory_mb().unwrap_or(0),
            vcpus_max: fleet.vcpus_max,
            memory_mb_max: fleet.memory_mb_max,
            vms_max: fleet.vms_max,
        },
        template_folder: fleet.template_folder.clone(),
        stream_address: fleet.stream_address.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        lease: fleet.lease,
    }
}

pub(crate) async fn register(parts: &WorkerParts) -> Result<Worker, WorkerError> {
    let worker = parts.store.register_worker(described(parts)).await?;
    tracing::info!(worker.id = %worker.id, epoch = worker.epoch, state = %worker.state(), "registered");
    Ok(worker)
}

/// Runs until the worker closes. A heartbeat that is late because the store does not answer is
/// followed by the next: whether the worker is lost is the store's word.
pub(crate) async fn keep(core: Arc<Core>) {
    let mut ticks = tokio::time::interval(core.parts.config.fleet.heartbeat);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks.tick().await;
    loop {
        tokio::select! {
            () = core.closing.cancelled() => return,
            _ = ticks.tick() => {}
        }
        match core.parts.store.heartbeat(core.registration()).await {
            Ok(_) => {
                if let Err(error) = claims::reread_cancelled(&core).await {
                    tracing::warn!(error = fault::chain(&error), "look for requests to end");
                }
            }
            Err(StoreError::Fenced) => {
                tokio::select! {
                    () = core.closing.cancelled() => return,
                    () = rejoin(&core) => {}
                }
            }
            Err(error) => tracing::warn!(error = fault::chain(&error), "send a heartbeat"),
        }
    }
}

/// Dropped in the middle, what is left is as after a crash: the next start does it.
async fn rejoin(core: &Arc<Core>) {
    tracing::warn!(
        worker.id = %core.parts.id,
        "this worker was declared lost; it lets go of what it has in hand and registers anew"
    );
    core.claiming.send_replace(false);
    core.attempts.cancel_all();
    if timeout(LET_GO_LIMIT, core.attempts.none()).await.is_err() {
        tracing::error!("work that was in hand did not end in time");
    }
    loop {
        match register(&core.parts).await {
            Ok(worker) => {
                core.register_as(&worker);
                break;
            }
            Err(error) => tracing::error!(error = fault::chain(&error), "register anew"),
        }
        tokio::time::sleep(RETRY_PAUSE).await;
    }
    while let Err(error) = reconcile::after_loss(core).await {
        tracing::error!(error = fault::chain(&error), "put in order what was declared lost");
        tokio::time::sleep(RETRY_PAUSE).await;
    }
    core.claiming.send_replace(true);
    tracing::info!(worker.id = %core.parts.id, "this worker is back");
}

/// Says that the worker ends. What goes wrong is what a crash would leave.
pub(crate) async fn leave(core: &Core) {
    match core.parts.store.leave(core.registration()).await {
        Ok(_) | Err(StoreError::Fenced) => {}
        Err(error) => tracing::warn!(error = fault::chain(&error), "leave the registry"),
    }
}

impl Core {
    /// As the store knows this worker.
    pub(crate) fn registration(&self) -> Registration {
        let epoch = self.epoch.load(std::sync::atomic::Ordering::Acquire);
        Registration { worker: self.parts.id, epoch }
    }

    fn register_as(&self, worker: &Worker) {
        self.epoch.store(worker.epoch, std::sync::atomic::Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_worker_is_told_is_bounded() {
        let default = FleetConfig::default();
        assert_eq!(default.validate(), Ok(()));
        for (config, field) in [
            (FleetConfig { heartbeat: Duration::from_millis(99), ..default.clone() }, "heartbeat:"),
            (FleetConfig { heartbeat: Duration::from_secs(61), ..default.clone() }, "heartbeat:"),
            (FleetConfig { lease: Duration::from_secs(14), ..default.clone() }, "lease:"),
            (FleetConfig { lease: Duration::from_secs(601), ..default.clone() }, "lease:"),
            (FleetConfig { host: String::new(), ..default.clone() }, "host:"),
            (FleetConfig { zone: Some(String::new()), ..default.clone() }, "zone:"),
        ] {
            assert!(config.validate().unwrap_err().starts_with(field), "{config:?}");
        }
        let shortest = Duration::from_millis(100);
        let short = FleetConfig { heartbeat: shortest, lease: shortest * 3, ..default };
        assert_eq!(short.validate(), Ok(()));
    }
}
