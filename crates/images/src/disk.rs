//! Writable disks over the frozen ones of a snapshot, and layers at their places.

mod placed;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

pub use self::placed::{Placement, write_placement};
use crate::ImageError;

/// What [`clone_sparse`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cloned {
    /// The file system shares the blocks until one of the two is written.
    pub reflinked: bool,
    /// Bytes that were copied.
    pub copied_bytes: u64,
}

/// Makes `to`, which must not exist, the same as `from`: by reflink, or copying what is not a hole.
/// Mode 0600. Not flushed.
pub fn clone_sparse(from: &Path, to: &Path) -> Result<Cloned, ImageError> {
    let source = File::open(from).map_err(ImageError::io("open", from))?;
    make_file(to, "copy the disk to", |target| {
        if rustix::fs::ioctl_ficlone(target, &source).is_ok() {
            return Ok(Cloned { reflinked: true, copied_bytes: 0 });
        }
        let size = source.metadata()?.len();
        target.set_len(size)?;
        let (mut position, mut copied_bytes) = (0, 0);
        while let Some(data) = next_data(&source, position)?.filter(|data| *data < size) {
            let hole = next_hole(&source, data)?.min(size);
            copied_bytes += if hole - data <= SMALL_RANGE {
                copy_what_is_not_zero(&source, target, data, hole)?
            } else {
                copy_range(&source, target, data, hole)?;
                hole - data
            };
            position = hole;
        }
        Ok(Cloned { reflinked: false, copied_bytes })
    })
}

/// qcow2, as of QEMU's `docs/interop/qcow2.txt`; the default size of a cluster.
const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// What one entry of the first-level table covers: 512 MiB.
const L1_ENTRY_COVERS: u64 = CLUSTER * (CLUSTER / 8);
const HEADER_LENGTH: u32 = 104;
/// 64 TiB: the table is then 1 MiB, and one block of reference counts is still enough.
const VIRTUAL_SIZE_MAX: u64 = 64 << 40;
const SECTOR: u64 = 512;

/// Makes an empty qcow2 image to be put over a read-only one, which is named on QEMU's command
/// line only: the file has no path in it. Mode 0600; an existing file is an error. Not flushed.
pub fn write_qcow2_overlay(path: &Path, virtual_size_bytes: u64) -> Result<(), ImageError> {
    if virtual_size_bytes == 0
        || virtual_size_bytes > VIRTUAL_SIZE_MAX
        || !virtual_size_bytes.is_multiple_of(SECTOR)
    {
        return Err(ImageError::InvalidRequest {
            field: "virtual_size_bytes",
            reason: format!("{virtual_size_bytes} is not a size of 512 bytes to 64 TiB"),
        });
    }
    // Clusters: header, table of reference counts, one block of them, first-level table. The last
    // is all zero, and stays a hole.
    let l1_entries =
        u32::try_from(virtual_size_bytes.div_ceil(L1_ENTRY_COVERS)).unwrap_or(u32::MAX);
    let clusters = 3 + (u64::from(l1_entries) * 8).div_ceil(CLUSTER);
    let header = Header {
        cluster_bits: CLUSTER_BITS,
        virtual_bytes: virtual_size_bytes,
        l1_entries,
        l1_at: 3 * CLUSTER,
        counts_at: CLUSTER,
        features: 0,
    };
    let counts = [0, 1].repeat(usize::try_from(clusters).unwrap_or_default());
    make_file(path, "make the overlay", |file| {
        file.set_len(clusters * CLUSTER)?;
        file.write_all_at(&header.encode(), 0)?;
        file.write_all_at(&(2 * CLUSTER).to_be_bytes(), CLUSTER)?;
        file.write_all_at(&counts, 2 * CLUSTER)
    })
}

/// What differs between the headers of images.
struct Header {
    cluster_bits: u32,
    virtual_bytes: u64,
    l1_entries: u32,
    l1_at: u64,
    /// Table of reference counts, one cluster long.
    counts_at: u64,
    /// Those that a reader must know.
    features: u64,
}

