//! A worker as the platform knows it: where it is, what it can, and whether it takes work.
//!
//! ```text
//!              registered                  lease ran out
//!   (new) ────────────────► present ─────────────────────► lost
//!                            │  ▲ ▲                          │
//!                 it ends    │  │ └──────── registered ──────┘   with a higher epoch
//!                            ▼  │ registered
//!                           left
//! ```
//!
//! Beside that a worker is draining or not, which is an operator's word and outlives its process:
//! a host that is restarted in the middle of its maintenance takes nothing new.

use std::{collections::BTreeMap, fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{DriverKind, Timestamp, WorkerId, limits, vm::validate_labels};

/// Whether a worker's process is there, as far as the store knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Presence {
    /// Its lease has not run out.
    Present,
    /// It said that it ends.
    Left,
    /// Its lease ran out: nobody knows what it does.
    Lost,
}

impl Presence {
    pub const ALL: &'static [Self] = &[Self::Present, Self::Left, Self::Lost];

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Present => "present",
            Self::Left => "left",
            Self::Lost => "lost",
        }
    }
}

impl FromStr for Presence {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = Self::ALL.iter().copied().find(|p| p.as_str() == text);
        known.ok_or_else(|| "unknown presence; one of present, left, lost".to_owned())
    }
}

/// A worker's state as its parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Standing {
    pub presence: Presence,
    pub draining: bool,
}

/// What happens to a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WorkerEvent {
    Registered,
    DrainRequested,
    ActivateRequested,
    /// It ends, and said so.
    Left,
    LeaseRanOut,
}

impl Standing {
    /// Of a worker that nobody has heard of.
    pub const NEW: Self = Self { presence: Presence::Left, draining: false };

    /// The standing after `event`, or `None` where no such transition exists.
    #[must_use]
    pub fn apply(self, event: WorkerEvent) -> Option<Self> {
        match (event, self.presence) {
            (WorkerEvent::Registered, Presence::Present | Presence::Left | Presence::Lost) => {
                Some(Self { presence: Presence::Present, ..self })
            }
            (WorkerEvent::DrainRequested, Presence::Present | Presence::Left | Presence::Lost) => {
                Some(Self { draining: true, ..self })
            }
            (
                WorkerEvent::ActivateRequested,
                Presence::Present | Presence::Left | Presence::Lost,
            ) => Some(Self { draining: false, ..self }),
            (WorkerEvent::Left, Presence::Present) => {
                Some(Self { presence: Presence::Left, ..self })
            }
            (WorkerEvent::LeaseRanOut, Presence::Present) => {
                Some(Self { presence: Presence::Lost, ..self })
            }
            // What was declared lost cannot say that it leaves, and only what is there is lost.
            (WorkerEvent::Left | WorkerEvent::LeaseRanOut, Presence::Left | Presence::Lost) => None,
        }
    }

    #[must_use]
    pub fn state(self) -> WorkerState {
        match (self.presence, self.draining) {
            (Presence::Present, false) => WorkerState::Active,
            (Presence::Present, true) => WorkerState::Draining,
            (Presence::Left, _) => WorkerState::Left,
            (Presence::Lost, _) => WorkerState::Lost,
        }
    }
}

/// A worker's state in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum WorkerState {
    /// It takes new VMs.
    Active,
    /// It serves the VMs that it has, and takes no new ones.
    Draining,
    Left,
    Lost,
}

impl WorkerState {
    pub const ALL: &'static [Self] = &[Self::Active, Self::Draining, Self::Left, Self::Lost];

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Draining => "draining",
            Self::Left => "left",
            Self::Lost => "lost",
        }
    }
}

impl fmt::Display for WorkerState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for WorkerState {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = Self::ALL.iter().copied().find(|s| s.as_str() == text);
        known.ok_or_else(|| "unknown worker state; one of active, draining, left, lost".to_owned())
    }
}

/// A driver of a worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct WorkerDriver {
    pub kind: DriverKind,
    pub version: String,
    /// Hardware virtualization is in use.
    pub accelerated: bool,
    /// What holds a hostile guest, in words.
    pub isolation: String,
    pub takes_snapshots: bool,
}

/// What a worker's host has, and how much of it VMs may be promised. Promises may exceed the host:
/// a guest's memory is taken as it is used, and clones share theirs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct WorkerCapacity {
    /// Of the host.
    pub processors: u32,
    pub host_memory_mb: u64,
    /// Of all VMs there together; `null`: not bounded.
    #[serde(default)]
    pub vcpus_max: Option<u32>,
    #[serde(default)]
    pub memory_mb_max: Option<u64>,
    #[serde(default)]
    pub vms_max: Option<u32>,
}

/// What the VMs of a worker were promised: of those that run, or are on their way to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct WorkerLoad {
    pub vms: u32,
    pub vcpus: u32,
    pub memory_mb: u64,
}

impl WorkerLoad {
    #[must_use]
    pub fn plus(self, vcpus: u32, memory_mb: u32) -> Self {
        Self {
            vms: self.vms.saturating_add(1),
            vcpus: self.vcpus.saturating_add(vcpus),
            memory_mb: self.memory_mb.saturating_add(u64::from(memory_mb)),
        }
    }

