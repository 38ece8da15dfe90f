//! Files.
//!
//! Each operation runs on a thread of its own connection, which takes the rights of the user that
//! was asked for and ends with the operation.

mod read;
mod tree;
mod write;

use std::fs::Metadata;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};

use aether_protocol::{FileKind, FileStat};

pub(crate) use read::read;
pub(crate) use tree::{list, mkdir, remove, rename, stat};
pub(crate) use write::write;

use crate::error::Fail;
use crate::{sys, users};

/// Takes the rights of the user, for the rest of this thread.
fn act_as(user: Option<&str>) -> Result<(), Fail> {
    if user.is_some() {
        sys::become_file_user(&users::find(user)?).map_err(Fail::io("act as the user"))?;
    }
    Ok(())
}

fn describe(metadata: &Metadata) -> FileStat {
    let kind = metadata.file_type();
    let kind = if kind.is_file() {
        FileKind::File
    } else if kind.is_dir() {
        FileKind::Directory
    } else if kind.is_symlink() {
        FileKind::Symlink
    } else {
        debug_assert!(
            kind.is_fifo() || kind.is_socket() || kind.is_char_device() || kind.is_block_device()
        );
        FileKind::Other
    };
    FileStat {
        kind: kind.into(),
        size: metadata.len(),
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        modified_unix_ns: metadata
            .mtime()
            .saturating_mul(1_000_000_000)
            .saturating_add(metadata.mtime_nsec()),
        link_target: None,
    }
}
