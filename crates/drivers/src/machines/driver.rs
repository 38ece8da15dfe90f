//! The driver's trait: each operation in a task of its own.

use std::{path::Path, sync::Arc, time::Duration};

use aether_protocol::host::BoxStream;
use aether_types::{MachineId, NetworkPolicy, VmId};
use async_trait::async_trait;

use super::{Machines, SnapshotWish, Vmm, lock, wrong};
use crate::{
    AfterSnapshot, Capabilities, Driver, DriverError, ExitReason, GuestNetwork, LayerFile, Machine,
    MachineSpec, MachineState, Phase, SnapshotDisk, SnapshotTaken, Start, stream::GuestStream,
};

/// Of a guest's last words: a kernel's panic stands above the trace that follows it.
const LINES_LOGGED: usize = 300;

/// What a driver's public type delegates to.
#[async_trait]
impl<V: Vmm> Driver for Arc<Machines<V>> {
    fn capabilities(&self) -> Capabilities {
        self.vmm.capabilities()
    }

    async fn create(&self, spec: MachineSpec) -> Result<GuestNetwork, DriverError> {
        let machines = Arc::clone(self);
        self.finish(async move { machines.create_one(spec).await }).await
    }

    async fn start(
        &self,
        id: MachineId,
        how: Start,
        limit: Duration,
    ) -> Result<Vec<Phase>, DriverError> {
        let machines = Arc::clone(self);
        self.finish(async move { machines.start_one(id, how, limit).await }).await
    }

    async fn snapshot(
        &self,
        id: MachineId,
        into: &Path,
        disk: SnapshotDisk,
        after: AfterSnapshot,
    ) -> Result<SnapshotTaken, DriverError> {
        let (machines, into) = (Arc::clone(self), into.to_owned());
        let wish = SnapshotWish { disk, after };
        self.finish(async move { machines.snapshot_one(id, &into, wish).await }).await
    }

    async fn claim(
        &self,
        id: MachineId,
        vm: VmId,
        network: &NetworkPolicy,
    ) -> Result<(), DriverError> {
        let (machines, network) = (Arc::clone(self), network.clone());
        self.finish(async move { machines.claim_one(id, vm, &network).await }).await
    }

    async fn add_layers(&self, id: MachineId, layers: &[LayerFile]) -> Result<(), DriverError> {
        let (machines, layers) = (Arc::clone(self), layers.to_vec());
        self.finish(async move { machines.add_layers_one(id, layers).await }).await
    }

    async fn take_output(&self, id: MachineId, into: &Path, bytes: u64) -> Result<(), DriverError> {
        let (machines, into) = (Arc::clone(self), into.to_owned());
        self.finish(async move { machines.take_output_one(id, into, bytes).await }).await
    }

    async fn set_background(&self, id: MachineId, background: bool) -> Result<(), DriverError> {
        let machines = Arc::clone(self);
        self.finish(async move { machines.set_background_one(id, background).await }).await
    }

    async fn pause(&self, id: MachineId) -> Result<(), DriverError> {
        let machines = Arc::clone(self);
        self.finish(async move { machines.set_paused(id, true).await }).await
    }

    async fn resume(&self, id: MachineId) -> Result<(), DriverError> {
        let machines = Arc::clone(self);
        self.finish(async move { machines.set_paused(id, false).await }).await
    }

    async fn kill(&self, id: MachineId) -> Result<(), DriverError> {
        let machines = Arc::clone(self);
        self.finish(async move {
            machines.known(id)?;
            let slot = machines.slot(id);
            slot.interrupt();
            let _one = slot.operation.lock().await;
            machines.host.fault.hit("kill")?;
            let live = slot.running();
            match live {
                Some(live) => live.kill(&*machines.vmm).await,
                None => Ok(()),
            }
        })
        .await
    }

    async fn exited(&self, id: MachineId) -> Result<ExitReason, DriverError> {
        self.known(id)?;
        let live = self.slot(id).running();
        match live {
            Some(live) => Ok(live.ended().await),
            None => Ok(match self.at_rest(id) {
                MachineState::Exited(reason) => reason,
                // It never ran: nobody but its owner keeps it from running.
                MachineState::Created | MachineState::Running | MachineState::Paused => {
                    ExitReason::Killed
                }
            }),
        }
    }

    async fn last_words(&self, id: MachineId) -> String {
        let Some(slot) = lock(&self.slots).get(&id).cloned() else { return String::new() };
        let ended = lock(&slot.live).as_ref().filter(|live| live.has_ended()).cloned();
        let Some(live) = ended else { return String::new() };
        let vmm = Arc::clone(&self.vmm);
        tokio::task::spawn_blocking(move || vmm.last_words(&live.control, LINES_LOGGED))
            .await
            .unwrap_or_default()
    }

