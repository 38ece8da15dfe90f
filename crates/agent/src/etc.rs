//! The few files in `/etc` that say which VM this is.
//!
//! They are links to files in memory, which stay open: a clone that is told who it is changes them
//! without a look at the disk's file system. A file that took the place of a link, as editors leave
//! one, is replaced like any other old text; where a link cannot be made, the file itself is changed.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use aether_protocol::{Dns, Hosts};

const HOSTS_BEGIN: &str = "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n";

/// The longest of the files that is changed in its place; a longer one is replaced.
const BYTES_MAX: usize = 4096;

pub(crate) fn hosts_text(hostname: Option<&str>, hosts: Option<&Hosts>) -> String {
    let mut text = HOSTS_BEGIN.to_owned();
    let kept = || fs::read_to_string("/etc/hostname").unwrap_or_default().trim().to_owned();
    let hostname = hostname.map_or_else(kept, ToOwned::to_owned);
    if crate::configure::is_host_name(&hostname) {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "127.0.1.1 {hostname}");
    }
    for entry in hosts.iter().flat_map(|hosts| &hosts.entries) {
        let _ = writeln!(text, "{} {}", entry.address, entry.names.join(" "));
    }
    text
}

pub(crate) fn resolver_text(dns: &Dns) -> String {
    let mut text = String::new();
    for server in &dns.servers {
        let _ = writeln!(text, "nameserver {server}");
    }
    if !dns.search.is_empty() {
        let _ = writeln!(text, "search {}", dns.search.join(" "));
    }
    text
}

/// Files that were written before.
#[derive(Debug)]
pub(crate) struct Texts {
    /// Where they are, in memory.
    directory: PathBuf,
    kept: BTreeMap<String, Kept>,
}

#[derive(Debug)]
struct Kept {
    file: File,
    text: String,
    /// To which the name in `/etc` leads.
    target: PathBuf,
}

impl Default for Texts {
    fn default() -> Self {
        Self::new("/run/aether-etc".into())
    }
}

impl Texts {
    fn new(directory: PathBuf) -> Self {
        Self { directory, kept: BTreeMap::new() }
    }

    /// Makes a file have this text. Whoever reads it meanwhile sees the old text or the new.
    /// `is_known`: nobody can have replaced it since.
    pub(crate) fn write(&mut self, path: &str, text: &str, is_known: bool) -> io::Result<()> {
        if let Some(kept) = self.kept.get_mut(path)
            && (is_known || fs::read_link(path).is_ok_and(|target| target == kept.target))
        {
            return kept.change(text);
        }
        match self.keep(path, text) {
            Ok(kept) => {
                self.kept.insert(path.to_owned(), kept);
                Ok(())
            }
            // A container's engine has mounted its own there, or the directory cannot be made.
            Err(_) => write_text(path, text),
        }
    }

    fn keep(&self, path: &str, text: &str) -> io::Result<Kept> {
        let path = Path::new(path);
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        fs::create_dir_all(&self.directory)?;
        let target = self.directory.join(name);
        let flags = libc::O_NOFOLLOW | libc::O_CLOEXEC;
        let mut options = File::options();
        let options = options.write(true).create(true).truncate(true).custom_flags(flags);
        let file = options.open(&target)?;
        file.set_permissions(fs::Permissions::from_mode(0o644))?;
        let mut kept = Kept { file, text: String::new(), target };
        kept.change(text)?;
        if !fs::read_link(path).is_ok_and(|target| target == kept.target) {
            let temporary = path.with_extension("aether-new");
            let _ = fs::remove_file(&temporary);
            symlink(&kept.target, &temporary)?;
            fs::rename(&temporary, path).inspect_err(|_| drop(fs::remove_file(&temporary)))?;
        }
        Ok(kept)
    }
}

impl Kept {
    fn change(&mut self, text: &str) -> io::Result<()> {
        if self.text == text {
            return Ok(());
        }
        self.file.write_all_at(text.as_bytes(), 0)?;
        if text.len() < self.text.len() {
            self.file.set_len(text.len() as u64)?;
        }
        text.clone_into(&mut self.text);
        Ok(())
    }
}

/// Makes a file have this text in its place.
fn write_text(path: &str, text: &str) -> io::Result<()> {
    match overwrite(path, text) {
        Ok(true) => Ok(()),
        // Not there, a link, or not a file of the usual kind.
        Ok(false) | Err(_) => replace(path, text),
    }
}

