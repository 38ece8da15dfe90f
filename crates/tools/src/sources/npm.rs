//! Packages of an npm registry.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::{Artefact, Offer, needed};
use crate::checksum::Checksum;
use crate::http::{Http, HttpError};
use crate::recipe::Extra;
use crate::version::{Version, Wanted};

/// The short form of a listing, which has all that is needed here.
const ACCEPT: &str = "application/vnd.npm.install-v1+json, application/json;q=0.8";

pub(super) struct Npm<'a> {
    pub(super) http: &'a Http,
    pub(super) registry: &'a str,
}

#[derive(Deserialize)]
struct Listing {
    #[serde(default, rename = "dist-tags")]
    tags: BTreeMap<String, String>,
    #[serde(default)]
    versions: BTreeMap<String, Package>,
}

#[derive(Deserialize)]
struct Package {
    #[serde(default)]
    dist: Dist,
    /// Very old packages have lists here, which say nothing.
    #[serde(default)]
    engines: serde_json::Value,
    /// Some text, where the package should not be used any more.
    #[serde(default)]
    deprecated: serde_json::Value,
}

#[derive(Deserialize, Default)]
struct Dist {
    #[serde(default)]
    integrity: Option<String>,
    #[serde(default)]
    tarball: String,
}

/// Where a registry has a package.
pub(super) fn tarball(registry: &str, name: &str, version: &str) -> String {
    let registry = registry.trim_end_matches('/');
    let plain = name.rsplit('/').next().unwrap_or(name);
    format!("{registry}/{name}/-/{plain}-{version}.tgz")
}

impl Npm<'_> {
    /// The versions of a package, or of the one whose versions count.
    pub(super) async fn offer(
        &self,
        package: &str,
        versions_of: Option<&str>,
    ) -> Result<Offer, String> {
        let listing = self.listing(versions_of.unwrap_or(package)).await?;
        let mut ids: Vec<&String> = listing.versions.keys().collect();
        let mut latest = listing.tags.get("latest").cloned();
        if versions_of.is_some() {
            // A platform's package may come later than the others, or not at all.
            let platform = self.listing(package).await?;
            ids.retain(|id| platform.versions.contains_key(*id));
            if latest.as_ref().is_none_or(|latest| !platform.versions.contains_key(latest)) {
                latest = platform.tags.get("latest").cloned();
            }
        }
        let versions = ids.into_iter().filter_map(|id| Version::parse(id)).collect();
        Ok(Offer { versions, latest })
    }

    pub(super) async fn artefact(&self, package: &str, version: &str) -> Result<Artefact, String> {
        let listing = self.listing(package).await?;
        let found = listing.versions.get(version);
        let found = found.ok_or_else(|| format!("npm:{package} has no version {version}"))?;
        self.artefact_of(package, version, found)
    }

    /// The newest version of a package that is of these.
    pub(super) async fn newest(&self, package: &str, asked: &str) -> Result<Artefact, String> {
        let offer = self.offer(package, None).await?;
        let found = Wanted::parse(asked)?.pick(&offer.versions, None).cloned();
        let version = found.ok_or_else(|| format!("npm:{package} has no version {asked}"))?;
        self.artefact(package, &version.id).await
    }

    /// A package that is fetched besides: the newest that fits the tool's version.
    pub(super) async fn extra(&self, extra: &Extra, tool: &Version) -> Result<Artefact, String> {
        let package = &extra.npm;
        let asked = crate::recipe::fill(&extra.version, tool);
        let wanted = Wanted::parse(&asked)?;
        let listing = self.listing(package).await?;
        let fits = |package: &Package| match &extra.engine {
            Some(engine) => {
                package.engines.get(engine).and_then(|range| range.as_str()).is_some_and(|range| {
                    let tool = std::slice::from_ref(tool);
                    Wanted::parse(range).is_ok_and(|wanted| wanted.pick(tool, None).is_some())
                })
            }
            None => true,
        };
        let is_fine = |package: &Package| !package.deprecated.is_string() && fits(package);
        let versions: Vec<Version> = listing
            .versions
            .iter()
            .filter(|(_, package)| is_fine(package))
            .filter_map(|(id, _)| Version::parse(id))
            .collect();
        // What the registry calls its latest counts only when it fits.
        let version = wanted.pick(&versions, None).ok_or_else(|| {
            format!("npm:{package} has no version {asked} that fits {}", tool.text)
        })?;
        self.artefact_of(package, &version.id, &listing.versions[&version.id])
    }

    fn artefact_of(&self, name: &str, version: &str, found: &Package) -> Result<Artefact, String> {
        let integrity = found.dist.integrity.as_deref().unwrap_or_default();
        let checksum = Checksum::of_integrity(integrity).ok_or_else(|| {
            format!("npm:{name} {version} has no SHA-512 or SHA-256 digest, and cannot be checked")
        })?;
        // The registry's own place first: a mirror may list the addresses of what it mirrors.
        let mut urls = vec![tarball(self.registry, name, version)];
        if found.dist.tarball.starts_with("http") && !urls.contains(&found.dist.tarball) {
            urls.push(found.dist.tarball.clone());
        }
        let name = format!("{}.tgz", name.trim_start_matches('@').replace('/', "-"));
        Ok(Artefact { name, urls, checksum, size_bytes: None })
    }

    async fn listing(&self, package: &str) -> Result<Listing, String> {
        let registry = self.registry.trim_end_matches('/');
        let url = format!("{registry}/{}", package.replace('/', "%2f"));
        let listing = match self.http.listing(&url, ACCEPT).await {
            Err(HttpError::NotFound(_)) => {
                return Err(format!("the registry has no package {package}"));
            }
            other => needed(other)?,
        };
        serde_json::from_slice(&listing.bytes).map_err(|error| {
            format!("the registry's listing of {package} is not readable: {error}")
        })
    }
}