    async fn delete(&self, id: MachineId) -> Result<(), DriverError> {
        let machines = Arc::clone(self);
        self.finish(async move {
            if machines.host.record(id).is_some_and(|record| record.kind != V::KIND) {
                return Ok(());
            }
            let slot = machines.slot(id);
            slot.interrupt();
            let _one = slot.operation.lock().await;
            machines.remove(id).await?;
            lock(&machines.slots).remove(&id);
            Ok(())
        })
        .await
    }

    async fn inspect(&self, id: MachineId) -> Result<Option<Machine>, DriverError> {
        self.machine(id).await
    }

    async fn list(&self) -> Result<Vec<Machine>, DriverError> {
        let mut found = Vec::new();
        for id in self.host.journal.machines() {
            found.extend(self.machine(id).await?);
        }
        Ok(found)
    }

    async fn release(&self) -> Result<(), DriverError> {
        let machines = Arc::clone(self);
        self.finish(async move {
            for id in machines.host.journal.machines() {
                if !machines.host.record(id).is_some_and(|record| record.kind == V::KIND) {
                    continue;
                }
                let slot = machines.slot(id);
                let _one = slot.operation.lock().await;
                if slot.running().is_none() {
                    machines.host.network().detach(id).await?;
                }
            }
            machines.host.network().close_if_empty().await?;
            Ok(())
        })
        .await
    }

    async fn connect(
        &self,
        id: MachineId,
        port: u32,
        limit: Duration,
    ) -> Result<BoxStream, DriverError> {
        let live = self.running(id, "connect to it")?;
        if let Some(stream) = self.vmm.take_connection(&live.control, port) {
            return Ok(Box::new(GuestStream::new(stream, live.ended.clone())));
        }
        let place = self.place(&self.known(id)?).ok_or(DriverError::UnknownVm(id))?;
        tokio::select! {
            stream = self.vmm.connect(&place, port, limit) => {
                Ok(Box::new(GuestStream::new(stream?, live.ended.clone())))
            }
            _ = live.ended() => Err(wrong(id, "stopped", "connect to it")),
        }
    }
}

/// Makes a public driver of a tuple around `Arc<Machines<_>>`.
macro_rules! delegate_driver {
    ($driver:ty) => {
        #[async_trait]
        impl Driver for $driver {
            fn capabilities(&self) -> Capabilities {
                self.0.capabilities()
            }
            async fn create(&self, spec: MachineSpec) -> Result<GuestNetwork, DriverError> {
                self.0.create(spec).await
            }
            async fn start(
                &self,
                id: MachineId,
                how: crate::Start,
                limit: Duration,
            ) -> Result<Vec<crate::Phase>, DriverError> {
                self.0.start(id, how, limit).await
            }
            async fn snapshot(
                &self,
                id: MachineId,
                into: &std::path::Path,
                disk: crate::SnapshotDisk,
                after: crate::AfterSnapshot,
            ) -> Result<crate::SnapshotTaken, DriverError> {
                self.0.snapshot(id, into, disk, after).await
            }
            async fn claim(
                &self,
                id: MachineId,
                vm: aether_types::VmId,
                network: &aether_types::NetworkPolicy,
            ) -> Result<(), DriverError> {
                self.0.claim(id, vm, network).await
            }
            async fn add_layers(
                &self,
                id: MachineId,
                layers: &[crate::LayerFile],
            ) -> Result<(), DriverError> {
                self.0.add_layers(id, layers).await
            }
            async fn take_output(
                &self,
                id: MachineId,
                into: &std::path::Path,
                bytes: u64,
            ) -> Result<(), DriverError> {
                self.0.take_output(id, into, bytes).await
            }
            async fn set_background(
                &self,
                id: MachineId,
                background: bool,
            ) -> Result<(), DriverError> {
                self.0.set_background(id, background).await
            }
            async fn pause(&self, id: MachineId) -> Result<(), DriverError> {
                self.0.pause(id).await
            }
            async fn resume(&self, id: MachineId) -> Result<(), DriverError> {
                self.0.resume(id).await
            }
            async fn kill(&self, id: MachineId) -> Result<(), DriverError> {
                self.0.kill(id).await
            }
            async fn exited(&self, id: MachineId) -> Result<ExitReason, DriverError> {
                self.0.exited(id).await
            }
            async fn last_words(&self, id: MachineId) -> String {
                self.0.last_words(id).await
            }
            async fn delete(&self, id: MachineId) -> Result<(), DriverError> {
                self.0.delete(id).await
            }
            async fn inspect(&self, id: MachineId) -> Result<Option<Machine>, DriverError> {
                self.0.inspect(id).await
            }
            async fn list(&self) -> Result<Vec<Machine>, DriverError> {
                self.0.list().await
            }
            async fn release(&self) -> Result<(), DriverError> {
                self.0.release().await
            }
            async fn connect(
                &self,
                id: MachineId,
                port: u32,
                limit: Duration,
            ) -> Result<BoxStream, DriverError> {
                self.0.connect(id, port, limit).await
            }
        }
    };
}
pub(crate) use delegate_driver;
