//! From a VM. The guest is not trusted: whatever it lists, nothing is written outside the folder
//! that the user named. Names with slashes are refused, a folder is never entered through a link,
//! and links are made last, when nothing more is written.

use std::{
    collections::BTreeSet,
    fs::{self, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use aether_api::{
    FileEntry, FileKind,
    client::{PageQuery, ReadOptions},
};
use aether_types::limits;
use tokio::io::AsyncWriteExt as _;

use super::{
    cp::{Copied, Copy, join},
    progress::Progress,
};
use crate::{exit::Exit, failure::Failure};

/// Deeper than any tree of people's; a guest could list one without end.
const DEPTH_MAX: usize = 256;

pub(super) async fn stdout(copy: &Copy<'_>, path: &str) -> Result<(), Failure> {
    let mut download = copy.client.read_file(copy.vm, path, &options(copy)).await?;
    let mut stdout = tokio::io::stdout();
    let failed = |e: io::Error| Failure::io("write to standard output", &e);
    while let Some(chunk) = download.next_chunk().await? {
        stdout.write_all(&chunk).await.map_err(failed)?;
    }
    stdout.flush().await.map_err(failed)
}

/// A file or, where asked for, a folder; into `local` where that is a folder, else as it.
pub(super) async fn tree(copy: &Copy<'_>, path: &str, local: &Path) -> Result<Copied, Failure> {
    let Some(found) = copy.stat(path, true).await? else {
        return Err(Failure::new(
            aether_types::ErrorCode::FileNotFound.as_str(),
            Exit::NotFound,
            format!("{}:{path} is not there", copy.vm),
        ));
    };
    let target = if local.is_dir() {
        match path.trim_end_matches('/').rsplit('/').next() {
            Some(name) if !name.is_empty() => local.join(plain_name(name)?),
            _ => local.to_owned(),
        }
    } else {
        local.to_owned()
    };
    let mut copied = Copied::default();
    match found.kind {
        FileKind::Directory => {
            copy.needs_recursive(&format!("{}:{path}", copy.vm))?;
            folder(copy, path, &target, &found.mode, &mut copied).await?;
        }
        FileKind::File => file(copy, path, &target, &mut copied).await?,
        FileKind::Symlink | FileKind::Other => {
            return Err(Failure::usage(format!("{}:{path} is neither file nor folder", copy.vm)));
        }
    }
    Ok(copied)
}

async fn folder(
    copy: &Copy<'_>,
    path: &str,
    target: &Path,
    mode: &str,
    copied: &mut Copied,
) -> Result<(), Failure> {
    let mut links: Vec<(PathBuf, String)> = Vec::new();
    let mut modes: Vec<(PathBuf, u32)> = Vec::new();
    let mut folders = vec![(path.to_owned(), target.to_owned(), mode.to_owned(), 0)];
    while let Some((from, to, mode, depth)) = folders.pop() {
        if depth > DEPTH_MAX {
            return Err(Failure::usage(format!("{from}: more than {DEPTH_MAX} folders deep")));
        }
        make_folder(&to)?;
        modes.push((to.clone(), parse_mode(&mode)));
        for entry in entries(copy, &from).await? {
            let name = plain_name(&entry.name)?;
            let (there, here) = (join(&from, name), to.join(name));
            match entry.file.kind {
                FileKind::Directory => folders.push((there, here, entry.file.mode, depth + 1)),
                FileKind::File => file(copy, &there, &here, copied).await?,
                FileKind::Symlink => {
                    // A list need not say where links point.
                    let points_to = match entry.file.link_target {
                        Some(target) => Some(target),
                        None => copy.stat(&there, false).await?.and_then(|f| f.link_target),
                    };
                    // One that has gone meanwhile is not copied.
                    links.extend(points_to.map(|target| (here, target)));
                }
                FileKind::Other => {
                    return Err(Failure::usage(format!(
                        "{}:{there} is neither a file, a folder nor a link",
                        copy.vm
                    )));
                }
            }
        }
    }
    for (here, points_to) in links {
        link(&here, &points_to)?;
        copied.files += 1;
    }
    // Last and from within: a folder may not let its owner write.
    for (here, mode) in modes.into_iter().rev() {
        fs::set_permissions(&here, fs::Permissions::from_mode(mode))
            .map_err(|e| Failure::file("set the mode of", &here, &e))?;
    }
    Ok(())
}

async fn entries(copy: &Copy<'_>, path: &str) -> Result<Vec<FileEntry>, Failure> {
    let mut page = PageQuery { limit: Some(limits::PAGE_LIMIT_MAX), cursor: None };
    let mut entries: Vec<FileEntry> = Vec::new();
    let mut names = BTreeSet::new();
    loop {
        let listing = copy.client.list_files(copy.vm, path, &page, copy.user).await?;
        for entry in listing.items {
            if entry.name_base64.is_some() {
                return Err(Failure::usage(format!(
                    "{}: the name is not UTF-8; such a file cannot be copied",
                    super::table::printable(&join(path, &entry.name))
                )));
            }
            // A name that comes twice, once as a link and once as a folder, would lead elsewhere.
            if !names.insert(entry.name.clone()) {
                return Err(hostile(&entry.name));
            }
            entries.push(entry);
        }
        match listing.next_cursor {
            Some(cursor) => page.cursor = Some(cursor),
            None => return Ok(entries),
        }
    }
}

/// Into a new file beside the target, then renamed: whole or not at all, and never through a link.
async fn file(
    copy: &Copy<'_>,
    path: &str,
    target: &Path,
    copied: &mut Copied,
) -> Result<(), Failure> {
    let mut download = copy.client.read_file(copy.vm, path, &options(copy)).await?;
    let progress = Progress::bytes(path, download.size(), copy.json);
    let new = Unfinished::beside(target)?;
    let failed = |e: io::Error| Failure::file("write", &new.path, &e);
    let mut file = tokio::fs::File::from_std(
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&new.path)
            .map_err(failed)?,
    );
    while let Some(chunk) = download.next_chunk().await? {
        file.write_all(&chunk).await.map_err(failed)?;
        progress.add(chunk.len());
        copied.bytes += chunk.len() as u64;
    }
    file.flush().await.map_err(failed)?;
    let mode = download.mode().unwrap_or(0o644) & 0o777;
    file.set_permissions(fs::Permissions::from_mode(mode)).await.map_err(failed)?;
    new.finish(target)?;
    copied.files += 1;
    Ok(())
}

/// A file that is removed unless it is finished.
struct Unfinished {
    path: PathBuf,
}

impl Unfinished {
    fn beside(target: &Path) -> Result<Self, Failure> {
        let name = target
            .file_name()
            .ok_or_else(|| Failure::usage(format!("{} names no file", target.display())))?;
        let mut new = std::ffi::OsString::from(".");
        new.push(name);
        new.push(format!(".{}", std::process::id()));
        Ok(Self { path: target.with_file_name(new) })
    }

    fn finish(&self, target: &Path) -> Result<(), Failure> {
        fs::rename(&self.path, target).map_err(|e| Failure::file("write", target, &e))
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        // After `finish` it is not there any more.
        let _ = fs::remove_file(&self.path);
    }
}

fn make_folder(path: &Path) -> Result<(), Failure> {
    match fs::DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            let found =
                fs::symlink_metadata(path).map_err(|e| Failure::file("examine", path, &e))?;
            if found.is_dir() {
                return Ok(());
            }
            Err(Failure::new(
                "io",
                Exit::Conflict,
                format!("{} is there and is not a folder", path.display()),
            ))
        }
        Err(e) => Err(Failure::file("make the folder", path, &e)),
    }
}

