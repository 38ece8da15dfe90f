use std::collections::BTreeSet;
use std::fmt;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{FlockOperation, OFlags, Timespec, Timestamps, UTIME_NOW};

use super::draft::{Draft, fill_random, random_name};
use super::fault::step;
use super::manifest::{self, FileRecord, Flaw, Key, Manifest};
use super::verify::{Verified, allocated, unfit};
use super::{PruneBudget, SealedSnapshot, SnapshotEntry, SnapshotError};
use crate::Digest;

const ID_LENGTH_MAX: usize = 128;

/// A folder of snapshots. May be shared by threads, and the folder by processes.
pub struct SnapshotStore {
    root: PathBuf,
    key: Key,
    verified: Verified,
}

// Not the key.
impl fmt::Debug for SnapshotStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SnapshotStore").field("root", &self.root).finish_non_exhaustive()
    }
}

impl SnapshotStore {
    /// Opens the store, making its folders and its key where they are missing. What dead processes
    /// left is swept.
    pub fn open(root: impl Into<PathBuf>) -> Result<Self, SnapshotError> {
        let root = root.into();
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(0o700);
        for name in ["entries", "drafts", "trash"] {
            let path = root.join(name);
            builder.create(&path).map_err(SnapshotError::io("make the folder", path))?;
        }
        let lock = lock(&root)?;
        let key = load_or_make_key(&root)?;
        let store = Self { root, key, verified: Verified::default() };
        store.sweep_drafts()?;
        drop(lock);
        store.empty_trash();
        Ok(store)
    }

    /// An empty folder for the files of the snapshot `id`: 1 to 128 letters, digits, '-', '_'.
    pub fn draft(&self, id: &str) -> Result<Draft, SnapshotError> {
        self.entry(id)?;
        let _lock = lock(&self.root)?;
        Draft::make(&self.folder("drafts"), id)
    }

    /// Takes the draft's files into the store. On disk, with digests, when this returns. Where a
    /// snapshot of this id is there already, it stays, is returned, and the draft is dropped.
    pub fn seal(
        &self,
        mut draft: Draft,
        detail: serde_json::Value,
    ) -> Result<SealedSnapshot, SnapshotError> {
        let id = draft.id().to_owned();
        let entry = self.entry(&id)?;
        if fs::exists(&entry).map_err(SnapshotError::io("examine", &entry))? {
            return self.get(&id);
        }
        let mut files = Vec::new();
        for (name, path) in files_of(draft.path())? {
            if name == manifest::FILE_NAME {
                return Err(unfit(&path, "the name is taken"));
            }
            files.push(self.verified.freeze(&path, &name)?);
        }
        let created_unix_ms = unix_ms(SystemTime::now());
        let manifest =
            Manifest { format: manifest::FORMAT, id: id.clone(), created_unix_ms, files, detail };
        self.write_manifest(draft.path(), &manifest)?;
        step(draft.path())?;
        draft.sync()?;
        draft.share_lock()?;
        step(&entry)?;
        if !draft.publish(&entry)? {
            return self.get(&id);
        }
        let flushed = step(&entry)
            .and_then(|()| sync_folder(&self.folder("entries")))
            .and_then(|()| sync_folder(&self.folder("drafts")));
        if let Err(error) = flushed {
            // Nobody was told of it, and it may be gone after a loss of power.
            if let Err(error) = self.remove(&id) {
                tracing::warn!(path = %entry.display(), %error, "leave an unacknowledged snapshot");
            }
            return Err(error);
        }
        self.get(&id)
    }

    /// The snapshot, checked, and marked as used now.
    pub fn get(&self, id: &str) -> Result<SealedSnapshot, SnapshotError> {
        let entry = self.entry(id)?;
        let in_use =
            use_folder(&entry)?.ok_or_else(|| SnapshotError::Unknown { id: id.to_owned() })?;
        let (manifest, bytes) = self.read_manifest(&entry, id)?;
        let mut size_bytes = bytes.allocated;
        refuse_additions(&entry, &manifest.files)?;
        for record in &manifest.files {
            size_bytes += self.verified.check(&entry.join(&record.name), record)?;
        }
        let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
        rustix::fs::futimens(&in_use, &Timestamps { last_access: now, last_modification: now })
            .map_err(SnapshotError::io("mark as used", &entry))?;
        Ok(SealedSnapshot {
            id: manifest.id,
            directory: entry,
            detail: manifest.detail,
            digest: bytes.digest.to_string(),
            size_bytes,
            in_use: Arc::new(in_use),
        })
    }

