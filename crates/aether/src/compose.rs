//! The composition root: which implementation stands behind each seam, and in which order the
//! parts begin and end.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use aether_drivers::{
    BootSource, Capabilities, CgroupStatus, Driver, DriverError, Host, HostConfig,
    firecracker::{FirecrackerConfig, FirecrackerDriver},
    network::NetworkConfig,
    qemu::{QemuConfig, QemuDriver},
    sim::{SimConfig, SimDriver, SimHost},
};
use aether_events::{EventBus, LocalBus};
use aether_images::ImageStore;
use aether_queue::{Queue, SqliteQueue};
use aether_store::{Durability, SqliteStore, Store};
use aether_streams::Sessions;
use aether_types::DriverKind;
use aether_worker::{ImageSource, ShutdownMode, ShutdownReport, Worker, WorkerConfig, WorkerParts};
use tokio::{net::TcpListener, time::Instant};

use crate::{
    args::{Backend, DriverChoice},
    datadir::LockedDataDir,
    exit::Exit,
    failure::{Failure, chain},
    gateway::{self, AdminKey, Gateway, ImageNames, Inputs},
    images::{SimulatedImages, StoredImages},
};

/// What a platform is made from.
pub(crate) struct Plan {
    pub(crate) dir: LockedDataDir,
    /// Bound already: a taken port is found out before anything is made.
    pub(crate) listener: TcpListener,
    pub(crate) backend: Backend,
}

/// Everything, running.
pub(crate) struct Platform {
    dir: LockedDataDir,
    address: SocketAddr,
    gateway: Gateway,
    worker: Worker,
    /// None under the simulated driver.
    host: Option<Arc<Host>>,
    drivers: Vec<Capabilities>,
    key: AdminKey,
}

/// The drivers, and what they stand on.
struct Machines {
    drivers: Vec<Arc<dyn Driver>>,
    images: Arc<dyn ImageSource>,
    names: ImageNames,
    /// None under the simulated driver.
    host: Option<Arc<Host>>,
}

impl Platform {
    /// Opens the data directory's content and starts the parts, those first that others need.
    /// What fails leaves the rest as a crash would: the next start takes it over.
    pub(crate) async fn start(plan: Plan) -> Result<Self, Failure> {
        let Plan { dir, listener, backend } = plan;
        let address = listener.local_addr().map_err(|e| Failure::io("read the address", &e))?;
        let store = SqliteStore::open(&dir.store(), Durability::default())
            .await
            .map_err(|e| Failure::internal("open the store", &e))?;
        let store: Arc<dyn Store> = Arc::new(store);
        let queue = SqliteQueue::open(&dir.queue())
            .await
            .map_err(|e| Failure::internal("open the queue", &e))?;
        let queue: Arc<dyn Queue> = Arc::new(queue);
        let bus: Arc<dyn EventBus> = Arc::new(LocalBus::new());
        let sessions = Sessions::default();
        let (keys, key) = gateway::keys(&dir, &*store).await?;
        let machines = Machines::open(&dir, &backend).await?;

        let worker = Worker::start(WorkerParts {
            id: dir.worker_id()?,
            store: Arc::clone(&store),
            queue: Arc::clone(&queue),
            bus: Arc::clone(&bus),
            sessions: sessions.clone(),
            drivers: machines.drivers.clone(),
            images: Arc::clone(&machines.images),
            config: WorkerConfig::default(),
        })
        .await
        .map_err(|e| Failure::internal("start the worker", &e))?;
        let drivers = machines.capabilities();
        gateway::warn_of_weak(&drivers);
        let offer = gateway::Offer::new(machines.names, backend.image, &drivers, dir.path());
        let links = worker.links();
        let gateway =
            gateway::start(Inputs { listener, store, queue, bus, sessions, links, keys, offer })?;
        let host = machines.host;
        Ok(Self { dir, address, gateway, worker, host, drivers, key })
    }

