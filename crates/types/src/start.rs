//! How a VM came to run, and where the time went.

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum StartKind {
    /// A machine that was restored and paused before anyone asked for it.
    Pool,
    /// Memory and disk of a snapshot.
    Restore,
    /// The kernel, from its beginning.
    Boot,
}

impl StartKind {
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pool => "pool",
            Self::Restore => "restore",
            Self::Boot => "boot",
        }
    }
}

/// One step. The next begins where it ends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartPhase {
    pub name: String,
    pub us: u64,
}

/// From the moment at which the request was recorded to the guest's readiness for commands. The
/// phases sum to the whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartReport {
    pub kind: StartKind,
    pub total_us: u64,
    pub phases: Vec<StartPhase>,
    /// Why it was not the faster way that the VM's origin has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fallback: Option<String>,
}

impl StartReport {
    #[must_use]
    pub fn new(kind: StartKind, phases: Vec<StartPhase>, fallback: Option<String>) -> Self {
        let total_us = phases.iter().map(|phase| phase.us).sum();
        Self { kind, total_us, phases, fallback }
    }
}
