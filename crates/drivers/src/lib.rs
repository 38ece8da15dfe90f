//! The seam to machines: one trait, one module for each kind of machine, and one contract suite
//! that every implementation passes.
//!
//! A driver gives a VM's lifecycle and a byte stream to a port in the guest. Commands, terminals
//! and files are `aether-protocol` over that stream, and one code for all drivers. A driver never
//! speaks that protocol itself, with one exception: the simulated one plays the guest.
//!
//! Invariants
//! - A host resource is in the [journal] before it exists and until it is gone.
//! - A VMM outlives the process that started it; [`Driver::list`] finds it again.
//! - `delete` succeeds from every state, however often it is called, and leaves nothing.

mod cgroup;
pub mod error;
pub mod fault;
pub mod firecracker;
mod host;
pub mod journal;
mod machines;
pub mod network;
mod process;
pub mod qemu;
pub mod sim;
mod stream;

use std::{fmt, net::IpAddr, path::PathBuf, time::Duration};

use aether_protocol::host::BoxStream;
use aether_types::{DriverKind, NetworkPolicy, VmId};
use async_trait::async_trait;

pub use cgroup::{CgroupMode, CgroupStatus};
pub use error::DriverError;
pub use host::{Host, HostConfig, UID_BASE_DEFAULT, UID_COUNT};

/// Everything a driver needs to make a VM. Also what it keeps, so that a VM can be started again
/// after a restart of the worker.
#[derive(Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct MachineSpec {
    pub vm_id: VmId,
    pub vcpus: u32,
    pub memory_mb: u32,
    pub disk_mb: u32,
    pub boot: BootSource,
    pub network: NetworkPolicy,
    /// The secret that the guest's agent asks of whoever connects; 32 random bytes in hex.
    pub token: String,
}

// The token must not reach a log.
impl fmt::Debug for MachineSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MachineSpec").field("vm_id", &self.vm_id).finish_non_exhaustive()
    }
}

/// The files a guest boots from; their digests were checked by who made this.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct BootSource {
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    pub rootfs: PathBuf,
    pub kernel_flavour: KernelFlavour,
}

/// Decides the kernel's command line and the machine's devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KernelFlavour {
    /// Debian's cloud kernel: modules in the initramfs, ACPI.
    Debian,
    /// The small kernel of `guest/firecracker-test-kernel`: all built in, no ACPI, no PCI.
    FirecrackerTest,
}

/// Addresses the driver gave the VM, for the agent to set up.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct GuestNetwork {
    /// MAC of the network interface that the guest is to configure.
    pub mac: String,
    pub addresses: Vec<(IpAddr, u8)>,
    pub gateways: Vec<IpAddr>,
    pub dns: Vec<IpAddr>,
    pub mtu: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MachineState {
    /// Resources are there, no process.
    Created,
    Running,
    Paused,
    /// The process has ended; its resources but for the process are still there.
    Exited(ExitReason),
}

/// Why a VMM ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitReason {
    /// `Driver::kill` did it.
    Killed,
    /// The guest powered off or rebooted (after a shutdown through the agent, that is the wish).
    GuestShutdown,
    /// The guest's kernel panicked.
    GuestPanic,
    /// The VMM died by a signal, or by a failure of its own.
    VmmDied,
}

#[derive(Debug, Clone)]
pub struct Machine {
    pub vm_id: VmId,
    pub state: MachineState,
    pub network: Option<GuestNetwork>,
    /// Process id of the VMM, while there is one.
    pub pid: Option<u32>,
    /// As given to `create`; a worker that restarts has the token from here. `None` only for a
    /// VM whose record is damaged: it can be deleted and nothing else.
    pub spec: Option<MachineSpec>,
}

/// What a driver is, for people and for scheduling.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Capabilities {
    pub kind: DriverKind,
    /// Hardware virtualization is in use.
    pub accelerated: bool,
    /// What holds a hostile guest, in words: shown wherever the driver is.
    pub isolation: &'static str,
    pub version: String,
}

/// A kind of machine. Every future may be dropped at any await: what was begun is either finished
/// by a task of the driver's own or undone by `delete`.
#[async_trait]
pub trait Driver: Send + Sync + 'static {
    fn capabilities(&self) -> Capabilities;

    /// Makes all host resources of a VM, and starts no process. Repeating it for the same id and
    /// specification is harmless. On failure everything made is undone.
    async fn create(&self, spec: MachineSpec) -> Result<GuestNetwork, DriverError>;

    /// Starts the VMM and returns when the guest's agent can be connected to (its ready hint has
    /// come), or within `limit`; on failure no process is left, and `create`d resources stay.
    /// Starting a running VM is an error; starting an exited one boots it again on its disk, and
    /// makes its network anew where `release` took it down.
    async fn start(&self, id: VmId, limit: Duration) -> Result<(), DriverError>;

    async fn pause(&self, id: VmId) -> Result<(), DriverError>;

    async fn resume(&self, id: VmId) -> Result<(), DriverError>;

    /// Ends the VMM at once and waits until it is gone; does nothing where none runs. A graceful
    /// stop is the caller's: it asks the agent, waits on `exited` with a limit, then calls this.
    async fn kill(&self, id: VmId) -> Result<(), DriverError>;

    /// Completes when the VM's VMM has ended (at once where none runs). An event, never a poll.
    async fn exited(&self, id: VmId) -> Result<ExitReason, DriverError>;

    /// Removes the VM, running or not, and everything it has on this host. Succeeds for an
    /// unknown id.
    async fn delete(&self, id: VmId) -> Result<(), DriverError>;

    /// The VM as it is now, from the operating system, not from memory. `None`: unknown.
    async fn inspect(&self, id: VmId) -> Result<Option<Machine>, DriverError>;

    /// Every VM that has anything on this host, including those found after a restart.
    async fn list(&self) -> Result<Vec<Machine>, DriverError>;

    /// Gives back what no running VM needs: links, namespaces, rules. Disks and records of stopped
    /// VMs stay, and `start` makes the rest anew. Called at the end of a clean shutdown; repeating
    /// it is harmless.
    async fn release(&self) -> Result<(), DriverError>;

    /// A byte stream to a port in the guest (vsock, or the private link). Bounded by `limit`.
    async fn connect(&self, id: VmId, port: u32, limit: Duration)
    -> Result<BoxStream, DriverError>;
}

/// The result of a driver's own task. It is never aborted, so that a failure to join is a panic in
/// it or the end of the runtime.
pub(crate) fn finished<T>(
    joined: Result<Result<T, DriverError>, tokio::task::JoinError>,
) -> Result<T, DriverError> {
    joined.unwrap_or_else(|error| {
        Err(DriverError::Io {
            action: "carry out an operation".to_owned(),
            source: std::io::Error::other(error),
        })
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::Path;

    use super::{BootSource, KernelFlavour, MachineSpec, NetworkPolicy, VmId};

    pub(crate) fn spec(images: &Path) -> MachineSpec {
        MachineSpec {
            vm_id: VmId::new(),
            vcpus: 1,
            memory_mb: 128,
            disk_mb: 256,
            boot: BootSource {
                kernel: images.join("kernel"),
                initrd: images.join("initrd"),
                rootfs: images.join("rootfs"),
                kernel_flavour: KernelFlavour::Debian,
            },
            network: NetworkPolicy::default(),
            token: "0123456789abcdef".repeat(4),
        }
    }
}
