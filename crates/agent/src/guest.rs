//! What the agent knows about its guest and shares between connections.

use std::fs;
use std::sync::{Mutex, PoisonError, RwLock};

use aether_protocol::EnvVar;

/// Environment of every run, as the host configured it.
#[derive(Debug, Default)]
pub(crate) struct Guest {
    env: RwLock<Vec<EnvVar>>,
    /// Held while the guest is configured: two at once would interleave.
    pub(crate) configuring: Mutex<()>,
}

impl Guest {
    pub(crate) fn set_env(&self, vars: Vec<EnvVar>) {
        *self.env.write().unwrap_or_else(PoisonError::into_inner) = vars;
    }

    pub(crate) fn env(&self) -> Vec<EnvVar> {
        self.env.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Time since the machine started.
pub(crate) fn uptime_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    u64::try_from(now.tv_sec * 1000 + now.tv_nsec / 1_000_000).unwrap_or(0)
}

/// The kernel's own name for this boot.
pub(crate) fn kernel_boot_id() -> String {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    id.trim().to_owned()
}