/// Writes the text over the old one, where one write can do that: far fewer system calls, and no
/// change of a directory.
fn overwrite(path: &str, text: &str) -> io::Result<bool> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC;
    let file = File::options().read(true).write(true).custom_flags(flags).open(path)?;
    let mut buffer = [0; BYTES_MAX];
    let length = file.read_at(&mut buffer, 0)?;
    let old = &buffer[..length];
    if old == text.as_bytes() {
        return Ok(true);
    }
    if length == BYTES_MAX || text.len() > BYTES_MAX {
        return Ok(false);
    }
    // What is left of a longer text becomes empty lines before it is cut off.
    let mut new = [b'\n'; BYTES_MAX];
    new[..text.len()].copy_from_slice(text.as_bytes());
    let covered = length.max(text.len());
    if file.write_at(&new[..covered], 0)? != covered {
        return Ok(false);
    }
    if covered > text.len() {
        file.set_len(text.len() as u64)?;
    }
    Ok(true)
}

fn replace(path: &str, text: &str) -> io::Result<()> {
    let path = Path::new(path);
    let temporary = path.with_extension("aether-new");
    fs::write(&temporary, text)?;
    fs::rename(&temporary, path)
}

#[cfg(test)]
mod tests {
    use aether_protocol::HostsEntry;

    use super::*;

    #[test]
    fn resolver_and_hosts_are_written_as_the_library_reads_them() {
        let dns = Dns { servers: vec!["10.0.0.1".into()], search: vec!["a.b".into(), "c".into()] };
        assert_eq!(resolver_text(&dns), "nameserver 10.0.0.1\nsearch a.b c\n");
        let entry = HostsEntry { address: "10.0.0.9".into(), names: vec!["git".into()] };
        let text = hosts_text(Some("vm"), Some(&Hosts { entries: vec![entry] }));
        assert!(text.ends_with("127.0.1.1 vm\n10.0.0.9 git\n"));
    }

    #[test]
    fn a_name_leads_to_a_file_in_memory_that_is_changed_in_its_place() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("hosts");
        let name = path.to_str().unwrap();
        let mut texts = Texts::new(directory.path().join("memory/etc"));
        fs::write(&path, "of the image, and longer than what follows").unwrap();
        for text in ["one\n", "longer than one\n", "short\n", "short\n", ""] {
            texts.write(name, text, false).unwrap();
            assert!(path.is_symlink());
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
        // An editor has put a file in the place of the link.
        fs::remove_file(&path).unwrap();
        fs::write(&path, "edited").unwrap();
        texts.write(name, "new\n", false).unwrap();
        assert!(path.is_symlink());
        assert_eq!(fs::read_to_string(&path).unwrap(), "new\n");
        // Another agent of the same guest, which has nothing open.
        let mut texts = Texts::new(directory.path().join("memory/etc"));
        texts.write(name, "n\n", false).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "n\n");
        let left = fs::read_dir(directory.path()).unwrap().count();
        assert_eq!(left, 2, "the link and the directory in memory");
    }

    #[test]
    fn where_no_link_can_be_made_the_file_is_changed() {
        let directory = tempfile::tempdir().unwrap();
        let blocked = directory.path().join("file");
        fs::write(&blocked, "").unwrap();
        let path = directory.path().join("hosts");
        let mut texts = Texts::new(blocked.join("etc"));
        texts.write(path.to_str().unwrap(), "text\n", false).unwrap();
        assert!(!path.is_symlink());
        assert_eq!(fs::read_to_string(&path).unwrap(), "text\n");
    }

    #[test]
    fn text_takes_the_place_of_whatever_was_there() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let name = path.to_str().unwrap();
        let longest = "y".repeat(BYTES_MAX);
        let longer = "z".repeat(3 * BYTES_MAX);
        for text in ["one\n", "longer than one\n", "short\n", "short\n", &longest, "s", &longer, ""]
        {
            write_text(name, text).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
        // A link is replaced, and what it leads to is left alone.
        let other = directory.path().join("other");
        fs::write(&other, "other").unwrap();
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(&other, &path).unwrap();
        write_text(name, "new").unwrap();
        assert!(!path.is_symlink());
        assert_eq!(fs::read_to_string(&other).unwrap(), "other");
        // A pipe that nobody writes to is not waited for.
        fs::remove_file(&path).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &path,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RWXU,
            0,
        )
        .unwrap();
        write_text(name, "new").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "new");
    }
}
