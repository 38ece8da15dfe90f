//! Live byte paths between a client's request, which the gateway holds, and the worker that
//! serves it. The two crates never depend on each other; they meet here.
//!
//! - [`Sessions`]: the live side of an execution. The gateway opens a session before it records
//!   the task; the worker that begins the task takes the other end. Both directions are bounded
//!   channels, so a client that stalls holds back its own command and nothing else.
//! - [`GuestLink`]: a connection to a VM's agent, for what is no task: files.
//!
//! In one process this is all there is. Between processes the same two meet over a network
//! connection ([`remote`]); who holds a [`SessionLink`] or a [`GuestLink`] does not know which it is.

pub mod remote;
mod sessions;

use std::fmt;

use aether_protocol::host::BoxStream;
use aether_types::{ExecutionId, Fault, TemplateId, VmId};
use async_trait::async_trait;

pub use sessions::{ClientEnd, SessionInput, SessionOutput, Sessions, WorkerEnd};

/// An open byte stream to a VM's agent, and the token that the agent asks for.
pub struct GuestConnection {
    pub stream: BoxStream,
    pub token: String,
}

// The token must not reach a log.
impl fmt::Debug for GuestConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestConnection").finish_non_exhaustive()
    }
}

/// Reaches the agent of any VM that runs.
#[async_trait]
pub trait GuestLink: Send + Sync + 'static {
    /// Bounded in time by the implementation. The fault is for the client's eyes.
    async fn connect(&self, vm: VmId) -> Result<GuestConnection, Fault>;
}

/// Opens the live side of executions.
#[async_trait]
pub trait SessionLink: Send + Sync + 'static {
    /// For an execution that is about to be recorded. Bounded in time by the implementation. The
    /// fault is for the client's eyes.
    async fn follow(&self, vm: VmId, id: ExecutionId) -> Result<ClientEnd, Fault>;
}

#[async_trait]
impl SessionLink for Sessions {
    async fn follow(&self, _: VmId, id: ExecutionId) -> Result<ClientEnd, Fault> {
        Ok(self.open(id))
    }
}

/// A pool of a worker: machines of a template that wait to be claimed.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct PoolStatus {
    pub template_id: TemplateId,
    /// `name:tag`.
    pub template: String,
    /// Machines that can be claimed now.
    pub ready: u32,
    /// Machines that there shall be now, by configuration, demand and memory.
    pub target: u32,
    pub min: u32,
    pub max: u32,
    /// Claims since the worker started, and creations that found the pool empty.
    pub hits: u64,
    pub misses: u64,
}

/// What a worker's pools hold.
pub trait Pools: Send + Sync + 'static {
    fn pools(&self) -> Vec<PoolStatus>;
}
