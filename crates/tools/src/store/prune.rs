//! Room is made by removing what was not used for longest.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::FlockOperation;

use super::{Store, file_names, flock, is_still_there, remove, sync_folder};
use crate::error::ToolError;
use crate::tools::ToolsPruned;

/// A file that may be removed.
struct Candidate {
    path: PathBuf,
    used: SystemTime,
    size_bytes: u64,
    /// Of a layer, `None` of an artefact.
    layer: Option<String>,
    records: Vec<PathBuf>,
}

impl Store {
    /// Removes layers that no record names, then what was not used for longest until the rest
    /// fits. What is locked is in use, and stays. Blocks.
    pub(crate) fn prune(&self, keep_bytes: u64) -> Result<ToolsPruned, ToolError> {
        super::session::sweep(&self.root.join("tmp"));
        let mut candidates = self.layers()?;
        candidates.extend(self.artefacts()?);
        candidates.sort_by_key(|candidate| (!candidate.is_unknown(), candidate.used));
        let mut pruned = ToolsPruned::default();
        let mut left: u64 = candidates.iter().map(|candidate| candidate.size_bytes).sum();
        for candidate in &candidates {
            if !candidate.is_unknown() && left <= keep_bytes {
                break;
            }
            if !remove_unused(&candidate.path)? {
                continue;
            }
            for record in &candidate.records {
                remove(record)?;
            }
            left -= candidate.size_bytes;
            pruned.size_bytes += candidate.size_bytes;
            match &candidate.layer {
                Some(layer) => pruned.layers.push(format!("blake3:{layer}")),
                None => pruned.artefacts += 1,
            }
        }
        for folder in ["layers", "records", "artefacts"] {
            sync_folder(&self.root.join(folder))?;
        }
        self.forget_verified();
        pruned.kept_bytes = left;
        Ok(pruned)
    }

    /// What layers and artefacts take.
    pub(crate) fn size_bytes(&self) -> Result<u64, ToolError> {
        let all = self.layers()?.into_iter().chain(self.artefacts()?);
        Ok(all.map(|candidate| candidate.size_bytes).sum())
    }

    fn layers(&self) -> Result<Vec<Candidate>, ToolError> {
        let mut records: HashMap<String, (SystemTime, Vec<PathBuf>)> = HashMap::new();
        for name in file_names(&self.root.join("records"))? {
            let path = self.root.join("records").join(name);
            let Some(record) = super::layers::read_record(&path)? else { continue };
            let Some((used, _)) = examine(&path)? else { continue };
            let layer = records.entry(record.layer.hex().to_owned());
            let (last, paths) = layer.or_insert((used, Vec::new()));
            *last = used.max(*last);
            paths.push(path);
        }
        let mut layers = Vec::new();
        for name in file_names(&self.root.join("layers"))? {
            let path = self.root.join("layers").join(&name);
            let Some((_, size_bytes)) = examine(&path)? else { continue };
            let (used, records) =
                records.remove(&name).unwrap_or((SystemTime::UNIX_EPOCH, Vec::new()));
            layers.push(Candidate { path, used, size_bytes, layer: Some(name), records });
        }
        Ok(layers)
    }

    fn artefacts(&self) -> Result<Vec<Candidate>, ToolError> {
        let mut artefacts = Vec::new();
        for name in file_names(&self.root.join("artefacts"))? {
            let path = self.root.join("artefacts").join(name);
            let Some((used, size_bytes)) = examine(&path)? else { continue };
            artefacts.push(Candidate { path, used, size_bytes, layer: None, records: Vec::new() });
        }
        Ok(artefacts)
    }

    /// What is known of layers that are gone would grow for ever.
    fn forget_verified(&self) {
        use std::os::unix::fs::MetadataExt;
        let there: HashSet<(u64, u64)> = fs::read_dir(self.root.join("layers"))
            .into_iter()
            .flatten()
            .filter_map(|entry| entry.ok()?.metadata().ok())
            .map(|meta| (meta.dev(), meta.ino()))
            .collect();
        let known = &self.verified.0;
        let mut known = known.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        known.retain(|inode, _| there.contains(inode));
    }
}

impl Candidate {
    fn is_unknown(&self) -> bool {
        self.layer.is_some() && self.records.is_empty()
    }
}

/// When a file was used last, and its size; `None` for what has gone meanwhile.
fn examine(path: &Path) -> Result<Option<(SystemTime, u64)>, ToolError> {
    let look = || -> io::Result<_> {
        let meta = fs::symlink_metadata(path)?;
        Ok((meta.modified()?, meta.len()))
    };
    match look() {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(ToolError::io("examine", path)(error)),
    }
}

/// Removes a file unless somebody holds it.
fn remove_unused(path: &Path) -> Result<bool, ToolError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(ToolError::io("open", path)(error)),
    };
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
        other => other.map_err(ToolError::io("lock", path))?,
    }
    if !is_still_there(&file, path).map_err(ToolError::io("examine", path))? {
        return Ok(false);
    }
    remove(path)?;
    Ok(true)
}
