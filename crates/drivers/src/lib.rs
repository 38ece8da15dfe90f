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
pub mod docker;
pub mod error;
pub mod fault;
pub mod firecracker;
mod host;
pub mod journal;
mod links;
mod machines;
pub mod network;
mod process;
pub mod qemu;
pub mod sim;
mod stream;
mod tools;

use std::{
    fmt,
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use aether_protocol::host::BoxStream;
use aether_types::{DriverKind, MachineId, NetworkPolicy, VmId};
use async_trait::async_trait;

pub use cgroup::{CgroupMode, CgroupStatus};
pub use error::DriverError;
pub use host::{Host, HostConfig, UID_BASE_DEFAULT, UID_COUNT};
pub use tools::layer_places;

/// Everything a driver needs to make a VM. Also what it keeps, so that a VM can be started again
/// after a restart of the worker.
#[derive(Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct MachineSpec {
    pub id: MachineId,
    /// The VM that it is. `None`: a spare machine of a pool, until [`Driver::claim`].
    #[serde(default)]
    pub vm: Option<VmId>,
    pub vcpus: u32,
    pub memory_mb: u32,
    pub disk_mb: u32,
    pub boot: BootSource,
    pub network: NetworkPolicy,
    /// The secret that the guest's agent asks of whoever connects; 32 random bytes in hex. After a
    /// restore the agent asks the snapshot's until it is given this one.
    pub token: String,
    /// The snapshot that its disk begins as; `None`: an empty layer over the image. The driver
    /// keeps what it needs of it, so that the snapshot may be removed at any time.
    #[serde(default)]
    pub disk_from: Option<SnapshotFiles>,
    /// Tools, from the lowest layer to the highest; those of the snapshot that it is restored from
    /// come first. The driver keeps what it needs of them, so that the files may be removed.
    #[serde(default)]
    pub layers: Vec<LayerFile>,
    /// A builder's: one more disk of so many MB, empty; see [`Driver::take_output`].
    #[serde(default)]
    pub output_mb: Option<u32>,
}

/// The file of a tool layer: erofs, with a `usr` in it; checked by who made this.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct LayerFile {
    /// As people know it: `go@1.23.1`.
    pub name: String,
    pub path: PathBuf,
    /// BLAKE3 of the content, in hex: what it is, wherever it is.
    pub digest: String,
    /// The length of the file, a multiple of 4096.
    pub bytes: u64,
}

/// A sealed snapshot, its files checked by who made this (see `aether_images::SnapshotStore`).
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SnapshotFiles {
    pub directory: PathBuf,
    pub machine: SnapshotMachine,
}

impl SnapshotFiles {
    /// The tools that its guest has mounted, as files of the snapshot: what [`MachineSpec::layers`]
    /// of a machine that is restored from it begins with.
    #[must_use]
    pub fn layers(&self) -> Vec<LayerFile> {
        let at = |layer: &LayerFile| LayerFile {
            path: self.directory.join(layer.path.file_name().unwrap_or_default()),
            ..layer.clone()
        };
        self.machine.layers.iter().map(at).collect()
    }
}

/// What a snapshot was taken of: what a machine must have to be restored from it. Kept in the
/// snapshot's manifest.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SnapshotMachine {
    pub driver: DriverKind,
    /// As [`Capabilities::snapshot_format`] was: another one cannot be restored.
    pub format: String,
    pub vcpus: u32,
    pub memory_mb: u32,
    pub disk_mb: u32,
    pub boot: BootSource,
    /// The tools that its guest has mounted: [`SnapshotFiles::layers`] says where they are.
    #[serde(default)]
    pub layers: Vec<LayerFile>,
    /// MAC of the guest's network interface, by which the guest still knows it after a restore.
    pub mac: String,
    /// The driver's own: anything else that its command line must repeat.
    #[serde(default)]
    pub detail: serde_json::Value,
}

