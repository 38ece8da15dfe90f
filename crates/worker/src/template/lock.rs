//! One builder of a template at a time: in this process, and over all that share the folder.

use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};

use crate::failure::{Failure, blocking, internal};

/// A lock of another process sends no event. A build takes seconds at least.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// The builds of this process, by digest.
#[derive(Default)]
pub(crate) struct Builds(Mutex<HashMap<String, Weak<AsyncMutex<()>>>>);

impl Builds {
    pub(super) async fn turn(&self, digest: &str) -> OwnedMutexGuard<()> {
        let lock = {
            let mut builds = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            builds.retain(|_, lock| lock.strong_count() > 0);
            let known = builds.get(digest).and_then(Weak::upgrade);
            known.unwrap_or_else(|| {
                let lock = Arc::new(AsyncMutex::new(()));
                builds.insert(digest.to_owned(), Arc::downgrade(&lock));
                lock
            })
        };
        lock.lock_owned().await
    }
}

/// Held by one process; its file goes with it.
pub(super) struct BuildLock {
    path: PathBuf,
    // Unlocked by being closed, after the file is gone.
    _file: File,
}

impl Drop for BuildLock {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Waits for its turn; whoever drops the future waits no more.
pub(super) async fn lock(path: PathBuf) -> Result<BuildLock, Failure> {
    loop {
        let wanted = path.clone();
        match blocking("lock a template", move || try_lock(&wanted)).await? {
            Ok(Some(file)) => return Ok(BuildLock { path, _file: file }),
            Ok(None) => tokio::time::sleep(LOOK_AGAIN).await,
            Err(error) => {
                tracing::error!(path = %path.display(), %error, "lock a template");
                return Err(Failure::again(internal("lock the template")));
            }
        }
    }
}

fn try_lock(path: &Path) -> io::Result<Option<File>> {
    if let Some(folder) = path.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    }
    let file =
        OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => return Ok(None),
        Err(error) => return Err(error.into()),
    }
    // The holder before may have removed the file between the two calls.
    let is_there = fs::metadata(path).is_ok_and(|there| {
        file.metadata().is_ok_and(|ours| (ours.dev(), ours.ino()) == (there.dev(), there.ino()))
    });
    Ok(is_there.then_some(file))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_holds_the_lock_and_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("builds/abc");
        let file = try_lock(&path).unwrap().unwrap();
        assert!(try_lock(&path).unwrap().is_none());
        drop(BuildLock { path: path.clone(), _file: file });
        assert!(!path.exists());
        assert!(try_lock(&path).unwrap().is_some());
    }

    #[tokio::test]
    async fn builds_of_one_template_come_one_after_another() {
        let builds = Builds::default();
        let first = builds.turn("a").await;
        let other = builds.turn("b").await;
        let waiting = tokio::time::timeout(Duration::ZERO, builds.turn("a"));
        assert!(waiting.await.is_err());
        drop((first, other));
        drop(builds.turn("a").await);
    }
}
