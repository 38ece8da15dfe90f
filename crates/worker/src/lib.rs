//! The worker: claims tasks, carries them out on machines, and says how they ended.
//!
//! ```text
//!   claims ──► attempt ──► lifecycle (create, start, stop, pause, resume, delete)
//!     │           └──────► execute ──► pump (guest ⇄ session)
//!     │
//!   reconcile: at the start and whenever a lease, a time to live or a VMM ends
//! ```
//!
//! Invariants
//! - An attempt speaks for a task only while its epoch is the last one; the store checks.
//! - A command that was handed to a guest is never handed to one again: a later attempt attaches
//!   to it, or says that it was lost.
//! - Operations on one VM come one after another; commands in it run beside each other.
//! - Whoever ends a VM says why first, so that the commands in it end with that reason.
//!
//! What this crate does not do: it never talks to clients, and it never decides whether a request
//! is legal; the store did, with the state machines of `aether-types`.

mod attempt;
mod claims;
mod execute;
mod fault;
mod guest;
mod lifecycle;
mod pump;
mod reconcile;
mod worker;

use std::{fmt, sync::Arc, time::Duration};

use aether_drivers::{BootSource, Driver, DriverError};
use aether_events::EventBus;
use aether_queue::{Queue, QueueError};
use aether_store::{Store, StoreError};
use aether_streams::Sessions;
use aether_types::{Fault, WorkerId};

pub use worker::{ShutdownMode, ShutdownReport, Worker};

/// Gives the files that an image boots from, their digests checked.
pub trait ImageSource: Send + Sync + 'static {
    /// May read whole files; called off the async threads. The fault is for the client's eyes.
    fn resolve(&self, image: &str) -> Result<BootSource, Fault>;
}

/// What a worker works with; the composition root chooses the implementations.
#[derive(Clone)]
pub struct WorkerParts {
    pub id: WorkerId,
    pub store: Arc<dyn Store>,
    pub queue: Arc<dyn Queue>,
    pub bus: Arc<dyn EventBus>,
    pub sessions: Sessions,
    pub drivers: Vec<Arc<dyn Driver>>,
    pub images: Arc<dyn ImageSource>,
    pub config: WorkerConfig,
}

impl fmt::Debug for WorkerParts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkerParts").field("id", &self.id).finish_non_exhaustive()
    }
}

#[derive(Debug, Clone)]
pub struct WorkerConfig {
    /// VMs that boot at once. A boot costs a processor its whole time; more only make all slower.
    pub boots_at_once: usize,
    /// Tasks in hand at once, those that wait for their VM included.
    pub tasks_at_once: usize,
    /// A lease that is not renewed for this long is given to another. Renewed at a third of it.
    pub lease: Duration,
    /// From the start of a VMM to the guest's answer.
    pub start_limit: Duration,
    /// From the request to stop to the end of the guest; then it is ended by force.
    pub stop_grace: Duration,
    /// One exchange with a guest's agent, connection included.
    pub guest_limit: Duration,
    /// A guest that lost a connection has this long to answer again before its command is given
    /// up. With what an exchange takes, a lost guest is reported within two seconds.
    pub reattach_limit: Duration,
}

impl Default for WorkerConfig {
    fn default() -> Self {
        let processors = std::thread::available_parallelism().map_or(2, usize::from);
        Self {
            boots_at_once: processors.max(2) * 2,
            tasks_at_once: 4096,
            lease: Duration::from_secs(15),
            start_limit: Duration::from_mins(2),
            stop_grace: Duration::from_secs(10),
            guest_limit: Duration::from_secs(10),
            reattach_limit: Duration::from_millis(1500),
        }
    }
}

/// Why a worker does not start.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    #[error("read the store")]
    Store(#[from] StoreError),
    #[error("use the queue")]
    Queue(#[from] QueueError),
    #[error("ask the driver for its machines")]
    Driver(#[from] DriverError),
}
