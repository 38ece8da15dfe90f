//! Layers: put, found, checked, pinned.

use std::collections::HashMap;
use std::fs::{self, File, Permissions};
use std::io::{self, Seek};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use aether_types::Timestamp;
use rustix::fs::{FlockOperation, Timespec, Timestamps, UTIME_OMIT};
use serde::{Deserialize, Serialize};

use super::{Scratch, Store, flock, open_pinned, remove, sync_folder, touch};
use crate::checksum::Checksum;
use crate::error::ToolError;

/// What an erofs image has at 1024.
const MAGIC: [u8; 4] = [0xe2, 0xe1, 0xf5, 0xe0];
const MAGIC_AT: u64 = 1024;

/// What a layer is, and what it was built from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LayerRecord {
    pub(crate) name: String,
    pub(crate) version: String,
    pub(crate) origin: String,
    pub(crate) artefacts: Vec<Checksum>,
    /// The digest of the recipe, and of the base image's root file system.
    pub(crate) recipe: String,
    pub(crate) base: String,
    pub(crate) layer: Checksum,
    pub(crate) size_bytes: u64,
    pub(crate) verified_at: Timestamp,
}

/// A layer that is there, checked, and stays for as long as this is kept.
#[derive(Debug, Clone)]
pub(crate) struct PinnedLayer {
    pub(crate) record: LayerRecord,
    pub(crate) path: PathBuf,
    pub(crate) pin: Arc<File>,
}

/// Layers that this process has hashed, by device and inode: hard links share them. The time of
/// the last change of status is not looked at, as a link changes it; the time of the content is
/// set to 0 when a layer is sealed, and any write sets it anew.
#[derive(Debug, Default)]
pub(crate) struct Verified(pub(super) Mutex<HashMap<(u64, u64), Stamp>>);

type Stamp = (u64, (i64, i64), Option<SystemTime>, Checksum);

impl Store {
    fn layer_path(&self, layer: &Checksum) -> PathBuf {
        self.root.join("layers").join(layer.hex())
    }

    fn record_path(&self, key: &str) -> PathBuf {
        self.root.join("records").join(format!("{key}.json"))
    }

    /// Whether a layer is there, unchecked.
    pub(crate) fn has_layer(&self, layer: &Checksum, size_bytes: u64) -> bool {
        fs::metadata(self.layer_path(layer)).is_ok_and(|meta| meta.len() == size_bytes)
    }

    /// The layer that was built from these inputs, where it still is. A damaged one is removed,
    /// to be built again. Blocks.
    pub(crate) fn find_layer(&self, key: &str) -> Result<Option<PinnedLayer>, ToolError> {
        let record_path = self.record_path(key);
        let Some(record) = read_record(&record_path)? else { return Ok(None) };
        let path = self.layer_path(&record.layer);
        let Some(file) = open_pinned(&path)? else { return Ok(None) };
        if !self.is_sound(&file, &record).map_err(ToolError::io("read", &path))? {
            let (tool, path_shown) = (&record.name, path.display());
            tracing::warn!(tool, path = %path_shown, "remove a damaged layer; it is built again");
            remove(&path)?;
            return Ok(None);
        }
        let used = File::open(&record_path).and_then(|file| touch(&file));
        used.map_err(ToolError::io("set the time of", record_path))?;
        Ok(Some(PinnedLayer { record, path, pin: Arc::new(file) }))
    }

    fn is_sound(&self, file: &File, record: &LayerRecord) -> io::Result<bool> {
        let meta = file.metadata()?;
        if meta.len() != record.size_bytes {
            return Ok(false);
        }
        let inode = (meta.dev(), meta.ino());
        let stamp = stamp_of(&meta, &record.layer);
        if self.verified.0.lock().unwrap_or_else(PoisonError::into_inner).get(&inode)
            == Some(&stamp)
        {
            return Ok(true);
        }
        let mut reader = file.try_clone()?;
        reader.rewind()?;
        if !record.layer.is_of(&mut reader)? {
            return Ok(false);
        }
        // Written while it was hashed, or not sealed by us: hashed again the next time.
        if stamp.1 == (0, 0) && stamp_of(&file.metadata()?, &record.layer) == stamp {
            let mut known = self.verified.0.lock().unwrap_or_else(PoisonError::into_inner);
            known.insert(inode, stamp);
        }
        Ok(true)
    }

    /// Takes what a builder made. `record` makes the record when the digest is known. Blocks.
    pub(crate) fn put_layer(
        &self,
        key: &str,
        scratch: &Scratch,
        record: impl FnOnce(Checksum, u64) -> LayerRecord,
    ) -> Result<PinnedLayer, ToolError> {
        let made = scratch.path();
        let file = File::open(made).map_err(ToolError::io("open", made))?;
        flock(&file, FlockOperation::LockShared).map_err(ToolError::io("lock", made))?;
        file.set_permissions(Permissions::from_mode(0o444))
            .map_err(ToolError::io("make read-only", made))?;
        let sealed = Timestamps {
            last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
            last_modification: Timespec { tv_sec: 0, tv_nsec: 0 },
        };
        rustix::fs::futimens(&file, &sealed)
            .map_err(io::Error::from)
            .map_err(ToolError::io("set the time of", made))?;
        file.sync_all().map_err(ToolError::io("flush", made))?;
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(&file).map_err(ToolError::io("read", made))?;
        let layer = Checksum::blake3(&hasher.finalize());
        let size_bytes = file.metadata().map_err(ToolError::io("examine", made))?.len();

        let path = self.layer_path(&layer);
        fs::rename(made, &path).map_err(ToolError::io("move into place", &path))?;
        sync_folder(&self.root.join("layers"))?;
        let record = record(layer, size_bytes);
        self.replace(&self.record_path(key), &record)?;
        Ok(PinnedLayer { record, path, pin: Arc::new(file) })
    }
}

/// A record that cannot be read is as good as none.
pub(super) fn read_record(path: &Path) -> Result<Option<LayerRecord>, ToolError> {
    match fs::read(path) {
        Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(ToolError::io("read", path)(error)),
    }
}

/// Checks what can be checked from outside of what a builder made, and cuts off what is not part
/// of the image. The error says what is wrong. Blocks.
pub(crate) fn trim(path: &Path, size_bytes: Option<u64>, max_bytes: u64) -> Result<(), String> {
    let readable = |error: io::Error| format!("the builder's output cannot be read: {error}");
    let meta = fs::symlink_metadata(path).map_err(readable)?;
    if !meta.is_file() {
        return Err("the builder's output is no regular file".to_owned());
    }
    let size = size_bytes.unwrap_or(meta.len());
    if size > max_bytes {
        return Err(format!("the layer has {size} bytes, and {max_bytes} are allowed"));
    }
    if size > meta.len() || size <= MAGIC_AT || !size.is_multiple_of(4096) {
        return Err(format!("the builder says {size} bytes, and delivered {}", meta.len()));
    }
    let file = File::options().read(true).write(true).open(path).map_err(readable)?;
    let mut magic = [0; 4];
    file.read_exact_at(&mut magic, MAGIC_AT).map_err(readable)?;
    if magic != MAGIC {
        return Err("the builder's output is no erofs image".to_owned());
    }
    file.set_len(size).map_err(readable)
}

fn stamp_of(meta: &fs::Metadata, layer: &Checksum) -> Stamp {
    (meta.len(), (meta.mtime(), meta.mtime_nsec()), meta.created().ok(), layer.clone())
}
