//! What the agent knows about its guest and shares between connections.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError, RwLock};

use aether_protocol::EnvVar;
use rustix::io::Errno;
use rustix::process::{WaitId, WaitIdOptions, waitid};

use crate::etc::Texts;
use crate::layers::Mounted;
use crate::net::KnownDevices;
use crate::sys;

/// Environment of every run, as the host configured it.
#[derive(Debug, Default)]
pub(crate) struct Guest {
    env: RwLock<Vec<EnvVar>>,
    /// Held while the guest is configured: two at once would interleave.
    pub(crate) known: Mutex<Known>,
    /// No command has run since the guest was configured, while nothing else was alive in it: its
    /// network is what it was made then.
    is_as_configured: AtomicBool,
    /// Changed under the lock of what is known only.
    pub(crate) layers: Mutex<Mounted>,
    /// The kernel's random generator. It stays open, so that a restored guest need not open it.
    random: OnceLock<File>,
    /// The kernel's list of the children of PID 1, open for the same reason.
    children: OnceLock<Option<File>>,
}

/// What stays at hand from one configuration to the next.
#[derive(Debug, Default)]
pub(crate) struct Known {
    pub(crate) devices: KnownDevices,
    pub(crate) texts: Texts,
}

impl Guest {
    /// A command is in the registry and about to run.
    pub(crate) fn will_run(&self) {
        self.is_as_configured.store(false, Ordering::SeqCst);
    }

    /// Whether the guest is as it was configured last. From now on it is being configured:
    /// `is_alone` says that nobody else can change it, unless a command comes.
    pub(crate) fn begin_configuration(&self, is_alone: impl FnOnce() -> bool) -> State {
        // In this order: a command that is not seen below comes after this and takes it back.
        let is_as_configured = self.is_as_configured.swap(true, Ordering::SeqCst);
        let is_alone = is_alone();
        if !is_alone {
            self.will_run();
        }
        State { is_alone, is_as_configured: is_alone && is_as_configured }
    }

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

    /// Whether no process is there but PID 1, this one and the kernel's own.
    pub(crate) fn is_alone(&self) -> bool {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        let has_none = matches!(waitid(WaitId::All, options), Err(Errno::CHILD));
        has_none && self.is_only_child().unwrap_or(false)
    }

    /// Whether PID 1, to whom everybody falls whose parent has ended, has this child alone.
    fn is_only_child(&self) -> io::Result<bool> {
        let opened = || File::open("/proc/1/task/1/children").ok();
        let Some(children) = self.children.get_or_init(opened) else { return Ok(false) };
        let mut text = [0; 32];
        let length = children.read_at(&mut text, 0)?;
        let text = str::from_utf8(&text[..length]).unwrap_or_default();
        Ok(text.trim().parse() == Ok(std::process::id()))
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

/// What may have happened to a guest since it was configured.
#[derive(Debug, Clone, Copy)]
pub(crate) struct State {
    /// No process is there but ours.
    pub(crate) is_alone: bool,
    /// And none has been since the last configuration.
    pub(crate) is_as_configured: bool,
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
