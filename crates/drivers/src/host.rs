//! What the drivers of real VMMs share on one host: directories, users, the journal, the network,
//! and how a process is started.
//!
//! ```text
//! DATA/journal           every host resource, before it exists
//! DATA/vms/ID/           mode 0700, of the VM's user: disk, sockets, what its VMM keeps
//! DATA/layers/ID/        mode 0700, of the worker's user: what the VM shares with snapshots
//! DATA/toolsets/         mode 0700: layers put together, for VMMs that take one file
//! DATA/probe/            which accelerators were seen to boot a VM, by boot of the host
//! ```

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use aether_images::ImageStore;
use aether_types::{DriverKind, MachineId};
use rustix::process::{Gid, Uid};

use crate::{
    CgroupMode, CgroupStatus, DriverError, ExitReason, GuestNetwork, MachineSpec, cgroup,
    fault::FaultPoints,
    journal::{Journal, Owner, Resource},
    machines::{WasBefore, background},
    network::{Network, NetworkConfig},
    process::{self, Identity, Launch, Process, ProcessId},
    tools,
};

/// First of the users that VMMs run as, where none is configured: above what systems hand out to
/// people and services, below what they give to containers.
pub const UID_BASE_DEFAULT: u32 = 0x6ae0_0000;
/// VMs that a host can have at once; each has a user of its own.
pub const UID_COUNT: u32 = 65_536;

const VMS: &str = "vms";
const LAYERS: &str = "layers";
/// Layers of tools put together, by their list; see [`tools::compose`].
const TOOLSETS: &str = "toolsets";

/// A VM's writable layer, in its directory.
pub(crate) const DISK_FILE: &str = "disk.img";

/// How this host is used.
#[derive(Debug, Clone)]
pub struct HostConfig {
    pub data_dir: PathBuf,
    /// First of [`UID_COUNT`] users that VMMs run as, one for each VM. `None`: VMMs run as the
    /// worker's own user, as they must where it is not root.
    pub uid_base: Option<u32>,
    pub cgroup: CgroupMode,
    pub network: NetworkConfig,
    pub fault: FaultPoints,
}

impl HostConfig {
    #[must_use]
    pub fn new(data_dir: impl Into<PathBuf>) -> Self {
        Self {
            data_dir: data_dir.into(),
            uid_base: rustix::process::geteuid().is_root().then_some(UID_BASE_DEFAULT),
            cgroup: CgroupMode::default(),
            network: NetworkConfig::default(),
            fault: FaultPoints::none(),
        }
    }
}

/// A host, open: its journal is locked for this process. Drivers share it.
pub struct Host {
    pub(crate) data_dir: PathBuf,
    pub(crate) journal: Journal,
    pub(crate) fault: FaultPoints,
    network: Network,
    images: Arc<ImageStore>,
    uid_base: Option<u32>,
    cgroup: CgroupStatus,
    /// Users of VMs that are being made are chosen one at a time.
    choosing: Mutex<()>,
}

/// What a driver keeps of a VM in the journal.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Record {
    pub(crate) kind: DriverKind,
    pub(crate) spec: MachineSpec,
    pub(crate) uid: Option<u32>,
    /// `None` while the VM is being made.
    pub(crate) network: Option<GuestNetwork>,
    /// How its last VMM ended.
    pub(crate) last_exit: Option<ExitReason>,
    /// Started since its disk was made.
    #[serde(default)]
    pub(crate) started: bool,
    /// The memory that was kept without the disk when the machine ended, and that the disk is still
    /// as it was for.
    #[serde(default)]
    pub(crate) memory: Option<String>,
    /// A snapshot is under way, or was when its worker died: what the machine was before.
    #[serde(default)]
    pub(crate) snapshotting: Option<WasBefore>,
    /// It gets only what nobody else wants of the processors.
    #[serde(default)]
    pub(crate) background: bool,
}

impl std::fmt::Debug for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Host").field("data_dir", &self.data_dir).finish_non_exhaustive()
    }
}

impl Host {
    /// Opens the data directory, takes over what an earlier process left, and removes what nobody
    /// owns. VMs are nobody's until their drivers are open, and are left alone.
    pub async fn open(
        config: HostConfig,
        images: Arc<ImageStore>,
    ) -> Result<Arc<Self>, DriverError> {
        let data_dir = std::path::absolute(&config.data_dir)
            .map_err(|e| file_error("find", &config.data_dir, e))?;
        for folder in ["", VMS, LAYERS, TOOLSETS, "probe"] {
            make_folder(&data_dir.join(folder), 0o700)?;
        }
        let journal = Journal::open(data_dir.join("journal"))?;
        let network_config = NetworkConfig { fault: config.fault.clone(), ..config.network };
        let network = Network::open(network_config, journal.clone()).await?;
        let host = Self {
            cgroup: CgroupStatus::prepare(&config.cgroup),
            data_dir,
            journal,
            fault: config.fault,
            network,
            images,
            uid_base: config.uid_base,
            choosing: Mutex::default(),
        };
        host.reconcile().await?;
        Ok(Arc::new(host))
    }

