//! Directories, and files as entries of them.

use std::collections::BinaryHeap;
use std::ffi::OsString;
use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use aether_protocol::limits::LIST_ENTRIES_MAX;
use aether_protocol::{Done, Entry, ErrorCode, FileStat, List, Listing, Mkdir, Move, Remove, Stat};
use bytes::Bytes;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use super::{act_as, describe};
use crate::error::Fail;

const DEFAULT_MODE: u32 = 0o755;
const MODE_MASK: u32 = 0o7777;

pub(crate) fn stat(request: &Stat) -> Result<FileStat, Fail> {
    act_as(request.user.as_deref())?;
    let path = &request.path;
    let metadata = if request.follow { fs::metadata(path) } else { fs::symlink_metadata(path) };
    let metadata = metadata.map_err(Fail::io(format!("look at {path}")))?;
    let mut stat = describe(&metadata);
    if metadata.is_symlink() {
        let target = fs::read_link(path).map_err(Fail::io(format!("read link {path}")))?;
        stat.link_target = Some(target.to_string_lossy().into_owned());
    }
    Ok(stat)
}

/// One page: the first names after `after`. Memory is bounded by the page, not by the directory.
pub(crate) fn list(request: &List) -> Result<Listing, Fail> {
    act_as(request.user.as_deref())?;
    let path = Path::new(&request.path);
    let limit = match request.limit {
        0 => LIST_ENTRIES_MAX,
        limit => limit.min(LIST_ENTRIES_MAX),
    };
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let read = |error| Fail::io(format!("list {}", request.path))(error);
    let mut smallest: BinaryHeap<OsString> = BinaryHeap::with_capacity(limit + 2);
    for entry in fs::read_dir(path).map_err(read)? {
        let name = entry.map_err(read)?.file_name();
        if name.as_bytes() > request.after.as_ref() {
            smallest.push(name);
            // One more than the page, to know whether another page follows.
            if smallest.len() > limit + 1 {
                smallest.pop();
            }
        }
    }
    let mut names = smallest.into_sorted_vec();
    let has_more = names.len() > limit;
    names.truncate(limit);
    let last = names.last().filter(|_| has_more);
    let next = last.map(|name| Bytes::copy_from_slice(name.as_bytes())).unwrap_or_default();
    // What has gone meanwhile is left out.
    let entries = names.into_iter().filter_map(|name| describe_entry(path, name)).collect();
    Ok(Listing { entries, next })
}

fn describe_entry(directory: &Path, name: OsString) -> Option<Entry> {
    let stat = describe(&fs::symlink_metadata(directory.join(&name)).ok()?);
    let (name, raw_name) = match name.into_string() {
        Ok(name) => (name, Bytes::new()),
        Err(name) => (name.to_string_lossy().into_owned(), Bytes::from(name.into_vec())),
    };
    Some(Entry { name, stat: Some(stat), raw_name })
}

pub(crate) fn mkdir(request: &Mkdir) -> Result<Done, Fail> {
    act_as(request.user.as_deref())?;
    let path = Path::new(&request.path);
    let mode = request.mode.unwrap_or(DEFAULT_MODE) & MODE_MASK;
    if request.parents {
        make_directories(path, mode)?;
    } else {
        make_directory(path, mode).map_err(Fail::io(format!("make directory {}", request.path)))?;
    }
    Ok(Done::default())
}

/// Makes a directory, with missing parents in the default mode.
pub(super) fn make_directories(path: &Path, mode: u32) -> Result<(), Fail> {
    let what = || format!("make directory {}", path.display());
    match make_directory(path, mode) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let parent = path.parent().ok_or_else(|| Fail::io(what())(error))?;
            let mut builder = DirBuilder::new();
            builder.recursive(true).mode(DEFAULT_MODE);
            builder.create(parent).map_err(Fail::io(what()))?;
            make_directories_done(make_directory(path, mode), path)
        }
        made => make_directories_done(made, path),
    }
}

/// A directory that is there already, or is made by another at the same time, is what was wanted.
fn make_directories_done(made: io::Result<()>, path: &Path) -> Result<(), Fail> {
    match made {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let message = format!("{} is not a directory", path.display());
            Err(Fail::new(ErrorCode::NotADirectory, message + &format!(": {error}")))
        }
        made => made.map_err(Fail::io(format!("make directory {}", path.display()))),
    }
}

/// With the mode as asked, whatever the umask.
fn make_directory(path: &Path, mode: u32) -> io::Result<()> {
    fs::create_dir(path)?;
    fs::set_permissions(path, Permissions::from_mode(mode))
}

pub(crate) fn rename(request: &Move) -> Result<Done, Fail> {
    act_as(request.user.as_deref())?;
    let (from, to) = (&request.from, &request.to);
    let what = || format!("move {from} to {to}");
    let renamed = if request.overwrite {
        rustix::fs::rename(from, to)
    } else {
        match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
            // A file system without the flag: looking first is the best there is.
            Err(Errno::INVAL) if fs::symlink_metadata(to).is_err() => rustix::fs::rename(from, to),
            renamed => renamed,
        }
    };
    renamed.map_err(|errno| match errno {
        Errno::XDEV => {
            Fail::new(ErrorCode::InvalidPath, format!("{}: on different file systems", what()))
        }
        _ => Fail::sys(what())(errno),
    })?;
    Ok(Done::default())
}

pub(crate) fn remove(request: &Remove) -> Result<Done, Fail> {
    act_as(request.user.as_deref())?;
    let path = Path::new(&request.path);
    let what = || format!("remove {}", request.path);
    let metadata = fs::symlink_metadata(path).map_err(Fail::io(what()))?;
    let root = fs::metadata("/").map_err(Fail::io(what()))?;
    // However it is written: `/`, `//`, `/usr/..`.
    if (metadata.dev(), metadata.ino()) == (root.dev(), root.ino()) {
        return Err(Fail::new(ErrorCode::InvalidPath, "the root directory stays"));
    }
    let removed = match (metadata.is_dir(), request.recursive) {
        (false, _) => fs::remove_file(path),
        (true, false) => fs::remove_dir(path),
        // Goes down by descriptors, so that a link put in its way leads nowhere.
        (true, true) => fs::remove_dir_all(path),
    };
    removed.map_err(Fail::io(what()))?;
    Ok(Done::default())
}
