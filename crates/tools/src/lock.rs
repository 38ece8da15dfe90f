//! The lock: what was asked for, and what it was resolved to. What is locked needs no network as
//! long as its layer, or its artefacts, are there.
//!
//! An exact version is looked up once. What may come to mean something newer (`latest`, `20`,
//! ranges) is looked up again when the record is older than the configured age; where the source
//! does not answer, the record holds on.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use aether_types::Timestamp;
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use crate::checksum::Checksum;
use crate::config::BaseImage;
use crate::error::ToolError;
use crate::recipe::Recipe;
use crate::sources::Resolved;
use crate::store::{PinnedLayer, Store, flock, open_lock};

/// More than anybody has; the oldest are forgotten.
const ENTRIES_MAX: usize = 4096;

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct LockFile {
    version: u32,
    tools: Vec<LockEntry>,
}

const VERSION: u32 = 1;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LockEntry {
    pub(crate) name: String,
    pub(crate) asked: String,
    #[serde(flatten)]
    pub(crate) resolved: Resolved,
    /// The digest of the recipe, and of the base image's root file system.
    pub(crate) recipe: String,
    pub(crate) base: String,
    /// Whether `asked` means this version for ever.
    pub(crate) is_exact: bool,
    pub(crate) resolved_at: Timestamp,
    pub(crate) layer: Checksum,
    pub(crate) layer_bytes: u64,
    pub(crate) verified_at: Timestamp,
}

/// What the lock says of a request.
pub(crate) enum Locked {
    /// It holds.
    Fresh(Resolved, Timestamp),
    /// It holds where the source cannot be asked.
    Old(Resolved, Timestamp),
    None,
}

impl LockEntry {
    pub(crate) fn new(
        asked: &str,
        resolved: &Resolved,
        layer: &PinnedLayer,
        is_exact: bool,
        resolved_at: Timestamp,
    ) -> Self {
        let record = &layer.record;
        Self {
            name: record.name.clone(),
            asked: asked.to_owned(),
            resolved: resolved.clone(),
            recipe: record.recipe.clone(),
            base: record.base.clone(),
            is_exact,
            resolved_at,
            layer: record.layer.clone(),
            layer_bytes: record.size_bytes,
            verified_at: record.verified_at,
        }
    }

    fn is_of(&self, other: &Self) -> bool {
        (&self.name, &self.asked, &self.base) == (&other.name, &other.asked, &other.base)
    }
}

impl Store {
    fn lock_file(&self) -> PathBuf {
        self.root().join("lock.json")
    }

    /// All of it. Blocks.
    pub(crate) fn lock_entries(&self) -> Result<Vec<LockEntry>, ToolError> {
        let path = self.lock_file();
        match fs::read(&path) {
            Ok(bytes) => {
                let lock: LockFile = serde_json::from_slice(&bytes)
                    .map_err(io::Error::other)
                    .map_err(ToolError::io("read the lock file", path))?;
                Ok(lock.tools)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(ToolError::io("read the lock file", path)(error)),
        }
    }

    /// What the lock has for a request. Blocks.
    pub(crate) fn find_locked(
        &self,
        recipe: &Recipe,
        asked: &str,
        base: &BaseImage,
        age_max: Duration,
    ) -> Result<Locked, ToolError> {
        let depends = recipe.depends_on_base();
        let mut entries = self.lock_entries()?;
        entries.retain(|entry| {
            let is_same = entry.name == recipe.name && entry.asked == asked;
            is_same && (!depends || entry.base == base.digest)
        });
        // The newest one is the one that counts; another base image may have looked it up.
        let Some(entry) = entries.into_iter().max_by_key(|entry| entry.resolved_at) else {
            return Ok(Locked::None);
        };
        let age_max = i64::try_from(age_max.as_millis()).unwrap_or(i64::MAX);
        let is_young = entry.resolved_at.plus_ms(age_max) > Timestamp::now();
        let is_fresh = entry.recipe == recipe.digest() && (entry.is_exact || is_young);
        let (resolved, at) = (entry.resolved, entry.resolved_at);
        Ok(if is_fresh { Locked::Fresh(resolved, at) } else { Locked::Old(resolved, at) })
    }

    /// Writes down what a request became, unless that is known. Blocks.
    pub(crate) fn lock_tool(&self, entry: LockEntry) -> Result<(), ToolError> {
        self.change_lock(|entries| {
            let is_known = |known: &LockEntry| {
                let at = known.resolved_at.max(entry.resolved_at);
                *known == LockEntry { resolved_at: at, ..entry.clone() }
            };
            if entries.iter().any(is_known) {
                return false;
            }
            entries.retain(|known| !known.is_of(&entry));
            entries.push(entry);
            true
        })
    }

    /// Makes every record old that may come to mean something newer. Blocks.
    pub(crate) fn age_lock(&self) -> Result<(), ToolError> {
        self.change_lock(|entries| {
            for entry in entries.iter_mut().filter(|entry| !entry.is_exact) {
                entry.resolved_at = Timestamp::from_unix_ms(0);
            }
            true
        })
    }

    fn change_lock(
        &self,
        change: impl FnOnce(&mut Vec<LockEntry>) -> bool,
    ) -> Result<(), ToolError> {
        let path = self.root().join("lock");
        let lock = open_lock(&path)?;
        flock(&lock, FlockOperation::LockExclusive).map_err(ToolError::io("lock", path))?;
        let mut tools = self.lock_entries()?;
        if !change(&mut tools) {
            return Ok(());
        }
        if tools.len() > ENTRIES_MAX {
            tools.sort_by_key(|entry| std::cmp::Reverse(entry.resolved_at));
            tools.truncate(ENTRIES_MAX);
        }
        tools.sort_by(|a, b| (&a.name, &a.asked, &a.base).cmp(&(&b.name, &b.asked, &b.base)));
        self.replace(&self.lock_file(), &LockFile { version: VERSION, tools })
    }
}
