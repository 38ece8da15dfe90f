//! The template that VMs get which ask for nothing else: built at the first start, in the
//! background, and found at every other.

use std::sync::Arc;

use aether_drivers::Capabilities;
use aether_events::{Event, EventBus, Received};
use aether_store::Store;
use aether_types::{
    Fault, Template, TemplateSpec, TemplateState, ToolRequest, limits, template::DEFAULT_TEMPLATE,
};
use aether_worker::Worker;
use serde::Serialize;
use tokio::time::Instant;

use crate::failure::chain;

/// What came of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct DefaultTemplate {
    pub(crate) name: &'static str,
    pub(crate) state: State,
    /// Since it was asked for.
    pub(crate) ms: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reason: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum State {
    Ready,
    /// VMs boot the image until it is built.
    Failed,
    /// The driver takes no snapshots.
    Unavailable,
}

/// The default image in the default size with the default tools, and nothing else in it.
pub(crate) fn spec(image: &str, driver: &Capabilities, tools: Vec<ToolRequest>) -> TemplateSpec {
    TemplateSpec {
        image: image.to_owned(),
        driver: driver.kind,
        vcpus: limits::VCPUS_DEFAULT,
        memory_mb: limits::MEMORY_MB_DEFAULT,
        disk_mb: limits::DISK_MB_DEFAULT,
        env: std::collections::BTreeMap::new(),
        files: Vec::new(),
        steps: Vec::new(),
        start: None,
        ready: None,
        network: aether_types::NetworkPolicy::default(),
        tools,
    }
}

/// Returns when the template is ready, or will not be. May be dropped: a build that was recorded
/// goes on.
pub(crate) async fn ensure(
    worker: &Worker,
    store: &Arc<dyn Store>,
    bus: &Arc<dyn EventBus>,
    driver: &Capabilities,
    spec: TemplateSpec,
) -> DefaultTemplate {
    let begun = Instant::now();
    let answer = |state, reason| {
        let ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        DefaultTemplate { name: DEFAULT_TEMPLATE, state, ms, reason }
    };
    if driver.snapshot_format.is_none() {
        let reason = format!("{} takes no snapshots here", driver.kind);
        tracing::info!(reason, "there is no default template; VMs boot");
        return answer(State::Unavailable, Some(reason));
    }
    match ready(worker, store, bus, spec).await {
        Ok(()) => {
            let ms = begun.elapsed().as_millis();
            tracing::info!(ms, "the default template is ready");
            answer(State::Ready, None)
        }
        Err(reason) => {
            tracing::warn!(reason, "there is no default template; VMs boot");
            answer(State::Failed, Some(reason))
        }
    }
}

async fn ready(
    worker: &Worker,
    store: &Arc<dyn Store>,
    bus: &Arc<dyn EventBus>,
    spec: TemplateSpec,
) -> Result<(), String> {
    // Before it is asked for, so that nothing is missed between.
    let mut events = bus.subscribe();
    let asked = worker.ensure_default_template(spec).await;
    let mut template: Template = asked.map_err(|error| chain(&error))?;
    loop {
        match template.state {
            TemplateState::Ready => return Ok(()),
            TemplateState::Building => {}
            TemplateState::Failed | TemplateState::Deleted => {
                let reason: Option<Fault> = template.reason;
                let state = template.state;
                return Err(reason.map_or_else(|| format!("it is {state}"), |r| r.to_string()));
            }
        }
        loop {
            match events.next().await {
                Received::Event(Event::Template { template_id, .. })
                    if template_id == template.id =>
                {
                    break;
                }
                Received::Missed => break,
                Received::Event(_) => {}
                Received::Closed => return Err("the platform ends".to_owned()),
            }
        }
        let found = store.template(template.id).await.map_err(|error| chain(&error))?;
        template = found.ok_or("it is gone")?;
    }
}
