//! One build, from the first byte fetched to the layer's digest.

use std::sync::Arc;
use std::time::Duration;

use aether_types::Timestamp;
use tokio::time::{Instant, timeout};

use super::flight::Events;
use super::output::Output;
use super::{BuildArtefact, BuildError, BuildJob, Builder, LAYOUT_FAILED, VERIFY_FAILED, script};
use crate::config::BaseImage;
use crate::error::ToolError;
use crate::fetch::{Fetched, Fetcher, Of, blocking};
use crate::recipe::Recipe;
use crate::sources::Resolved;
use crate::store::{LayerRecord, PinnedLayer, trim};
use crate::tools::ToolEvent;

/// Of the installer's output, in an error.
const LAST_LINES: usize = 12;
const LAST_LINES_BYTES: usize = 2048;

/// All that a build needs.
pub(crate) struct Build {
    pub(crate) key: String,
    pub(crate) recipe: Recipe,
    pub(crate) resolved: Resolved,
    pub(crate) base: BaseImage,
    pub(crate) builder: Arc<dyn Builder>,
    pub(crate) fetcher: Arc<Fetcher>,
    pub(crate) turns: Arc<tokio::sync::Semaphore>,
    pub(crate) time_limit: Duration,
    pub(crate) layer_bytes_max: u64,
}

impl Build {
    pub(crate) async fn run(self, events: Arc<Events>) -> Result<PinnedLayer, ToolError> {
        let (store, key) = (Arc::clone(&self.fetcher.store), self.key.clone());
        let (waiting, at) = (Arc::clone(&events), self.event("wait for another builder"));
        let found = blocking(move || {
            let lock = store.lock_build(&key, || waiting.push(at))?;
            Ok((lock, store.find_layer(&key)?))
        });
        let (_lock, found) = found.await?;
        if let Some(layer) = found {
            // Another process has built it while we waited.
            return Ok(layer);
        }
        let output = Output::new(&self.recipe.name, &self.resolved.version, Arc::clone(&events));
        let timed_out = || {
            output.end();
            self.failed(&BuildError::TimedOut { limit: self.time_limit }, &output, &events)
        };
        let began = Instant::now();
        let fetched = timeout(self.time_limit, self.fetch(&events));
        let fetched = fetched.await.unwrap_or_else(|_| Err(timed_out()))?;
        // Waiting for other builds is nothing that this tool does.
        let left = self.time_limit.saturating_sub(began.elapsed());
        let _turn = self.turn(&events).await;
        let made = timeout(left, self.make(&fetched, &events, &output, left));
        made.await.unwrap_or_else(|_| Err(timed_out()))
    }

    /// Waits until there may be one more builder. An error would say that there is no bound.
    async fn turn(&self, events: &Events) -> Option<tokio::sync::OwnedSemaphorePermit> {
        if let Ok(turn) = Arc::clone(&self.turns).try_acquire_owned() {
            return Some(turn);
        }
        self.stage(events, "wait for other builds");
        Arc::clone(&self.turns).acquire_owned().await.ok()
    }

    async fn fetch(&self, events: &Events) -> Result<Vec<Fetched>, ToolError> {
        let of = Of { tool: self.recipe.name.clone(), version: self.resolved.version.clone() };
        let mut fetched = Vec::new();
        for artefact in &self.resolved.artefacts {
            let began = || self.stage(events, &format!("fetch {}", artefact.name));
            fetched.push(self.fetcher.fetch(&of, artefact, began).await?);
        }
        Ok(fetched)
    }

