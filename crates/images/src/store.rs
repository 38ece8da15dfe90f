use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rustix::fs::FlockOperation;

use crate::blobs::{Blobs, replace_file};
use crate::manifest::{Blob, BootSet, Image};
use crate::pins::Pins;
use crate::program::read_if_there;
use crate::seed::DiskSeed;
use crate::{Digest, ImageError, build, seed};

/// A folder of images. Cheap to keep for the life of a process; may be shared by threads, and the
/// folder by processes.
#[derive(Debug)]
pub struct ImageStore {
    root: PathBuf,
    pub(crate) blobs: Blobs,
    seeds: Mutex<HashMap<u32, DiskSeed>>,
}

/// What [`ImageStore::prune`] removed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pruned {
    pub blobs: Vec<Digest>,
    pub size_bytes: u64,
}

impl ImageStore {
    /// Opens the store, making its folders where they are missing.
    pub fn open(root: impl Into<PathBuf>) -> Result<Self, ImageError> {
        let root = root.into();
        for folder in ["blobs", "images", "stages", "seeds", "pins", "tmp"] {
            let path = root.join(folder);
            fs::create_dir_all(&path).map_err(ImageError::io("make the folder", path))?;
        }
        let lock = root.join("lock");
        open_lock(&lock)?;
        let blobs = Blobs::new(root.join("blobs"), root.join("tmp"));
        Ok(Self { root, blobs, seeds: Mutex::default() })
    }

    /// All images, by name.
    pub fn list(&self) -> Result<Vec<Image>, ImageError> {
        self.names()?.iter().map(|name| self.get(name)).collect()
    }

    /// The image of a name, or of `name@digest`, which goes on to work for as long as the blobs
    /// are kept when the name has come to mean a newer one.
    pub fn get(&self, name: &str) -> Result<Image, ImageError> {
        let unknown = || -> Result<ImageError, ImageError> {
            Ok(ImageError::Unknown { name: name.to_owned(), known: self.names()? })
        };
        let (plain, pinned) = match name.split_once('@') {
            Some((plain, digest)) => (plain, Some(Digest::parse(digest)?)),
            None => (name, None),
        };
        if !is_name(plain) {
            return Err(unknown()?);
        }
        let path = match &pinned {
            Some(digest) => self.blobs.path(digest),
            None => self.manifest_path(plain),
        };
        let Some(bytes) = read_if_there(&path)? else { return Err(unknown()?) };
        let digest = Digest::of_bytes(&bytes);
        if let Some(pinned) = pinned.filter(|pinned| *pinned != digest) {
            return Err(ImageError::DamagedBlob {
                image: plain.to_owned(),
                digest: pinned,
                found: digest,
                path,
            });
        }
        let image: Image = serde_json::from_slice(&bytes)
            .map_err(|source| ImageError::Manifest { path, source })?;
        if image.name != plain {
            return Err(unknown()?);
        }
        Ok(Image { digest, ..image })
    }

    /// The files to boot an image with. Each is checked; see the module's invariants.
    pub fn resolve(&self, name: &str) -> Result<BootSet, ImageError> {
        let image = self.get(name)?;
        let checked = |digest| self.blobs.checked_path(&image.name, digest);
        Ok(BootSet {
            kernel: checked(&image.kernel.blob.digest)?,
            initrd: checked(&image.initrd.digest)?,
            rootfs: checked(&image.rootfs.digest)?,
            kernel_flavour: image.kernel.flavour,
            digest: image.digest.to_string(),
            image: image.name,
        })
    }

    /// The layer with the kernel's modules, checked; see [`Image::module_layer`].
    pub fn module_layer(&self, name: &str) -> Result<Option<(Blob, PathBuf)>, ImageError> {
        let image = self.get(name)?;
        let Some(blob) = image.module_layer else { return Ok(None) };
        let path = self.blobs.checked_path(&image.name, &blob.digest)?;
        Ok(Some((blob, path)))
    }

    /// Builds what the request asks for, or finds that it is there. Takes about a minute and root
    /// the first time; when only the agent has changed, a moment. Returns the default image; the
    /// one with the test kernel, where asked for, is made beside it.
    pub fn build(
        &self,
        request: &build::BuildRequest,
        progress: &dyn Fn(&str),
    ) -> Result<Image, ImageError> {
        build::build(self, request, progress)
    }

    /// What a VM's writable layer of this size is made from. The first call for a size runs
    /// `mkfs.ext4`; after that it is on disk, and in memory.
    pub fn seed(&self, disk_mb: u32) -> Result<DiskSeed, ImageError> {
        let mut seeds = self.seeds.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(seed) = seeds.get(&disk_mb) {
            return Ok(seed.clone());
        }
        let seed = seed::load_or_make(&self.root.join("seeds"), disk_mb)?;
        seeds.insert(disk_mb, seed.clone());
        Ok(seed)
    }

