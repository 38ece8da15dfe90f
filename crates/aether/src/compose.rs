//! The composition root: which implementation stands behind each seam, and in which order the
//! parts begin and end.

use std::{net::Ipv4Addr, path::PathBuf, sync::Arc, time::Duration};

use aether_api::client::Trust;
use aether_drivers::{
    BootSource, Capabilities, CgroupStatus, Driver, DriverError, Host, HostConfig,
    docker::{DockerConfig, DockerDriver},
    firecracker::{FirecrackerConfig, FirecrackerDriver},
    network::NetworkConfig,
    qemu::{QemuConfig, QemuDriver},
    sim::{SimConfig, SimDriver, SimHost},
};
use aether_events::EventBus;
use aether_gateway::JwtVerifier;
use aether_images::{ImageStore, SnapshotError, SnapshotStore};
use aether_postgres::Database;
use aether_store::Store;
use aether_streams::{GuestLink, SessionLink, Sessions};
use aether_types::{DriverKind, ToolRequest, template::DEFAULT_TAG};
use aether_worker::{
    FleetConfig, ImageSource, PoolConfig, Retention, ShutdownMode, ShutdownReport, Worker,
    WorkerConfig, WorkerParts,
};
use tokio::{net::TcpListener, time::Instant};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{
    args::{
        Backend, Capacity, DriverChoice, Edge, FleetOptions, PoolChoice, PoolSpec, Snapshots,
        ToolOptions,
    },
    authority::{self, Known},
    database::{Opened, Target},
    datadir::{Listen, LockedDataDir},
    default_template::{self, DefaultTemplate},
    exit::Exit,
    failure::{Failure, chain},
    gateway::{self, AdminKey, Gateway, ImageNames, Inputs},
    images::{SimulatedImages, StoredImages},
    links::{FleetLinks, StreamPlan},
    logs::{LogInputs, Logs},
    metrics::Metrics,
    tls::{Tls, TlsPlan},
    tools::ToolsHere,
};

/// What a platform is made from.
pub(crate) struct Plan {
    pub(crate) dir: LockedDataDir,
    /// Bound already: a taken port is found out before anything is made.
    pub(crate) listener: TcpListener,
    pub(crate) target: Target,
    pub(crate) backend: Backend,
    pub(crate) capacity: Capacity,
    pub(crate) snapshots: Snapshots,
    pub(crate) tools: ToolOptions,
    pub(crate) fleet: FleetConfig,
    /// `None`: no streams with other processes.
    pub(crate) streams: Option<StreamPlan>,
    pub(crate) logs: LogInputs,
    pub(crate) edge: Edge,
    pub(crate) tls: TlsPlan,
    /// Of tokens, where they are accepted.
    pub(crate) jwt: Option<JwtVerifier>,
    /// Of the platform's own authority, where it is not in the data directory.
    pub(crate) authority_dir: Option<PathBuf>,
}

/// Everything, running.
pub(crate) struct Platform {
    dir: LockedDataDir,
    listen: Listen,
    /// How a client here knows that it is this server.
    trust: Trust,
    /// Of what is kept up beside the parts.
    closing: DropGuard,
    gateway: Gateway,
    worker: Worker,
    links: Option<FleetLinks>,
    store: Arc<dyn Store>,
    bus: Arc<dyn EventBus>,
    logs: Logs,
    _metrics: Metrics,
    /// The image of the default template; `None`: there shall be none.
    template_image: Option<String>,
    /// Of every VM, and so of the default template.
    default_tools: Vec<ToolRequest>,
    /// None under the simulated driver.
    host: Option<Arc<Host>>,
    /// None on files, which close by themselves.
    database: Option<Database>,
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
        let Plan {
            dir,
            listener,
            target,
            backend,
            capacity,
            snapshots,
            tools,
            fleet,
            streams,
            logs,
            edge,
            tls,
            jwt,
            authority_dir,
        } = plan;
        let address = listener.local_addr().map_err(|e| Failure::io("read the address", &e))?;
        let Opened { store, queue, bus, limiter, database } = Opened::open(target, &dir).await?;
        let LogInputs { plan, sink, backlog } = logs;
        let logs = Logs::open(&dir.logs(), plan, backlog).await?;
        let metrics = Metrics::start(sink.clone())?;
        let sessions = Sessions::default();
        let (keys, key) = gateway::keys(&dir, &*store, database.is_some()).await?;
        let is_needed = streams.is_some() || matches!(tls, TlsPlan::Auto { .. });
        let known = if is_needed {
            let folder = authority_dir.unwrap_or_else(|| dir.authority());
            authority::open(&folder, &*store, database.is_some()).await?
        } else {
            Known::Elsewhere
        };
        let id = dir.worker_id()?;
        let streams = streams.map(|plan| plan.certify(&known, id)).transpose()?;
        let tls = match tls {
            TlsPlan::Plain => None,
            TlsPlan::Files(tls) => Some(*tls),
            TlsPlan::Auto { names } => Some(Tls::auto(&known, names, address)?),
        };
        let tools = ToolsHere::open(tools, dir.tools()).await?;
        let machines = Machines::open(&dir, &backend).await?;
        let kept = open_snapshots(dir.snapshots()).await?;
        let templates = match &snapshots.template_dir {
            Some(shared) => open_snapshots(shared.clone()).await?,
            None => open_snapshots(dir.templates()).await?,
        };

