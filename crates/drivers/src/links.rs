//! Files that machines and snapshots share: links that outlive the place they were made from.

use std::{fs, io, os::unix::fs::PermissionsExt as _, path::Path};

use aether_images::clone_sparse;

use crate::{
    DriverError,
    host::{file_error, remove_file},
};

/// Of what is shared: nobody writes it.
pub(crate) const FROZEN_MODE: u32 = 0o400;

/// Links a file that nobody changes into a folder, under its name there or another; copies it where
/// that is another file system.
pub(crate) fn keep_file(from: &Path, to: &Path) -> Result<(), DriverError> {
    match fs::hard_link(from, to) {
        Ok(()) => Ok(()),
        // Of an earlier attempt; it is whole.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound && to.exists() => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::CrossesDevices => copy(from, to),
        Err(error) => Err(file_error("link", from, error)),
    }
}

/// A copy that is whole or not there.
pub(crate) fn copy(from: &Path, to: &Path) -> Result<(), DriverError> {
    let half = to.with_extension("part");
    remove_file(&half)?;
    clone_sparse(from, &half).map_err(|error| DriverError::Io {
        action: format!("copy {}", from.display()),
        source: io::Error::other(error),
    })?;
    let done = fs::set_permissions(&half, fs::Permissions::from_mode(FROZEN_MODE))
        .and_then(|()| fs::rename(&half, to));
    done.map_err(|e| file_error("make", to, e))
}