    pub fn cgroup(&self) -> &CgroupStatus {
        &self.cgroup
    }

    pub fn network(&self) -> &Network {
        &self.network
    }

    /// Removes what no VM owns: processes that were never finished starting (probes), folders
    /// without a record, links and rules.
    async fn reconcile(&self) -> Result<(), DriverError> {
        let known = self.journal.machines();
        for resource in self.journal.resources(Owner::Host) {
            if matches!(resource, Resource::Process { .. }) {
                end_journaled(&self.journal, Owner::Host, &resource).await?;
            }
        }
        for folder in [VMS, LAYERS] {
            self.remove_unowned(folder, &known)?;
        }
        tools::remove_unused_sets(self)?;
        for removed in self.network.reconcile(&known).await? {
            tracing::warn!(%removed, "removed what no VM owns");
        }
        Ok(())
    }

    fn remove_unowned(&self, folder: &str, known: &[MachineId]) -> Result<(), DriverError> {
        let folder = self.data_dir.join(folder);
        let entries = fs::read_dir(&folder).map_err(|e| file_error("read", &folder, e))?;
        for entry in entries {
            let entry = entry.map_err(|e| file_error("read", &folder, e))?;
            let owner = entry.file_name().to_str().and_then(|name| name.parse::<MachineId>().ok());
            if owner.is_some_and(|id| !known.contains(&id)) {
                tracing::warn!(path = %entry.path().display(), "remove a folder that no VM owns");
                remove_tree(&entry.path())?;
            }
        }
        Ok(())
    }

    /// Removes every VM and the network, whatever driver they have. For a host that is given up.
    pub async fn remove_all(&self) -> Result<(), DriverError> {
        for id in self.journal.machines() {
            self.end_processes(Owner::Machine(id)).await?;
            self.network.detach(id).await?;
            self.remove_files(id).await?;
            self.journal.forget_owner(id)?;
        }
        self.network.remove_all().await
    }

    pub(crate) fn directory(&self, id: MachineId) -> PathBuf {
        self.data_dir.join(VMS).join(id.to_string())
    }

    /// What a VM shares with snapshots, where no VMM can reach it.
    pub(crate) fn layers(&self, id: MachineId) -> PathBuf {
        self.data_dir.join(LAYERS).join(id.to_string())
    }

    pub(crate) fn toolsets(&self) -> PathBuf {
        self.data_dir.join(TOOLSETS)
    }

    pub(crate) fn make_layers_folder(&self, id: MachineId) -> Result<PathBuf, DriverError> {
        let path = self.layers(id);
        self.journal.intend(id, &Resource::Directory { path: path.clone() })?;
        make_folder(&path, 0o700)?;
        Ok(path)
    }

    /// The record of a VM of this kind. Damaged records are `None`, as unknown VMs are.
    pub(crate) fn record(&self, id: MachineId) -> Option<Record> {
        serde_json::from_value(self.journal.machine(id)?).ok()
    }

    pub(crate) fn set_record(&self, record: &Record) -> Result<(), DriverError> {
        let id = record.spec.id;
        let value = serde_json::to_value(record)
            .map_err(|e| DriverError::Io { action: format!("record VM {id}"), source: e.into() })?;
        self.journal.set_machine(id, value)
    }

    /// The first record of a VM, with a user that no other VM has.
    pub(crate) fn begin(&self, kind: DriverKind, spec: MachineSpec) -> Result<Record, DriverError> {
        let _choosing = self.choosing.lock().unwrap_or_else(PoisonError::into_inner);
        let uid = match self.uid_base {
            None => None,
            Some(base) => {
                let records = self.journal.machines().into_iter().filter_map(|id| self.record(id));
                let taken: BTreeSet<u32> = records.filter_map(|record| record.uid).collect();
                let free = (base..base.saturating_add(UID_COUNT)).find(|uid| !taken.contains(uid));
                let range = || DriverError::NoAddress { range: format!("users from {base}") };
                Some(free.ok_or_else(range)?)
            }
        };
        let record = Record {
            kind,
            spec,
            uid,
            network: None,
            last_exit: None,
            started: false,
            memory: None,
            snapshotting: None,
            background: false,
        };
        self.set_record(&record)?;
        Ok(record)
    }

