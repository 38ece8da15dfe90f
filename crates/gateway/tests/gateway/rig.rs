//! A gateway on a free port, with everything it needs in a temporary folder.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use aether_api::{
    CreateVm, ExecuteRequest, Problem, VmView,
    client::{CallOptions, Client, Waited},
};
use aether_events::{EventBus, LocalBus};
use aether_gateway::{
    AuthSecret, Catalogue, DriverInfo, Gateway, GatewayConfig, GatewayParts, HostCheck, HostLimits,
    JwtVerifier, KeyRing, LocalLimiter, NewKey, Probe,
};
use aether_logs::{EmbeddedConfig, EmbeddedStore};
use aether_queue::{Queue, SqliteQueue};
use aether_store::{SqliteStore, Store, sqlite::Durability};
use aether_streams::{PoolStatus, Pools, Sessions};
use aether_types::{Access, DriverKind, ProjectId, Role};
use reqwest::{Method, RequestBuilder, Response};
use tempfile::TempDir;
use tokio::{net::TcpListener, task::JoinHandle, time::timeout};
use tokio_util::sync::CancellationToken;

use crate::{guest::ScriptedLink, tools::ScriptedTools, worker::ScriptedWorker};

/// Nothing in these tests takes long; what does not come by then does not come.
pub(crate) const SOON: Duration = Duration::from_secs(20);

pub(crate) struct Options {
    pub(crate) has_worker: bool,
    pub(crate) config: GatewayConfig,
    pub(crate) probes: Vec<(String, Arc<dyn Probe>)>,
    /// Put around the queue.
    pub(crate) queue: fn(Arc<dyn Queue>) -> Arc<dyn Queue>,
    pub(crate) pools: ScriptedPools,
    pub(crate) jwt: Option<JwtVerifier>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            has_worker: true,
            config: GatewayConfig::default(),
            probes: Vec::new(),
            queue: |queue| queue,
            pools: ScriptedPools::default(),
            jwt: None,
        }
    }
}

pub(crate) struct Rig {
    pub(crate) client: Client,
    pub(crate) base: String,
    pub(crate) key: String,
    pub(crate) keys: KeyRing,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) queue: Arc<dyn Queue>,
    pub(crate) bus: Arc<dyn EventBus>,
    pub(crate) sessions: Sessions,
    pub(crate) worker: Arc<ScriptedWorker>,
    pub(crate) logs: Arc<EmbeddedStore>,
    pub(crate) tools: Arc<ScriptedTools>,
    pub(crate) shutdown: CancellationToken,
    pub(crate) served: JoinHandle<std::io::Result<()>>,
    http: reqwest::Client,
    dir: TempDir,
}

impl Rig {
    pub(crate) async fn new() -> Self {
        Self::with(Options::default()).await
    }

    pub(crate) async fn with(options: Options) -> Self {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("store");
        let store = SqliteStore::open(&path, Durability::default()).await.unwrap();
        let store: Arc<dyn Store> = Arc::new(store);
        let queue: Arc<dyn Queue> =
            Arc::new(SqliteQueue::open(&dir.path().join("queue")).await.unwrap());
        let queue = (options.queue)(queue);
        let bus: Arc<dyn EventBus> = Arc::new(LocalBus::new());
        let sessions = Sessions::default();
        let keys = KeyRing::new(AuthSecret::generate().unwrap());
        let access = Access { project: ProjectId::DEFAULT, role: Role::Admin, scopes: Vec::new() };
        let first = NewKey { name: "test".into(), access, created_by: None, expires_in: None };
        let (key, _) = keys.create(&*store, first).await.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let tools = Arc::new(ScriptedTools::default());
        let path = dir.path().join("logs");
        let logs = EmbeddedStore::open(&path, EmbeddedConfig::default()).await.unwrap();
        let logs = Arc::new(logs);
        let gateway = Gateway::new(GatewayParts {
            store: Arc::clone(&store),
            queue: Arc::clone(&queue),
            bus: Arc::clone(&bus),
            logs: Arc::clone(&logs) as _,
            sessions: Arc::new(sessions.clone()),
            links: Arc::new(ScriptedLink::default()),
            pools: Arc::new(options.pools),
            catalogue: Arc::new(Offer),
            tools: Arc::clone(&tools) as _,
            keys: keys.clone(),
            jwt: options.jwt,
            probes: options.probes,
            metrics: Arc::new(|| "# counted\n".to_owned()),
            hosts: HostCheck::for_listener(address),
            tls: None,
            limiter: Arc::new(LocalLimiter::default()),
            config: options.config,
        });
        let shutdown = CancellationToken::new();
        let token = shutdown.clone();
        let served = tokio::spawn(async move { gateway.serve(listener, token).await });
        let worker = ScriptedWorker::new(&store, &queue, &bus, &sessions);
        if options.has_worker {
            worker.start();
        }
        let base = format!("http://{address}");
        let client = Client::new(&base, Some(&key)).unwrap();
        // An error: another test of this process has done so.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::new();
        Self {
            client,
            base,
            key,
            keys,
            store,
            queue,
            bus,
            sessions,
            worker,
            logs,
            tools,
            shutdown,
            served,
            http,
            dir,
        }
    }

