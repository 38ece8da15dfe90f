use std::io;
use std::path::{Path, PathBuf};

use super::{PruneBudget, SealedSnapshot, SnapshotEntry, SnapshotError};

/// A folder of snapshots. May be shared by threads, and the folder by processes.
#[derive(Debug)]
pub struct SnapshotStore {
    root: PathBuf,
}

/// A place for the files of a snapshot that is being made. Removed when it is dropped unsealed.
#[derive(Debug)]
pub struct Draft {
    path: PathBuf,
}

impl Draft {
    /// An empty folder, mode 0700, on the file system of the store.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl SnapshotStore {
    /// Opens the store, making its folders and its key where they are missing. What dead processes
    /// left is swept.
    pub fn open(root: impl Into<PathBuf>) -> Result<Self, SnapshotError> {
        Ok(Self { root: root.into() })
    }

    /// An empty folder for the files of the snapshot `id`: 1 to 128 letters, digits, '-', '_'.
    pub fn draft(&self, _id: &str) -> Result<Draft, SnapshotError> {
        Err(self.unfinished())
    }

    /// Takes the draft's files into the store. On disk, with digests, when this returns. Where a
    /// snapshot of this id is there already, it stays, is returned, and the draft is dropped.
    pub fn seal(
        &self,
        _draft: Draft,
        _detail: serde_json::Value,
    ) -> Result<SealedSnapshot, SnapshotError> {
        Err(self.unfinished())
    }

    /// The snapshot, checked, and marked as used now.
    pub fn get(&self, _id: &str) -> Result<SealedSnapshot, SnapshotError> {
        Err(self.unfinished())
    }

    /// All snapshots by id, unchecked.
    pub fn list(&self) -> Result<Vec<SnapshotEntry>, SnapshotError> {
        Err(self.unfinished())
    }

    /// Removes a snapshot, damaged or not. `false`: there was none. VMs with hard links of its
    /// files keep them.
    pub fn remove(&self, _id: &str) -> Result<bool, SnapshotError> {
        Err(self.unfinished())
    }

    /// Removes what is too old, and then the longest unused, until the rest is within the budget.
    /// What is in use stays. Returns what was removed.
    pub fn prune(&self, _budget: &PruneBudget<'_>) -> Result<Vec<SnapshotEntry>, SnapshotError> {
        Err(self.unfinished())
    }

    /// Where the files of a snapshot are or will be: the holder to pin its image for, see
    /// [`ImageStore::pin`](crate::ImageStore::pin).
    #[must_use]
    pub fn entry_path(&self, id: &str) -> PathBuf {
        self.root.join("entries").join(id)
    }

    fn unfinished(&self) -> SnapshotError {
        SnapshotError::io("use the snapshot store", &self.root)(io::Error::from(
            io::ErrorKind::Unsupported,
        ))
    }
}
