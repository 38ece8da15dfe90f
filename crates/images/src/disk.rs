//! Writable disks over the frozen ones of a snapshot.

use std::io;
use std::path::Path;

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
pub fn clone_sparse(_from: &Path, to: &Path) -> Result<Cloned, ImageError> {
    Err(ImageError::io("copy to", to)(io::Error::from(io::ErrorKind::Unsupported)))
}

/// Makes an empty qcow2 image to be put over a read-only one, which is named on QEMU's command
/// line only: the file has no path in it. Mode 0600; an existing file is an error. Not flushed.
pub fn write_qcow2_overlay(path: &Path, _virtual_size_bytes: u64) -> Result<(), ImageError> {
    Err(ImageError::io("make the overlay", path)(io::Error::from(io::ErrorKind::Unsupported)))
}