    /// A request with the key, to a path below the prefix.
    pub(crate) fn call(&self, method: Method, path: &str) -> RequestBuilder {
        self.bare(method, path).bearer_auth(&self.key)
    }

    pub(crate) fn bare(&self, method: Method, path: &str) -> RequestBuilder {
        // Some tests have whole paths from the table.
        let prefix = if path.starts_with("/api/") || ["/metrics", "/openapi.json"].contains(&path) {
            ""
        } else {
            "/api/v1"
        };
        self.http.request(method, format!("{}{prefix}{path}", self.base))
    }

    /// Of the files of store and queue.
    pub(crate) fn folder(&self) -> &std::path::Path {
        self.dir.path()
    }

    /// A VM that runs.
    pub(crate) async fn vm(&self, name: &str) -> VmView {
        let request = CreateVm { name: Some(name.into()), ..CreateVm::default() };
        done(self.client.create_vm(&request, &waiting()).await.unwrap())
    }
}

pub(crate) fn waiting() -> CallOptions {
    CallOptions::waiting(SOON)
}

pub(crate) fn done<T: std::fmt::Debug>(waited: Waited<T>) -> T {
    match waited {
        Waited::Done(value) => value,
        Waited::Accepted(accepted) => panic!("not done: {accepted:?}"),
    }
}

pub(crate) fn command(command: &str, args: &[&str]) -> ExecuteRequest {
    ExecuteRequest {
        command: command.into(),
        args: args.iter().map(|&a| a.to_owned()).collect(),
        ..ExecuteRequest::default()
    }
}

/// The problem of an answer, checked for its outer form.
pub(crate) async fn problem(response: Response) -> Problem {
    let status = response.status().as_u16();
    let header = |name: &str| response.headers()[name].to_str().unwrap().to_owned();
    assert_eq!(header("content-type"), "application/problem+json");
    let id = header("x-request-id");
    let problem: Problem = response.json().await.unwrap();
    assert_eq!((problem.status, &problem.instance), (status, &id));
    problem
}

pub(crate) async fn soon<F: Future>(future: F) -> F::Output {
    timeout(SOON, future).await.expect("it did not come in time")
}

/// Holds what it is told.
#[derive(Clone, Default)]
pub(crate) struct ScriptedPools(pub(crate) Arc<Mutex<Vec<PoolStatus>>>);

impl Pools for ScriptedPools {
    fn pools(&self) -> Vec<PoolStatus> {
        self.0.lock().unwrap().clone()
    }
}

struct Offer;

impl Catalogue for Offer {
    fn images(&self) -> Vec<String> {
        vec!["debian".into()]
    }

    fn default_image(&self) -> String {
        "debian".into()
    }

    fn drivers(&self) -> Vec<DriverInfo> {
        let sim = DriverInfo {
            kind: DriverKind::Sim,
            isolation: "none: no machine".into(),
            unavailable: None,
            takes_snapshots: true,
        };
        let qemu = DriverInfo {
            kind: DriverKind::Qemu,
            isolation: "a machine".into(),
            unavailable: Some("there is no program".into()),
            takes_snapshots: false,
        };
        vec![sim, qemu]
    }

    fn default_driver(&self) -> DriverKind {
        DriverKind::Sim
    }

    fn host_limits(&self) -> HostLimits {
        HostLimits { vcpus_max: 4, memory_mb_max: 4096, disk_mb_max: 100_000 }
    }
}
