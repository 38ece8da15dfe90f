//! Layers and artefacts by their content, and records of what was built from what.
//!
//! ```text
//!   layers/<blake3>                 one erofs image, 0444
//!   records/<key>.json              what was built from these inputs; its time is the last use
//!   artefacts/<algorithm>-<hex>     what was fetched; its time is the last use
//!   lock.json                       what was asked, and what it became (see the module `lock`)
//!   building/<key>.lock             held by the one who builds this layer
//!   apt/                            Debian's lists
//!   tmp/<session>/, <session>.lock  what a process has in hand, and the lock that it holds on it
//! ```
//!
//! Invariants:
//! - What has its final name is whole: it was made under `tmp/`, flushed, and renamed.
//! - A layer is pinned by a shared lock on its file, taken before the file has its name. Only
//!   what can be locked alone is removed, so that what is in use stays, in whichever process.
//! - A layer is hashed when this process first sees it, and again when it is another file.
//! - What is under `tmp/` and nobody holds is removed by the next one who opens the store.

mod layers;
mod prune;
mod session;

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT};
use serde::Serialize;

use crate::checksum::Checksum;
use crate::error::ToolError;

pub(crate) use layers::{LayerRecord, PinnedLayer, trim};
pub(crate) use session::unique;

#[derive(Debug)]
pub(crate) struct Store {
    root: PathBuf,
    session: session::Session,
    verified: layers::Verified,
}

/// A file in hand, removed when it was not moved into its place.
#[derive(Debug)]
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        match fs::remove_file(&self.0) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %self.0.display(), %error, "leave a file to the next start");
            }
            _ => {}
        }
    }
}

impl Store {
    pub(crate) fn open(root: &Path) -> Result<Self, ToolError> {
        for folder in ["layers", "records", "artefacts", "building", "apt", "tmp"] {
            let path = root.join(folder);
            fs::create_dir_all(&path).map_err(ToolError::io("make the folder", path))?;
        }
        session::sweep(&root.join("tmp"));
        let session = session::Session::begin(&root.join("tmp"))?;
        Ok(Self { root: root.to_owned(), session, verified: layers::Verified::default() })
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// For files in hand; goes with this process, or at the next start.
    pub(crate) fn session_folder(&self) -> &Path {
        self.session.folder()
    }

    pub(crate) fn scratch(&self, what: &str) -> Scratch {
        Scratch(self.session.folder().join(format!("{what}-{}", unique())))
    }

    /// Waits until nobody builds this layer, in any process; says so once when it must wait.
    /// Blocks. The lock ends with the file, and with the process.
    pub(crate) fn lock_build(&self, key: &str, waits: impl FnOnce()) -> Result<File, ToolError> {
        let path = self.root.join("building").join(format!("{key}.lock"));
        let file = open_lock(&path)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                waits();
                flock(&file, FlockOperation::LockExclusive).map_err(ToolError::io("lock", path))?;
            }
            other => other.map_err(ToolError::io("lock", path))?,
        }
        Ok(file)
    }

    /// Where an artefact is or would be.
    pub(crate) fn artefact_path(&self, checksum: &Checksum) -> PathBuf {
        self.root.join("artefacts").join(checksum.file_name())
    }

    /// An artefact that is there, checked, and not pruned while the file is open. One that is
    /// damaged is removed. Blocks.
    pub(crate) fn find_artefact(
        &self,
        checksum: &Checksum,
    ) -> Result<Option<(PathBuf, File)>, ToolError> {
        let path = self.artefact_path(checksum);
        let Some(mut file) = open_pinned(&path)? else { return Ok(None) };
        if !checksum.is_of(&mut file).map_err(ToolError::io("read", &path))? {
            tracing::warn!(path = %path.display(), "remove a damaged artefact");
            remove(&path)?;
            return Ok(None);
        }
        touch(&file).map_err(ToolError::io("set the time of", &path))?;
        Ok(Some((path, file)))
    }

    /// Takes a file that was checked. Blocks.
    pub(crate) fn put_artefact(
        &self,
        scratch: &Scratch,
        checksum: &Checksum,
    ) -> Result<(PathBuf, File), ToolError> {
        let path = self.artefact_path(checksum);
        let file = File::open(scratch.path()).map_err(ToolError::io("open", scratch.path()))?;
        flock(&file, FlockOperation::LockShared).map_err(ToolError::io("lock", scratch.path()))?;
        file.sync_all().map_err(ToolError::io("flush", scratch.path()))?;
        fs::rename(scratch.path(), &path).map_err(ToolError::io("move into place", &path))?;
        sync_folder(&self.root.join("artefacts"))?;
        Ok((path, file))
    }

    /// Replaces a small file in one step.
    pub(crate) fn replace(&self, path: &Path, content: &impl Serialize) -> Result<(), ToolError> {
        let scratch = self.scratch("file");
        let mut bytes = serde_json::to_vec_pretty(content)
            .map_err(io::Error::other)
            .map_err(ToolError::io("write", path))?;
        bytes.push(b'\n');
        write_new(scratch.path(), &bytes)?;
        fs::rename(scratch.path(), path).map_err(ToolError::io("move into place", path))?;
        path.parent().map_or(Ok(()), sync_folder)
    }
}

pub(crate) fn write_new(path: &Path, bytes: &[u8]) -> Result<(), ToolError> {
    File::create_new(path)
        .and_then(|mut file| {
            file.write_all(bytes)?;
            file.sync_all()
        })
        .map_err(ToolError::io("write", path))
}

pub(crate) fn flock(file: &File, operation: FlockOperation) -> io::Result<()> {
    rustix::io::retry_on_intr(|| rustix::fs::flock(file, operation)).map_err(io::Error::from)
}

pub(crate) fn open_lock(path: &Path) -> Result<File, ToolError> {
    File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .map_err(ToolError::io("open the lock", path))
}

/// Opens a file and locks it with others, so that nobody prunes it. `None` where there is none, or
/// it was removed meanwhile.
fn open_pinned(path: &Path) -> Result<Option<File>, ToolError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(ToolError::io("open", path)(error)),
    };
    flock(&file, FlockOperation::LockShared).map_err(ToolError::io("lock", path))?;
    Ok(is_still_there(&file, path).map_err(ToolError::io("examine", path))?.then_some(file))
}

/// Whether a path still leads to the file that was opened by it.
fn is_still_there(file: &File, path: &Path) -> io::Result<bool> {
    use std::os::unix::fs::MetadataExt;
    let opened = file.metadata()?;
    match fs::metadata(path) {
        Ok(found) => Ok((found.dev(), found.ino()) == (opened.dev(), opened.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Writes down that a file was used now.
fn touch(file: &File) -> io::Result<()> {
    let now = Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
    };
    Ok(rustix::fs::futimens(file, &now)?)
}

fn remove(path: &Path) -> Result<(), ToolError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(ToolError::io("remove", path)(error))
        }
        _ => Ok(()),
    }
}

/// Makes names in a folder durable.
pub(crate) fn sync_folder(folder: &Path) -> Result<(), ToolError> {
    File::open(folder)
        .and_then(|file| file.sync_all())
        .map_err(ToolError::io("flush the folder", folder))
}

/// The files of a folder, by name.
pub(crate) fn file_names(folder: &Path) -> Result<Vec<String>, ToolError> {
    let read = || -> io::Result<Vec<String>> {
        let names = fs::read_dir(folder)?;
        names.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    };
    let mut names = read().map_err(ToolError::io("list", folder))?;
    names.sort_unstable();
    Ok(names)
}

#[cfg(test)]
mod tests;
