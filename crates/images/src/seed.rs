//! A VM's writable layer: a sparse file with an ext4 file system in it, made by writing the few
//! blocks of a fresh file system that are not zero.
//!
//! `mkfs.ext4` runs once for a size. Its options are chosen for few such blocks (14 for 10 GiB,
//! 56 KiB): no spare group descriptors, no copies of the superblock, all bitmaps and inode tables
//! in one place, and inode tables declared to be zero already, so that the guest's kernel does not
//! write them out in the background either. The journal stays, at its smallest: a VM that is
//! killed keeps a sound file system.
//!
//! All layers of a size have the same UUID; no VM sees the layer of another.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{FlockOperation, SeekFrom};

use crate::ImageError;
use crate::blobs::{replace_file, scratch_path, sweep};
use crate::program::{Program, read_if_there};
use crate::store::open_lock;

/// The smallest disk: a file system of 64 MiB, a few of which are its own.
const DISK_MB_MIN: u32 = 64;
/// 2 TiB, the largest with a quarter of a MiB of descriptors.
const DISK_MB_MAX: u32 = 2 * 1024 * 1024;
const BLOCK: usize = 4096;
const FORMAT: &[u8; 16] = b"aether-seed-v1\n\0";
const UUID: &str = "ae7e0000-0000-4000-8000-00000000d15c";
/// The time at which every layer says it was made.
const MADE_AT: &str = "1735689600";

/// The blocks of a fresh ext4 file system of one size. Copies share the blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskSeed {
    pub disk_mb: u32,
    /// Where to write what; everything between is zero.
    pub extents: Arc<[(u64, Vec<u8>)]>,
}

impl DiskSeed {
    /// Makes a new layer. It has the root folders `upper` and `work` for an overlay. An existing
    /// file is not touched and is an error.
    ///
    /// Not flushed to the disk: a host that loses power loses the VM as well.
    pub fn write_layer(&self, path: &Path) -> Result<(), ImageError> {
        let file = File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(ImageError::io("create the layer", path))?;
        let written = file.set_len(self.size_bytes()).and_then(|()| {
            self.extents.iter().try_for_each(|(offset, bytes)| file.write_all_at(bytes, *offset))
        });
        written.map_err(|source| {
            // Half a layer is worse than none; that it may stay behind changes nothing here.
            let _ = fs::remove_file(path);
            ImageError::io("write the layer", path)(source)
        })
    }

    fn size_bytes(&self) -> u64 {
        u64::from(self.disk_mb) << 20
    }

    /// The seed's own file: the parts one after the other, and the digest of all before it.
    fn encode(&self) -> Vec<u8> {
        let mut bytes = FORMAT.to_vec();
        bytes.extend_from_slice(&self.disk_mb.to_le_bytes());
        for (offset, content) in self.extents.iter() {
            bytes.extend_from_slice(&offset.to_le_bytes());
            bytes.extend_from_slice(&(content.len() as u64).to_le_bytes());
            bytes.extend_from_slice(content);
        }
        let digest = blake3::hash(&bytes);
        bytes.extend_from_slice(digest.as_bytes());
        bytes
    }

    /// Nothing where the bytes are not a whole seed of this size: it is then made again.
    fn decode(bytes: &[u8], disk_mb: u32) -> Option<Self> {
        let (content, digest) = bytes.split_last_chunk::<{ blake3::OUT_LEN }>()?;
        if blake3::hash(content) != *digest {
            return None;
        }
        let rest = content.strip_prefix(FORMAT.as_slice())?;
        let mut rest = rest.strip_prefix(disk_mb.to_le_bytes().as_slice())?;
        let mut extents = Vec::new();
        while !rest.is_empty() {
            let (offset, after) = rest.split_first_chunk()?;
            let (length, after) = after.split_first_chunk()?;
            let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
            let (bytes, after) = after.split_at_checked(length)?;
            extents.push((u64::from_le_bytes(*offset), bytes.to_vec()));
            rest = after;
        }
        Some(Self { disk_mb, extents: extents.into() })
    }
}

