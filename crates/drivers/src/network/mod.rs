//! The network of this host's VMs.

mod range;

use std::{
    net::{IpAddr, Ipv4Addr},
    os::fd::{BorrowedFd, OwnedFd},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use aether_types::{NetworkPolicy, VmId};

pub use self::range::{Ipv4Range, ParseRangeError};
use crate::{DriverError, GuestNetwork, fault::FaultPoints, journal::Journal};

/// How the network is to be.
#[derive(Debug, Clone, Default)]
pub struct NetworkConfig {
    /// Addresses of the VMs. Refused where anything else on the host has a part of it. `None`:
    /// 10.213.0.0/16, or the next free one like it.
    pub range: Option<Ipv4Range>,
    /// Resolvers that guests use. Empty: the host's own.
    pub dns: Vec<IpAddr>,
    pub fault: FaultPoints,
}

/// What one VM has of the network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    /// The TAP that carries the guest's network; in [`Network::namespace`].
    pub tap: String,
    /// The TAP of the private link to the guest's agent, where one was asked for.
    pub channel_tap: Option<String>,
    pub guest: GuestNetwork,
    /// The host, as VMs see it: what an allow rule for a service on the host names.
    pub uplink_host_address: IpAddr,
}

struct Shared {
    namespace: OwnedFd,
}

/// Cheap to clone.
#[derive(Clone)]
pub struct Network(Arc<Shared>);

/// The socket on which a guest's agent says that it is ready.
#[derive(Debug)]
pub struct ReadyListener {
    socket: tokio::net::UdpSocket,
}

impl ReadyListener {
    /// The next hint from the guest, whatever it says: a guest writes it, so it is a hint only.
    /// Safe to drop and call again.
    pub async fn wait(&mut self) -> Result<Vec<u8>, DriverError> {
        todo!()
    }
}

impl Network {
    /// Makes the instance's network, or takes over the one that an earlier process left; mends
    /// what is missing of it.
    pub async fn open(config: NetworkConfig, journal: Journal) -> Result<Self, DriverError> {
        todo!()
    }

    /// Makes the VM's links, address and rules. Repeating it is harmless, and mends what is
    /// missing. On failure everything made is undone. Completes even if dropped.
    pub async fn attach(
        &self,
        vm: VmId,
        policy: &NetworkPolicy,
        owner_uid: u32,
        channel_link: bool,
    ) -> Result<Attachment, DriverError> {
        todo!()
    }

    /// Removes the VM's links, address and rules. Succeeds for an unknown VM.
    pub async fn detach(&self, vm: VmId) -> Result<(), DriverError> {
        todo!()
    }

    /// From the journal, so also after a restart.
    pub fn attachment(&self, vm: VmId) -> Option<Attachment> {
        todo!()
    }

    /// For `setns` in the process of a VMM.
    pub fn namespace(&self) -> BorrowedFd<'_> {
        todo!()
    }

    /// A connection to a port of the guest's agent over the private link.
    pub async fn dial(
        &self,
        vm: VmId,
        port: u32,
        limit: Duration,
    ) -> Result<tokio::net::TcpStream, DriverError> {
        todo!()
    }

    /// Listens for the agent's ready hint; call it before the guest boots.
    pub async fn ready_listener(&self, vm: VmId) -> Result<ReadyListener, DriverError> {
        todo!()
    }

    /// Mends what is missing and removes what no VM of `known` owns; says what it removed.
    pub async fn reconcile(&self, known: &[VmId]) -> Result<Vec<String>, DriverError> {
        todo!()
    }

    /// Removes all of it, if no VM is attached; says whether it did.
    pub async fn close_if_empty(&self) -> Result<bool, DriverError> {
        todo!()
    }

    /// Removes all of it, attachments included.
    pub async fn remove_all(&self) -> Result<(), DriverError> {
        todo!()
    }

    /// Name of the instance: eight hex digits.
    pub fn instance(&self) -> &str {
        todo!()
    }

    pub fn range(&self) -> Ipv4Range {
        todo!()
    }
}

/// Namespaces, links, tables and entries of this host that bear our name: of one instance, or of all.
pub fn leftovers(instance: Option<&str>) -> Vec<String> {
    todo!()
}
