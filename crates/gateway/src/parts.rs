//! What the gateway is made of, and the state that its routes share.

use std::{
    collections::HashSet,
    fmt,
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use aether_api::PREFIX;
use aether_events::{Event, EventBus};
use aether_logs::LogStore;
use aether_queue::Queue;
use aether_store::{Capacity, Store};
use aether_streams::{GuestLink, Pools, SessionLink};
use aether_types::Scope;
use axum::{Router, http::Method};
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    Catalogue, HostCheck, JwtVerifier, KeyRing, Origins, Probe, RateLimiter, RateLimits,
    ToolCatalogue,
    admission::Offer,
    audit::Strangers,
    auth::Rule,
    dispatch::{DispatchLoop, Dispatcher},
    history::History,
    problem::ApiError,
    routes,
    templates::Templates,
};

/// Given by the composition root.
pub struct GatewayParts {
    pub store: Arc<dyn Store>,
    pub queue: Arc<dyn Queue>,
    pub bus: Arc<dyn EventBus>,
    pub logs: Arc<dyn LogStore>,
    pub sessions: Arc<dyn SessionLink>,
    pub links: Arc<dyn GuestLink>,
    pub pools: Arc<dyn Pools>,
    pub catalogue: Arc<dyn Catalogue>,
    pub tools: Arc<dyn ToolCatalogue>,
    pub keys: KeyRing,
    /// `None`: tokens open nothing.
    pub jwt: Option<JwtVerifier>,
    /// Of components that the gateway does not know itself, by name: `workers` and others.
    pub probes: Vec<(String, Arc<dyn Probe>)>,
    /// Everything that the program has counted, as Prometheus' text.
    pub metrics: Arc<dyn Fn() -> String + Send + Sync>,
    pub hosts: HostCheck,
    /// `None`: plain HTTP.
    pub tls: Option<Arc<rustls::ServerConfig>>,
    pub limiter: Arc<dyn RateLimiter>,
    pub config: GatewayConfig,
}

impl fmt::Debug for GatewayParts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GatewayParts").field("config", &self.config).finish_non_exhaustive()
    }
}

/// The gateway's own bounds.
#[derive(Debug, Clone)]
pub struct GatewayConfig {
    /// Requests in hand at once; more are answered with 503 at once.
    pub requests_max: usize,
    /// Followed executions, terminals and file transfers at once; more are answered with 503.
    pub streams_max: usize,
    /// Connections at once; more wait to be accepted.
    pub connections_max: usize,
    /// From the request to end to the moment when what still runs is cut off.
    pub shutdown_limit: Duration,
    /// A client that says nothing for this long in the middle of a body, or on a terminal, is gone.
    pub idle_limit: Duration,
    /// VMs that there may be; one more is answered with 503 at once.
    pub capacity: Capacity,
    pub limits: RateLimits,
    /// Whose pages may read answers.
    pub origins: Origins,
}

impl Default for GatewayConfig {
    fn default() -> Self {
        Self {
            requests_max: 2048,
            streams_max: 2048,
            connections_max: 8192,
            shutdown_limit: Duration::from_secs(3),
            idle_limit: Duration::from_mins(1),
            capacity: Capacity::default(),
            limits: RateLimits::default(),
            origins: Origins::default(),
        }
    }
}

/// The gateway, ready to serve.
pub struct Gateway {
    pub(crate) app: App,
    pub(crate) dispatch: Mutex<Option<DispatchLoop>>,
}

impl fmt::Debug for Gateway {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gateway").finish_non_exhaustive()
    }
}

impl Gateway {
    #[must_use]
    pub fn new(parts: GatewayParts) -> Self {
        let (dispatcher, dispatch) =
            Dispatcher::new(Arc::clone(&parts.store), Arc::clone(&parts.queue));
        let app = App(Arc::new(Shared {
            requests: Arc::new(Semaphore::new(parts.config.requests_max)),
            streams: Arc::new(Semaphore::new(parts.config.streams_max)),
            templates: Templates::new(&*parts.bus),
            fleet_changed: watch::Sender::new(()),
            history: History::default(),
            pools_shown: std::sync::Mutex::default(),
            strangers: Strangers::default(),
            audited: AtomicU64::new(0),
            parts,
            dispatcher,
            closing: CancellationToken::new(),
            tasks: TaskTracker::new(),
        }));
        Self { app, dispatch: Mutex::new(Some(dispatch)) }
    }

    /// Every method and path that is served, for documents and tests.
    pub fn routes() -> Vec<(Method, String)> {
        let root = routes::root_table().into_iter().map(|r| (r.method, r.path.to_owned()));
        let below = routes::table().into_iter().map(|r| (r.method, format!("{PREFIX}{}", r.path)));
        root.chain(below).collect()
    }

    /// The OpenAPI document of all that is served, as it is checked in.
    pub fn openapi() -> String {
        crate::openapi::written()
    }

    /// What each route needs of the caller's key; `None`: it needs no key.
    pub fn rules() -> Vec<(Method, String, Option<Scope>)> {
        let rule = |route: routes::Route| {
            let scope = match route.rule {
                Rule::Open => None,
                Rule::Needs(scope) => Some(scope),
            };
            (route.method, route.path.to_owned(), scope)
        };
        let below = routes::table().into_iter().map(rule);
        let below = below.map(|(method, path, scope)| (method, format!("{PREFIX}{path}"), scope));
        routes::root_table().into_iter().map(rule).chain(below).collect()
    }

    /// The routes alone, for a server of the caller's own. Without [`Gateway::serve`] nobody
    /// repeats a dispatch that failed.
    pub fn router(&self) -> Router {
        routes::router(self.app.clone())
    }
}

/// Shared by every route. Cheap to clone.
#[derive(Clone)]
pub(crate) struct App(Arc<Shared>);

pub(crate) struct Shared {
    pub(crate) parts: GatewayParts,
    pub(crate) dispatcher: Dispatcher,
    pub(crate) templates: Templates,
    /// A worker has come, gone or was declared lost: what it did last may have been told to nobody.
    pub(crate) fleet_changed: watch::Sender<()>,
    pub(crate) history: History,
    /// That stand among the metrics.
    pub(crate) pools_shown: std::sync::Mutex<HashSet<String>>,
    pub(crate) strangers: Strangers,
    /// Entries of the audit log that this process wrote: now and then one prunes it.
    pub(crate) audited: AtomicU64,
    /// The gateway ends: whoever waits or follows stops.
    pub(crate) closing: CancellationToken,
    /// Work that goes on when its client has gone: recordings, terminals.
    pub(crate) tasks: TaskTracker,
    pub(crate) requests: Arc<Semaphore>,
    streams: Arc<Semaphore>,
}

impl std::ops::Deref for App {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.0
    }
}

impl Shared {
    pub(crate) fn store(&self) -> &dyn Store {
        &*self.parts.store
    }

    pub(crate) fn offer(&self) -> Offer<'_> {
        Offer { catalogue: &*self.parts.catalogue, tools: &*self.parts.tools }
    }

    /// A place for something that goes on after its handler has answered.
    pub(crate) fn stream_place(&self) -> Result<OwnedSemaphorePermit, ApiError> {
        Arc::clone(&self.streams).try_acquire_owned().map_err(|_| ApiError::full())
    }

    pub(crate) async fn publish(&self, event: Event) {
        // Events are history: whoever needs the truth reads the store.
        if let Err(error) = self.parts.bus.publish(event).await {
            tracing::warn!(%error, "an event is lost");
        }
    }
}
