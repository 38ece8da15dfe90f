//! Tools and output disks of machines.

use std::{path::PathBuf, sync::Arc};

use aether_types::MachineId;
use tokio::time::timeout;

use super::{CONTROL_LIMIT, Machines, Vmm, wrong};
use crate::{DriverError, LayerFile, host::blocking, layer_places, tools};

impl<V: Vmm> Machines<V> {
    pub(super) async fn add_layers_one(
        self: &Arc<Self>,
        id: MachineId,
        layers: Vec<LayerFile>,
    ) -> Result<(), DriverError> {
        self.known(id)?;
        let slot = self.slot(id);
        let _one = slot.operation.lock().await;
        slot.work.wait().await;
        let mut record = self.known(id)?;
        let have = record.spec.layers.len();
        if record.network.is_none() {
            return Err(wrong(id, "half made", "add tools to it"));
        }
        if !tools::begin_with(&layers, &record.spec.layers) {
            let detail = "the machine has others, which would have to go".to_owned();
            return Err(DriverError::Layers(detail));
        }
        if layers.len() == have {
            return Ok(());
        }
        layer_places(&layers)?;
        self.host.fault.hit("add layers")?;
        record.spec.layers = layers;
        let (host, vmm, with) = (Arc::clone(&self.host), Arc::clone(&self.vmm), record.clone());
        blocking(move || vmm.keep_layers(&host, &with, have)).await?;
        self.host.fault.hit("add layers: kept")?;
        let live = slot.running();
        if let Some(live) = live {
            let place = self.place(&record).ok_or(DriverError::UnknownVm(id))?;
            let adding = timeout(CONTROL_LIMIT, self.vmm.add_layers(&place, &live.control, have));
            tokio::select! {
                added = adding => added.unwrap_or_else(|_| {
                    let (action, detail) = ("add tools".to_owned(), "no answer in time".to_owned());
                    Err(DriverError::Vmm { action, detail })
                })?,
                _ = live.ended() => return Err(wrong(id, "stopped", "add tools to it")),
            }
        }
        self.host.fault.hit("add layers: added")?;
        self.host.set_record(&record)
    }

    pub(super) async fn take_output_one(
        self: &Arc<Self>,
        id: MachineId,
        into: PathBuf,
        bytes: u64,
    ) -> Result<(), DriverError> {
        self.known(id)?;
        let slot = self.slot(id);
        let _one = slot.operation.lock().await;
        slot.work.wait().await;
        let record = self.known(id)?;
        if slot.running().is_some() {
            return Err(wrong(id, "running", "take its output"));
        }
        if record.spec.output_mb.is_none_or(|mb| bytes > u64::from(mb) << 20) {
            return Err(wrong(id, "without an output disk of that size", "take its output"));
        }
        let from = self.host.directory(id).join(tools::OUTPUT_FILE);
        let copying = slot.work.spawn_blocking(move || tools::take_output(&from, &into, bytes));
        crate::finished(copying.await)
    }
}
