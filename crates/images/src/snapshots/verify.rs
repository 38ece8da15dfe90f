//! Freezing files, and checking that they still are what they were.

use std::collections::HashMap;
use std::fs::{File, Metadata, Permissions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use blake3::Hash;
use rustix::fs::{OFlags, Timespec, Timestamps, UTIME_OMIT};

use super::SnapshotError;
use super::content::content_digest;
use super::fault::step;
use super::manifest::FileRecord;

/// What a file is known by between two looks at it. See the module's invariants for why the time
/// of status change is not here, and why equal stamps of a sealed file mean equal content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    size: u64,
    modified: (i64, i64),
    /// Tells an inode from one that had its number before.
    born: Option<SystemTime>,
}

const SEALED_TIME: (i64, i64) = (0, 0);

impl Stamp {
    fn of(meta: &Metadata) -> Self {
        Self {
            size: meta.len(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            born: meta.created().ok(),
        }
    }
}

/// Digests that this process has found, by device and inode: hard links share them.
#[derive(Debug, Default)]
pub(super) struct Verified {
    known: Mutex<HashMap<(u64, u64), (Stamp, Hash)>>,
    /// One file is hashed at a time, by all processors: who comes meanwhile finds it done.
    hashing: Mutex<()>,
}

impl Verified {
    /// Makes a file of a draft read-only and ours, puts it on the disk, and takes its digest.
    pub(super) fn freeze(&self, path: &Path, name: &str) -> Result<FileRecord, SnapshotError> {
        let (file, meta) = open_regular(path)?
            .ok_or_else(|| unfit(path, "it is no regular file, or is no longer there"))?;
        let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
        step(path)?;
        if meta.uid() != uid.as_raw() {
            rustix::fs::fchown(&file, Some(uid), Some(gid))
                .map_err(SnapshotError::io("take over", path))?;
        }
        // A file that a VM's process made and has open is not safe from it: its writes show.
        file.set_permissions(Permissions::from_mode(0o444))
            .map_err(SnapshotError::io("make read-only", path))?;
        step(path)?;
        rustix::fs::futimens(&file, &sealed_times())
            .map_err(SnapshotError::io("set the time of", path))?;
        // After the time is set: from here on a write by a mapping faults, and sets it again.
        step(path)?;
        file.sync_all().map_err(SnapshotError::io("flush", path))?;
        let meta = file.metadata().map_err(SnapshotError::io("examine", path))?;
        let digest = self.digest(&file, &meta, None).map_err(SnapshotError::io("read", path))?;
        let after = file.metadata().map_err(SnapshotError::io("examine", path))?;
        if Stamp::of(&meta) != Stamp::of(&after) || Stamp::of(&after).modified != SEALED_TIME {
            return Err(unfit(path, "it was written while it was sealed"));
        }
        Ok(FileRecord {
            name: name.to_owned(),
            size_bytes: after.len(),
            allocated_bytes: allocated(&after),
            digest: digest.to_hex().to_string(),
        })
    }

    /// Checks a sealed file, and returns the room it takes.
    pub(super) fn check(&self, path: &Path, record: &FileRecord) -> Result<u64, SnapshotError> {
        let damaged = |reason| SnapshotError::Damaged { file: path.to_owned(), reason };
        let (file, meta) =
            open_regular(path)?.ok_or_else(|| damaged("it is missing, or no regular file"))?;
        if meta.len() != record.size_bytes {
            return Err(damaged("it has another size than when it was sealed"));
        }
        let wanted = Hash::from_hex(&record.digest)
            .map_err(|_| damaged("the manifest has no digest for it"))?;
        let found =
            self.digest(&file, &meta, Some(wanted)).map_err(SnapshotError::io("read", path))?;
        if found != wanted {
            return Err(damaged("it has another content than when it was sealed"));
        }
        Ok(allocated(&meta))
    }

    /// Forgets files, so that what is kept does not grow with what was.
    pub(super) fn forget(&self, files: &[(u64, u64)]) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        for file in files {
            known.remove(file);
        }
    }

    /// The digest, from memory where the file has not changed and is as wanted.
    fn digest(&self, file: &File, meta: &Metadata, wanted: Option<Hash>) -> std::io::Result<Hash> {
        let (inode, stamp) = ((meta.dev(), meta.ino()), Stamp::of(meta));
        let find = || {
            let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            let (_, digest) = *known.get(&inode).filter(|known| known.0 == stamp)?;
            (wanted.is_none() || wanted == Some(digest)).then_some(digest)
        };
        if let Some(digest) = find() {
            return Ok(digest);
        }
        let _turn = self.hashing.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(digest) = find() {
            return Ok(digest);
        }
        let digest = content_digest(file, meta.len())?;
        // The time of another file (a copy, a file that was repaired) may be that of a write to
        // come in the same tick of the clock: such a file is hashed every time.
        let unchanged = Stamp::of(&file.metadata()?) == stamp;
        if unchanged && stamp.modified == SEALED_TIME {
            let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            known.insert(inode, (stamp, digest));
        }
        Ok(digest)
    }
}

/// Nothing where there is no file, or one of another kind. A symbolic link is not followed, and a
/// pipe is not waited for.
fn open_regular(path: &Path) -> Result<Option<(File, Metadata)>, SnapshotError> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let opened = File::options()
        .read(true)
        .custom_flags(flags.bits().cast_signed())
        .open(path)
        .and_then(|file| file.metadata().map(|meta| (file, meta)));
    match opened {
        Ok((file, meta)) => Ok(meta.is_file().then_some((file, meta))),
        Err(error) => match rustix::io::Errno::from_io_error(&error) {
            // Not there; a symbolic link; a socket or a device without driver.
            Some(
                rustix::io::Errno::NOENT
                | rustix::io::Errno::LOOP
                | rustix::io::Errno::NXIO
                | rustix::io::Errno::NODEV,
            ) => Ok(None),
            _ => Err(SnapshotError::io("open", path)(error)),
        },
    }
}

pub(super) fn allocated(meta: &Metadata) -> u64 {
    meta.blocks() * 512
}

pub(super) fn unfit(path: &Path, reason: &'static str) -> SnapshotError {
    SnapshotError::Unfit { file: path.to_owned(), reason }
}

fn sealed_times() -> Timestamps {
    let (tv_sec, tv_nsec) = SEALED_TIME;
    Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec, tv_nsec },
    }
}
