//! What the agent knows about its guest and shares between connections.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::fd::AsFd as _;
use std::sync::{Mutex, OnceLock, PoisonError, RwLock};

use aether_protocol::EnvVar;

use crate::sys;

/// Environment of every run, as the host configured it.
#[derive(Debug, Default)]
pub(crate) struct Guest {
    env: RwLock<Vec<EnvVar>>,
    /// Held while the guest is configured: two at once would interleave.
    pub(crate) configuring: Mutex<()>,
    /// The kernel's random generator. It stays open, so that a restored guest need not open it.
    random: OnceLock<File>,
}

impl Guest {
    pub(crate) fn set_env(&self, vars: Vec<EnvVar>) {
        *self.env.write().unwrap_or_else(PoisonError::into_inner) = vars;
    }

    /// Mixes the entropy into the kernel's generator and has every processor's draw from it anew.
    pub(crate) fn reseed(&self, entropy: &[u8]) -> io::Result<()> {
        // The kernel renews its base generator, and by the generation of that every processor
        // renews its own, and its batches of numbers, before the next draw.
        sys::reseed(self.random()?.as_fd(), entropy)
    }

    /// A boot id that no other guest has, nor this one before: for after a reseed.
    pub(crate) fn new_boot_id(&self) -> io::Result<String> {
        let mut bytes = [0; 16];
        let mut random = self.random()?;
        random.read_exact(&mut bytes)?;
        Ok(format!("{:032x}", u128::from_be_bytes(bytes)))
    }

    fn random(&self) -> io::Result<&File> {
        match self.random.get() {
            Some(random) => Ok(random),
            None => File::open("/dev/urandom").map(|file| self.random.get_or_init(|| file)),
        }
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