/// The seed from `folder`, or a new one, which is then kept there.
pub(crate) fn load_or_make(folder: &Path, disk_mb: u32) -> Result<DiskSeed, ImageError> {
    if !(DISK_MB_MIN..=DISK_MB_MAX).contains(&disk_mb) {
        return Err(ImageError::DiskSize { disk_mb, min: DISK_MB_MIN, max: DISK_MB_MAX });
    }
    let version = mkfs_version()?;
    let path = folder.join(format!("{disk_mb}-mke2fs-{version}.seed"));
    let cached = |path: &Path| -> Result<Option<DiskSeed>, ImageError> {
        Ok(read_if_there(path)?.and_then(|bytes| DiskSeed::decode(&bytes, disk_mb)))
    };
    if let Some(seed) = cached(&path)? {
        return Ok(seed);
    }
    // A lock of its own: making a VM must not wait for an image that is being built.
    let lock_path = folder.join("lock");
    let lock = open_lock(&lock_path)?;
    rustix::io::retry_on_intr(|| rustix::fs::flock(&lock, FlockOperation::LockExclusive))
        .map_err(io::Error::from)
        .map_err(ImageError::io("lock", &lock_path))?;
    if let Some(seed) = cached(&path)? {
        return Ok(seed);
    }
    let tmp = folder.join("tmp");
    fs::create_dir_all(&tmp).map_err(ImageError::io("make the folder", &tmp))?;
    sweep(&tmp);
    let seed = make(&tmp, disk_mb, &version)?;
    sweep(&tmp);
    replace_file(&tmp, &path, &seed.encode())?;
    Ok(seed)
}

fn make(tmp: &Path, disk_mb: u32, version: &str) -> Result<DiskSeed, ImageError> {
    let content = scratch_path(tmp, "content");
    for name in ["upper", "work"] {
        let path = content.join(name);
        fs::create_dir_all(&path).map_err(ImageError::io("make the folder", path))?;
    }
    let image = scratch_path(tmp, "layer");
    File::create_new(&image)
        .and_then(|file| file.set_len(u64::from(disk_mb) << 20))
        .map_err(ImageError::io("create", &image))?;
    // Before 1.47 there is no way to say that the tables are zero but to make them so.
    let zeroed = if version_at_least(version, (1, 47)) {
        "assume_storage_prezeroed=1"
    } else {
        "lazy_itable_init=0,lazy_journal_init=0"
    };
    let extended =
        format!("packed_meta_blocks=1,{zeroed},nodiscard,num_backup_sb=0,hash_seed={UUID}");
    Program::new("mkfs.ext4", "e2fsprogs")?
        .env("E2FSPROGS_FAKE_TIME", MADE_AT)
        .args(["-q", "-F", "-b", "4096", "-I", "256", "-m", "0", "-J", "size=4", "-U", UUID])
        .args(["-O", "^resize_inode,^64bit,sparse_super2", "-E", &extended, "-d"])
        .arg(&content)
        .arg(&image)
        .output()?;
    let extents = non_zero_extents(&image).map_err(ImageError::io("read", &image))?;
    Ok(DiskSeed { disk_mb, extents: extents.into() })
}

/// Reads a sparse file and keeps the runs of blocks that are not zero.
fn non_zero_extents(path: &Path) -> io::Result<Vec<(u64, Vec<u8>)>> {
    let file = File::open(path)?;
    let mut extents: Vec<(u64, Vec<u8>)> = Vec::new();
    let mut position = 0;
    loop {
        let data = match rustix::fs::seek(&file, SeekFrom::Data(position)) {
            Ok(data) => data,
            Err(rustix::io::Errno::NXIO) => return Ok(extents),
            Err(error) => return Err(error.into()),
        };
        let hole = rustix::fs::seek(&file, SeekFrom::Hole(data))?;
        rustix::fs::seek(&file, SeekFrom::Start(data))?;
        let mut reader = (&file).take(hole - data);
        let mut offset = data;
        loop {
            let mut block = Vec::with_capacity(BLOCK);
            (&mut reader).take(BLOCK as u64).read_to_end(&mut block)?;
            if block.is_empty() {
                break;
            }
            let next = offset + block.len() as u64;
            if block.iter().any(|byte| *byte != 0) {
                match extents.last_mut() {
                    Some((start, bytes)) if *start + bytes.len() as u64 == offset => {
                        bytes.extend_from_slice(&block);
                    }
                    _ => extents.push((offset, block)),
                }
            }
            offset = next;
        }
        position = hole;
    }
}

