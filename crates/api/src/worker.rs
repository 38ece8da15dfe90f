use std::collections::BTreeMap;

use aether_types::{
    Timestamp, Worker, WorkerCapacity, WorkerDriver, WorkerId, WorkerLoad, WorkerState,
};
use serde::{Deserialize, Serialize};

/// A worker as it is now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct WorkerView {
    pub id: WorkerId,
    /// The name of its host.
    pub host: String,
    pub zone: Option<String>,
    pub labels: BTreeMap<String, String>,
    pub state: WorkerState,
    /// It takes no new VMs, which an operator said; also kept while it is away.
    pub draining: bool,
    pub drivers: Vec<WorkerDriver>,
    /// What its host has, and what VMs may be promised of it; `null` is not bounded.
    pub capacity: WorkerCapacity,
    /// What its VMs were promised: of those that run, or are on their way to.
    pub promised: WorkerLoad,
    pub version: String,
    /// Counts its registrations.
    pub epoch: i64,
    pub registered_at: Timestamp,
    /// By the store's clock.
    pub heartbeat_at: Timestamp,
    /// Without a heartbeat for so long it is lost.
    pub lease_ms: i64,
}

impl From<(Worker, WorkerLoad)> for WorkerView {
    fn from((worker, promised): (Worker, WorkerLoad)) -> Self {
        let state = worker.state();
        let Worker {
            id,
            host,
            zone,
            labels,
            drivers,
            capacity,
            template_folder: _,
            stream_address: _,
            version,
            standing,
            epoch,
            registered_at,
            heartbeat_at,
            lease_ms,
        } = worker;
        Self {
            id,
            host,
            zone,
            labels,
            state,
            draining: standing.draining,
            drivers,
            capacity,
            promised,
            version,
            epoch,
            registered_at,
            heartbeat_at,
            lease_ms,
        }
    }
}

/// `GET /cluster/stats`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ClusterStats {
    /// By state; a state that none has is not there.
    pub workers: BTreeMap<WorkerState, u64>,
    /// Of the hosts of workers that are active or draining.
    pub processors: u64,
    pub host_memory_mb: u64,
    /// By all workers.
    pub promised: WorkerLoad,
    /// VMs that wait for a worker.
    pub vms_waiting: u64,
}

/// One place of `GET /cluster/distribution`: how much is where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct WorkerShare {
    pub worker_id: WorkerId,
    pub host: String,
    pub zone: Option<String>,
    pub state: WorkerState,
    pub promised: WorkerLoad,
    /// Of all VMs that count, in thousandths.
    pub vms_permille: u32,
    /// Of what the worker may promise, or of its host's memory where that is not bounded, in
    /// thousandths; more than 1000 where the host is over-committed.
    pub memory_permille: u32,
}

impl ClusterStats {
    #[must_use]
    pub fn new(workers: &[WorkerView], vms_waiting: u64) -> Self {
        let mut stats = Self { vms_waiting, ..Self::default() };
        for worker in workers {
            *stats.workers.entry(worker.state).or_default() += 1;
            if matches!(worker.state, WorkerState::Active | WorkerState::Draining) {
                stats.processors += u64::from(worker.capacity.processors);
                stats.host_memory_mb =
                    stats.host_memory_mb.saturating_add(worker.capacity.host_memory_mb);
            }
            let WorkerLoad { vms, vcpus, memory_mb } = worker.promised;
            stats.promised.vms = stats.promised.vms.saturating_add(vms);
            stats.promised.vcpus = stats.promised.vcpus.saturating_add(vcpus);
            stats.promised.memory_mb = stats.promised.memory_mb.saturating_add(memory_mb);
        }
        stats
    }
}

impl WorkerShare {
    /// Of each worker, in the same order.
    #[must_use]
    pub fn of_all(workers: &[WorkerView]) -> Vec<Self> {
        let vms = workers.iter().map(|worker| u64::from(worker.promised.vms)).sum();
        let share = |worker: &WorkerView| {
            let WorkerView { id, host, zone, state, capacity, promised, .. } = worker;
            let memory = capacity.memory_mb_max.unwrap_or(capacity.host_memory_mb);
            Self {
                worker_id: *id,
                host: host.clone(),
                zone: zone.clone(),
                state: *state,
                promised: *promised,
                vms_permille: permille(u64::from(promised.vms), vms),
                memory_permille: permille(promised.memory_mb, memory),
            }
        };
        workers.iter().map(share).collect()
    }
}

fn permille(part: u64, whole: u64) -> u32 {
    let of = part.saturating_mul(1000).checked_div(whole).unwrap_or(0);
    u32::try_from(of).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worker(state: WorkerState, vms: u32, memory_mb: u64) -> WorkerView {
        let at = Timestamp::from_unix_ms(0);
        WorkerView {
            id: WorkerId::new(),
            host: "h".into(),
            zone: None,
            labels: BTreeMap::new(),
            state,
            draining: false,
            drivers: Vec::new(),
            capacity: WorkerCapacity {
                processors: 4,
                host_memory_mb: 1000,
                ..WorkerCapacity::default()
            },
            promised: WorkerLoad { vms, vcpus: vms, memory_mb },
            version: String::new(),
            epoch: 1,
            registered_at: at,
            heartbeat_at: at,
            lease_ms: 1,
        }
    }

    #[test]
    fn a_cluster_is_summed_up() {
        let workers = [
            worker(WorkerState::Active, 3, 1500),
            worker(WorkerState::Draining, 1, 100),
            worker(WorkerState::Lost, 0, 0),
        ];
        let stats = ClusterStats::new(&workers, 7);
        assert_eq!((stats.processors, stats.host_memory_mb, stats.vms_waiting), (8, 2000, 7));
        assert_eq!(stats.promised, WorkerLoad { vms: 4, vcpus: 4, memory_mb: 1600 });
        assert_eq!(stats.workers.len(), 3);
        let shares = WorkerShare::of_all(&workers);
        let of = |share: &WorkerShare| (share.vms_permille, share.memory_permille);
        assert_eq!(shares.iter().map(of).collect::<Vec<_>>(), [(750, 1500), (250, 100), (0, 0)]);
        assert_eq!(of(&WorkerShare::of_all(&workers[2..])[0]), (0, 0));
    }
}
