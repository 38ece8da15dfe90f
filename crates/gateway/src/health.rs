//! Whether the platform works, for probes and people. Needs no key, so it says nothing that does.

use std::{collections::BTreeMap, future::Future, time::Duration};

use aether_api::{ComponentHealth, Health, HealthStatus};
use async_trait::async_trait;
use tokio::time::timeout;

use crate::{parts::App, problem::chain};

pub(crate) const PATH: &str = "/api/v1/health";

/// A component that does not answer in this time is unavailable.
const LIMIT: Duration = Duration::from_secs(1);

/// Asks one component. The detail is shown to anyone.
#[async_trait]
pub trait Probe: Send + Sync + 'static {
    async fn check(&self) -> ComponentHealth;
}

pub(crate) async fn check(app: &App) -> Health {
    let parts = &app.parts;
    let store = async { verdict("store", parts.store.ping().await.map_err(|e| chain(&e))) };
    let queue = async { verdict("queue", parts.queue.depth().await.map_err(|e| chain(&e))) };
    let others = futures::future::join_all(
        parts
            .probes
            .iter()
            .map(|(name, probe)| async { (name.clone(), bounded(probe.check()).await) }),
    );
    let (store, queue, others) = tokio::join!(bounded(store), bounded(queue), others);
    let mut components = BTreeMap::from([
        ("store".to_owned(), store),
        ("queue".to_owned(), queue),
        // It takes events as long as this process lives; a bus elsewhere comes with a probe.
        ("event_bus".to_owned(), ComponentHealth::ok()),
    ]);
    components.extend(others);
    let mut status = components.values().map(|c| c.status).max().unwrap_or(HealthStatus::Ok);
    if app.closing.is_cancelled() {
        status = HealthStatus::Unavailable;
    }
    Health { status, version: env!("CARGO_PKG_VERSION").to_owned(), components }
}

async fn bounded(check: impl Future<Output = ComponentHealth>) -> ComponentHealth {
    timeout(LIMIT, check).await.unwrap_or_else(|_| {
        ComponentHealth::new(HealthStatus::Unavailable, "no answer within a second")
    })
}

fn verdict<T>(component: &'static str, result: Result<T, String>) -> ComponentHealth {
    match result {
        Ok(_) => ComponentHealth::ok(),
        Err(error) => {
            tracing::error!(component, error, "a component failed its check");
            ComponentHealth::new(HealthStatus::Unavailable, "it fails; the log says more")
        }
    }
}
