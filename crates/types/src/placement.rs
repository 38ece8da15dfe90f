//! Which worker a VM goes to: pure, told what there is.
//!
//! A worker fits that is active, has the driver, is where the VM wants to be, holds what the VM
//! begins as where that cannot be had elsewhere, and has room. Of those that fit the ones that
//! hold the VM's template come first, then the one that has promised the least of its host.

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};

use crate::{DriverKind, Worker, WorkerId, WorkerLoad, WorkerState, limits, vm::validate_labels};

/// Where a VM is to be.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct Placement {
    /// Only on workers of this zone.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(with = "Option<crate::schema::Zone>"))]
    pub zone: Option<String>,
    /// Only on workers with all of these labels.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    #[cfg_attr(feature = "schema", schemars(with = "crate::schema::Labels"))]
    pub labels: BTreeMap<String, String>,
}

impl Placement {
    #[must_use]
    pub fn is_anywhere(&self) -> bool {
        self.zone.is_none() && self.labels.is_empty()
    }

    /// Names the field and its bounds.
    pub fn validate(&self) -> Result<(), String> {
        if let Some(zone) = &self.zone
            && (zone.is_empty()
                || zone.len() > limits::WORKER_NAME_BYTES_MAX
                || zone.contains(char::is_control))
        {
            let max = limits::WORKER_NAME_BYTES_MAX;
            return Err(format!("placement: the zone has 1 to {max} bytes, no control characters"));
        }
        validate_labels(&self.labels).map_err(|text| format!("placement: {text}"))
    }
}

/// What a VM needs of a worker.
#[derive(Debug, Clone)]
pub struct Wish<'a> {
    pub driver: DriverKind,
    pub vcpus: u32,
    pub memory_mb: u32,
    pub placement: &'a Placement,
    pub holders: Holders,
}

/// The workers that hold what the VM begins as.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Holders {
    /// It is everywhere.
    #[default]
    All,
    /// The VM is faster there.
    Preferred(Vec<WorkerId>),
    /// The VM can be made nowhere else.
    Only(Vec<WorkerId>),
}

/// Why a worker does not get a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Misfit {
    NotActive,
    WithoutDriver,
    Elsewhere,
    HoldsNothing,
    Full,
}

impl fmt::Display for Misfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotActive => "takes no new VMs",
            Self::WithoutDriver => "lacks the driver",
            Self::Elsewhere => "has another zone or other labels",
            Self::HoldsNothing => "lacks the snapshot that the VM begins as",
            Self::Full => "has no room",
        })
    }
}

/// `None`: it fits.
#[must_use]
pub fn misfit(worker: &Worker, load: WorkerLoad, wish: &Wish<'_>) -> Option<Misfit> {
    if worker.state() != WorkerState::Active {
        return Some(Misfit::NotActive);
    }
    if !worker.drivers.iter().any(|driver| driver.kind == wish.driver) {
        return Some(Misfit::WithoutDriver);
    }
    let Placement { zone, labels } = wish.placement;
    let has = |(key, value): (&String, &String)| worker.labels.get(key) == Some(value);
    if zone.is_some() && *zone != worker.zone || !labels.iter().all(has) {
        return Some(Misfit::Elsewhere);
    }
    if let Holders::Only(holders) = &wish.holders
        && !holders.contains(&worker.id)
    {
        return Some(Misfit::HoldsNothing);
    }
    let fits = load.plus(wish.vcpus, wish.memory_mb).is_within(&worker.capacity);
    (!fits).then_some(Misfit::Full)
}

/// The place in `workers` of the one that gets the VM, or in words why none does.
pub fn choose(workers: &[(Worker, WorkerLoad)], wish: &Wish<'_>) -> Result<usize, String> {
    let holds = |worker: &Worker| match &wish.holders {
        Holders::Preferred(holders) => holders.contains(&worker.id),
        Holders::All | Holders::Only(_) => true,
    };
    let fitting =
        workers.iter().enumerate().filter(|(_, (w, load))| misfit(w, *load, wish).is_none());
    let best = fitting.min_by_key(|(_, (worker, load))| {
        (!holds(worker), promised(worker, *load), load.vms, worker.id)
    });
    best.map(|(index, _)| index).ok_or_else(|| why_none(workers, wish))
}

/// How much of its host's memory a worker has promised, in thousandths.
fn promised(worker: &Worker, load: WorkerLoad) -> u64 {
    let memory = worker.capacity.memory_mb_max.unwrap_or(worker.capacity.host_memory_mb);
    load.memory_mb.saturating_mul(1000) / memory.max(1)
}

