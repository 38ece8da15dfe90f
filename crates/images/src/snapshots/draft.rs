//! A snapshot that is being made.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

use super::SnapshotError;
use super::fault::step;

/// A place for the files of a snapshot that is being made. Removed when it is dropped unsealed.
#[derive(Debug)]
pub struct Draft {
    id: String,
    path: PathBuf,
    /// Locked for as long as this process is at work in the folder.
    lock: File,
    sealed: bool,
}

impl Draft {
    /// An empty folder, mode 0700, on the file system of the store.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn id(&self) -> &str {
        &self.id
    }

    /// The caller holds the store's lock, so that no other process sweeps the folder before it is
    /// locked itself.
    pub(super) fn make(drafts: &Path, id: &str) -> Result<Self, SnapshotError> {
        let path = drafts.join(random_name(id)?);
        step(&path)?;
        DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(SnapshotError::io("make the folder", &path))?;
        let lock = File::open(&path)
            .and_then(|folder| {
                rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive)?;
                Ok(folder)
            })
            .map_err(|source| {
                let _ = fs::remove_dir(&path);
                SnapshotError::io("lock", &path)(source)
            })?;
        Ok(Self { id: id.to_owned(), path, lock, sealed: false })
    }

    /// Lets others in, but keeps it from being swept or pruned: what a sealed snapshot has.
    pub(super) fn share_lock(&self) -> Result<(), SnapshotError> {
        rustix::io::retry_on_intr(|| rustix::fs::flock(&self.lock, FlockOperation::LockShared))
            .map_err(SnapshotError::io("lock", &self.path))
    }

    /// Makes the files' names durable.
    pub(super) fn sync(&self) -> Result<(), SnapshotError> {
        self.lock.sync_all().map_err(SnapshotError::io("flush the folder", &self.path))
    }

    /// Gives the folder its name as an entry. `false`: there is one already.
    pub(super) fn publish(&mut self, entry: &Path) -> Result<bool, SnapshotError> {
        // A folder replaces none that has files in it.
        match fs::rename(&self.path, entry) {
            Ok(()) => {
                self.sealed = true;
                Ok(true)
            }
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::AlreadyExists | io::ErrorKind::DirectoryNotEmpty
                ) =>
            {
                Ok(false)
            }
            Err(error) => Err(SnapshotError::io("move into place", entry)(error)),
        }
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if self.sealed {
            return;
        }
        if let Err(error) = fs::remove_dir_all(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "leave a draft to the next sweep");
        }
    }
}

/// A name that no other draft, and nothing in the trash, has.
pub(super) fn random_name(id: &str) -> Result<String, SnapshotError> {
    let mut random = [0; 8];
    fill_random(&mut random)?;
    Ok(format!("{id}-{:016x}", u64::from_le_bytes(random)))
}

pub(super) fn fill_random(bytes: &mut [u8]) -> Result<(), SnapshotError> {
    // Up to 256 bytes come at once, or not at all.
    rustix::io::retry_on_intr(|| {
        rustix::rand::getrandom(&mut *bytes, rustix::rand::GetRandomFlags::empty())
    })
    .map(drop)
    .map_err(SnapshotError::io("read randomness", ""))
}