    /// All snapshots by id, unchecked.
    pub fn list(&self) -> Result<Vec<SnapshotEntry>, SnapshotError> {
        let folder = self.folder("entries");
        let mut entries = Vec::new();
        for (id, path) in names(&folder)? {
            if is_id(&id) {
                // Nothing where it is being removed now.
                entries.extend(if_there(describe(id, &path), "examine", &path)?);
            }
        }
        entries.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(entries)
    }

    /// Removes a snapshot, damaged or not. `false`: there was none. VMs with hard links of its
    /// files keep them.
    pub fn remove(&self, id: &str) -> Result<bool, SnapshotError> {
        let entry = self.entry(id)?;
        self.discard(id, &entry)
    }

    /// Removes what is too old, and then the longest unused, until the rest is within the budget.
    /// What is in use stays. Returns what was removed.
    pub fn prune(&self, budget: &PruneBudget<'_>) -> Result<Vec<SnapshotEntry>, SnapshotError> {
        let mut entries = self.list()?;
        entries.sort_by_key(|entry| entry.last_used_unix_ms);
        let mut total: u64 = entries.iter().map(|entry| entry.size_bytes).sum();
        let now = unix_ms(SystemTime::now());
        let mut removed = Vec::new();
        for entry in entries {
            let age = Duration::from_millis(now.saturating_sub(entry.last_used_unix_ms));
            let too_old = budget.max_age.is_some_and(|max| age > max);
            let too_much = budget.max_bytes.is_some_and(|max| total > max);
            if !(too_old || too_much) || (budget.keep)(&entry.id) {
                continue;
            }
            if self.remove_unused(&entry)? {
                total -= entry.size_bytes;
                removed.push(entry);
            }
        }
        Ok(removed)
    }

    /// Where the files of a snapshot are or will be: the holder to pin its image for, see
    /// [`ImageStore::pin`](crate::ImageStore::pin).
    #[must_use]
    pub fn entry_path(&self, id: &str) -> PathBuf {
        self.folder("entries").join(id)
    }

    fn folder(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    fn entry(&self, id: &str) -> Result<PathBuf, SnapshotError> {
        if is_id(id) {
            Ok(self.entry_path(id))
        } else {
            Err(SnapshotError::InvalidId { id: id.to_owned() })
        }
    }

    fn write_manifest(&self, folder: &Path, manifest: &Manifest) -> Result<(), SnapshotError> {
        let path = folder.join(manifest::FILE_NAME);
        let bytes = manifest.encode(&self.key).map_err(|error| {
            SnapshotError::io::<io::Error>("describe the snapshot in", &path)(error.into())
        })?;
        if bytes.len() as u64 > manifest::BYTES_MAX {
            return Err(unfit(&path, "the snapshot's detail is too long"));
        }
        step(&path)?;
        write_new(&path, 0o400, &bytes)
    }

    fn read_manifest(
        &self,
        entry: &Path,
        id: &str,
    ) -> Result<(Manifest, ManifestFile), SnapshotError> {
        let path = entry.join(manifest::FILE_NAME);
        let damaged = |reason| SnapshotError::Damaged { file: path.clone(), reason };
        let foreign = |reason| SnapshotError::Foreign { file: path.clone(), reason };
        let mut bytes = Vec::new();
        let read = File::options()
            .read(true)
            .custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed())
            .open(&path)
            .and_then(|file| {
                let meta = file.metadata()?;
                file.take(manifest::BYTES_MAX + 1).read_to_end(&mut bytes)?;
                Ok(meta)
            });
        let meta = if_there(read, "read", &path)?.ok_or_else(|| damaged("it is missing"))?;
        let manifest = Manifest::decode(&bytes, &self.key).map_err(|flaw| match flaw {
            Flaw::Malformed => damaged("it is not a manifest"),
            Flaw::Mac => foreign("it was sealed by another store, or changed since"),
            Flaw::Format(found) => {
                SnapshotError::Format { file: path.clone(), found, known: manifest::FORMAT }
            }
        })?;
        if manifest.id != id {
            return Err(foreign("it was sealed as another snapshot"));
        }
        // Ours by its MAC; still, no path is made of a name that could leave the folder.
        if manifest.files.iter().any(|file| !is_file_name(&file.name)) {
            return Err(damaged("it names a file that cannot be"));
        }
        let digest = Digest::of_bytes(&bytes);
        Ok((manifest, ManifestFile { digest, allocated: allocated(&meta) }))
    }