    /// Makes the VM's directory, for its user.
    pub(crate) fn make_directory(&self, record: &Record) -> Result<(), DriverError> {
        let id = record.spec.id;
        let path = self.directory(id);
        self.journal.intend(id, &Resource::Directory { path: path.clone() })?;
        make_folder(&path, 0o700)?;
        self.give(&path, record)
    }

    /// Makes the VM's writable layer, for its user.
    pub(crate) fn make_disk(&self, record: &Record) -> Result<(), DriverError> {
        let spec = &record.spec;
        let path = self.disk(spec.id);
        let failed = |e: aether_images::ImageError| DriverError::Io {
            action: format!("make the disk of VM {}", spec.id),
            source: io::Error::other(e),
        };
        // Of an earlier attempt: it may be half a disk.
        remove_file(&path)?;
        self.images.seed(spec.disk_mb).map_err(failed)?.write_layer(&path).map_err(failed)?;
        self.give(&path, record)
    }

    pub(crate) fn disk(&self, id: MachineId) -> PathBuf {
        self.directory(id).join(DISK_FILE)
    }

    /// Makes the VM's user the owner of a file.
    #[expect(clippy::unused_self, reason = "it is this host's file")]
    pub(crate) fn give(&self, path: &Path, record: &Record) -> Result<(), DriverError> {
        let Some(uid) = record.uid else { return Ok(()) };
        let (owner, group) = (Uid::from_raw(uid), Gid::from_raw(uid));
        rustix::fs::chown(path, Some(owner), Some(group))
            .map_err(|e| file_error("change the owner of", path, e.into()))
    }

    /// What any VM's VMM runs as; `None` where that is the worker's own user.
    pub(crate) fn sample_identity(&self) -> Option<Identity> {
        self.identity(self.uid_base)
    }

    /// The user that a VM's VMM runs as, with the group that may use KVM.
    #[expect(clippy::unused_self, reason = "it is this host's user")]
    pub(crate) fn identity(&self, uid: Option<u32>) -> Option<Identity> {
        use std::os::unix::fs::MetadataExt as _;
        let uid = uid?;
        let kvm = fs::metadata("/dev/kvm").ok().map(|m| m.gid()).filter(|gid| *gid != 0);
        Some(Identity { uid, gid: uid, groups: kvm.into_iter().collect() })
    }

    /// Starts a VM's VMM: in the journal and in its cgroup before it runs. If the call is dropped,
    /// the process is either in the journal by then or will never run.
    pub(crate) async fn spawn(
        self: &Arc<Self>,
        spec: &MachineSpec,
        launch: Launch,
        what: &'static str,
    ) -> Result<Process, DriverError> {
        let (host, spec) = (Arc::clone(self), spec.clone());
        let wanted = Arc::new(Mutex::new(true));
        let _unwanted = Unwanted(Arc::clone(&wanted));
        blocking(move || {
            let group = host.cgroup.group_of(&spec);
            if let Some(path) = &group {
                host.journal.intend(spec.id, &Resource::Cgroup { path: path.clone() })?;
            }
            process::spawn(launch, |id| {
                let wanted = wanted.lock().unwrap_or_else(PoisonError::into_inner);
                if !*wanted {
                    let detail = "nobody waits for it any more".to_owned();
                    return Err(DriverError::ExitedDuringStart { detail });
                }
                host.fault.hit("start process")?;
                host.journal.intend(spec.id, &process_resource(id, what))?;
                if let Some(group) = &group {
                    cgroup::admit(group, &spec, id.pid)?;
                }
                if host.record(spec.id).is_some_and(|record| record.background) {
                    background::set(id.pid, true).map_err(|source| DriverError::Io {
                        action: "lower a VMM's share of the processors".to_owned(),
                        source,
                    })?;
                }
                host.fault.hit("start process: journaled")
            })
        })
        .await
    }

    /// Starts a process that belongs to no VM and ends with this driver's opening.
    pub(crate) async fn spawn_probe(
        self: &Arc<Self>,
        launch: Launch,
        what: &'static str,
    ) -> Result<Process, DriverError> {
        let host = Arc::clone(self);
        blocking(move || {
            process::spawn(launch, |id| {
                host.journal.intend(Owner::Host, &process_resource(id, what))
            })
        })
        .await
    }

    /// The process of a VM that the journal names and that still runs.
    pub(crate) fn running(&self, id: MachineId) -> Result<Option<Process>, DriverError> {
        for resource in self.journal.resources(id) {
            if let Resource::Process { pid, start_ticks, .. } = resource
                && let Some(process) = Process::adopt(ProcessId { pid, start_ticks })?
            {
                return Ok(Some(process));
            }
        }
        Ok(None)
    }

