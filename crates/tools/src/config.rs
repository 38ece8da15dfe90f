//! Where tools are kept and what they come from. Read once, at the edge of the program.

use std::path::PathBuf;
use std::time::Duration;

use aether_types::limits;

/// Age at which what `latest` and ranges were resolved to is looked at again, where there is a
/// network.
const REFRESH_AFTER: Duration = Duration::from_hours(24);
/// Largest layer that is taken: the Rust tool chain with a C compiler is 1 GiB.
const LAYER_BYTES_MAX: u64 = 4 << 30;

#[derive(Debug, Clone)]
pub struct ToolsConfig {
    /// Layers, artefacts, records. Data directories and workers of one host may share it.
    pub folder: PathBuf,
    /// The user's own recipes, which add to the catalogue or replace what it has.
    pub catalogue: Option<PathBuf>,
    /// An offline mirror: nothing is fetched from anywhere else.
    pub mirror: Option<PathBuf>,
    pub endpoints: Endpoints,
    /// Whose Debian packages are listed where no image is at hand.
    pub suite: String,
    /// What layers and artefacts may take together; see [`crate::Tools::prune`]. `None`: no bound.
    pub budget_bytes: Option<u64>,
    pub refresh_after: Duration,
    /// For all of a build: fetch, install, verify, pack, digest.
    pub build_time_limit: Duration,
    pub layer_bytes_max: u64,
}

impl ToolsConfig {
    #[must_use]
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self {
            folder: folder.into(),
            catalogue: None,
            mirror: None,
            endpoints: Endpoints::default(),
            suite: "bookworm".to_owned(),
            budget_bytes: None,
            refresh_after: REFRESH_AFTER,
            build_time_limit: Duration::from_secs(limits::TOOL_BUILD_TIMEOUT_S),
            layer_bytes_max: LAYER_BYTES_MAX,
        }
    }
}

/// Base addresses of the sources. Where one is not set, it is what the host's own client of that
/// source (npm, pip, apt) is configured with.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Endpoints {
    /// An npm registry.
    pub npm: Option<String>,
    /// A Python package index with the simple interface; the address usually ends with `/simple`.
    pub pypi: Option<String>,
    pub debian: Option<String>,
    pub debian_security: Option<String>,
}

/// The base image of a VM, as far as tools depend on it: installers run on it, and a Debian
/// package's dependencies are in the layer unless the image has them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseImage {
    /// `name@blake3:…`, for the builder.
    pub image: String,
    /// Of the root file system, so that a new kernel or agent does not make layers anew.
    pub digest: String,
    /// Such as `bookworm`.
    pub suite: String,
    /// Every package of the root file system, as `name=version`.
    pub packages: Vec<String>,
}
