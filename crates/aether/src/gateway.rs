//! The gateway's surroundings: what it is told of this installation, its secret and first key,
//! and how it begins and ends.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use aether_api::{ComponentHealth, HealthStatus};
use aether_drivers::Capabilities;
use aether_events::EventBus;
use aether_gateway::{
    AuthSecret, Catalogue, DriverInfo, GatewayConfig, GatewayParts, HostCheck, HostLimits,
    JwtVerifier, KeyRing, NewKey, Origins, Probe, RateLimiter, RateLimits,
};
use aether_logs::LogStore;
use aether_queue::Queue;
use aether_store::{Capacity, Store};
use aether_streams::{GuestLink, Pools, SessionLink};
use aether_types::{Access, DriverKind, ProjectId, Role, limits};
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use crate::{
    compose, datadir::LockedDataDir, exit::Exit, failure::Failure, logs::LogProbe, tools::ToolsHere,
};

const KEY_NAME: &str = "admin";

/// In a store that several processes share.
const SECRET_NAME: &str = "api_keys";

/// The first key of an installation.
pub(crate) struct AdminKey {
    text: String,
    is_new: bool,
}

impl AdminKey {
    pub(crate) fn text(&self) -> &str {
        &self.text
    }

    /// The key, if this start made it: it is shown once.
    pub(crate) fn made(&self) -> Option<&str> {
        self.is_new.then_some(self.text.as_str())
    }
}

/// The keys of the installation, with a first one. The file of the first key is the way back in:
/// where it is missing, as after a crash between the two writes, or of another installation, a new
/// key is made.
pub(crate) async fn keys(
    dir: &LockedDataDir,
    store: &dyn Store,
    is_shared: bool,
) -> Result<(KeyRing, AdminKey), Failure> {
    let failed = |e: &dyn std::error::Error| Failure::internal("make the first API key", e);
    let ring = KeyRing::new(secret(dir, store, is_shared).await?);
    if let Some(text) = dir.read_admin_key()? {
        let found = ring.find(store, &text).await;
        if found.map_err(|e| Failure::internal("look the first API key up", &e))?.is_some() {
            return Ok((ring, AdminKey { text, is_new: false }));
        }
    }
    let access = Access { project: ProjectId::DEFAULT, role: Role::Admin, scopes: Vec::new() };
    let first = NewKey { name: KEY_NAME.to_owned(), access, created_by: None, expires_in: None };
    let (text, _) = ring.create(store, first).await.map_err(|e| failed(&e))?;
    dir.write_admin_key(&text)?;
    Ok((ring, AdminKey { text, is_new: true }))
}

/// A file of the data directory; where others are on the same store, that one's, so that each
/// accepts the keys of all. A copy of such a store opens nothing either: keys are 32 random bytes,
/// which nobody finds from their hashes.
async fn secret(
    dir: &LockedDataDir,
    store: &dyn Store,
    is_shared: bool,
) -> Result<AuthSecret, Failure> {
    let new = || AuthSecret::generate().map_err(|e| Failure::internal("make a secret", &e));
    if is_shared {
        let proposed = new()?;
        let kept = store.shared_secret(SECRET_NAME, proposed.as_bytes()).await;
        let kept = kept.map_err(|e| Failure::internal("read the secret of API keys", &e))?;
        return kept.try_into().map(AuthSecret::from_bytes).map_err(|_| {
            Failure::new("store_damaged", Exit::Failure, "the secret of API keys is damaged")
        });
    }
    if let Some(bytes) = dir.read_secret()? {
        return Ok(AuthSecret::from_bytes(bytes));
    }
    let secret = new()?;
    dir.write_secret(secret.as_bytes())?;
    Ok(secret)
}

pub(crate) struct Inputs {
    pub(crate) listener: TcpListener,
    /// `None`: plain HTTP.
    pub(crate) tls: Option<Arc<rustls::ServerConfig>>,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) queue: Arc<dyn Queue>,
    pub(crate) bus: Arc<dyn EventBus>,
    /// With the name of the component in the answer of health.
    pub(crate) logs: (&'static str, Arc<dyn LogStore>),
    pub(crate) sessions: Arc<dyn SessionLink>,
    pub(crate) links: Arc<dyn GuestLink>,
    pub(crate) pools: Arc<dyn Pools>,
    pub(crate) keys: KeyRing,
    /// `None`: tokens open nothing.
    pub(crate) jwt: Option<JwtVerifier>,
    pub(crate) offer: Offer,
    /// What is counted, as text.
    pub(crate) metrics: Arc<dyn Fn() -> String + Send + Sync>,
    pub(crate) tools: ToolsHere,
    pub(crate) capacity: Capacity,
    pub(crate) limits: RateLimits,
    pub(crate) limiter: Arc<dyn RateLimiter>,
    pub(crate) origins: Origins,
}

/// The gateway, serving.
pub(crate) struct Gateway {
    closing: CancellationToken,
    served: JoinHandle<std::io::Result<()>>,
}

pub(crate) fn start(inputs: Inputs) -> Result<Gateway, Failure> {
    let Inputs {
        listener,
        tls,
        store,
        queue,
        bus,
        logs: (component, logs),
        sessions,
        links,
        pools,
        keys,
        jwt,
        offer,
        metrics,
        tools,
        capacity,
        limits,
        limiter,
        origins,
    } = inputs;
    let address = listener.local_addr().map_err(|e| Failure::io("read the address", &e))?;
    let gateway = aether_gateway::Gateway::new(GatewayParts {
        store,
        queue,
        bus,
        logs: Arc::clone(&logs),
        sessions,
        links,
        pools,
        catalogue: Arc::new(offer),
        tools: Arc::new(tools),
        keys,
        jwt,
        probes: vec![
            ("workers".to_owned(), Arc::new(WorkerHere) as Arc<dyn Probe>),
            (component.to_owned(), Arc::new(LogProbe(logs))),
        ],
        metrics,
        hosts: HostCheck::for_listener(address),
        tls,
        limiter,
        config: GatewayConfig { capacity, limits, origins, ..GatewayConfig::default() },
    });
    let closing = CancellationToken::new();
    let token = closing.clone();
    let served = tokio::spawn(async move { gateway.serve(listener, token).await });
    Ok(Gateway { closing, served })
}

