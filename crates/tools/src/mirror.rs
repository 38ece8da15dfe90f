//! An offline mirror: a folder that has tools, each resolved and with its files.
//!
//! ```text
//!   tools/<name>/<version>-<hash>.json   a version, and what it is made of
//!   files/<algorithm>-<hex>              the files, by digest
//! ```
//!
//! It is made by [`crate::Tools::mirror_export`], may be copied anywhere, and mirrors may be
//! copied into one. What is in it is checked like what comes from the network: the digests in
//! `tools/` are trusted, the files are not.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::checksum::Checksum;
use crate::config::BaseImage;
use crate::error::ToolError;
use crate::recipe::Recipe;
use crate::sources::{Offer, Resolved, parse_version};
use crate::store::{file_names, sync_folder, unique};
use crate::version::Version;

#[derive(Debug, Clone)]
pub(crate) struct Mirror {
    folder: PathBuf,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Entry {
    #[serde(flatten)]
    resolved: Resolved,
    /// Only what depends on the base image: what that must have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    base: Option<Needs>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Needs {
    suite: String,
    packages: BTreeSet<String>,
}

impl Needs {
    fn of(base: &BaseImage) -> Self {
        let name = |package: &String| package.split('=').next().unwrap_or_default().to_owned();
        Self { suite: base.suite.clone(), packages: base.packages.iter().map(name).collect() }
    }

    fn are_in(&self, base: &BaseImage) -> bool {
        let has = Self::of(base);
        self.suite == has.suite && self.packages.is_subset(&has.packages)
    }
}

impl Mirror {
    pub(crate) fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    pub(crate) fn file(&self, checksum: &Checksum) -> PathBuf {
        self.folder.join("files").join(checksum.file_name())
    }

    pub(crate) fn offer(&self, recipe: &Recipe, base: Option<&BaseImage>) -> Result<Offer, String> {
        let entries = self.entries(recipe, base)?;
        let versions = entries.iter().filter_map(|entry| entry.resolved.version(recipe)).collect();
        Ok(Offer { versions, latest: None })
    }

    pub(crate) fn resolve(
        &self,
        recipe: &Recipe,
        version: &Version,
        base: &BaseImage,
    ) -> Result<Resolved, ToolError> {
        let wrong = |reason| ToolError::Source { tool: recipe.name.clone(), reason };
        let entries = self.entries(recipe, Some(base)).map_err(wrong)?;
        let mut fitting = entries.into_iter().filter(|e| e.resolved.version_id == version.id);
        fitting.next_back().map(|entry| entry.resolved).ok_or_else(|| {
            wrong(format!("{} no longer has {}", self.folder.display(), version.text))
        })
    }

    /// What there is of a tool, of the same source as the recipe's, that fits the image.
    fn entries(&self, recipe: &Recipe, base: Option<&BaseImage>) -> Result<Vec<Entry>, String> {
        let folder = self.folder.join("tools").join(&recipe.name);
        if !self.folder.is_dir() {
            return Err(format!("the mirror {} is no folder", self.folder.display()));
        }
        if !folder.is_dir() {
            return Ok(Vec::new());
        }
        let mut entries = Vec::new();
        for name in file_names(&folder).map_err(|error| error.to_string())? {
            let path = folder.join(name);
            if path.extension().is_none_or(|kind| kind != "json") {
                continue;
            }
            let bytes = fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
            let entry: Entry = serde_json::from_slice(&bytes)
                .map_err(|error| format!("{}: {error}", path.display()))?;
            let needs = entry.base.as_ref();
            let fits = base.is_none_or(|base| needs.is_none_or(|needs| needs.are_in(base)));
            if fits && parse_version(recipe, &entry.resolved.version_id).is_some() {
                entries.push(entry);
            }
        }
        Ok(entries)
    }

    /// Adds a version of a tool. Its files are there already. Blocks.
    pub(crate) fn add(
        &self,
        recipe: &Recipe,
        resolved: &Resolved,
        base: &BaseImage,
    ) -> Result<(), ToolError> {
        let depends = recipe.depends_on_base();
        let entry = Entry { resolved: resolved.clone(), base: depends.then(|| Needs::of(base)) };
        let folder = self.folder.join("tools").join(&recipe.name);
        fs::create_dir_all(&folder).map_err(ToolError::io("make the folder", &folder))?;
        let mut bytes = serde_json::to_vec_pretty(&entry)
            .map_err(io::Error::other)
            .map_err(ToolError::io("write in", &folder))?;
        bytes.push(b'\n');
        let is_plain = |c: char| c.is_ascii_alphanumeric() || ".+-_".contains(c);
        let version: String =
            resolved.version.chars().map(|c| if is_plain(c) { c } else { '_' }).collect();
        let hash = blake3::hash(&bytes).to_hex();
        let path = folder.join(format!("{version}-{}.json", &hash[..8]));
        put(&path, |file| io::Write::write_all(file, &bytes))
    }

    /// Adds a file that was checked. Blocks.
    pub(crate) fn add_file(&self, checksum: &Checksum, from: &Path) -> Result<(), ToolError> {
        let path = self.file(checksum);
        if path.is_file() {
            return Ok(());
        }
        let folder = self.folder.join("files");
        fs::create_dir_all(&folder).map_err(ToolError::io("make the folder", &folder))?;
        let mut source = File::open(from).map_err(ToolError::io("open", from))?;
        put(&path, |file| io::copy(&mut source, file).map(|_| ()))
    }
}

/// Writes a file beside its place and moves it there, so that a mirror never has half of one.
fn put(path: &Path, fill: impl FnOnce(&mut File) -> io::Result<()>) -> Result<(), ToolError> {
    let part = path.with_file_name(format!(".part-{}", unique()));
    let written = File::create(&part)
        .and_then(|mut file| {
            fill(&mut file)?;
            file.sync_all()
        })
        .and_then(|()| fs::rename(&part, path))
        .map_err(ToolError::io("write", path));
    if written.is_err() {
        // The error that counts is the first.
        let _ = fs::remove_file(&part);
    }
    written?;
    path.parent().map_or(Ok(()), sync_folder)
}