        let worker = Worker::start(WorkerParts {
            id,
            store: Arc::clone(&store),
            queue: Arc::clone(&queue),
            bus: Arc::clone(&bus),
            logs: sink,
            sessions: sessions.clone(),
            drivers: machines.drivers.clone(),
            images: Arc::clone(&machines.images),
            snapshots: kept,
            templates,
            tools: tools.tools.clone(),
            config: WorkerConfig { fleet, ..worker_config(&capacity, &snapshots, backend.driver) },
        })
        .await
        .map_err(|e| Failure::internal("start the worker", &e))?;
        let closing = CancellationToken::new();
        let guests = worker.links();
        let links = streams
            .map(|streams| streams.start(&sessions, &guests, &store, closing.clone()))
            .transpose()?;
        let (sessions, guests): (Arc<dyn SessionLink>, Arc<dyn GuestLink>) = match &links {
            Some(links) => (links.links(), links.links()),
            None => (Arc::new(sessions), guests),
        };
        let drivers = machines.capabilities();
        gateway::warn_of_weak(&drivers);
        let template_image = (!snapshots.no_default_template).then(|| backend.image.clone());
        let offer = gateway::Offer::new(machines.names, backend.image, &drivers, dir.path());
        let default_tools = tools.defaults().to_vec();
        let tls_config = tls.as_ref().map(Tls::server_config).transpose()?;
        let gateway = gateway::start(Inputs {
            listener,
            tls: tls_config,
            store: Arc::clone(&store),
            queue,
            bus: Arc::clone(&bus),
            logs: (logs.component, Arc::clone(&logs.store)),
            sessions,
            links: guests,
            pools: worker.pools(),
            keys,
            jwt,
            offer,
            metrics: Arc::clone(&metrics.read),
            tools,
            limits: edge.limits(),
            limiter,
            origins: edge.origins()?,
            capacity: aether_store::Capacity {
                vms_max: Some(capacity.max_vms),
                starting_max: Some(capacity.max_starting),
            },
        })?;
        let host = machines.host;
        let trust = tls.as_ref().map_or(Trust::System, Tls::trust);
        let has_tls = tls.is_some();
        if let Some(tls) = tls {
            let told = dir.server_certificate();
            tls.write(&told)?;
            tokio::spawn(tls.keep(told, closing.clone()));
        }
        Ok(Self {
            dir,
            listen: Listen { address, has_tls },
            trust,
            closing: closing.drop_guard(),
            gateway,
            worker,
            links,
            store,
            bus,
            logs,
            _metrics: metrics,
            template_image,
            default_tools,
            host,
            database,
            drivers,
            key,
        })
    }

    pub(crate) fn dir(&self) -> &LockedDataDir {
        &self.dir
    }

    pub(crate) fn listen(&self) -> Listen {
        self.listen
    }

    pub(crate) fn trust(&self) -> Trust {
        self.trust.clone()
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

    /// Makes the default template ready, says what came of that, and completes if the gateway ends
    /// by itself, which it should not.
    pub(crate) async fn run(&mut self, told: impl FnOnce(&DefaultTemplate)) -> Failure {
        let Self { gateway, worker, store, bus, template_image, default_tools, drivers, .. } = self;
        let template = async {
            if let Some((image, driver)) = template_image.as_ref().zip(drivers.first()) {
                let spec = default_template::spec(image, driver, std::mem::take(default_tools));
                told(&default_template::ensure(worker, store, bus, driver, spec).await);
            }
            std::future::pending::<Failure>().await
        };
        tokio::select! {
            failure = gateway.failed() => failure,
            failure = template => failure,
        }
    }

    /// Stops taking requests, stops claiming work, ends or hands over the VMs, flushes, closes: in
    /// this order, and within `limit`.
    pub(crate) async fn shutdown(self, mode: ShutdownMode, limit: Duration) -> ShutdownReport {
        let Self { dir, gateway, worker, links, host, logs, database, closing, .. } = self;
        // Nothing writes into the directory from here on but the parts themselves.
        drop(closing);
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
        if let Some(links) = links
            && tokio::time::timeout_at(deadline, links.close()).await.is_err()
        {
            tracing::warn!("streams of other processes were cut off");
        }
        // Last: the others have told how they ended.
        if tokio::time::timeout_at(deadline, logs.close()).await.is_err() {
            tracing::warn!("log lines were still being written when the time was over");
        }
        drop(host);
        if let Some(database) = database
            && tokio::time::timeout_at(deadline, database.close()).await.is_err()
        {
            tracing::warn!("the database was still in use when the time was over");
        }
        drop(dir);
        report
    }
}

