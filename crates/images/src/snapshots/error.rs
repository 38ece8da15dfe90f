use std::io;
use std::path::PathBuf;

/// Why a snapshot could not be made, checked, or removed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    #[error("there is no snapshot {id} in this store")]
    Unknown { id: String },

    #[error("{id:?} is not an id of a snapshot: 1 to 128 letters, digits, '-' and '_' are")]
    InvalidId { id: String },

    /// Missing, or not what was sealed. The snapshot is of no use any more; remove it.
    #[error("the snapshot file {} is damaged: {reason}", file.display())]
    Damaged { file: PathBuf, reason: &'static str },

    /// Not sealed with this store's key, or not as this snapshot.
    #[error("the snapshot file {} is not of this store: {reason}", file.display())]
    Foreign { file: PathBuf, reason: &'static str },

    /// Written by a later version.
    #[error("the snapshot file {} has format {found}; this program knows {known}", file.display())]
    Format { file: PathBuf, found: u32, known: u32 },

    /// A draft may hold regular files with plain names, that nobody writes any more.
    #[error("the file {} cannot be part of a snapshot: {reason}", file.display())]
    Unfit { file: PathBuf, reason: &'static str },

    #[error("{action} {}: the disk is full; free some room and try again", path.display())]
    NoSpace { action: &'static str, path: PathBuf, source: io::Error },

    #[error("{action} {}", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
}

impl SnapshotError {
    /// A name for the kind of failure that does not change between versions.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Unknown { .. } => "snapshot_not_found",
            Self::InvalidId { .. } => "snapshot_id_invalid",
            Self::Damaged { .. } | Self::Foreign { .. } => "snapshot_damaged",
            Self::Format { .. } => "snapshot_incompatible",
            Self::Unfit { .. } => "snapshot_file_unfit",
            Self::NoSpace { .. } => "no_space",
            Self::Io { .. } => "snapshot_io",
        }
    }

    /// Puts the step and the file to an I/O error, for `map_err`. A full disk is told apart.
    pub(crate) fn io<E: Into<io::Error>>(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(E) -> Self {
        let path = path.into();
        move |source| {
            let source = source.into();
            match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                    Self::NoSpace { action, path, source }
                }
                _ => Self::Io { action, path, source },
            }
        }
    }
}
