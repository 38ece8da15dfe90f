//! The digest of a file's content that costs no more than the data in it: holes and zero blocks
//! are skipped, and are the same thing. A copy that fills holes or makes them has the same digest.
//!
//! A file is cut into chunks of 1 MiB. A chunk with anything in it has a leaf: BLAKE3 of the bitmap
//! of its 4 KiB blocks that are not zero, and of those blocks. The digest is that of the file's
//! size and of each leaf with its place. Leaves are hashed by several threads.

use std::fs::File;
use std::io;
use std::num::NonZero;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use blake3::Hash;

use crate::disk::{next_data, next_hole};

const CHUNK: usize = 1 << 20;
const BLOCK: usize = 4096;
const CONTEXT: &str = "aetherium 2026-12 snapshot file content v1";
/// More threads wait for memory rather than for the processor.
const THREADS_MAX: usize = 8;
/// Below this a thread costs more than it gives.
const CHUNKS_PER_THREAD: usize = 8;

/// A chunk's place and leaf.
type Leaf = (u64, Hash);

pub(super) fn content_digest(file: &File, size: u64) -> io::Result<Hash> {
    let chunks = chunks_with_data(file, size)?;
    let mut leaves = leaves(file, size, &chunks)?;
    leaves.sort_unstable_by_key(|leaf| leaf.0);
    let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
    hasher.update(&size.to_le_bytes());
    for (offset, leaf) in leaves {
        hasher.update(&offset.to_le_bytes()).update(leaf.as_bytes());
    }
    Ok(hasher.finalize())
}

/// Offsets of the chunks that are not one hole.
fn chunks_with_data(file: &File, size: u64) -> io::Result<Vec<u64>> {
    let chunk = CHUNK as u64;
    let mut offsets = Vec::new();
    let mut position = 0;
    while position < size {
        let Some(data) = next_data(file, position)?.filter(|data| *data < size) else { break };
        let offset = data / chunk * chunk;
        offsets.push(offset);
        position = offset + chunk;
    }
    Ok(offsets)
}

fn leaves(file: &File, size: u64, chunks: &[u64]) -> io::Result<Vec<Leaf>> {
    let processors = thread::available_parallelism().map_or(1, NonZero::get);
    let threads = (chunks.len() / CHUNKS_PER_THREAD).min(processors).min(THREADS_MAX);
    // One thread's failure ends the others' work early.
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let work = || -> io::Result<Vec<Leaf>> {
        let mut buffer = vec![0; CHUNK];
        let mut leaves = Vec::new();
        while !failed.load(Ordering::Relaxed) {
            let Some(&offset) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) else { break };
            match leaf(file, size, offset, &mut buffer) {
                Ok(Some(hash)) => leaves.push((offset, hash)),
                Ok(None) => {}
                Err(error) => {
                    failed.store(true, Ordering::Relaxed);
                    return Err(error);
                }
            }
        }
        Ok(leaves)
    };
    if threads < 2 {
        return work();
    }
    thread::scope(|scope| {
        let handles: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let mut all = Vec::with_capacity(chunks.len());
        for handle in handles {
            all.extend(handle.join().map_err(|_| io::Error::other("a hashing thread panicked"))??);
        }
        Ok(all)
    })
}

/// `None` where all of the chunk is zero.
fn leaf(file: &File, size: u64, offset: u64, buffer: &mut [u8]) -> io::Result<Option<Hash>> {
    read_chunk(file, offset, (offset + CHUNK as u64).min(size), buffer)?;
    let zero = [0; BLOCK];
    let mut bitmap = [0_u8; CHUNK / BLOCK / 8];
    for (index, block) in buffer.chunks_exact(BLOCK).enumerate() {
        if block != zero {
            bitmap[index / 8] |= 1 << (index % 8);
        }
    }
    if bitmap.iter().all(|byte| *byte == 0) {
        return Ok(None);
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update(&bitmap);
    let set = |index: usize| bitmap[index / 8] & (1 << (index % 8)) != 0;
    let mut index = 0;
    while index < CHUNK / BLOCK {
        let start = index;
        while index < CHUNK / BLOCK && set(index) {
            index += 1;
        }
        hasher.update(&buffer[start * BLOCK..index * BLOCK]);
        index += 1;
    }
    Ok(Some(hasher.finalize()))
}

/// Fills the buffer with a chunk, without reading its holes, which would fill the page cache.
/// Beyond the file's end are zeros.
fn read_chunk(file: &File, offset: u64, end: u64, buffer: &mut [u8]) -> io::Result<()> {
    let place = |position: u64| usize::try_from(position - offset).unwrap_or(CHUNK).min(CHUNK);
    let mut position = offset;
    while position < end {
        let data = next_data(file, position)?.unwrap_or(end).min(end);
        buffer[place(position)..place(data)].fill(0);
        if data == end {
            break;
        }
        let hole = next_hole(file, data)?.min(end);
        file.read_exact_at(&mut buffer[place(data)..place(hole)], data)?;
        position = hole;
    }
    buffer[place(end)..].fill(0);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(size: u64, parts: &[(u64, &[u8])]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        for (offset, bytes) in parts {
            file.write_all_at(bytes, *offset).unwrap();
        }
        file
    }

    fn digest(file: &File) -> Hash {
        content_digest(file, file.metadata().unwrap().len()).unwrap()
    }

    #[test]
    fn holes_and_written_zeros_are_the_same() {
        let sparse = file(5 << 20, &[(3 << 20, b"data")]);
        let full = file(5 << 20, &[(0, &vec![0; 5 << 20]), (3 << 20, b"data")]);
        assert_eq!(digest(&sparse), digest(&full));
    }

    #[test]
    fn every_change_shows() {
        let chunk = CHUNK as u64;
        let many: Vec<u8> = (0..40_u8 << 2).flat_map(|index| vec![index | 1; 256 << 10]).collect();
        let files = [
            file(0, &[]),
            file(1, &[]),
            file(1, &[(0, b"x")]),
            file(2, &[(0, b"x")]),
            file(2, &[(1, b"x")]),
            file(chunk, &[]),
            file(chunk + 1, &[]),
            file(chunk + 1, &[(chunk, b"x")]),
            file(chunk + 2, &[(chunk, b"x")]),
            file(chunk * 2, &[(0, b"x")]),
            file(chunk * 2, &[(4096, b"x")]),
            file(chunk * 2, &[(chunk, b"x")]),
            file(chunk * 2, &[(0, b"x"), (chunk, b"x")]),
            file(40 * chunk, &[(0, &many)]),
            file(40 * chunk, &[(0, &many), (33 * chunk + 5, b"\0")]),
        ];
        let mut seen: Vec<_> = files.iter().map(|file| digest(file).to_string()).collect();
        assert_eq!(digest(&files[13]).to_string(), seen[13]);
        seen.sort();
        seen.dedup();
        assert_eq!(seen.len(), files.len());
    }
}