/// As `mke2fs -V` says, such as `1.47.0`.
fn mkfs_version() -> Result<String, ImageError> {
    let text = Program::new("mkfs.ext4", "e2fsprogs")?.arg("-V").complaint()?;
    Ok(text
        .split_whitespace()
        .find(|word| word.starts_with(|c: char| c.is_ascii_digit()))
        .unwrap_or("unknown")
        .chars()
        .filter(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-'))
        .collect())
}

fn version_at_least(version: &str, wanted: (u32, u32)) -> bool {
    let mut parts = version.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
    parts.next().map(|major| (major, parts.next().unwrap_or(0))) >= Some(wanted)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::process::Command;
    use std::time::{Duration, Instant};

    use super::*;

    fn run(program: &str, args: &[&str], path: &Path) -> String {
        let output = Command::new(program).args(args).arg(path).output().unwrap();
        assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stdout));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    #[test]
    fn layer_is_a_sound_file_system_with_the_overlay_folders() {
        let folder = tempfile::tempdir().unwrap();
        for disk_mb in [64, 1024, 10 * 1024] {
            let seed = load_or_make(folder.path(), disk_mb).unwrap();
            let path = folder.path().join(format!("layer-{disk_mb}"));
            seed.write_layer(&path).unwrap();
            let meta = fs::metadata(&path).unwrap();
            assert_eq!(meta.len(), u64::from(disk_mb) << 20);
            assert!(meta.blocks() * 512 <= 64 << 10, "{} KiB allocated", meta.blocks() / 2);
            run("/sbin/e2fsck", &["-fn"], &path);
            let listing = run("/sbin/debugfs", &["-R", "ls -p /"], &path);
            assert!(listing.contains("/upper/") && listing.contains("/work/"), "{listing}");
            let header = run("/sbin/dumpe2fs", &["-h"], &path);
            assert!(header.contains("has_journal") && header.contains("metadata_csum"), "{header}");
        }
    }

    #[test]
    fn layer_costs_next_to_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let seed = load_or_make(folder.path(), 10 * 1024).unwrap();
        let mut took: Vec<Duration> = (0..50)
            .map(|index| {
                let path = folder.path().join(index.to_string());
                let start = Instant::now();
                seed.write_layer(&path).unwrap();
                start.elapsed()
            })
            .collect();
        took.sort();
        println!("median {:?}, slowest {:?}", took[25], took[49]);
        // A copy or a mkfs would take tens of milliseconds; the bound leaves room for a busy host.
        assert!(took[25] < Duration::from_millis(5), "median {:?}", took[25]);
    }

    #[test]
    fn existing_layer_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let seed = load_or_make(folder.path(), 64).unwrap();
        let path = folder.path().join("layer");
        fs::write(&path, "kept").unwrap();
        assert_eq!(seed.write_layer(&path).unwrap_err().code(), "image_io");
        assert_eq!(fs::read(&path).unwrap(), b"kept");
    }

    #[test]
    fn damaged_seed_is_made_again_and_a_sound_one_is_used() {
        let folder = tempfile::tempdir().unwrap();
        let first = load_or_make(folder.path(), 64).unwrap();
        let path = fs::read_dir(folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .find(|path| path.extension().is_some_and(|extension| extension == "seed"))
            .unwrap();
        let inode = fs::metadata(&path).unwrap().ino();
        assert_eq!(load_or_make(folder.path(), 64).unwrap(), first);
        assert_eq!(fs::metadata(&path).unwrap().ino(), inode);

        let mut bytes = fs::read(&path).unwrap();
        bytes[5000] ^= 1;
        fs::write(&path, &bytes).unwrap();
        let second = load_or_make(folder.path(), 64).unwrap();
        // Not the content: the two folders have the times of when they were copied.
        let places = |seed: &DiskSeed| seed.extents.iter().map(|e| e.0).collect::<Vec<_>>();
        assert_eq!(places(&second), places(&first));
        assert!(DiskSeed::decode(&fs::read(&path).unwrap(), 64) == Some(second));
    }

    #[test]
    fn every_cut_of_a_seed_is_refused() {
        let seed = DiskSeed { disk_mb: 64, extents: vec![(0, vec![1; 9]), (50, vec![2])].into() };
        let bytes = seed.encode();
        assert_eq!(DiskSeed::decode(&bytes, 64), Some(seed));
        assert_eq!(DiskSeed::decode(&bytes, 65), None);
        for cut in 0..bytes.len() {
            assert_eq!(DiskSeed::decode(&bytes[..cut], 64), None, "{cut}");
        }
    }

    #[test]
    fn sizes_out_of_bounds_are_refused_with_the_bounds() {
        let folder = tempfile::tempdir().unwrap();
        for disk_mb in [0, 63, DISK_MB_MAX + 1] {
            let error = load_or_make(folder.path(), disk_mb).unwrap_err();
            assert_eq!(error.code(), "image_disk_size");
            assert!(error.to_string().contains("64 to 2097152"), "{error}");
        }
    }
}
