//! Memories of snapshots, kept ready: each in a file in memory that nobody can change any more, and
//! that every QEMU restored from it maps privately.
//!
//! QEMU opens the file of its memory for writing, also where it maps it privately. A file on disk
//! would have to be writable for the user of every VM; a sealed one is not, whoever opens it.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _},
    },
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use rustix::{
    fs::{MemfdFlags, SealFlags, SeekFrom},
    io::Errno,
};
use tokio::sync::OnceCell;

use crate::{
    DriverError,
    host::{blocking, file_error},
};

const COPY_BYTES: usize = 1024 * 1024;
/// Of the host's memory, where nothing else is configured.
const BUDGET_DIVISOR: u64 = 4;
/// Where the host does not say how much it has.
const BUDGET_BYTES_DEFAULT: u64 = 1 << 30;

/// A file that has not changed since. Its links may have: every VM makes one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    bytes: u64,
    changed_ns: i128,
}

impl Identity {
    fn of(file: &File) -> io::Result<Self> {
        let found = file.metadata()?;
        let changed_ns = i128::from(found.mtime()) * 1_000_000_000 + i128::from(found.mtime_nsec());
        let (device, inode) = (found.dev(), found.ino());
        Ok(Self { device, inode, bytes: found.len(), changed_ns })
    }
}

type Loaded = Arc<OnceCell<Arc<OwnedFd>>>;

#[derive(Debug)]
struct Entry {
    of: Identity,
    loaded: Loaded,
    /// What it takes of the host's memory; zero while it is loaded.
    bytes: u64,
    used: u64,
}

#[derive(Debug, Default)]
struct Kept {
    entries: Vec<Entry>,
    uses: u64,
}

/// What is loaded, up to a budget; what was not used for longest goes first. A VM that maps a
/// memory keeps it whatever happens here.
#[derive(Debug)]
pub(super) struct Memories {
    budget_bytes: u64,
    kept: Mutex<Kept>,
}

impl Memories {
    pub(super) fn new(budget_bytes: Option<u64>) -> Self {
        let budget_bytes = budget_bytes.unwrap_or_else(|| {
            host_memory_bytes().map_or(BUDGET_BYTES_DEFAULT, |bytes| bytes / BUDGET_DIVISOR)
        });
        Self { budget_bytes, kept: Mutex::default() }
    }

    /// The memory in a file, for QEMU to map. Whoever asks while it is being loaded waits for that.
    pub(super) async fn get(&self, path: &Path) -> Result<Arc<OwnedFd>, DriverError> {
        let opened = open(path)?;
        let of = Identity::of(&opened).map_err(|e| file_error("look at", path, e))?;
        let loaded = self.slot(of);
        let load = || async {
            let path = path.to_owned();
            blocking(move || load(&opened, of, &path).map(Arc::new)).await
        };
        match loaded.get_or_try_init(load).await {
            Ok(memory) => {
                let memory = Arc::clone(memory);
                self.account(of, &memory);
                Ok(memory)
            }
            Err(error) => {
                self.with(|kept| kept.entries.retain(|e| e.of != of || e.loaded.initialized()));
                Err(error)
            }
        }
    }

