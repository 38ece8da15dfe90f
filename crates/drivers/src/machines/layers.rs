//! Tools and output disks of machines.

use std::path::PathBuf;

use aether_types::MachineId;

use super::{Machines, Vmm};
use crate::{DriverError, LayerFile};

impl<V: Vmm> Machines<V> {
    pub(super) async fn add_layers_one(
        &self,
        id: MachineId,
        layers: Vec<LayerFile>,
    ) -> Result<(), DriverError> {
        let _ = (id, layers);
        Err(DriverError::Unavailable("this driver cannot add tools to a machine".to_owned()))
    }

    pub(super) async fn take_output_one(
        &self,
        id: MachineId,
        into: PathBuf,
        bytes: u64,
    ) -> Result<(), DriverError> {
        let _ = (id, into, bytes);
        Err(DriverError::Unavailable("this driver has no output disks".to_owned()))
    }
}
