//! The worker: claims tasks, carries them out on machines, and says how they ended.
//!
//! ```text
//!   claims ──► attempt ──► create (pool, restore, boot), lifecycle, snapshot, template
//!     │           ├──────► execute ──► pump (guest ⇄ session)
//!     │           └──────► tool_build: layers of tools, for VMs and ahead of them
//!     │
//!   registry:  says that the worker is there, and lets go where it was declared lost
//!   reconcile: at the start and whenever a lease, a time to live or a VMM ends
//!   garbage:   the files of snapshots that nothing needs any more
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
mod builder;
mod claims;
mod configure;
mod create;
mod derive;
mod execute;
mod failure;
mod fault;
mod garbage;
mod guest;
mod lifecycle;
pub mod metrics;
mod phases;
mod pool;
mod pump;
mod reconcile;
mod registry;
mod sealed;
mod snapshot;
mod template;
mod tool_build;
mod toolset;
mod worker;

use std::{fmt, path::Path, sync::Arc, time::Duration};

use aether_drivers::{BootSource, Driver, DriverError, LayerFile};
use aether_events::EventBus;
use aether_images::SnapshotStore;
use aether_logs::LogSink;
use aether_queue::{Queue, QueueError};
use aether_store::{Store, StoreError};
use aether_streams::Sessions;
use aether_tools::{BaseImage, Tools};
use aether_types::{Fault, WorkerId};

pub use garbage::Retention;
pub use pool::{PoolConfig, default_memory_reserve_mb, host_memory_mb};
pub use registry::FleetConfig;
pub use template::EnsureError;
pub use worker::{ShutdownMode, ShutdownReport, Worker};

/// Gives the files that an image boots from, their digests checked.
pub trait ImageSource: Send + Sync + 'static {
    /// Of a name, or of `name@digest`, which means one image for ever. May read whole files; called
    /// off the async threads. The fault is for the client's eyes.
    fn resolve(&self, image: &str) -> Result<BootSource, Fault>;

    /// What the name means now, as it stands after the `@`. Called off the async threads.
    fn digest(&self, image: &str) -> Result<String, Fault>;

    /// What tools depend on of an image. Called off the async threads.
    fn base(&self, image: &str) -> Result<BaseImage, Fault>;

    /// All modules of the image's kernel as a layer of `/usr`, where it has some. Called off the
    /// async threads.
    fn module_layer(&self, image: &str) -> Result<Option<LayerFile>, Fault>;

    /// Keeps the files of `name@digest` for as long as the file or folder `holder` is there, which
    /// is about to be made. Called off the async threads.
    fn pin(&self, image: &str, holder: &Path) -> Result<(), Fault>;
}

/// What a worker works with; the composition root chooses the implementations.
#[derive(Clone)]
pub struct WorkerParts {
    pub id: WorkerId,
    pub store: Arc<dyn Store>,
    pub queue: Arc<dyn Queue>,
    pub bus: Arc<dyn EventBus>,
    /// Takes what guests say.
    pub logs: LogSink,
    pub sessions: Sessions,
    pub drivers: Vec<Arc<dyn Driver>>,
    pub images: Arc<dyn ImageSource>,
    /// By snapshot id.
    pub snapshots: Arc<SnapshotStore>,
    /// By template digest.
    pub templates: Arc<SnapshotStore>,
    /// Where layers of tools come from.
    pub tools: Tools,
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
    /// VMs that are restored at once; the same of them.
    pub restores_at_once: usize,
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
    /// How long the guest of a template comes to rest before its snapshot: what its kernel puts off
    /// after a boot, and what the last command leaves, is then done once, and not in every clone.
    pub template_rest: Duration,
    /// A guest that lost a connection has this long to answer again before its command is given
    /// up. With what an exchange takes, a lost guest is reported within two seconds.
    pub reattach_limit: Duration,
    /// What the registry is told.
    pub fleet: FleetConfig,
    pub retention: Retention,
    /// Other data directories use the template store too; what no template here is made of stays.
    pub templates_are_shared: bool,
    /// Machines that are kept ready, by template.
    pub pools: Vec<PoolConfig>,
    /// While less than this is available on the host, the pools give their machines back.
    pub memory_reserve_mb: u64,
    /// A machine that has waited in a pool for so long is replaced.
    pub spare_age_max: Duration,
}

impl Default for WorkerConfig {
    fn default() -> Self {
        let processors = std::thread::available_parallelism().map_or(2, usize::from);
        let memory_mb = host_memory_mb();
        Self {
            boots_at_once: processors.max(2) * 2,
            restores_at_once: processors.max(2),
            tasks_at_once: 4096,
            lease: Duration::from_secs(15),
            start_limit: Duration::from_mins(2),
            stop_grace: Duration::from_secs(10),
            guest_limit: Duration::from_secs(10),
            template_rest: Duration::from_secs(1),
            reattach_limit: Duration::from_millis(1500),
            fleet: FleetConfig::default(),
            retention: Retention::default(),
            templates_are_shared: false,
            pools: PoolConfig::default_for(memory_mb),
            memory_reserve_mb: default_memory_reserve_mb(memory_mb),
            spare_age_max: Duration::from_hours(1),
        }
    }
}

/// Why a worker does not start.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// `0` names the field and its bounds.
    #[error("{0}")]
    Config(String),
    #[error("read the store")]
    Store(#[from] StoreError),
    #[error("use the queue")]
    Queue(#[from] QueueError),
    #[error("ask the driver for its machines")]
    Driver(#[from] DriverError),
}
