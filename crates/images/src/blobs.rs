//! Files by content: written once, never in place, checked when used.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::manifest::Blob;
use crate::{Digest, ImageError};

/// What changes when a file is replaced or written to. The change time cannot be set back by the
/// one who writes, so equal stamps mean equal content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(file: &File) -> io::Result<Self> {
        let meta = file.metadata()?;
        Ok(Self {
            device: meta.dev(),
            inode: meta.ino(),
            size: meta.size(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        })
    }
}

#[derive(Debug)]
pub(crate) struct Blobs {
    folder: PathBuf,
    tmp: PathBuf,
    checked: Mutex<HashMap<Digest, Stamp>>,
}

impl Blobs {
    pub(crate) fn new(folder: PathBuf, tmp: PathBuf) -> Self {
        Self { folder, tmp, checked: Mutex::default() }
    }

    pub(crate) fn path(&self, digest: &Digest) -> PathBuf {
        self.folder.join(digest.hex())
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// A path under `tmp/` that no other builder uses. The caller holds the builder's lock.
    pub(crate) fn scratch(&self, what: &str) -> PathBuf {
        scratch_path(&self.tmp, what)
    }

    /// Whether the blob is there with its size; the content is checked when it is used.
    pub(crate) fn has(&self, blob: &Blob) -> bool {
        fs::metadata(self.path(&blob.digest))
            .is_ok_and(|meta| meta.is_file() && meta.len() == blob.size_bytes)
    }

    pub(crate) fn put_bytes(&self, bytes: &[u8]) -> Result<Blob, ImageError> {
        let path = self.scratch("blob");
        File::create_new(&path)
            .and_then(|mut file| file.write_all(bytes))
            .map_err(ImageError::io("write", &path))?;
        self.put_file(&path)
    }

    /// Takes a file made under `tmp/` into the store.
    pub(crate) fn put_file(&self, path: &Path) -> Result<Blob, ImageError> {
        let file = File::open(path).map_err(ImageError::io("open", path))?;
        let digest = Digest::of_file(&file).map_err(ImageError::io("read", path))?;
        let size_bytes = file.metadata().map_err(ImageError::io("examine", path))?.len();
        file.set_permissions(fs::Permissions::from_mode(0o444))
            .and_then(|()| file.sync_all())
            .map_err(ImageError::io("flush", path))?;
        let target = self.path(&digest);
        fs::rename(path, &target).map_err(ImageError::io("move into place", &target))?;
        sync_folder(&self.folder)?;
        Ok(Blob { digest, size_bytes })
    }

    /// The blob's path, after making sure that its content is what its name says.
    pub(crate) fn checked_path(&self, image: &str, digest: &Digest) -> Result<PathBuf, ImageError> {
        let path = self.path(digest);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(ImageError::MissingBlob {
                    image: image.to_owned(),
                    digest: digest.clone(),
                    path,
                });
            }
            Err(error) => return Err(ImageError::io("open", path)(error)),
        };
        // Taken before hashing: a write during the hashing then shows as a changed stamp next time.
        let stamp = Stamp::of(&file).map_err(ImageError::io("examine", &path))?;
        if self.checked.lock().unwrap_or_else(PoisonError::into_inner).get(digest) == Some(&stamp) {
            return Ok(path);
        }
        let found = Digest::of_file(&file).map_err(ImageError::io("read", &path))?;
        if found != *digest {
            return Err(ImageError::DamagedBlob {
                image: image.to_owned(),
                digest: digest.clone(),
                found,
                path,
            });
        }
        self.checked.lock().unwrap_or_else(PoisonError::into_inner).insert(digest.clone(), stamp);
        Ok(path)
    }
}

/// Makes names in a folder durable.
pub(crate) fn sync_folder(folder: &Path) -> Result<(), ImageError> {
    File::open(folder)
        .and_then(|file| file.sync_all())
        .map_err(ImageError::io("flush the folder", folder))
}

/// Replaces a small file in one step. `tmp` is on the same file system as `path`.
pub(crate) fn replace_file(tmp: &Path, path: &Path, content: &[u8]) -> Result<(), ImageError> {
    let scratch = scratch_path(tmp, "file");
    File::create_new(&scratch)
        .and_then(|mut file| {
            file.write_all(content)?;
            file.sync_all()
        })
        .map_err(ImageError::io("write", &scratch))?;
    fs::rename(&scratch, path).map_err(ImageError::io("move into place", path))?;
    path.parent().map_or(Ok(()), sync_folder)
}

pub(crate) fn scratch_path(tmp: &Path, what: &str) -> PathBuf {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    tmp.join(format!("{what}-{}-{count}", std::process::id()))
}

/// Removes a folder of a build with all that is in it, unless something is mounted there: programs
/// that install packages mount the host's own `/dev` and `/proc`, and one that was killed may not
/// have had the time to undo it.
pub(crate) fn remove_tree(path: &Path) -> io::Result<()> {
    let folder = path.canonicalize()?;
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    if let Some(mount) = mounted_under(&mounts, &folder) {
        return Err(io::Error::new(
            io::ErrorKind::ResourceBusy,
            format!("{mount} is mounted; unmount it first"),
        ));
    }
    fs::remove_dir_all(&folder)
}

/// The first mount point at or under a folder. Spaces in mount points are written `\\040`.
fn mounted_under<'a>(mountinfo: &'a str, folder: &Path) -> Option<&'a str> {
    mountinfo
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .find(|mount| Path::new(&mount.replace("\\040", " ")).starts_with(folder))
}

/// Removes what a builder that died has left. What cannot be removed now (its programs may still
/// be running and writing) is left to the next sweep.
pub(crate) fn sweep(tmp: &Path) {
    let Ok(entries) = fs::read_dir(tmp) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        let removed = if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&path)
        } else {
            fs::remove_file(&path)
        };
        if let Err(error) = removed {
            tracing::warn!(path = %path.display(), %error, "leave a stale file to the next sweep");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folder_with_a_mount_in_it_is_left_alone() {
        let mounts = "22 1 0:21 / / rw - ext4 /dev/vda rw\n\
                      23 22 0:22 / /store\\040x/tmp/rootfs-1-1/tree/proc rw - proc proc rw\n";
        let found = mounted_under(mounts, Path::new("/store x/tmp/rootfs-1-1"));
        assert_eq!(found, Some("/store\\040x/tmp/rootfs-1-1/tree/proc"));
        assert_eq!(mounted_under(mounts, Path::new("/store x/tmp/rootfs-1-10")), None);
        assert_eq!(mounted_under(mounts, Path::new("/store x/tmp/rootfs-1")), None);
    }
}
