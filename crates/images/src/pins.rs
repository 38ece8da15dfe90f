//! Who needs an image that its name may not mean any more: a snapshot names files of the image it
//! was taken on, and other data directories and programs know nothing of it. So the need is
//! written down beside the images.
//!
//! A pin is a file `pins/<digest of the holder's path>.json`. It holds for as long as its holder
//! exists, so that removing the holder is all that has to be done, by whoever does it and even if
//! he dies; a pin that is younger than [`GRACE`] holds too, as its holder may be about to be made.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use crate::blobs::replace_file;
use crate::program::read_if_there;
use crate::store::{file_names, open_lock};
use crate::{Digest, ImageError};

/// Longest time between the pin and its holder: the making of a snapshot.
const GRACE: Duration = Duration::from_hours(1);

#[derive(Debug, Serialize, Deserialize)]
struct Pin {
    holder: PathBuf,
    /// Of the image's manifest.
    image: Digest,
}

/// The folder of pins, which nobody else changes now.
#[derive(Debug)]
pub(crate) struct Pins {
    folder: PathBuf,
    _lock: File,
}

impl Pins {
    /// Waits for others, who hold the lock for a few quick steps, or while they remove blobs.
    pub(crate) fn lock(folder: PathBuf) -> Result<Self, ImageError> {
        let path = folder.join("lock");
        let lock = open_lock(&path)?;
        rustix::io::retry_on_intr(|| rustix::fs::flock(&lock, FlockOperation::LockExclusive))
            .map_err(io::Error::from)
            .map_err(ImageError::io("lock", path))?;
        Ok(Self { folder, _lock: lock })
    }

    pub(crate) fn add(&self, holder: &Path, image: &Digest) -> Result<(), ImageError> {
        let holder = std::path::absolute(holder).map_err(ImageError::io("name", holder))?;
        let name = Digest::of_bytes(holder.as_os_str().as_encoded_bytes());
        let path = self.folder.join(format!("{}.json", name.hex()));
        let bytes = serde_json::to_vec(&Pin { holder, image: image.clone() })
            .map_err(|source| ImageError::Manifest { path: path.clone(), source })?;
        replace_file(&self.folder, &path, &bytes)
    }

    /// The images that are pinned. Pins without a holder are removed, and what a process that died
    /// while it wrote one has left.
    pub(crate) fn images(&self) -> Result<Vec<Digest>, ImageError> {
        let mut images = Vec::new();
        for name in file_names(&self.folder)? {
            let path = self.folder.join(&name);
            if name == "lock" {
                continue;
            }
            if path.extension().is_none_or(|kind| kind != "json") {
                fs::remove_file(&path).map_err(ImageError::io("remove", &path))?;
                continue;
            }
            let Some(bytes) = read_if_there(&path)? else { continue };
            let pin: Pin = serde_json::from_slice(&bytes)
                .map_err(|source| ImageError::Manifest { path: path.clone(), source })?;
            if is_held(&path, &pin.holder)? {
                images.push(pin.image);
            } else {
                fs::remove_file(&path).map_err(ImageError::io("remove", &path))?;
            }
        }
        Ok(images)
    }
}

fn is_held(pin: &Path, holder: &Path) -> Result<bool, ImageError> {
    match fs::symlink_metadata(holder) {
        Err(error)
            if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) =>
        {
            let made = fs::metadata(pin).and_then(|meta| meta.modified());
            let made = made.map_err(ImageError::io("examine", pin))?;
            // A time in the future is a clock that was set back.
            Ok(made.elapsed().is_ok_and(|age| age < GRACE))
        }
        // Whatever else is wrong with it, it may be there.
        _ => Ok(true),
    }
}
