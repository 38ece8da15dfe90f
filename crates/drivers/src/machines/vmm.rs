//! What differs between VMMs.

use std::{sync::Arc, time::Duration};

use aether_protocol::host::BoxStream;
use aether_types::{DriverKind, VmId};
use async_trait::async_trait;

use crate::{
    Capabilities, DriverError, ExitReason,
    host::{Host, Record},
    network::Attachment,
    process::Process,
};

/// A VM, as its driver sees it while it acts.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) host: Arc<Host>,
    pub(crate) record: Record,
    pub(crate) attachment: Attachment,
}

impl Place {
    pub(crate) fn id(&self) -> VmId {
        self.record.spec.vm_id
    }
}

/// A VMM that was started.
pub(crate) struct Booted<C> {
    pub(crate) process: Process,
    pub(crate) control: C,
}

/// What differs between VMMs.
#[async_trait]
pub(crate) trait Vmm: Send + Sync + 'static {
    /// The way to a VMM that runs.
    type Control: Send + Sync + 'static;

    const KIND: DriverKind;
    /// The guest's channel is a private link of the network.
    const CHANNEL_LINK: bool;

    fn capabilities(&self) -> Capabilities;

    /// Starts the VMM and lets the guest boot. What it leaves when it fails is found in the
    /// journal.
    async fn boot(&self, place: &Place) -> Result<Booted<Self::Control>, DriverError>;

    /// Waits for the guest's hint that it can be connected to, and sees that it can.
    async fn ready(&self, place: &Place, control: &Self::Control) -> Result<(), DriverError>;

    /// Takes up the way to a VMM that an earlier worker started.
    async fn adopt(&self, place: &Place, process: &Process) -> Result<Self::Control, DriverError>;

    /// Waits until the VMM has ended, and says why as far as it can be told.
    async fn watch(&self, control: &Self::Control, process: &Process) -> ExitReason;

    /// The last words of guest and VMM, for an error.
    fn last_words(&self, control: &Self::Control) -> String;

    async fn pause(&self, control: &Self::Control) -> Result<(), DriverError>;
    async fn resume(&self, control: &Self::Control) -> Result<(), DriverError>;
    async fn is_paused(&self, control: &Self::Control) -> Result<bool, DriverError>;

    async fn connect(
        &self,
        place: &Place,
        port: u32,
        limit: Duration,
    ) -> Result<BoxStream, DriverError>;

    /// Removes what a VMM that has ended left in the VM's directory.
    fn clean(&self, host: &Host, record: &Record) -> Result<(), DriverError>;
}