    /// Takes an entry away in one step, then unlinks it.
    fn discard(&self, id: &str, entry: &Path) -> Result<bool, SnapshotError> {
        let inodes = inodes_of(entry);
        let trash = self.folder("trash").join(random_name(id)?);
        if if_there(fs::rename(entry, &trash), "remove", entry)?.is_none() {
            return Ok(false);
        }
        self.verified.forget(&inodes);
        step(entry)?;
        // Before the files go: after a loss of power there is all of it, or nothing.
        sync_folder(&self.folder("entries"))?;
        step(&trash)?;
        unlink(&trash);
        Ok(true)
    }

    fn remove_unused(&self, listed: &SnapshotEntry) -> Result<bool, SnapshotError> {
        let entry = self.entry(&listed.id)?;
        let Some(folder) = if_there(File::open(&entry), "open", &entry)? else {
            return Ok(false);
        };
        match rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(false),
            Err(error) => return Err(SnapshotError::io("lock", &entry)(error)),
        }
        let described = if_there(describe(listed.id.clone(), &entry), "examine", &entry)?;
        let used_since =
            described.is_none_or(|now| now.last_used_unix_ms != listed.last_used_unix_ms);
        Ok(!used_since && self.discard(&listed.id, &entry)?)
    }

    /// Takes the drafts of dead processes away. The caller holds the store's lock.
    fn sweep_drafts(&self) -> Result<(), SnapshotError> {
        for (name, path) in names(&self.folder("drafts"))? {
            let Some(folder) = if_there(File::open(&path), "open", &path)? else { continue };
            match rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => continue,
                Err(error) => return Err(SnapshotError::io("lock", &path)(error)),
            }
            let trash = self.folder("trash").join(name);
            if_there(fs::rename(&path, trash), "sweep", &path)?;
        }
        Ok(())
    }

    /// Other processes may be at it too.
    fn empty_trash(&self) {
        match names(&self.folder("trash")) {
            Ok(names) => names.iter().for_each(|(_, path)| unlink(path)),
            Err(error) => tracing::warn!(%error, "leave the trash to the next sweep"),
        }
    }
}

struct ManifestFile {
    digest: Digest,
    allocated: u64,
}

/// Ids are file names: nothing that could leave the folder.
fn is_id(id: &str) -> bool {
    (1..=ID_LENGTH_MAX).contains(&id.len())
        && id.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
}

fn is_file_name(name: &str) -> bool {
    !matches!(name, "" | "." | ".." | manifest::FILE_NAME) && !name.contains(['/', '\0'])
}