fn why_none(workers: &[(Worker, WorkerLoad)], wish: &Wish<'_>) -> String {
    let mut counts: BTreeMap<Misfit, usize> = BTreeMap::new();
    for reason in workers.iter().filter_map(|(worker, load)| misfit(worker, *load, wish)) {
        *counts.entry(reason).or_default() += 1;
    }
    let reasons: Vec<_> = counts.iter().map(|(why, count)| format!("{count} {why}")).collect();
    if reasons.is_empty() {
        return "waits for a worker; there is none".to_owned();
    }
    format!("waits for a worker; of {}: {}", workers.len(), reasons.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Presence, Standing, Timestamp, WorkerCapacity, WorkerDriver};

    fn worker(memory_mb: u64) -> Worker {
        let driver = WorkerDriver {
            kind: DriverKind::Sim,
            version: "1".into(),
            accelerated: false,
            isolation: "none".into(),
            takes_snapshots: true,
        };
        let now = Timestamp::from_unix_ms(0);
        Worker {
            id: WorkerId::new(),
            host: "h".into(),
            zone: Some("a".into()),
            labels: [("disk".to_owned(), "fast".to_owned())].into(),
            drivers: vec![driver],
            capacity: WorkerCapacity {
                processors: 4,
                host_memory_mb: memory_mb,
                memory_mb_max: Some(memory_mb),
                ..WorkerCapacity::default()
            },
            template_folder: None,
            stream_address: None,
            version: "1".into(),
            standing: Standing { presence: Presence::Present, draining: false },
            epoch: 1,
            registered_at: now,
            heartbeat_at: now,
            lease_ms: 1,
        }
    }

    fn wish(placement: &Placement) -> Wish<'_> {
        let holders = Holders::All;
        Wish { driver: DriverKind::Sim, vcpus: 1, memory_mb: 256, placement, holders }
    }

    fn with_load(workers: &[Worker], memory_mb: &[u64]) -> Vec<(Worker, WorkerLoad)> {
        let load = |memory_mb: &u64| WorkerLoad { vms: 1, vcpus: 1, memory_mb: *memory_mb };
        workers.iter().cloned().zip(memory_mb.iter().map(load)).collect()
    }

    #[test]
    fn the_one_that_has_promised_the_least_of_its_host_is_chosen() {
        let anywhere = Placement::default();
        let workers = [worker(1000), worker(4000)];
        assert_eq!(choose(&with_load(&workers, &[300, 900]), &wish(&anywhere)), Ok(1));
        assert_eq!(choose(&with_load(&workers, &[300, 2000]), &wish(&anywhere)), Ok(0));
        // The emptier one has no room for this VM.
        let large = Wish { memory_mb: 1500, ..wish(&anywhere) };
        assert_eq!(choose(&with_load(&workers, &[0, 2000]), &large), Ok(1));
    }

    #[test]
    fn holders_come_first_or_are_the_only_ones() {
        let anywhere = Placement::default();
        let workers = [worker(1000), worker(1000)];
        let there = with_load(&workers, &[0, 500]);
        let prefers = Holders::Preferred(vec![workers[1].id]);
        assert_eq!(choose(&there, &Wish { holders: prefers, ..wish(&anywhere) }), Ok(1));
        let only = Holders::Only(vec![workers[1].id]);
        let only = Wish { holders: only, ..wish(&anywhere) };
        assert_eq!(choose(&there, &only), Ok(1));
        let full = with_load(&workers, &[0, 1000]);
        assert_eq!(
            choose(&full, &only).unwrap_err(),
            "waits for a worker; of 2: 1 lacks the snapshot that the VM begins as, 1 has no room"
        );
        let gone = Holders::Preferred(vec![WorkerId::new()]);
        assert_eq!(choose(&there, &Wish { holders: gone, ..wish(&anywhere) }), Ok(0));
    }

    #[test]
    fn what_does_not_fit_is_told_apart() {
        let anywhere = Placement::default();
        let fits = worker(1000);
        let load = WorkerLoad::default();
        assert_eq!(misfit(&fits, load, &wish(&anywhere)), None);
        let draining =
            Worker { standing: Standing { draining: true, ..fits.standing }, ..fits.clone() };
        assert_eq!(misfit(&draining, load, &wish(&anywhere)), Some(Misfit::NotActive));
        let other = Wish { driver: DriverKind::Qemu, ..wish(&anywhere) };
        assert_eq!(misfit(&fits, load, &other), Some(Misfit::WithoutDriver));
        for (zone, key, expected) in [
            (Some("a"), Some(("disk", "fast")), None),
            (Some("b"), None, Some(Misfit::Elsewhere)),
            (None, Some(("disk", "slow")), Some(Misfit::Elsewhere)),
            (None, Some(("gpu", "")), Some(Misfit::Elsewhere)),
        ] {
            let labels = key.map(|(k, v)| (k.to_owned(), v.to_owned())).into_iter().collect();
            let placement = Placement { zone: zone.map(str::to_owned), labels };
            assert_eq!(misfit(&fits, load, &wish(&placement)), expected, "{placement:?}");
        }
        let large = Wish { memory_mb: 1001, ..wish(&anywhere) };
        assert_eq!(misfit(&fits, load, &large), Some(Misfit::Full));
        assert_eq!(choose(&[], &wish(&anywhere)).unwrap_err(), "waits for a worker; there is none");
    }

    #[test]
    fn a_placement_is_checked() {
        assert!(Placement::default().is_anywhere());
        let zone = |zone: &str| Placement { zone: Some(zone.into()), ..Placement::default() };
        assert_eq!(zone("eu-1").validate(), Ok(()));
        assert!(zone("").validate().unwrap_err().starts_with("placement: "));
        let labels = [("a b".to_owned(), String::new())].into();
        assert!(Placement { labels, zone: None }.validate().is_err());
    }
}
