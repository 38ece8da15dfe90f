//! Snapshots of machines on disk: made apart, sealed in one step, checked whenever they are used.
//!
//! ```text
//!   draft ──▶ drafts/<id>-<random>/       written by a driver; flocked by its process
//!   seal  ──▶ entries/<id>/               digests, MAC, flushed, renamed; only now acknowledged
//!   get   ──▶ SealedSnapshot              MAC and every file checked; in use while it lives
//!   remove ─▶ trash/<id>-<random>/        gone in one step, then unlinked
//! ```
//!
//! Invariants:
//! - An entry is whole: it is on disk, with the digests of its files, before its name is there.
//! - Nothing is handed out unchecked: a file that is missing, added, changed, or of another store
//!   fails [`SnapshotStore::get`] by its name.
//! - Processes may share a store. What one is writing ([`Draft`]) no other sweeps; what one uses
//!   ([`SealedSnapshot`]) no other prunes.
//! - Sealed files have the time of last change 0, set before they are hashed. Whoever writes to
//!   one later sets another time, so a file that still has it is not hashed twice in one process.
//!   The time of status change says less: it moves with each hard link that a VM makes or drops.
//!
//! All calls block.

mod content;
mod draft;
mod error;
mod fault;
mod manifest;
mod store;
mod verify;

use std::fmt;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

pub use draft::Draft;
pub use error::SnapshotError;
pub use store::SnapshotStore;

/// A snapshot, checked. While it or a copy of it lives, [`SnapshotStore::prune`] of any process
/// leaves the files; [`SnapshotStore::remove`] does not, but a hard link keeps a file.
#[derive(Clone)]
pub struct SealedSnapshot {
    pub id: String,
    /// Read-only files; to be linked, mapped privately or copied, never written.
    pub directory: PathBuf,
    /// As given to [`SnapshotStore::seal`].
    pub detail: serde_json::Value,
    /// BLAKE3 of the manifest, which has the digests of the files: `blake3:…`.
    pub digest: String,
    /// Room that the files take on disk, holes not counted.
    pub size_bytes: u64,
    /// A shared lock on the directory.
    #[expect(dead_code, reason = "held, not read")]
    in_use: Arc<File>,
}

// The detail may have secrets.
impl fmt::Debug for SealedSnapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SealedSnapshot")
            .field("directory", &self.directory)
            .field("digest", &self.digest)
            .finish_non_exhaustive()
    }
}

/// A snapshot in a list, not checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotEntry {
    pub id: String,
    /// Room that the files take on disk, holes not counted. A file that several snapshots have
    /// hard links of is counted in each.
    pub size_bytes: u64,
    pub created_unix_ms: u64,
    /// When it was sealed or last handed out.
    pub last_used_unix_ms: u64,
}

/// What [`SnapshotStore::prune`] may leave.
#[derive(Clone, Copy)]
pub struct PruneBudget<'a> {
    /// Room for all snapshots together.
    pub max_bytes: Option<u64>,
    /// Since the last use.
    pub max_age: Option<Duration>,
    /// Ids that stay in any case.
    pub keep: &'a dyn Fn(&str) -> bool,
}

impl fmt::Debug for PruneBudget<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PruneBudget")
            .field("max_bytes", &self.max_bytes)
            .field("max_age", &self.max_age)
            .finish_non_exhaustive()
    }
}