/// What the worker says of itself.
pub(crate) fn fleet(
    options: FleetOptions,
    template_dir: Option<&std::path::Path>,
) -> Result<FleetConfig, Failure> {
    let here = || rustix::system::uname().nodename().to_string_lossy().into_owned();
    let fleet = FleetConfig {
        host: options.worker_host.unwrap_or_else(here),
        zone: options.worker_zone,
        labels: options.worker_labels.into_iter().collect(),
        vcpus_max: options.worker_vcpus,
        memory_mb_max: options.worker_memory,
        vms_max: options.worker_vms,
        template_folder: template_dir.map(|dir| dir.to_string_lossy().into_owned()),
        stream_address: None,
        heartbeat: options.worker_heartbeat,
        lease: options.worker_lease,
    };
    let wrong = |text: String| Failure::usage(format!("of the worker: {text}"));
    fleet.validate().map_err(wrong)?;
    Ok(fleet)
}

/// Makes the folder where it is not there, and removes what a crash left in it.
async fn open_snapshots(root: PathBuf) -> Result<Arc<SnapshotStore>, Failure> {
    let opened = tokio::task::spawn_blocking(move || SnapshotStore::open(root));
    let opened = opened.await.map_err(|e| Failure::internal("open the snapshots", &e))?;
    opened
        .map(Arc::new)
        .map_err(|error: SnapshotError| Failure::new(error.code(), Exit::Failure, chain(&error)))
}

fn worker_config(capacity: &Capacity, snapshots: &Snapshots, driver: DriverChoice) -> WorkerConfig {
    let config = WorkerConfig::default();
    // A simulated guest has nothing that it puts off.
    let is_real = driver != DriverChoice::Sim;
    WorkerConfig {
        retention: Retention {
            snapshots_per_vm_max: snapshots.snapshot_keep,
            snapshot_age_max: snapshots.snapshot_max_age,
            snapshot_bytes_max: snapshots.snapshot_disk_mb.map(|mb| mb.saturating_mul(1 << 20)),
        },
        templates_are_shared: snapshots.template_dir.is_some(),
        pools: pools(config.pools, &capacity.pool),
        template_rest: if is_real { config.template_rest } else { Duration::ZERO },
        ..config
    }
}

/// The default pool stays beside those that are asked for, unless one of them is its own, or it is
/// not wanted.
fn pools(defaults: Vec<PoolConfig>, asked: &[PoolChoice]) -> Vec<PoolConfig> {
    let full = |template: &str| match template.split_once(':') {
        Some(_) => template.to_owned(),
        None => format!("{template}:{DEFAULT_TAG}"),
    };
    let mut pools = if asked.contains(&PoolChoice::None) { Vec::new() } else { defaults };
    for choice in asked {
        let PoolChoice::Of(PoolSpec { template, min, max }) = choice else { continue };
        let template = full(template);
        pools.retain(|pool| full(&pool.template) != template);
        pools.push(PoolConfig { template, min: *min, max: *max });
    }
    pools
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
        // Weaker than a VM: only who asks for it by name gets it.
        DriverChoice::Docker => {
            let mut drivers =
                vec![open_docker(host, backend).await.map_err(|e| driver_failure(&e))?];
            match qemu.await {
                Ok(driver) => drivers.push(driver),
                Err(error) => {
                    tracing::info!(
                        reason = chain(&error),
                        "without QEMU, tools are not built here"
                    );
                }
            }
            Ok(drivers)
        }
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

async fn open_docker(host: &Arc<Host>, backend: &Backend) -> Result<Arc<dyn Driver>, DriverError> {
    let config = DockerConfig { socket: backend.docker_socket.clone() };
    Ok(Arc::new(DockerDriver::open(Arc::clone(host), config).await?))
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
        DriverKind::Docker | DriverKind::Sim => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pools_are_added_replaced_and_left_out() {
        let defaults = || vec![PoolConfig { template: "default:latest".into(), min: 1, max: 4 }];
        let of = |text: &str| {
            let asked: Vec<PoolChoice> = text.split(',').map(|t| t.parse().unwrap()).collect();
            let pools = pools(defaults(), &asked).into_iter();
            pools.map(|p| format!("{}={}..{}", p.template, p.min, p.max)).collect::<Vec<_>>()
        };
        assert_eq!(of("web=2"), ["default:latest=1..4", "web:latest=2..2"]);
        assert_eq!(of("default=0..9"), ["default:latest=0..9"]);
        assert_eq!(of("none,web:v1=1"), ["web:v1=1..1"]);
        assert!(of("none").is_empty());
        assert_eq!(of("web=1,web:latest=2"), ["default:latest=1..4", "web:latest=2..2"]);
    }
}
