//! The driver for containers of a Docker engine: for tests, and for machines that cannot do better.
//!
//! ```text
//!   engine (dockerd) ── container ── PID 1: the image's agent, `--container /run/aether`
//!                          │             ├─ token         read once
//!   DATA/vms/ID/channel ═══╪═ bind ══════╪─ ready.sock    ours: the agent says that it listens
//!                          │             └─ agent.sock    the agent's: we connect
//!   namespace aether-ID ───┴─ veth ── eth0, under the same rules as a VM's TAP
//! ```
//!
//! The same base image (imported once, by its content), the same agent and the same protocol as in a
//! microVM; lifecycle, journal and adoption are the one engine of all real drivers. A container is a
//! weaker wall than a VM: it shares the host's kernel, and that is said wherever the driver shows.
//!
//! Invariants
//! - A container is in the journal before it exists. One that the journal does not know is removed,
//!   and one that runs without being recorded as running is ended, as the driver opens.
//! - No capability but what a package manager needs, no new privileges, the engine's seccomp
//!   profile, no network but ours; processors, memory and processes are bounded.
//! - What a container writes is followed nowhere: the folder that is shared with it is made anew for
//!   each start, and its socket is opened without following links.
//!
//! - Tools are mounted by the host, read-only, and written to in the VM's own folder.
//!
//! What this deliberately does not do: snapshots and builders, user namespaces of the engine
//! (refused), a bound on the disk where the engine's storage has none.

mod channel;
mod container;
mod engine;
mod import;
mod tools;
mod vmm;

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use aether_protocol::host::BoxStream;
use aether_types::MachineId;
use async_trait::async_trait;

use self::{engine::Engine, vmm::Docker};
use crate::{
    Capabilities, Driver, DriverError, ExitReason, GuestNetwork, Machine, MachineSpec,
    host::Host,
    journal::Resource,
    machines::{Machines, delegate_driver},
};

/// Where an engine listens if nobody says otherwise.
pub const SOCKET_DEFAULT: &str = "/var/run/docker.sock";

/// The label of our containers, with the data directory that they belong to.
const LABEL_OWNER: &str = "aetherium.data-dir";
const NAME_PREFIX: &str = "aetherium-";

/// How the engine is used.
#[derive(Debug, Clone)]
pub struct DockerConfig {
    /// The engine's Unix socket, on this host: files are shared with its containers.
    pub socket: PathBuf,
}

impl Default for DockerConfig {
    fn default() -> Self {
        Self { socket: SOCKET_DEFAULT.into() }
    }
}

/// Containers as machines. Dropping it leaves them running.
pub struct DockerDriver(Arc<Machines<Docker>>);

impl std::fmt::Debug for DockerDriver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("DockerDriver").field(&self.0.vmm).finish()
    }
}

delegate_driver!(DockerDriver);

impl DockerDriver {
    /// Connects to the engine, removes containers of this data directory that nobody owns, and
    /// takes over those that run.
    pub async fn open(host: Arc<Host>, config: DockerConfig) -> Result<Self, DriverError> {
        if !rustix::process::geteuid().is_root() {
            return Err(DriverError::Unavailable(
                "the Docker driver makes networks and shares folders with containers, which takes \
                 root; run it as root"
                    .to_owned(),
            ));
        }
        let engine = Engine::connect(&config.socket).await?;
        let version = engine.check().await?;
        tracing::warn!(
            engine = %config.socket.display(), %version, isolation = vmm::ISOLATION,
            "VMs of this driver are containers"
        );
        sweep(&host, &engine).await?;
        let docker = Docker::new(engine, version);
        Ok(Self(Machines::open(host, docker).await?))
    }
}

/// Ends what a worker left that died between the start of a container and its record, and removes
/// what no record knows.
async fn sweep(host: &Host, engine: &Engine) -> Result<(), DriverError> {
    let known: HashSet<String> = host.journal.machines().into_iter().map(name_of).collect();
    for container in engine.list(&owner_of(host)).await? {
        if !known.contains(&container) {
            tracing::warn!(container, "remove a container that no VM owns");
            engine.remove(&container).await?;
            continue;
        }
        let id = container.strip_prefix(NAME_PREFIX).and_then(|id| id.parse::<MachineId>().ok());
        let Some(id) = id else { continue };
        let recorded = host.journal.resources(id);
        if !recorded.iter().any(|r| matches!(r, Resource::Process { .. })) {
            engine.end(&container).await?;
        }
    }
    Ok(())
}

fn name_of(id: MachineId) -> String {
    format!("{NAME_PREFIX}{id}")
}

fn owner_of(host: &Host) -> String {
    host.data_dir.display().to_string()
}

/// Ends a container that the journal names, paused or not; none is no error.
pub(crate) async fn end_container(engine: &Path, name: &str) -> Result<(), DriverError> {
    Engine::connect(engine).await?.end(name).await
}

/// Removes a container that the journal names; none is no error.
pub(crate) async fn remove_container(engine: &Path, name: &str) -> Result<(), DriverError> {
    Engine::connect(engine).await?.remove(name).await
}
