//! Warm pools: machines of a template that were restored, configured, warmed and paused before
//! anyone asked for them.
//!
//! ```text
//!   template ready ──► make ──► ready ──► claim ──► a VM's
//!                       │         └─ too old, too many, template gone, memory short, VMM died
//!                       └─ failed, or nobody wants it any more ──► discard
//! ```
//!
//! - A claim is a pop under a lock that is never held across an await: no I/O, no wait. An empty
//!   pool says so at once, and the caller restores.
//! - Machines are made one at a time, at background priority, and only while nobody waits for a
//!   machine: before each step the maker asks for its [`Turn`], and a start that somebody waits
//!   for ([`InHand`]) suspends it between two steps.
//! - A pool holds as many machines as its demand (see [`demand`]) says, within the bounds of its
//!   configuration; none are made, and the newest are given back, while the host is short of memory
//!   (see [`memory`]). A machine is made only where the whole memory of its guest is available
//!   besides the reserve.
//! - A machine that is too old is replaced: the younger one is made first.
//! - Spare machines are not in the store. Whatever a worker leaves behind is removed by the next
//!   one before it makes any.

mod backoff;
mod config;
mod demand;
mod keeper;
mod machines;
mod memory;
mod shelf;
#[cfg(test)]
mod tests;
mod traffic;

use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use aether_drivers::{Driver, GuestNetwork, LayerFile};
use aether_protocol::{Token, host::BoxStream};
use aether_streams::{PoolStatus, Pools};
use aether_types::{DriverKind, Fault, MachineId, Template, TemplateId};
use async_trait::async_trait;
use tokio::{sync::Notify, time::Instant};

pub use self::config::{PoolConfig, default_memory_reserve_mb};
pub(crate) use self::{
    machines::{Agent, keep, listen},
    memory::Meter,
    traffic::{InHand, Turn},
};
use self::{shelf::Shelf, traffic::Traffic};
pub use memory::host_memory_mb;

/// A paused machine that can become any VM of its template.
pub(crate) struct Spare {
    pub(crate) machine: MachineId,
    pub(crate) driver: Arc<dyn Driver>,
    pub(crate) token: Token,
    pub(crate) network: GuestNetwork,
    /// Of its guest, since it was restored.
    pub(crate) boot_id: String,
    /// Its template's tools, which its guest has.
    pub(crate) layers: Vec<LayerFile>,
    /// To its agent, opened before the pause: what a claim says, and the first command, need no
    /// other.
    pub(crate) connection: Option<BoxStream>,
}

// The token must not reach a log.
impl fmt::Debug for Spare {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Spare").field("machine", &self.machine).finish_non_exhaustive()
    }
}

/// Makes and removes machines for the pools.
#[async_trait]
pub(crate) trait Spares: Send + Sync + 'static {
    /// The template of this name, if it is ready.
    async fn template(&self, name: &str, tag: &str) -> Result<Option<Template>, Fault>;

    /// A paused machine of this id: restored, configured, warmed. Asks for its turn before each
    /// step. Where it fails or is dropped, `discard` removes what there is.
    async fn make(&self, id: MachineId, template: &Template, turn: &Turn) -> Result<Spare, Fault>;

    /// Harmless to repeat, and for a machine that was never made.
    async fn discard(&self, id: MachineId, driver: DriverKind) -> Result<(), Fault>;

    /// Completes when the machine's process has ended.
    async fn exited(&self, id: MachineId, driver: DriverKind);
}

/// The pools of a worker.
pub(crate) struct PoolSet {
    shelves: Mutex<Shelves>,
    traffic: Traffic,
    wake: Notify,
    /// Templates may have changed since they were last read.
    is_stale: AtomicBool,
    age_max: Duration,
    reserve_mb: u64,
}

struct Shelves {
    all: Vec<Shelf>,
    /// Nothing is claimed, nothing is put back.
    is_closed: bool,
    /// No machine is made for lack of memory.
    is_short: bool,
}

impl PoolSet {
    pub(crate) fn new(pools: Vec<PoolConfig>, age_max: Duration, reserve_mb: u64) -> Self {
        let all = pools.into_iter().map(Shelf::new).collect();
        Self {
            shelves: Mutex::new(Shelves { all, is_closed: false, is_short: false }),
            traffic: Traffic::default(),
            wake: Notify::new(),
            is_stale: AtomicBool::new(true),
            age_max,
            reserve_mb,
        }
    }

    /// Somebody waits for a machine, made or claimed, until the answer is dropped. Nothing is made
    /// for a pool meanwhile.
    pub(crate) fn begin(&self) -> InHand {
        self.traffic.begin()
    }

    /// To work for those who do not wait, as the pools do.
    pub(crate) fn turn(&self) -> Turn {
        self.traffic.turn()
    }

    /// A machine of this template, the caller's from now on; `None` at once where there is none.
    /// Each is given once.
    pub(crate) fn claim(&self, template: TemplateId, _in_hand: &InHand) -> Option<Spare> {
        let mut shelves = self.shelves();
        if shelves.is_closed {
            return None;
        }
        shelves.all.iter_mut().find(|shelf| shelf.is_of(template))?.claim(Instant::now())
    }

    /// A template is ready, replaced or deleted; or nobody knows.
    pub(crate) fn templates_changed(&self) {
        self.is_stale.store(true, Ordering::Release);
        self.wake.notify_one();
    }

    // Nothing panics while the lock is held.
    fn shelves(&self) -> MutexGuard<'_, Shelves> {
        self.shelves.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pools for PoolSet {
    fn pools(&self) -> Vec<PoolStatus> {
        let (now, mut shelves) = (Instant::now(), self.shelves());
        let is_short = shelves.is_short;
        shelves.all.iter_mut().filter_map(|shelf| shelf.status(now, is_short)).collect()
    }
}