    #[must_use]
    pub fn is_within(self, capacity: &WorkerCapacity) -> bool {
        capacity.vms_max.is_none_or(|max| self.vms <= max)
            && capacity.vcpus_max.is_none_or(|max| self.vcpus <= max)
            && capacity.memory_mb_max.is_none_or(|max| self.memory_mb <= max)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Worker {
    pub id: WorkerId,
    /// The name of its host.
    pub host: String,
    /// A failure domain: a rack, a room, a region.
    pub zone: Option<String>,
    pub labels: BTreeMap<String, String>,
    pub drivers: Vec<WorkerDriver>,
    pub capacity: WorkerCapacity,
    /// Where its templates are, where others may use the same folder.
    pub template_folder: Option<String>,
    /// `host:port` where it takes streams of other processes; `None`: it takes none.
    pub stream_address: Option<String>,
    /// Of its program.
    pub version: String,
    pub standing: Standing,
    /// Counts its registrations; the fence against the writes of an earlier one.
    pub epoch: i64,
    pub registered_at: Timestamp,
    /// By the store's clock.
    pub heartbeat_at: Timestamp,
    /// Without a heartbeat for so long it is lost.
    pub lease_ms: i64,
}

impl Worker {
    #[must_use]
    pub fn state(&self) -> WorkerState {
        self.standing.state()
    }
}

/// Checks what an operator says of a worker.
pub fn validate_worker(
    host: &str,
    zone: Option<&str>,
    labels: &BTreeMap<String, String>,
) -> Result<(), String> {
    let fits = |text: &str| {
        !text.is_empty()
            && text.len() <= limits::WORKER_NAME_BYTES_MAX
            && !text.contains(char::is_control)
    };
    for (field, text) in [("host", Some(host)), ("zone", zone)] {
        if text.is_some_and(|text| !fits(text)) {
            return Err(format!(
                "{field}: 1 to {} bytes and no control characters",
                limits::WORKER_NAME_BYTES_MAX
            ));
        }
    }
    validate_labels(labels)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const EVENTS: &[WorkerEvent] = &[
        WorkerEvent::Registered,
        WorkerEvent::DrainRequested,
        WorkerEvent::ActivateRequested,
        WorkerEvent::Left,
        WorkerEvent::LeaseRanOut,
    ];

    #[test]
    fn states_spell_themselves() {
        for &state in WorkerState::ALL {
            assert_eq!(serde_json::to_string(&state).unwrap(), format!("\"{state}\""));
            assert_eq!(state.to_string().parse(), Ok(state));
        }
        for &presence in Presence::ALL {
            assert_eq!(presence.as_str().parse(), Ok(presence));
        }
    }

    #[test]
    fn a_load_is_within_what_is_bounded() {
        let load = WorkerLoad::default().plus(2, 512).plus(1, 256);
        assert_eq!(load, WorkerLoad { vms: 2, vcpus: 3, memory_mb: 768 });
        let none = WorkerCapacity::default();
        assert!(load.is_within(&none));
        for (capacity, fits) in [
            (WorkerCapacity { vms_max: Some(2), ..none }, true),
            (WorkerCapacity { vms_max: Some(1), ..none }, false),
            (WorkerCapacity { vcpus_max: Some(3), ..none }, true),
            (WorkerCapacity { vcpus_max: Some(2), ..none }, false),
            (WorkerCapacity { memory_mb_max: Some(768), ..none }, true),
            (WorkerCapacity { memory_mb_max: Some(767), ..none }, false),
        ] {
            assert_eq!(load.is_within(&capacity), fits, "{capacity:?}");
        }
    }

    #[test]
    fn what_an_operator_says_is_checked() {
        let labels = BTreeMap::from([("gpu".to_owned(), "a100".to_owned())]);
        assert_eq!(validate_worker("host-1", Some("eu-1"), &labels), Ok(()));
        assert!(validate_worker("", None, &labels).unwrap_err().starts_with("host:"));
        assert!(validate_worker("h", Some("a\nb"), &labels).unwrap_err().starts_with("zone:"));
        let bad = BTreeMap::from([("a b".to_owned(), String::new())]);
        assert!(validate_worker("h", None, &bad).unwrap_err().starts_with("labels:"));
    }

    proptest! {
        /// Against a model of two booleans: draining is an operator's word and nobody else's, and
        /// only a registration brings a worker back.
        #[test]
        fn only_an_operator_drains_and_only_a_registration_brings_back(
            events in prop::collection::vec(prop::sample::select(EVENTS), 0..40)
        ) {
            let (mut standing, mut draining, mut present) = (Standing::NEW, false, false);
            for event in events {
                let next = standing.apply(event);
                match event {
                    WorkerEvent::Registered => present = true,
                    WorkerEvent::DrainRequested => draining = true,
                    WorkerEvent::ActivateRequested => draining = false,
                    WorkerEvent::Left | WorkerEvent::LeaseRanOut => {
                        prop_assert_eq!(next.is_some(), present);
                        present = false;
                    }
                }
                standing = next.unwrap_or(standing);
                prop_assert_eq!(standing.draining, draining);
                prop_assert_eq!(standing.presence == Presence::Present, present);
            }
        }
    }
}