    pub(crate) fn dir(&self) -> &LockedDataDir {
        &self.dir
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn key(&self) -> &AdminKey {
        &self.key
    }

    /// The one that VMs get stands first.
    pub(crate) fn drivers(&self) -> &[Capabilities] {
        &self.drivers
    }

    /// Whether limits on what VMs use of the host hold, in words.
    pub(crate) fn cgroup(&self) -> Option<CgroupStatus> {
        Some(self.host.as_ref()?.cgroup().clone())
    }

    /// The addresses of the VMs.
    pub(crate) fn network_range(&self) -> Option<String> {
        Some(self.host.as_ref()?.network().range()?.to_string())
    }

    /// Where VMs find this host, if they are allowed to.
    pub(crate) fn host_address(&self) -> Option<Ipv4Addr> {
        Some(self.host.as_ref()?.network().range()?.uplink_host())
    }

    pub(crate) fn network_instance(&self) -> Option<String> {
        self.host.as_ref()?.network().instance()
    }

    /// Completes if the gateway ends by itself, which it should not.
    pub(crate) async fn failed(&mut self) -> Failure {
        self.gateway.failed().await
    }

    /// Stops taking requests, stops claiming work, ends or hands over the VMs, flushes, closes: in
    /// this order, and within `limit`.
    pub(crate) async fn shutdown(self, mode: ShutdownMode, limit: Duration) -> ShutdownReport {
        let Self { dir, gateway, worker, host, .. } = self;
        let deadline = Instant::now() + limit;
        // Clients look for the server here; it is as good as gone.
        if let Err(failure) = dir.remove_listen() {
            tracing::warn!(error = %failure, "forget the server's address");
        }
        gateway.close();
        let left = deadline.saturating_duration_since(Instant::now());
        let report = worker.shutdown(mode, left).await;
        // Answers that waited for the worker's last words go out meanwhile.
        if tokio::time::timeout_at(deadline, gateway.ended()).await.is_err() {
            tracing::warn!("clients were still connected when the time was over");
        }
        drop(host);
        drop(dir);
        report
    }
}

impl Machines {
    async fn open(dir: &LockedDataDir, backend: &Backend) -> Result<Self, Failure> {
        if backend.driver == DriverChoice::Sim {
            let mut images = vec![backend.image.clone(), aether_images::DEFAULT_IMAGE.to_owned()];
            images.dedup();
            let driver = SimDriver::new(SimHost::new(SimConfig::default()));
            return Ok(Self {
                drivers: vec![Arc::new(driver)],
                images: Arc::new(SimulatedImages(images.clone())),
                names: ImageNames::Fixed(images),
                host: None,
            });
        }
        if !rustix::process::geteuid().is_root() {
            return Err(Failure::new(
                "not_root",
                Exit::Failure,
                "VMs need links, rules and users of their own, which only root can make",
            )
            .hint("run it as root or with sudo; `--driver sim` needs no rights and runs nothing"));
        }
        let root = backend.images.path();
        let store = Arc::new(ImageStore::open(&root)?);
        let names = ImageNames::stored(Arc::clone(&store), &root);
        let config = HostConfig {
            network: NetworkConfig { range: backend.network_range, ..NetworkConfig::default() },
            ..HostConfig::new(dir.path())
        };
        let host = Host::open(config, Arc::clone(&store)).await.map_err(|e| driver_failure(&e))?;
        let images: Arc<dyn ImageSource> = Arc::new(StoredImages(store));
        let drivers = open_drivers(&host, &images, backend).await?;
        Ok(Self { drivers, images, names, host: Some(host) })
    }

    fn capabilities(&self) -> Vec<Capabilities> {
        self.drivers.iter().map(|driver| driver.capabilities()).collect()
    }
}

/// The driver that VMs get stands first. The others are there for VMs that ask for them, or that
/// an earlier run made.
async fn open_drivers(
    host: &Arc<Host>,
    images: &Arc<dyn ImageSource>,
    backend: &Backend,
) -> Result<Vec<Arc<dyn Driver>>, Failure> {
    // Without an image no probe can run, and no VM either: the first request says so.
    let probe = images.resolve(&backend.image).ok();
    if probe.is_none() {
        tracing::warn!(image = backend.image, "the image is not there; `aether image build`");
    }
    let firecracker = Box::pin(open_firecracker(host, probe.clone(), backend));
    let qemu = Box::pin(open_qemu(host, probe));
    match backend.driver {
        // It has no host.
        DriverChoice::Sim => Ok(Vec::new()),
        DriverChoice::Qemu => Ok(vec![qemu.await.map_err(|e| driver_failure(&e))?]),
        // Asked for by name, it is never replaced by something weaker.
        DriverChoice::Firecracker => Ok(vec![firecracker.await.map_err(|e| driver_failure(&e))?]),
        DriverChoice::Auto => {
            let mut drivers = Vec::new();
            match firecracker.await {
                Ok(driver) => drivers.push(driver),
                Err(error) => tracing::info!(reason = chain(&error), "Firecracker is not used"),
            }
            match qemu.await {
                Ok(driver) => drivers.push(driver),
                Err(error) if drivers.is_empty() => return Err(driver_failure(&error)),
                Err(error) => tracing::info!(reason = chain(&error), "QEMU is not used"),
            }
            Ok(drivers)
        }
    }
}

async fn open_qemu(
    host: &Arc<Host>,
    probe: Option<BootSource>,
) -> Result<Arc<dyn Driver>, DriverError> {
    let config =
        QemuConfig { probe, search_path: std::env::var_os("PATH"), ..QemuConfig::default() };
    Ok(Arc::new(QemuDriver::open(Arc::clone(host), config).await?))
}

async fn open_firecracker(
    host: &Arc<Host>,
    probe: Option<BootSource>,
    backend: &Backend,
) -> Result<Arc<dyn Driver>, DriverError> {
    let config = FirecrackerConfig {
        firecracker: backend.firecracker.clone(),
        jailer: backend.jailer.clone(),
        probe,
        allow_vulnerable: backend.allow_vulnerable_firecracker,
        search_path: std::env::var_os("PATH"),
        ..FirecrackerConfig::default()
    };
    Ok(Arc::new(FirecrackerDriver::open(Arc::clone(host), config).await?))
}

fn driver_failure(error: &DriverError) -> Failure {
    let code = error.code();
    let text = chain(error);
    let failure = Failure::new(code.as_str(), Exit::Unavailable, text);
    match error {
        DriverError::RangeOverlaps { .. } => failure.hint("choose another with --network-range"),
        _ => failure.hint("`aether doctor` checks the host"),
    }
}

/// In words, for people who are about to trust it.
pub(crate) fn describe(capabilities: &Capabilities) -> String {
    format!("{} {}: {}", capabilities.kind, capabilities.version, capabilities.isolation)
}

/// Whether a hostile guest is held by nothing that was made to hold one.
pub(crate) fn is_weak(capabilities: &Capabilities) -> bool {
    match capabilities.kind {
        DriverKind::Firecracker | DriverKind::Qemu => !capabilities.accelerated,
        DriverKind::Sim => true,
    }
}