impl Header {
    /// Big-endian, field by field.
    fn encode(&self) -> Vec<u8> {
        let zero = [0; 8];
        [
            b"QFI\xfb".as_slice(),
            &3_u32.to_be_bytes(),
            // The backing file's name: where it is, and its length.
            &zero,
            &zero[..4],
            &self.cluster_bits.to_be_bytes(),
            &self.virtual_bytes.to_be_bytes(),
            // No encryption.
            &zero[..4],
            &self.l1_entries.to_be_bytes(),
            &self.l1_at.to_be_bytes(),
            &self.counts_at.to_be_bytes(),
            &1_u32.to_be_bytes(),
            // Snapshots inside: count and place.
            &zero[..4],
            &zero,
            // Features: incompatible, compatible, self-clearing.
            &self.features.to_be_bytes(),
            &[0; 16],
            // A reference count has 2^4 bits.
            &4_u32.to_be_bytes(),
            &HEADER_LENGTH.to_be_bytes(),
            // The end of the header's extensions.
            &zero,
        ]
        .concat()
    }
}

/// Makes a new file, or none: half a disk is worse than no disk.
fn make_file<T>(
    path: &Path,
    action: &'static str,
    write: impl FnOnce(&File) -> io::Result<T>,
) -> Result<T, ImageError> {
    let file = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(ImageError::io("create", path))?;
    write(&file).map_err(|source| {
        // That it may stay behind changes nothing for the caller.
        let _ = fs::remove_file(path);
        ImageError::io(action, path)(source)
    })
}

/// Makes `to`, which must not exist, a file of `size` bytes with the first bytes of each part at its
/// place: shared with it where the file system can, copied elsewhere. Mode 0600. Not flushed.
pub fn compose(to: &Path, size: u64, parts: &[(File, u64, u64)]) -> Result<(), ImageError> {
    make_file(to, "put layers together in", |target| {
        target.set_len(size)?;
        for (part, offset, bytes) in parts {
            copy_to(part, target, (0, *bytes), *offset)?;
        }
        Ok(())
    })
}

/// A small range is looked through: a journal that a guest has emptied is zeros.
const SMALL_RANGE: u64 = 1 << 20;
/// Of common file systems; where it is not, holes are fewer and nothing else.
const BLOCK_BYTES: usize = 4096;

/// How many bytes were copied.
fn copy_what_is_not_zero(source: &File, target: &File, start: u64, end: u64) -> io::Result<u64> {
    let length = usize::try_from(end - start).map_err(io::Error::other)?;
    let mut bytes = vec![0; length];
    source.read_exact_at(&mut bytes, start)?;
    let (mut position, mut copied) = (start, 0);
    for block in bytes.chunks(BLOCK_BYTES) {
        if block.iter().any(|byte| *byte != 0) {
            target.write_all_at(block, position)?;
            copied += block.len() as u64;
        }
        position += block.len() as u64;
    }
    Ok(copied)
}

fn copy_range(source: &File, target: &File, start: u64, end: u64) -> io::Result<()> {
    copy_to(source, target, (start, end), start)
}

fn copy_to(source: &File, target: &File, (start, end): (u64, u64), place: u64) -> io::Result<()> {
    let (mut from, mut to) = (start, place);
    while from < end {
        let length = usize::try_from(end - from).unwrap_or(usize::MAX);
        match rustix::fs::copy_file_range(source, Some(&mut from), target, Some(&mut to), length) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::XDEV | Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS | Errno::PERM) => {
                return copy_by_hand(source, target, (from, end), to);
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Between file systems, on some kernels.
fn copy_by_hand(
    source: &File,
    target: &File,
    (start, end): (u64, u64),
    mut place: u64,
) -> io::Result<()> {
    let mut buffer = vec![0; 128 << 10];
    let mut position = start;
    while position < end {
        let length = usize::try_from(end - position).unwrap_or(usize::MAX).min(buffer.len());
        source.read_exact_at(&mut buffer[..length], position)?;
        target.write_all_at(&buffer[..length], place)?;
        position += length as u64;
        place += length as u64;
    }
    Ok(())
}

/// Where the next data is, at or after a position. `None`: there are only holes.
pub(crate) fn next_data(file: &File, position: u64) -> io::Result<Option<u64>> {
    match rustix::fs::seek(file, SeekFrom::Data(position)) {
        Ok(data) => Ok(Some(data)),
        Err(Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Where the data at a position ends.
pub(crate) fn next_hole(file: &File, position: u64) -> io::Result<u64> {
    Ok(rustix::fs::seek(file, SeekFrom::Hole(position))?)
}

#[cfg(test)]
mod tests;