    fn with<T>(&self, change: impl FnOnce(&mut Kept) -> T) -> T {
        change(&mut self.kept.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn slot(&self, of: Identity) -> Loaded {
        self.with(|kept| {
            kept.uses += 1;
            let used = kept.uses;
            if let Some(entry) = kept.entries.iter_mut().find(|entry| entry.of == of) {
                entry.used = used;
                return Arc::clone(&entry.loaded);
            }
            let loaded = Loaded::default();
            kept.entries.push(Entry { of, loaded: Arc::clone(&loaded), bytes: 0, used });
            loaded
        })
    }

    fn account(&self, of: Identity, memory: &OwnedFd) {
        let bytes = rustix::fs::fstat(memory).map_or(of.bytes, |stat| {
            u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512)
        });
        self.with(|kept| {
            if let Some(entry) = kept.entries.iter_mut().find(|entry| entry.of == of) {
                entry.bytes = bytes;
            }
            while kept.entries.iter().map(|entry| entry.bytes).sum::<u64>() > self.budget_bytes {
                let candidates = kept.entries.iter().enumerate().filter(|(_, e)| e.bytes > 0);
                let Some((oldest, _)) = candidates.min_by_key(|(_, entry)| entry.used) else {
                    break;
                };
                kept.entries.swap_remove(oldest);
            }
        });
    }
}

fn host_memory_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

fn open(path: &Path) -> Result<File, DriverError> {
    File::options()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
        .map_err(|e| file_error("open", path, e))
}

fn load(file: &File, of: Identity, path: &Path) -> Result<OwnedFd, DriverError> {
    let memory = copy(file, of.bytes).map_err(|e| file_error("load", path, e))?;
    let now = Identity::of(file).map_err(|e| file_error("look at", path, e))?;
    if now != of {
        let detail = "it was changed while it was read".to_owned();
        return Err(DriverError::Damaged { path: path.to_owned(), detail });
    }
    Ok(memory)
}

fn copy(file: &File, bytes: u64) -> io::Result<OwnedFd> {
    let memory = File::from(new_memory()?);
    memory.set_len(bytes)?;
    let mut buffer = vec![0; COPY_BYTES];
    let mut at = 0;
    while let Some(data) = seek(file, SeekFrom::Data(at))? {
        let hole = seek(file, SeekFrom::Hole(data))?.unwrap_or(bytes).min(bytes);
        at = data;
        while at < hole {
            let length = usize::try_from(hole - at).unwrap_or(COPY_BYTES).min(COPY_BYTES);
            file.read_exact_at(&mut buffer[..length], at)?;
            memory.write_all_at(&buffer[..length], at)?;
            at += length as u64;
        }
        if at >= bytes {
            break;
        }
    }
    let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(memory.as_fd(), seals)?;
    Ok(memory.into())
}

/// `None`: there is nothing more of it.
fn seek(file: &File, to: SeekFrom) -> io::Result<Option<u64>> {
    match rustix::fs::seek(file, to) {
        Ok(at) => Ok(Some(at)),
        Err(Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn new_memory() -> rustix::io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    match rustix::fs::memfd_create(c"vm-memory", flags | MemfdFlags::NOEXEC_SEAL) {
        // Kernels before 6.3 do not know the last flag.
        Err(Errno::INVAL) => rustix::fs::memfd_create(c"vm-memory", flags),
        made => made,
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd as _;

    use super::*;

    fn file_of(folder: &Path, name: &str, fill: u8) -> std::path::PathBuf {
        let path = folder.join(name);
        let file = File::create(&path).unwrap();
        file.set_len(8 << 20).unwrap();
        file.write_all_at(&vec![fill; 1 << 20], 2 << 20).unwrap();
        path
    }

    #[tokio::test]
    async fn a_memory_is_loaded_once_and_cannot_be_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = file_of(folder.path(), "memory", 7);
        let memories = Memories::new(Some(64 << 20));
        let (one, other) = tokio::join!(memories.get(&path), memories.get(&path));
        let (one, other) = (one.unwrap(), other.unwrap());
        assert!(Arc::ptr_eq(&one, &other));
        // As QEMU does it.
        let again = File::options()
            .read(true)
            .write(true)
            .open(format!("/proc/self/fd/{}", one.as_raw_fd()))
            .unwrap();
        let mut page = [0; 2];
        again.read_exact_at(&mut page, (2 << 20) - 1).unwrap();
        assert_eq!(page, [0, 7]);
        assert!(again.write_all_at(b"x", 0).is_err());
        assert!(again.set_len(0).is_err());
    }

    #[tokio::test]
    async fn what_was_not_used_for_longest_makes_room() {
        let folder = tempfile::tempdir().unwrap();
        let paths = [1, 2, 3].map(|n| file_of(folder.path(), &n.to_string(), n));
        let memories = Memories::new(Some(5 << 19));
        let first = memories.get(&paths[0]).await.unwrap();
        let second = memories.get(&paths[1]).await.unwrap();
        assert!(Arc::ptr_eq(&first, &memories.get(&paths[0]).await.unwrap()));
        memories.get(&paths[2]).await.unwrap();
        assert!(Arc::ptr_eq(&first, &memories.get(&paths[0]).await.unwrap()));
        assert!(!Arc::ptr_eq(&second, &memories.get(&paths[1]).await.unwrap()));
    }

    #[tokio::test]
    async fn a_file_that_is_missing_or_a_link_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = file_of(folder.path(), "memory", 7);
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let memories = Memories::new(None);
        assert!(memories.get(&link).await.is_err());
        assert!(memories.get(&folder.path().join("none")).await.is_err());
    }
}