fn link(path: &Path, points_to: &str) -> Result<(), Failure> {
    let failed = |e: io::Error| Failure::file("make the link", path, &e);
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => {
            return Err(failed(io::ErrorKind::AlreadyExists.into()));
        }
        Ok(_) => fs::remove_file(path).map_err(failed)?,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(failed(e)),
    }
    std::os::unix::fs::symlink(points_to, path).map_err(failed)
}

fn plain_name(name: &str) -> Result<&str, Failure> {
    if name.is_empty() || name == "." || name == ".." || name.contains(['/', '\0']) {
        return Err(hostile(name));
    }
    Ok(name)
}

fn hostile(name: &str) -> Failure {
    let name = super::table::printable(name);
    Failure::new("hostile_listing", Exit::Failure, format!("the VM lists a file named {name:?}"))
        .hint("its list cannot be trusted; nothing more is copied")
}

/// The guest's set-id bits are not taken over.
fn parse_mode(mode: &str) -> u32 {
    u32::from_str_radix(mode, 8).unwrap_or(0o755) & 0o777
}

fn options(copy: &Copy<'_>) -> ReadOptions {
    ReadOptions { user: copy.user.map(str::to_owned), ..ReadOptions::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for name in ["", ".", "..", "a/b", "/etc", "a\0"] {
            assert_eq!(plain_name(name).unwrap_err().code, "hostile_listing", "{name:?}");
        }
        plain_name("..a").unwrap();
    }

    #[test]
    fn a_link_in_place_of_a_folder_is_not_entered() {
        let root = tempfile::tempdir().unwrap();
        let link = root.path().join("link");
        std::os::unix::fs::symlink("/tmp", &link).unwrap();
        assert_eq!(make_folder(&link).unwrap_err().exit, Exit::Conflict);
        make_folder(&root.path().join("new")).unwrap();
        make_folder(&root.path().join("new")).unwrap();
    }
}