impl Gateway {
    /// Completes when it has ended by itself.
    pub(crate) async fn failed(&mut self) -> Failure {
        let text = match (&mut self.served).await {
            Ok(Ok(())) => "it ended".to_owned(),
            Ok(Err(error)) => error.to_string(),
            Err(error) => error.to_string(),
        };
        Failure::new("gateway_ended", Exit::Failure, format!("the gateway does not serve: {text}"))
    }

    /// Takes no more requests, and lets those in hand end.
    pub(crate) fn close(&self) {
        self.closing.cancel();
    }

    pub(crate) async fn ended(self) {
        if self.served.is_finished() {
            return;
        }
        match self.served.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "end the gateway"),
            Err(error) => tracing::error!(%error, "end the gateway"),
        }
    }
}

/// The worker of this process: it lives as long as the gateway does.
struct WorkerHere;

#[async_trait::async_trait]
impl Probe for WorkerHere {
    async fn check(&self) -> ComponentHealth {
        ComponentHealth::new(HealthStatus::Ok, "1 in this process")
    }
}

/// What VMs can be made of here.
pub(crate) struct Offer {
    images: ImageNames,
    image_default: String,
    drivers: Vec<DriverInfo>,
    driver_default: DriverKind,
    limits: HostLimits,
}

/// Where the names of images come from.
pub(crate) enum ImageNames {
    Fixed(Vec<String>),
    /// The folder that changes with every image, and what it was when it was last read.
    Stored {
        store: Arc<aether_images::ImageStore>,
        folder: PathBuf,
        read: Mutex<Option<(SystemTime, Vec<String>)>>,
    },
}

impl ImageNames {
    pub(crate) fn stored(store: Arc<aether_images::ImageStore>, root: &std::path::Path) -> Self {
        Self::Stored { store, folder: root.join("images"), read: Mutex::default() }
    }

    fn get(&self) -> Vec<String> {
        let (store, folder, read) = match self {
            Self::Fixed(names) => return names.clone(),
            Self::Stored { store, folder, read } => (store, folder, read),
        };
        let changed = std::fs::metadata(folder).and_then(|found| found.modified()).ok();
        let mut read = read.lock().unwrap_or_else(PoisonError::into_inner);
        if let (Some((at, names)), Some(changed)) = (&*read, changed)
            && *at == changed
        {
            return names.clone();
        }
        let names: Vec<String> = match store.list() {
            Ok(images) => images.into_iter().map(|image| image.name).collect(),
            Err(error) => {
                tracing::error!(error = crate::failure::chain(&error), "list the images");
                Vec::new()
            }
        };
        if let Some(changed) = changed {
            *read = Some((changed, names.clone()));
        }
        names
    }
}

impl Offer {
    /// The first of `drivers` is the one that VMs get.
    pub(crate) fn new(
        images: ImageNames,
        image_default: String,
        drivers: &[Capabilities],
        data_dir: &std::path::Path,
    ) -> Self {
        let driver_default = drivers.first().map_or(DriverKind::Sim, |driver| driver.kind);
        let drivers = drivers
            .iter()
            .map(|driver| DriverInfo {
                kind: driver.kind,
                isolation: driver.isolation.to_owned(),
                unavailable: None,
                takes_snapshots: driver.snapshot_format.is_some(),
            })
            .collect();
        Self { images, image_default, drivers, driver_default, limits: host_limits(data_dir) }
    }
}

/// A VM may be given all of the host, and no more than it.
fn host_limits(data_dir: &std::path::Path) -> HostLimits {
    let vcpus = std::thread::available_parallelism().map_or(1, usize::from);
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let memory_kb = memory
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    let disk = rustix::fs::statvfs(data_dir).map(|stat| stat.f_blocks * stat.f_frsize).ok();
    let mb = |bytes: Option<u64>, most: u32| {
        bytes.map_or(most, |b| u32::try_from(b >> 20).unwrap_or(u32::MAX).min(most))
    };
    HostLimits {
        vcpus_max: u32::try_from(vcpus).unwrap_or(u32::MAX).min(limits::VCPUS_MAX),
        memory_mb_max: mb(memory_kb.map(|kb| kb << 10), limits::MEMORY_MB_MAX),
        disk_mb_max: mb(disk, limits::DISK_MB_MAX),
    }
}

impl Catalogue for Offer {
    fn images(&self) -> Vec<String> {
        self.images.get()
    }

    fn default_image(&self) -> String {
        self.image_default.clone()
    }

    fn drivers(&self) -> Vec<DriverInfo> {
        self.drivers.clone()
    }

    fn default_driver(&self) -> DriverKind {
        self.driver_default
    }

    fn host_limits(&self) -> HostLimits {
        self.limits
    }
}

/// Whether any of them holds a hostile guest; told at every start that it is not so.
pub(crate) fn warn_of_weak(drivers: &[Capabilities]) {
    for driver in drivers.iter().filter(|driver| compose::is_weak(driver)) {
        tracing::warn!(driver = %driver.kind, isolation = driver.isolation, "weak isolation");
    }
}
