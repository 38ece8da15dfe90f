//! Shows the bytes of a file at another place, without a copy: metadata of two qcow2 images.
//!
//! QEMU has nothing that moves the beginning of a file to a later place of a device. qcow2 does, but
//! only for data that is in the same file as its tables. So one image, `inner`, makes such a file of
//! the two: its data file is the layer, at the same place, and what is not in the layer is read
//! from its backing, where the other image's tables are. That one, `outer`, reads from `inner` and
//! moves.
//!
//! ```text
//!   outer   guest:   0 ... offset ............ offset+bytes ...          backing: the layer below
//!                             │  16 KiB by 16 KiB │
//!   inner   header │ 1st cluster of the layer is missing here │ the layer's rest │ copy of the 1st │ tables
//!              from its backing                                 from its data file   from its backing
//! ```
//!
//! A file's first cluster cannot hold data, so the layer's is copied: 16 KiB. All of it is written
//! into one file, sparse, of which QEMU is given windows.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// QEMU reads a whole cluster of counts when it opens an image, and a page that it has not touched
/// costs more than the reading. Smaller ones make the first-level table of a long device longer.
const CLUSTER_BITS: u32 = 14;
const CLUSTER: u64 = 1 << CLUSTER_BITS;

/// Places in a first-level table.
const L2_ENTRIES: u64 = CLUSTER / 8;
/// In an entry: the cluster is this image's alone.
const COPIED: u64 = 1 << 63;
/// Of the incompatible features: an external data file.
const DATA_FILE: u64 = 1 << 2;

/// Windows of the file with the metadata.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    /// What `inner` reads where the layer has nothing, and `outer` has its tables in.
    pub outer: Range<u64>,
    /// The file of `inner`.
    pub inner: Range<u64>,
}

/// Writes what places the first `bytes` of `layer` at `offset` of a device of `device_bytes`. The
/// windows begin at `at`, or after it; what comes after the last window is free.
///
/// `offset` must be a multiple of 16 KiB, and the layer must not be empty.
pub fn write_placement(
    metadata: &File,
    at: u64,
    layer: &File,
    bytes: u64,
    (offset, device_bytes): (u64, u64),
) -> io::Result<Placement> {
    let invalid = |reason: &str| Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
    if bytes == 0 || !offset.is_multiple_of(CLUSTER) {
        return invalid("a layer that is empty, or not at a boundary, cannot be placed");
    }
    if offset.checked_add(bytes).is_none_or(|end| end > device_bytes) {
        return invalid("a layer is past the end of its device");
    }
    let clusters = bytes.div_ceil(CLUSTER);
    let begin = at.next_multiple_of(CLUSTER);
    let first_copy = clusters * CLUSTER;

    let moved = (0..clusters).map(|index| {
        let host = if index == 0 { first_copy } else { index * CLUSTER };
        (offset / CLUSTER + index, host)
    });
    let outer = Image { begin, tables: first_copy + CLUSTER, virtual_bytes: device_bytes };
    let outer_end = outer.write(metadata, 0, moved)?;
    let mut first = vec![0; usize::try_from(CLUSTER.min(bytes)).unwrap_or_default()];
    layer.read_exact_at(&mut first, 0)?;
    metadata.write_all_at(&first, begin + first_copy)?;

    let inner_begin = begin + outer_end;
    let inner = Image { begin: inner_begin, tables: CLUSTER, virtual_bytes: outer_end };
    let in_place = (1..clusters).map(|index| (index, index * CLUSTER));
    let inner_end = inner.write(metadata, DATA_FILE, in_place)?;
    Ok(Placement { outer: begin..begin + outer_end, inner: inner_begin..inner_begin + inner_end })
}

/// An image in a window: its header is at the beginning, its tables where they are said to be.
struct Image {
    begin: u64,
    tables: u64,
    virtual_bytes: u64,
}