    /// Ends every process of an owner that the journal names, and what belongs to the process.
    pub(crate) async fn end_processes(&self, owner: Owner) -> Result<(), DriverError> {
        // A container that is paused would not see a signal.
        for resource in self.journal.resources(owner) {
            if let Resource::Container { engine, name } = &resource {
                crate::docker::end_container(engine, name).await?;
            }
        }
        for resource in self.journal.resources(owner) {
            match &resource {
                Resource::Process { .. } => {
                    end_journaled(&self.journal, owner, &resource).await?;
                }
                Resource::Directory { .. }
                | Resource::File { .. }
                | Resource::Socket { .. }
                | Resource::Mount { .. }
                | Resource::Cgroup { .. }
                | Resource::Container { .. }
                | Resource::Tap { .. }
                | Resource::Address { .. }
                | Resource::Rules { .. }
                | Resource::Network { .. }
                | Resource::Namespace { .. }
                | Resource::Veth { .. }
                | Resource::Table { .. }
                | Resource::ForeignRules { .. } => {}
            }
        }
        for resource in self.journal.resources(owner) {
            if let Resource::Cgroup { path } = &resource {
                cgroup::remove(path)?;
                self.journal.forget(owner, &resource)?;
            }
        }
        Ok(())
    }

    /// Removes the VM's mounts and files, in the reverse order of their making.
    pub(crate) async fn remove_files(&self, id: MachineId) -> Result<(), DriverError> {
        for resource in self.journal.resources(id).into_iter().rev() {
            match &resource {
                Resource::Mount { path } => unmount(path)?,
                Resource::Directory { path } => {
                    let path = path.clone();
                    blocking(move || remove_tree(&path)).await?;
                }
                Resource::File { path } | Resource::Socket { path } => remove_file(path)?,
                Resource::Container { engine, name } => {
                    crate::docker::remove_container(engine, name).await?;
                }
                Resource::Process { .. }
                | Resource::Cgroup { .. }
                | Resource::Tap { .. }
                | Resource::Address { .. }
                | Resource::Rules { .. }
                | Resource::Network { .. }
                | Resource::Namespace { .. }
                | Resource::Veth { .. }
                | Resource::Table { .. }
                | Resource::ForeignRules { .. } => continue,
            }
            self.journal.forget(id, &resource)?;
        }
        Ok(())
    }
}

/// Says that nobody waits any more for a process that is being started.
struct Unwanted(Arc<Mutex<bool>>);

impl Drop for Unwanted {
    fn drop(&mut self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = false;
    }
}

fn process_resource(id: ProcessId, what: &str) -> Resource {
    Resource::Process { pid: id.pid, start_ticks: id.start_ticks, what: what.to_owned() }
}

async fn end_journaled(
    journal: &Journal,
    owner: Owner,
    resource: &Resource,
) -> Result<(), DriverError> {
    if let Resource::Process { pid, start_ticks, .. } = resource {
        let id = ProcessId { pid: *pid, start_ticks: *start_ticks };
        if let Some(process) = Process::adopt(id)? {
            process.kill_and_wait().await?;
        }
        journal.forget(owner, resource)?;
    }
    Ok(())
}

/// Runs what blocks on a thread for that.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, DriverError> + Send + 'static,
) -> Result<T, DriverError> {
    crate::finished(tokio::task::spawn_blocking(work).await)
}

pub(crate) fn file_error(action: &'static str, path: &Path, source: io::Error) -> DriverError {
    DriverError::File { action, path: path.to_owned(), source }
}

/// Makes a folder, or takes one that is there; its mode is exact.
pub(crate) fn make_folder(path: &Path, mode: u32) -> Result<(), DriverError> {
    use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
    fs::DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(path)
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(mode)))
        .map_err(|e| file_error("make the folder", path, e))
}

/// Removes a file; one that is gone is no error.
pub(crate) fn remove_file(path: &Path) -> Result<(), DriverError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(file_error("remove", path, e)),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Removes a folder and what is in it; symbolic links are not followed.
pub(crate) fn remove_tree(path: &Path) -> Result<(), DriverError> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(file_error("remove", path, e)),
        Ok(()) | Err(_) => Ok(()),
    }
}

pub(crate) fn unmount(path: &Path) -> Result<(), DriverError> {
    use rustix::{io::Errno, mount::UnmountFlags};
    match rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        // Not a mount point, or not there: it was never made, or is gone.
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        Err(e) => Err(file_error("unmount", path, e.into())),
    }
}