    async fn make(
        &self,
        fetched: &[Fetched],
        events: &Events,
        output: &Output,
        time_limit: Duration,
    ) -> Result<PinnedLayer, ToolError> {
        let artefacts = self.resolved.artefacts.iter().zip(fetched);
        let artefacts = artefacts.map(|(artefact, fetched)| BuildArtefact {
            name: artefact.name.clone(),
            path: fetched.path.clone(),
            size_bytes: fetched.size_bytes,
        });
        let version = self.resolved.version(&self.recipe).ok_or_else(|| ToolError::Source {
            tool: self.recipe.name.clone(),
            reason: format!("the version {} is not readable", self.resolved.version_id),
        })?;
        let scratch = self.fetcher.store.scratch("layer");
        let job = BuildJob {
            tool: self.recipe.name.clone(),
            version: self.resolved.version.clone(),
            image: self.base.image.clone(),
            artefacts: artefacts.collect(),
            script: script(&self.recipe, &version),
            output: scratch.path().to_owned(),
            output_bytes_max: self.layer_bytes_max,
            room_bytes: self.recipe.room_mb << 20,
            time_limit,
        };
        self.stage(events, "start a builder");
        let built = self.builder.build(job, output.sink()).await;
        output.end();
        built.map_err(|error| self.failed(&error, output, events))?;
        self.take(scratch, output, events).await
    }

    async fn take(
        &self,
        scratch: crate::store::Scratch,
        output: &Output,
        events: &Events,
    ) -> Result<PinnedLayer, ToolError> {
        let record = self.record();
        let (store, key) = (Arc::clone(&self.fetcher.store), self.key.clone());
        let (size_bytes, max_bytes) = (output.size_bytes(), self.layer_bytes_max);
        let wrong = |reason: String| ToolError::Build {
            tool: self.recipe.name.clone(),
            version: self.resolved.version.clone(),
            reason,
            last_lines: events.last_lines(LAST_LINES, LAST_LINES_BYTES),
        };
        let put = blocking(move || {
            if let Err(reason) = trim(scratch.path(), size_bytes, max_bytes) {
                return Ok(Err(reason));
            }
            store.put_layer(&key, &scratch, record).map(Ok)
        });
        put.await?.map_err(wrong)
    }

    fn record(&self) -> impl FnOnce(crate::checksum::Checksum, u64) -> LayerRecord + use<> {
        let (name, recipe) = (self.recipe.name.clone(), self.recipe.digest());
        let (resolved, base) = (self.resolved.clone(), self.base.digest.clone());
        move |layer, size_bytes| LayerRecord {
            name,
            version: resolved.version,
            origin: resolved.origin,
            artefacts: resolved.artefacts.into_iter().map(|artefact| artefact.checksum).collect(),
            recipe,
            base,
            layer,
            size_bytes,
            verified_at: Timestamp::now(),
        }
    }

    fn failed(&self, error: &BuildError, output: &Output, events: &Events) -> ToolError {
        let (tool, version) = (self.recipe.name.clone(), self.resolved.version.clone());
        let reason = match error {
            BuildError::Unavailable { reason } => {
                return ToolError::BuilderUnavailable { tool, version, reason: reason.clone() };
            }
            BuildError::Script { status: VERIFY_FAILED } => {
                "it was installed, and does not do what it must".to_owned()
            }
            BuildError::Script { status: LAYOUT_FAILED } => {
                "what was installed cannot be a layer".to_owned()
            }
            BuildError::Script { .. }
            | BuildError::Signal { .. }
            | BuildError::TimedOut { .. }
            | BuildError::NoSpace { .. }
            | BuildError::TooLarge { .. } => match output.stage() {
                stage if stage.is_empty() => error.to_string(),
                stage => format!("{error} (at: {stage})"),
            },
        };
        let last_lines = events.last_lines(LAST_LINES, LAST_LINES_BYTES);
        ToolError::Build { tool, version, reason, last_lines }
    }

    fn event(&self, stage: &str) -> ToolEvent {
        ToolEvent::Stage {
            tool: self.recipe.name.clone(),
            version: self.resolved.version.clone(),
            stage: stage.to_owned(),
        }
    }

    fn stage(&self, events: &Events, stage: &str) {
        events.push(self.event(stage));
    }
}