impl Image {
    /// `entries`: which cluster of the guest is where, in order. Returns the window's length.
    fn write(
        &self,
        file: &File,
        features: u64,
        entries: impl Iterator<Item = (u64, u64)>,
    ) -> io::Result<u64> {
        let l1_entries = self.virtual_bytes.div_ceil(CLUSTER * L2_ENTRIES);
        let (counts, l1) = (self.tables + CLUSTER, self.tables + 2 * CLUSTER);
        let mut end = l1 + (l1_entries * 8).next_multiple_of(CLUSTER);
        // Reference counts are for who writes; that there is a table of them is asked of all.
        let header = super::Header {
            cluster_bits: CLUSTER_BITS,
            virtual_bytes: self.virtual_bytes,
            l1_entries: u32::try_from(l1_entries).unwrap_or(u32::MAX),
            l1_at: l1,
            counts_at: self.tables,
            features,
        };
        file.write_all_at(&header.encode(), self.begin)?;
        file.write_all_at(&counts.to_be_bytes(), self.begin + self.tables)?;
        let mut table: Option<(u64, u64)> = None;
        let mut run: Vec<u8> = Vec::new();
        let mut run_at = 0;
        for (guest, host) in entries {
            let (number, index) = (guest / L2_ENTRIES, guest % L2_ENTRIES);
            let table_at = match table {
                Some((known, at)) if known == number => at,
                Some(_) | None => {
                    file.write_all_at(&run, run_at)?;
                    run.clear();
                    let at = end;
                    end += CLUSTER;
                    let entry = (COPIED | at).to_be_bytes();
                    file.write_all_at(&entry, self.begin + l1 + number * 8)?;
                    run_at = self.begin + at + index * 8;
                    table = Some((number, at));
                    at
                }
            };
            debug_assert_eq!(run_at + run.len() as u64, self.begin + table_at + index * 8);
            run.extend_from_slice(&(COPIED | host).to_be_bytes());
        }
        file.write_all_at(&run, run_at)?;
        file.set_len(self.begin + end)?;
        Ok(end)
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// As QEMU reads it, with the one below.
    fn node(metadata: &str, layer: &str, placement: &Placement, below: &str) -> String {
        let window = |range: &Range<u64>| {
            let size = range.end - range.start;
            format!(
                r#"{{"driver":"raw","offset":{},"size":{size},"file":{{"driver":"file","filename":"{metadata}"}}}}"#,
                range.start
            )
        };
        let (outer, inner) = (window(&placement.outer), window(&placement.inner));
        format!(
            r#"{{"driver":"qcow2","backing":{below},"file":{{"driver":"qcow2","file":{inner},"data-file":{{"driver":"file","filename":"{layer}"}},"backing":{outer}}}}}"#
        )
    }

    #[test]
    fn qemu_reads_each_layer_at_its_place() {
        const DEVICE: u64 = 64 << 30;
        if Command::new("qemu-img").arg("--version").output().is_err() {
            eprintln!("SKIPPED: qemu-img is not installed");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        let metadata =
            File::options().create_new(true).read(true).write(true).open(path("metadata")).unwrap();
        // The smallest, whole clusters, the edge of a first-level entry, and a long one.
        let places =
            [(1 << 20, 4096), (2 << 20, 3 * CLUSTER), ((32 << 20) - CLUSTER, 5 * CLUSTER + 4096)];
        let mut below = format!(r#"{{"driver":"null-co","size":{DEVICE},"read-zeroes":true}}"#);
        let (mut wanted, mut at) = (Vec::new(), 0);
        for (index, (offset, bytes)) in places.into_iter().enumerate() {
            let content: Vec<u8> =
                (0..bytes).map(|i| (i / 7 + index as u64 * 31).to_le_bytes()[0]).collect();
            let name = path(&format!("layer{index}"));
            std::fs::write(&name, &content).unwrap();
            let layer = File::open(&name).unwrap();
            let placed = write_placement(&metadata, at, &layer, bytes, (offset, DEVICE)).unwrap();
            at = placed.inner.end;
            below = node(&path("metadata"), &name, &placed, &below);
            wanted.push((offset, content));
        }
        let raw = path("raw");
        let output = Command::new("qemu-img")
            .args(["convert", "-O", "raw", &format!("json:{below}"), &raw])
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let raw = File::open(raw).unwrap();
        assert_eq!(raw.metadata().unwrap().len(), DEVICE);
        for (offset, content) in wanted {
            let mut read = vec![1; content.len() + 4096];
            raw.read_exact_at(&mut read, offset).unwrap();
            let (layer, after) = read.split_at(content.len());
            assert!(layer == content, "at {offset}");
            assert!(after.iter().all(|byte| *byte == 0), "after {offset}");
        }
    }

    #[test]
    fn what_has_no_place_is_refused() {
        let file = tempfile::tempfile().unwrap();
        for (bytes, offset) in [(0, 0), (4096, 100), (4096, 1 << 20), (u64::MAX, 0)] {
            assert!(write_placement(&file, 0, &file, bytes, (offset, 1 << 20)).is_err());
        }
    }
}
