//! Machines that are none: scripted, in this process, for tests and for `aether up --driver sim`.
//!
//! A [`SimHost`] is the simulated hardware: machines, their disks and what they take of a host.
//! It outlives the [`SimDriver`]s made on it, as a real host outlives its worker. A guest speaks
//! the guest's side of the protocol over in-memory streams and has a small set of programs
//! ([`command`]). A snapshot is real files ([`saved`]), which any simulated host restores; what a
//! clone's programs had done before, they do not do again.
//!
//! What this deliberately does not do: isolate anything, and keep anything but snapshots when its
//! process ends.

mod clock;
mod command;
mod files;
mod guest;
mod host;
mod output;
mod run;
mod saved;

use std::{
    path::Path,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use aether_protocol::{AGENT_PORT, host::BoxStream};
use aether_types::{DriverKind, MachineId, NetworkPolicy, VmId};
use async_trait::async_trait;

use self::host::{SimMachine, ended, kill, state_name, wrong};
pub use self::{
    clock::{ManualClock, SimClock},
    host::SimHost,
};
use crate::{
    AfterSnapshot, Capabilities, Driver, DriverError, ExitReason, GuestNetwork, LayerFile, Machine,
    MachineSpec, MachineState, Phase, SnapshotDisk, SnapshotTaken, Start, fault::FaultPoints,
};

/// In one direction of a stream to a simulated guest; about a socket's.
const STREAM_BYTES: usize = 256 * 1024;

/// How a simulated host behaves.
#[derive(Debug, Clone, Default)]
pub struct SimConfig {
    pub clock: SimClock,
    pub latency: SimLatency,
    pub fault: FaultPoints,
}

/// How long things take. Zero by default.
#[derive(Debug, Clone, Default)]
pub struct SimLatency {
    pub create: Duration,
    pub boot: Duration,
    pub restore: Duration,
    /// All of it with the guest standing still.
    pub snapshot: Duration,
    pub pause: Duration,
    pub claim: Duration,
    pub connect: Duration,
    pub delete: Duration,
}

/// A driver on a simulated host. Dropping it leaves the host's machines as they are.
#[derive(Debug, Clone)]
pub struct SimDriver {
    host: Arc<SimHost>,
}

impl SimDriver {
    #[must_use]
    pub fn new(host: Arc<SimHost>) -> Self {
        Self { host }
    }

    pub fn host(&self) -> &Arc<SimHost> {
        &self.host
    }

    fn known(&self, id: MachineId) -> Result<Arc<SimMachine>, DriverError> {
        self.host.known(id).ok_or(DriverError::UnknownVm(id))
    }

    /// Runs an operation to its end, also if the caller stops waiting.
    async fn finish<T: Send + 'static>(
        &self,
        operation: impl Future<Output = Result<T, DriverError>> + Send + 'static,
    ) -> Result<T, DriverError> {
        crate::finished(self.host.tasks.spawn(operation).await)
    }
}

