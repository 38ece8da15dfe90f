//! What a process has in hand, so that it can be told from what a dead one has left.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::FlockOperation;
use uuid::Uuid;

use super::{flock, is_still_there, open_lock};
use crate::error::ToolError;

/// A name that no other in this process has.
pub(crate) fn unique() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    format!("{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

#[derive(Debug)]
pub(super) struct Session {
    folder: PathBuf,
    lock_path: PathBuf,
    _lock: File,
}

impl Session {
    pub(super) fn begin(tmp: &Path) -> Result<Self, ToolError> {
        loop {
            let id = Uuid::new_v4();
            let lock_path = tmp.join(format!("{id}.lock"));
            let lock = open_lock(&lock_path)?;
            flock(&lock, FlockOperation::LockShared).map_err(ToolError::io("lock", &lock_path))?;
            // A sweep may have come between the two, and taken the lock for a dead one's.
            if !is_still_there(&lock, &lock_path).map_err(ToolError::io("examine", &lock_path))? {
                continue;
            }
            let folder = tmp.join(id.to_string());
            fs::create_dir(&folder).map_err(ToolError::io("make the folder", &folder))?;
            return Ok(Self { folder, lock_path, _lock: lock });
        }
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // What cannot be removed is left to the next sweep, which finds it unlocked.
        let _ = fs::remove_dir_all(&self.folder).and_then(|()| fs::remove_file(&self.lock_path));
    }
}

/// Removes what dead processes have left.
pub(super) fn sweep(tmp: &Path) {
    let Ok(entries) = fs::read_dir(tmp) else { return };
    for entry in entries.flatten() {
        let lock = entry.path();
        if lock.extension().is_some_and(|kind| kind == "lock")
            && let Err(error) = sweep_one(&lock)
        {
            tracing::warn!(path = %lock.display(), %error, "leave files to the next start");
        }
    }
}

fn sweep_one(lock: &Path) -> io::Result<()> {
    let file = File::open(lock)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
        other => other?,
    }
    match fs::remove_dir_all(lock.with_extension("")) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // Last: as long as it is there, the folder is found again.
    fs::remove_file(lock)
}