    /// Removes blobs that no image refers to. VMs may still want an older image than the one its
    /// name means now: `keep` has the manifest digests of those. What is pinned stays.
    pub fn prune(&self, keep: &[Digest]) -> Result<Pruned, ImageError> {
        let _lock = self.lock(&|_| ())?;
        let pins = Pins::lock(self.folder("pins"))?;
        crate::blobs::sweep(&self.root.join("tmp"));
        let mut wanted = BTreeSet::new();
        for image in self.list()? {
            wanted.extend(image.blobs().map(|blob| blob.digest.hex().to_owned()));
            wanted.insert(image.digest.hex().to_owned());
        }
        for digest in keep.iter().chain(&pins.images()?) {
            let blobs = self.blobs_of(digest)?.unwrap_or_default();
            wanted.extend(blobs.iter().map(|blob| blob.hex().to_owned()));
        }
        let mut pruned = Pruned::default();
        for name in file_names(self.blobs.folder())? {
            let Ok(digest) = Digest::parse(&format!("blake3:{name}")) else { continue };
            if wanted.contains(&name) {
                continue;
            }
            let path = self.blobs.path(&digest);
            let size_bytes = fs::metadata(&path).map_err(ImageError::io("examine", &path))?.len();
            fs::remove_file(&path).map_err(ImageError::io("remove", &path))?;
            pruned.size_bytes += size_bytes;
            pruned.blobs.push(digest);
        }
        build::forget_stages(self)?;
        Ok(pruned)
    }

    /// Keeps the blobs of an image, by its manifest's digest, for as long as the file or folder
    /// `holder` exists, whatever its name comes to mean. To be called before the holder is made,
    /// within the hour; [`ImageStore::prune`] forgets the pin when the holder is gone.
    pub fn pin(&self, holder: &Path, image: &Digest) -> Result<(), ImageError> {
        let pins = Pins::lock(self.folder("pins"))?;
        // Pruning waits for the lock, so that what is here now stays.
        let needed = self.blobs_of(image)?.unwrap_or_else(|| vec![image.clone()]);
        for digest in needed {
            let path = self.blobs.path(&digest);
            if !path.exists() {
                return Err(ImageError::MissingBlob { image: image.to_string(), digest, path });
            }
        }
        pins.add(holder, image)
    }

    /// The blobs of an image, its manifest first; nothing where that is not here.
    fn blobs_of(&self, image: &Digest) -> Result<Option<Vec<Digest>>, ImageError> {
        let path = self.blobs.path(image);
        let Some(bytes) = read_if_there(&path)? else { return Ok(None) };
        let manifest: Image = serde_json::from_slice(&bytes)
            .map_err(|source| ImageError::Manifest { path, source })?;
        let parts = manifest.blobs().map(|blob| blob.digest.clone());
        Ok(Some(std::iter::once(image.clone()).chain(parts).collect()))
    }

    pub(crate) fn folder(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Waits until no other builder is at work, in this process or any other. The lock ends with
    /// the returned file, and with the process.
    pub(crate) fn lock(&self, progress: &dyn Fn(&str)) -> Result<File, ImageError> {
        let path = self.root.join("lock");
        let file = open_lock(&path)?;
        let wait = |operation| {
            rustix::io::retry_on_intr(|| rustix::fs::flock(&file, operation))
                .map_err(io::Error::from)
        };
        match wait(FlockOperation::NonBlockingLockExclusive) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                progress("wait for another builder");
                wait(FlockOperation::LockExclusive).map_err(ImageError::io("lock", path))?;
            }
            other => other.map_err(ImageError::io("lock", path))?,
        }
        Ok(file)
    }

    /// Makes the manifest's name mean this image from now on.
    pub(crate) fn publish(&self, image: &Image) -> Result<Image, ImageError> {
        let path = self.manifest_path(&image.name);
        let mut bytes = serde_json::to_vec_pretty(image)
            .map_err(|source| ImageError::Manifest { path: path.clone(), source })?;
        bytes.push(b'\n');
        let blob = self.blobs.put_bytes(&bytes)?;
        replace_file(&self.folder("tmp"), &path, &bytes)?;
        Ok(Image { digest: blob.digest, ..image.clone() })
    }

    fn manifest_path(&self, name: &str) -> PathBuf {
        self.root.join("images").join(format!("{name}.json"))
    }

    fn names(&self) -> Result<Vec<String>, ImageError> {
        let mut names: Vec<_> = file_names(&self.root.join("images"))?
            .into_iter()
            .filter_map(|file| file.strip_suffix(".json").map(str::to_owned))
            .filter(|name| is_name(name))
            .collect();
        names.sort();
        Ok(names)
    }
}

/// The names are file names too: letters, digits and dashes, nothing that could leave the folder.
fn is_name(name: &str) -> bool {
    (1..=63).contains(&name.len())
        && !name.starts_with(['-', '.'])
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

pub(crate) fn file_names(folder: &Path) -> Result<Vec<String>, ImageError> {
    fs::read_dir(folder)
        .and_then(|entries| {
            entries
                .map(|entry| entry.map(|entry| entry.file_name().to_string_lossy().into_owned()))
                .collect()
        })
        .map_err(ImageError::io("list", folder))
}

pub(crate) fn open_lock(path: &Path) -> Result<File, ImageError> {
    File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .map_err(ImageError::io("open the lock", path))
}

#[cfg(test)]
mod tests;