/// One process at a time makes drafts or sweeps. The holder does a few quick steps.
fn lock(root: &Path) -> Result<File, SnapshotError> {
    let path = root.join("lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path)
        .map_err(SnapshotError::io("open the lock", &path))?;
    rustix::io::retry_on_intr(|| rustix::fs::flock(&file, FlockOperation::LockExclusive))
        .map_err(SnapshotError::io("lock", path))?;
    Ok(file)
}

/// The key of all manifests. The caller holds the store's lock.
fn load_or_make_key(root: &Path) -> Result<Key, SnapshotError> {
    let path = root.join("key");
    if let Some(bytes) = if_there(fs::read(&path), "read", &path)? {
        return Key::try_from(bytes.as_slice()).map_err(|_| SnapshotError::Damaged {
            file: path,
            reason: "it is no key; without the right one no snapshot can be used",
        });
    }
    let mut key = Key::default();
    fill_random(&mut key)?;
    let new = root.join("key.new");
    // Left by a process that died here.
    if_there(fs::remove_file(&new), "remove", &new)?;
    step(&new)?;
    let written = write_new(&new, 0o600, &key).and_then(|()| {
        step(&new)?;
        fs::rename(&new, &path).map_err(SnapshotError::io("move into place", &path))?;
        sync_folder(root)
    });
    if written.is_err() {
        let _ = fs::remove_file(&new);
    }
    written.map(|()| key)
}

/// Keeps the folder from being pruned. Nothing where there is none, or it was removed meanwhile.
fn use_folder(path: &Path) -> Result<Option<File>, SnapshotError> {
    let opened = File::options()
        .read(true)
        .custom_flags((OFlags::NOFOLLOW | OFlags::DIRECTORY).bits().cast_signed())
        .open(path);
    let Some(folder) = if_there(opened, "open", path)? else { return Ok(None) };
    // The only one who may be waited for is about to move the folder away.
    rustix::io::retry_on_intr(|| rustix::fs::flock(&folder, FlockOperation::LockShared))
        .map_err(SnapshotError::io("lock", path))?;
    let held = folder.metadata().map_err(SnapshotError::io("examine", path))?;
    let named = if_there(fs::symlink_metadata(path), "examine", path)?;
    let same = named.is_some_and(|named| (named.dev(), named.ino()) == (held.dev(), held.ino()));
    Ok(same.then_some(folder))
}

fn refuse_additions(entry: &Path, files: &[FileRecord]) -> Result<(), SnapshotError> {
    let known: BTreeSet<&str> = files.iter().map(|file| file.name.as_str()).collect();
    for (name, path) in names(entry)? {
        if name != manifest::FILE_NAME && !known.contains(name.as_str()) {
            return Err(SnapshotError::Damaged {
                file: path,
                reason: "it was not there when the snapshot was sealed",
            });
        }
    }
    Ok(())
}

fn describe(id: String, entry: &Path) -> io::Result<SnapshotEntry> {
    let folder = fs::symlink_metadata(entry)?;
    let created =
        fs::symlink_metadata(entry.join(manifest::FILE_NAME)).map_or(0, |m| modified_ms(&m));
    let mut size_bytes = 0;
    for file in fs::read_dir(entry)? {
        size_bytes += allocated(&file?.metadata()?);
    }
    let last_used_unix_ms = modified_ms(&folder);
    Ok(SnapshotEntry { id, size_bytes, created_unix_ms: created, last_used_unix_ms })
}

fn inodes_of(entry: &Path) -> Vec<(u64, u64)> {
    let Ok(files) = fs::read_dir(entry) else { return Vec::new() };
    files.flatten().filter_map(|file| file.metadata().ok()).map(|m| (m.dev(), m.ino())).collect()
}

/// The names in a draft, in order, all of them text.
fn files_of(folder: &Path) -> Result<Vec<(String, PathBuf)>, SnapshotError> {
    let mut files = names(folder)?;
    files.sort();
    match files.iter().find(|(_, path)| path.file_name().is_none_or(|name| name.to_str().is_none()))
    {
        Some((_, path)) => Err(unfit(path, "its name is not text")),
        None => Ok(files),
    }
}

fn names(folder: &Path) -> Result<Vec<(String, PathBuf)>, SnapshotError> {
    fs::read_dir(folder)
        .and_then(|entries| {
            entries
                .map(|entry| {
                    entry.map(|entry| {
                        (entry.file_name().to_string_lossy().into_owned(), entry.path())
                    })
                })
                .collect()
        })
        .map_err(SnapshotError::io("list", folder))
}

/// Nothing where there is no such file.
fn if_there<T>(
    result: io::Result<T>,
    action: &'static str,
    path: &Path,
) -> Result<Option<T>, SnapshotError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(SnapshotError::io(action, path)(error)),
    }
}

fn write_new(path: &Path, mode: u32, bytes: &[u8]) -> Result<(), SnapshotError> {
    File::options()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .and_then(|mut file| {
            file.write_all(bytes)?;
            file.sync_all()
        })
        .map_err(SnapshotError::io("write", path))
}

fn sync_folder(folder: &Path) -> Result<(), SnapshotError> {
    File::open(folder)
        .and_then(|file| file.sync_all())
        .map_err(SnapshotError::io("flush the folder", folder))
}

/// Nobody knows the files any more; what cannot be unlinked now is left to the next sweep.
fn unlink(path: &Path) {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(path = %path.display(), %error, "leave removed files to the next sweep");
        }
        _ => {}
    }
}

fn unix_ms(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn modified_ms(meta: &fs::Metadata) -> u64 {
    meta.modified().map_or(0, unix_ms)
}

#[cfg(test)]
mod tests;