impl SnapshotMachine {
    /// Whether a machine of this kind, format and specification can be restored from it. That its
    /// disk is as it was then is for the driver to know.
    pub(crate) fn check(
        &self,
        kind: DriverKind,
        format: &str,
        spec: &MachineSpec,
    ) -> Result<(), DriverError> {
        self.check_disk(kind, spec)?;
        same("machine format", &self.format, &format)?;
        same("number of processors", &self.vcpus, &spec.vcpus)?;
        same("memory in MB", &self.memory_mb, &spec.memory_mb)?;
        for (what, theirs, ours) in [
            ("kernel", &self.boot.kernel, &spec.boot.kernel),
            ("initramfs", &self.boot.initrd, &spec.boot.initrd),
        ] {
            same(what, &theirs.display(), &ours.display())?;
        }
        if tools::begin_with(&spec.layers, &self.layers) {
            return Ok(());
        }
        let names = |layers: &[LayerFile]| {
            layers.iter().map(|layer| layer.name.as_str()).collect::<Vec<_>>().join(", ")
        };
        // Equal names may be of other builds.
        Err(DriverError::Incompatible {
            what: "list of tools",
            snapshot: names(&self.layers),
            machine: names(&spec.layers),
        })
    }

    /// Whether a machine of this kind and specification can have its disk.
    pub(crate) fn check_disk(
        &self,
        kind: DriverKind,
        spec: &MachineSpec,
    ) -> Result<(), DriverError> {
        same("driver", &self.driver.as_str(), &kind.as_str())?;
        same("disk in MB", &self.disk_mb, &spec.disk_mb)?;
        let (theirs, ours) = (&self.boot.rootfs, &spec.boot.rootfs);
        same("root file system", &theirs.display(), &ours.display())
    }
}

fn same(
    what: &'static str,
    snapshot: &impl ToString,
    machine: &impl ToString,
) -> Result<(), DriverError> {
    let (snapshot, machine) = (snapshot.to_string(), machine.to_string());
    if snapshot == machine {
        return Ok(());
    }
    Err(DriverError::Incompatible { what, snapshot, machine })
}

/// How a machine's guest comes to run.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(clippy::large_enum_variant, reason = "one at a time exists")]
pub enum Start {
    /// From its kernel, on its disk.
    Boot,
    /// From a memory, on its disk, which must be as it was when the snapshot was taken: just made
    /// from the same snapshot, or its own and not used since.
    Restore(SnapshotFiles),
}

/// What becomes of a machine that a snapshot was taken of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AfterSnapshot {
    /// It is what it was: running or paused.
    GoOn,
    /// It is killed.
    End,
}

/// Whether a snapshot holds the disk. One that does not is for this machine alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SnapshotDisk {
    Include,
    Leave,
}

/// A snapshot's files, not sealed yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotTaken {
    pub machine: SnapshotMachine,
    /// How long the guest stood still; zero for one that was paused.
    pub paused: Duration,
}

/// One step of a start and how long it took. Steps follow one another without a gap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Phase {
    pub name: &'static str,
    pub took: Duration,
}

// The token must not reach a log.
impl fmt::Debug for MachineSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MachineSpec")
            .field("id", &self.id)
            .field("vm", &self.vm)
            .finish_non_exhaustive()
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
    pub id: MachineId,
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
    /// What of a snapshot must be equal for this driver to restore it: VMM and version, processor
    /// and accelerator, and the layout of our machines. `None`: it takes and restores none.
    pub snapshot_format: Option<String>,
}