#[async_trait]
impl Driver for SimDriver {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            kind: DriverKind::Sim,
            accelerated: false,
            isolation: "none: simulated machines, for tests",
            version: env!("CARGO_PKG_VERSION").to_owned(),
            snapshot_format: Some(saved::FORMAT.to_owned()),
        }
    }

    async fn create(&self, spec: MachineSpec) -> Result<GuestNetwork, DriverError> {
        let host = Arc::clone(&self.host);
        self.finish(async move { host.create(spec).await }).await
    }

    async fn start(
        &self,
        id: MachineId,
        how: Start,
        limit: Duration,
    ) -> Result<Vec<Phase>, DriverError> {
        let (host, machine) = (Arc::clone(&self.host), self.known(id)?);
        self.finish(async move {
            let _one = machine.operation.lock().await;
            host.start(&machine, how, limit).await
        })
        .await
    }

    async fn snapshot(
        &self,
        id: MachineId,
        into: &Path,
        disk: SnapshotDisk,
        after: AfterSnapshot,
    ) -> Result<SnapshotTaken, DriverError> {
        let (host, machine, into) = (Arc::clone(&self.host), self.known(id)?, into.to_owned());
        self.finish(async move {
            let _one = machine.operation.lock().await;
            host.snapshot(&machine, into, disk, after).await
        })
        .await
    }

    async fn claim(
        &self,
        id: MachineId,
        vm: VmId,
        network: &NetworkPolicy,
    ) -> Result<(), DriverError> {
        let (host, machine) = (Arc::clone(&self.host), self.known(id)?);
        let network = network.clone();
        self.finish(async move {
            let _one = machine.operation.lock().await;
            host.claim(&machine, vm, network).await
        })
        .await
    }

    async fn add_layers(&self, id: MachineId, layers: &[LayerFile]) -> Result<(), DriverError> {
        let (host, machine) = (Arc::clone(&self.host), self.known(id)?);
        let layers = layers.to_vec();
        self.finish(async move {
            let _one = machine.operation.lock().await;
            host.add_layers(&machine, layers)
        })
        .await
    }

    async fn set_background(&self, id: MachineId, background: bool) -> Result<(), DriverError> {
        let machine = self.known(id)?;
        self.host.config.fault.hit("sim set background")?;
        machine.is_background.store(background, Ordering::Relaxed);
        Ok(())
    }

    async fn pause(&self, id: MachineId) -> Result<(), DriverError> {
        let (host, machine) = (Arc::clone(&self.host), self.known(id)?);
        self.finish(async move { host.set_paused(&machine, true).await }).await
    }

    async fn resume(&self, id: MachineId) -> Result<(), DriverError> {
        let (host, machine) = (Arc::clone(&self.host), self.known(id)?);
        self.finish(async move { host.set_paused(&machine, false).await }).await
    }

    async fn kill(&self, id: MachineId) -> Result<(), DriverError> {
        let (host, machine) = (Arc::clone(&self.host), self.known(id)?);
        self.finish(async move {
            let _one = machine.turn_to_end().await;
            host.config.fault.hit("sim kill")?;
            kill(&host, &machine).await;
            host.config.fault.hit("sim killed")
        })
        .await
    }

    async fn exited(&self, id: MachineId) -> Result<ExitReason, DriverError> {
        let machine = self.known(id)?;
        Ok(ended(&machine).await)
    }

    async fn last_words(&self, id: MachineId) -> String {
        let state = self.host.known(id).map(|machine| machine.describe().state);
        match state {
            Some(MachineState::Exited(ExitReason::GuestPanic)) => {
                "Kernel panic - not syncing: simulated".to_owned()
            }
            _ => String::new(),
        }
    }

    async fn delete(&self, id: MachineId) -> Result<(), DriverError> {
        let host = Arc::clone(&self.host);
        self.finish(async move { host.delete(id).await }).await
    }

    async fn inspect(&self, id: MachineId) -> Result<Option<Machine>, DriverError> {
        Ok(self.host.known(id).map(|machine| machine.describe()))
    }

    async fn list(&self) -> Result<Vec<Machine>, DriverError> {
        Ok(self.host.all().iter().map(|machine| machine.describe()).collect())
    }

    async fn release(&self) -> Result<(), DriverError> {
        self.host.release().await;
        Ok(())
    }

    async fn connect(
        &self,
        id: MachineId,
        port: u32,
        limit: Duration,
    ) -> Result<BoxStream, DriverError> {
        let machine = self.known(id)?;
        let state = *machine.state.borrow();
        let silent = match state {
            MachineState::Running => !machine.is_reachable.load(Ordering::Relaxed),
            MachineState::Paused => true,
            MachineState::Created | MachineState::Exited(_) => {
                return Err(wrong(id, state_name(state), "connect to it"));
            }
        };
        let clock = &self.host.config.clock;
        let latency = self.host.config.latency.connect;
        if silent || latency > limit {
            tokio::select! {
                () = clock.sleep(limit) => {}
                _ = ended(&machine) => {}
            }
            return Err(DriverError::ConnectTimeout { port, limit_ms: limit.as_millis() });
        }
        clock.sleep(latency).await;
        let guest = self.host.guest(id);
        let Some(guest) = guest.filter(|guest| port == AGENT_PORT && guest.has_agent()) else {
            return Err(DriverError::ConnectRefused { port });
        };
        let (ours, theirs) = tokio::io::duplex(STREAM_BYTES);
        guest.accept(Box::new(theirs));
        Ok(Box::new(ours))
    }
}
