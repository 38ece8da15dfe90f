//! The log store of this platform: which one, and the way of the platform's own lines into it.

use std::{path::Path, sync::Arc};

use aether_api::{ComponentHealth, HealthStatus};
use aether_gateway::Probe;
use aether_logs::{EmbeddedStore, LogBacklog, LogError, LogPipe, LogSink, LogStore, LokiStore};

use crate::{
    args::LogPlan,
    exit::Exit,
    failure::{Failure, chain},
};

/// What lines go in by, and what a store is opened from.
pub(crate) struct LogInputs {
    pub(crate) plan: LogPlan,
    pub(crate) sink: LogSink,
    pub(crate) backlog: LogBacklog,
}

pub(crate) struct Logs {
    pub(crate) store: Arc<dyn LogStore>,
    /// The name in the answer of health.
    pub(crate) component: &'static str,
    pipe: LogPipe,
}

impl Logs {
    pub(crate) async fn open(
        path: &Path,
        plan: LogPlan,
        backlog: LogBacklog,
    ) -> Result<Self, Failure> {
        let failed = |error: LogError| match error {
            LogError::LokiAddress { .. } => {
                Failure::usage(error.to_string()).hint("see --loki-url and LOKI_URL")
            }
            error => Failure::new("internal", Exit::Failure, chain(&error)),
        };
        let (component, store): (_, Arc<dyn LogStore>) = match plan {
            LogPlan::Embedded(config) => {
                ("logs", Arc::new(EmbeddedStore::open(path, config).await.map_err(failed)?))
            }
            LogPlan::Loki(config) => {
                ("loki", Arc::new(LokiStore::open(path, config).await.map_err(failed)?))
            }
        };
        let pipe = backlog.connect(Arc::clone(&store));
        Ok(Self { store, component, pipe })
    }

    /// After everybody who has something to say.
    pub(crate) async fn close(self) {
        self.pipe.close().await;
        self.store.close().await;
    }
}

/// Lines wait on the disk while a Loki is away, so the platform goes on.
pub(crate) struct LogProbe(pub(crate) Arc<dyn LogStore>);

#[async_trait::async_trait]
impl Probe for LogProbe {
    async fn check(&self) -> ComponentHealth {
        match self.0.check().await {
            Ok(()) => ComponentHealth::ok(),
            // The reason is in the log: this answer needs no key.
            Err(_) => ComponentHealth::new(
                HealthStatus::Degraded,
                "log lines do not arrive; they wait on this host's disk",
            ),
        }
    }
}