/// A kind of machine. Every future may be dropped at any await: what was begun is either finished
/// by a task of the driver's own or undone by `delete`.
#[async_trait]
pub trait Driver: Send + Sync + 'static {
    fn capabilities(&self) -> Capabilities;

    /// Makes all host resources of a VM, and starts no process. Repeating it for the same id and
    /// specification is harmless. On failure everything made is undone.
    async fn create(&self, spec: MachineSpec) -> Result<GuestNetwork, DriverError>;

    /// Starts the VMM and returns when the guest's agent can be connected to, or within `limit`;
    /// on failure no process is left, and `create`d resources stay. Starting a running VM is an
    /// error; starting an exited one boots it again on its disk, and makes its network anew where
    /// `release` took it down. A restored guest runs, has the name, addresses and token of the one
    /// that the snapshot was taken of, and no network until it is configured.
    async fn start(
        &self,
        id: MachineId,
        how: Start,
        limit: Duration,
    ) -> Result<Vec<Phase>, DriverError>;

    /// Writes memory, device state and (as told) the disk of a running or paused machine into an
    /// empty directory, which the caller then seals. On failure the machine is what it was.
    async fn snapshot(
        &self,
        id: MachineId,
        into: &Path,
        disk: SnapshotDisk,
        after: AfterSnapshot,
    ) -> Result<SnapshotTaken, DriverError>;

    /// Makes a spare machine this VM's, with its network policy, durably. A repetition for the same
    /// VM is harmless; a machine of another VM is refused.
    async fn claim(
        &self,
        id: MachineId,
        vm: VmId,
        network: &NetworkPolicy,
    ) -> Result<(), DriverError>;

    /// Puts further tools over those that a machine has, durably, whether it runs, is paused or was
    /// never started; the guest is told by whoever calls. `layers` are all that it shall have, and
    /// begin with those that it has. A repetition is harmless.
    async fn add_layers(&self, id: MachineId, layers: &[LayerFile]) -> Result<(), DriverError> {
        let _ = (id, layers);
        Err(DriverError::Unavailable("this driver cannot add tools to a machine".to_owned()))
    }

    /// Copies the first bytes of a builder's output disk into a new file. The VMM must have ended.
    async fn take_output(&self, id: MachineId, into: &Path, bytes: u64) -> Result<(), DriverError> {
        let _ = (id, into, bytes);
        Err(DriverError::Unavailable("this driver has no output disks".to_owned()))
    }

    /// The VMM's share of the processors: low while a machine is made for a pool.
    async fn set_background(&self, id: MachineId, background: bool) -> Result<(), DriverError>;

    async fn pause(&self, id: MachineId) -> Result<(), DriverError>;

    async fn resume(&self, id: MachineId) -> Result<(), DriverError>;

    /// Ends the VMM at once and waits until it is gone; does nothing where none runs. A graceful
    /// stop is the caller's: it asks the agent, waits on `exited` with a limit, then calls this.
    async fn kill(&self, id: MachineId) -> Result<(), DriverError>;

    /// Completes when the VM's VMM has ended (at once where none runs). An event, never a poll.
    async fn exited(&self, id: MachineId) -> Result<ExitReason, DriverError>;

    /// What the console of a machine that has ended showed last, or its VMM said where there is
    /// none; some hundred lines of what a guest wrote, so anything at all. Empty where nothing is known.
    async fn last_words(&self, id: MachineId) -> String {
        let _ = id;
        String::new()
    }

    /// Removes the VM, running or not, and everything it has on this host. Succeeds for an
    /// unknown id.
    async fn delete(&self, id: MachineId) -> Result<(), DriverError>;

    /// The VM as it is now, from the operating system, not from memory. `None`: unknown.
    async fn inspect(&self, id: MachineId) -> Result<Option<Machine>, DriverError>;

    /// Every VM that has anything on this host, including those found after a restart.
    async fn list(&self) -> Result<Vec<Machine>, DriverError>;

    /// Gives back what no running VM needs: links, namespaces, rules. Disks and records of stopped
    /// VMs stay, and `start` makes the rest anew. Called at the end of a clean shutdown; repeating
    /// it is harmless.
    async fn release(&self) -> Result<(), DriverError>;

    /// A byte stream to a port in the guest (vsock, or the private link). Bounded by `limit`.
    async fn connect(
        &self,
        id: MachineId,
        port: u32,
        limit: Duration,
    ) -> Result<BoxStream, DriverError>;
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

    use super::{BootSource, KernelFlavour, MachineId, MachineSpec, NetworkPolicy};

    pub(crate) fn spec(images: &Path) -> MachineSpec {
        MachineSpec {
            id: MachineId::new(),
            vm: None,
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
            disk_from: None,
            layers: Vec::new(),
            output_mb: None,
            token: "0123456789abcdef".repeat(4),
        }
    }
}
