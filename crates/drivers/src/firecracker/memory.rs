//! A guest's memory as a file with holes: what a VMM wrote, laid over what was there before.
//!
//! Firecracker writes either all of the memory, zeros included, or the pages that changed since the
//! last snapshot, with holes for the rest. Either becomes one file that has no pages of zeros, and
//! that no VMM has ever had open for writing.

use std::{
    fs::File,
    io,
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::Path,
};

use rustix::{
    fs::{FallocateFlags, SeekFrom},
    io::Errno,
};

pub(super) const PAGE: usize = 4096;
const CHUNK: usize = 256 * PAGE;

/// Makes `to`, which must not exist, of the memory `below` (nothing: all zero) and what `above` has.
pub(super) fn merge(
    below: Option<&Path>,
    above: &File,
    to: &Path,
    size: u64,
) -> Result<(), io::Error> {
    let found = above.metadata()?.len();
    if found != size {
        let text = format!("the VMM wrote a memory of {found} bytes, {size} were wanted");
        return Err(io::Error::other(text));
    }
    let target = if let Some(below) = below {
        aether_images::clone_sparse(below, to).map_err(io::Error::other)?;
        File::options().write(true).open(to)?
    } else {
        let mut options = File::options();
        let target = options.write(true).create_new(true).mode(0o600).open(to)?;
        target.set_len(size)?;
        target
    };
    let mut chunk = vec![0; CHUNK];
    let mut at = 0;
    while let Some(data) = next(above, SeekFrom::Data(at))?.filter(|data| *data < size) {
        let hole = next(above, SeekFrom::Hole(data))?.unwrap_or(size).min(size);
        lay(above, &target, data, hole, &mut chunk)?;
        at = hole;
    }
    Ok(())
}

fn next(file: &File, from: SeekFrom) -> io::Result<Option<u64>> {
    match rustix::fs::seek(file, from) {
        Ok(at) => Ok(Some(at)),
        Err(Errno::NXIO) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

fn lay(above: &File, to: &File, from: u64, until: u64, chunk: &mut [u8]) -> io::Result<()> {
    let mut at = from;
    while at < until {
        let length = usize::try_from(until - at).unwrap_or(CHUNK).min(CHUNK);
        let part = &mut chunk[..length];
        above.read_exact_at(part, at)?;
        for run in runs(part) {
            let begin = at + run.offset as u64;
            match run.bytes {
                Some(bytes) => to.write_all_at(bytes, begin)?,
                None => rustix::fs::fallocate(
                    to,
                    FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
                    begin,
                    run.length as u64,
                )?,
            }
        }
        at += length as u64;
    }
    Ok(())
}

/// Pages next to each other that are all zero, or all not.
struct Run<'a> {
    offset: usize,
    length: usize,
    /// `None`: zeros.
    bytes: Option<&'a [u8]>,
}

fn runs(part: &[u8]) -> impl Iterator<Item = Run<'_>> {
    let mut offset = 0;
    std::iter::from_fn(move || {
        let rest = &part[offset..];
        let is_zero = |page: &[u8]| page.iter().all(|byte| *byte == 0);
        let zero = is_zero(rest.chunks(PAGE).next()?);
        let alike = rest.chunks(PAGE).take_while(|page| is_zero(page) == zero);
        let length = alike.map(<[u8]>::len).sum();
        let run = Run { offset, length, bytes: (!zero).then(|| &rest[..length]) };
        offset += length;
        Some(run)
    })
}

/// Whether a hole in a file of this folder begins and ends at a page: else what Firecracker left
/// out cannot be told from zeros that it wrote.
pub(super) fn has_holes_of_pages(folder: &Path) -> bool {
    const LENGTH: u64 = 4 << 20;
    const AT: u64 = (1 << 20) + PAGE as u64;
    let probe = || {
        let path = folder.join("holes");
        let file =
            File::options().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
        std::fs::remove_file(&path)?;
        file.set_len(LENGTH)?;
        file.write_all_at(&[1; PAGE], AT)?;
        let data = next(&file, SeekFrom::Data(0))?;
        let hole = next(&file, SeekFrom::Hole(AT))?;
        Ok::<_, io::Error>((data, hole) == (Some(AT), Some(AT + PAGE as u64)))
    };
    probe().unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    fn file(path: &Path, pages: &[Option<u8>]) -> File {
        let file = File::options().read(true).write(true).create_new(true).open(path).unwrap();
        file.set_len((pages.len() * PAGE) as u64).unwrap();
        for (i, page) in pages.iter().enumerate() {
            if let Some(value) = page {
                file.write_all_at(&[*value; PAGE], (i * PAGE) as u64).unwrap();
            }
        }
        file
    }

    fn pages(path: &Path) -> Vec<u8> {
        let bytes = std::fs::read(path).unwrap();
        assert!(bytes.chunks(PAGE).all(|page| page.iter().all(|b| *b == page[0])));
        bytes.chunks(PAGE).map(|page| page[0]).collect()
    }

    #[test]
    fn what_changed_is_laid_over_what_was_and_zeros_are_holes() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        assert!(has_holes_of_pages(folder.path()));
        let size = 6 * PAGE as u64;
        let first = file(&path("full"), &[Some(1), Some(0), Some(2), Some(0), Some(0), Some(3)]);
        merge(None, &first, &path("a"), size).unwrap();
        assert_eq!(pages(&path("a")), [1, 0, 2, 0, 0, 3]);
        assert_eq!(std::fs::metadata(path("a")).unwrap().blocks(), 3 * PAGE as u64 / 512);
        // Page 2 became zero, page 3 something; the rest is as it was.
        let diff = file(&path("diff"), &[None, None, Some(0), Some(4), None, None]);
        merge(Some(&path("a")), &diff, &path("b"), size).unwrap();
        assert_eq!(pages(&path("b")), [1, 0, 0, 4, 0, 3]);
        assert_eq!(pages(&path("a")), [1, 0, 2, 0, 0, 3]);
        assert_eq!(std::fs::metadata(path("b")).unwrap().blocks(), 3 * PAGE as u64 / 512);
    }

    #[test]
    fn a_memory_of_another_size_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let short = file(&folder.path().join("short"), &[Some(1)]);
        let error = merge(None, &short, &folder.path().join("to"), 2 * PAGE as u64).unwrap_err();
        assert!(error.to_string().contains("4096 bytes, 8192 were wanted"), "{error}");
    }
}
