//! A simulated guest's disk: a tree of files in memory, with the errors that a real one has.

use std::collections::BTreeMap;

use aether_protocol::{ErrorCode, FileKind, FileStat};
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::saved::hex;

/// A refusal, as the guest's agent words it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) code: ErrorCode,
    pub(super) message: String,
}

fn refuse<T>(code: ErrorCode, path: &str) -> Result<T, Refusal> {
    Err(Refusal { code, message: format!("{path}: {}", code.as_str().replace('_', " ")) })
}

#[derive(Debug, Clone, Serialize, Deserialize)]
enum Node {
    File {
        #[serde(with = "hex")]
        data: Vec<u8>,
        mode: u32,
    },
    Directory {
        mode: u32,
    },
}

/// Keys are absolute paths without a trailing slash; the root is the empty text.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Disk {
    nodes: BTreeMap<String, Node>,
    size_bytes: u64,
    /// A test's wish: no byte more fits.
    #[serde(skip)]
    pub(super) is_full: bool,
}

/// The canonical key of a path; `..` stops at the root.
fn key(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            name => parts.push(name),
        }
    }
    parts.iter().flat_map(|part| ["/", part]).collect()
}

fn parent(key: &str) -> &str {
    key.rsplit_once('/').map_or("", |(parent, _)| parent)
}

impl Disk {
    pub(super) fn new(size_bytes: u64) -> Self {
        let nodes = ["", "/tmp", "/root", "/etc"]
            .map(|path| (path.to_owned(), Node::Directory { mode: 0o755 }));
        Self { nodes: nodes.into(), size_bytes, is_full: false }
    }

    fn used_bytes(&self) -> u64 {
        let bytes = |node: &Node| match node {
            Node::File { data, .. } => data.len() as u64,
            Node::Directory { .. } => 0,
        };
        self.nodes.values().map(bytes).sum()
    }

    pub(super) fn read(&self, path: &str) -> Result<Bytes, Refusal> {
        match self.nodes.get(&key(path)) {
            Some(Node::File { data, .. }) => Ok(Bytes::copy_from_slice(data)),
            Some(Node::Directory { .. }) => refuse(ErrorCode::IsADirectory, path),
            None => refuse(ErrorCode::NotFound, path),
        }
    }

    pub(super) fn has_room(&self, bytes: usize) -> bool {
        !self.is_full && self.used_bytes().saturating_add(bytes as u64) <= self.size_bytes
    }

    pub(super) fn write(
        &mut self,
        path: &str,
        data: &[u8],
        mode: Option<u32>,
        append: bool,
        create_parents: bool,
    ) -> Result<(), Refusal> {
        let key = key(path);
        let old = match self.nodes.get(&key) {
            Some(Node::Directory { .. }) => return refuse(ErrorCode::IsADirectory, path),
            Some(Node::File { data, mode }) => Some((data.clone(), *mode)),
            None => None,
        };
        if create_parents {
            self.mkdir(parent(&key), true, None)?;
        }
        self.parent_of(&key, path)?;
        if !self.has_room(data.len()) {
            return refuse(ErrorCode::NoSpace, path);
        }
        let (old_data, old_mode) = old.unwrap_or((Vec::new(), 0o644));
        let mut whole = if append { old_data } else { Vec::new() };
        whole.extend_from_slice(data);
        self.nodes.insert(key, Node::File { data: whole, mode: mode.unwrap_or(old_mode) });
        Ok(())
    }

    fn parent_of(&self, key: &str, path: &str) -> Result<(), Refusal> {
        match self.nodes.get(parent(key)) {
            Some(Node::Directory { .. }) => Ok(()),
            Some(Node::File { .. }) => refuse(ErrorCode::NotADirectory, path),
            None => refuse(ErrorCode::NotFound, path),
        }
    }

    pub(super) fn mkdir(
        &mut self,
        path: &str,
        parents: bool,
        mode: Option<u32>,
    ) -> Result<(), Refusal> {
        let key = key(path);
        match self.nodes.get(&key) {
            Some(Node::Directory { .. }) if parents => return Ok(()),
            Some(_) => return refuse(ErrorCode::Exists, path),
            None => {}
        }
        if parents {
            self.mkdir(parent(&key), true, None)?;
        }
        self.parent_of(&key, path)?;
        self.nodes.insert(key, Node::Directory { mode: mode.unwrap_or(0o755) });
        Ok(())
    }

    /// Names directly below a directory, with what they are, in order.
    pub(super) fn list(&self, path: &str) -> Result<Vec<(String, FileStat)>, Refusal> {
        let key = key(path);
        match self.nodes.get(&key) {
            Some(Node::Directory { .. }) => {}
            Some(Node::File { .. }) => return refuse(ErrorCode::NotADirectory, path),
            None => return refuse(ErrorCode::NotFound, path),
        }
        let below = format!("{key}/");
        let names = self.nodes.iter().filter_map(|(path, node)| {
            let name = path.strip_prefix(&below).filter(|n| !n.is_empty() && !n.contains('/'))?;
            Some((name.to_owned(), describe(node)))
        });
        Ok(names.collect())
    }

    pub(super) fn stat(&self, path: &str) -> Result<FileStat, Refusal> {
        self.nodes
            .get(&key(path))
            .map_or_else(|| refuse(ErrorCode::NotFound, path), |node| Ok(describe(node)))
    }

    pub(super) fn remove(&mut self, path: &str, recursive: bool) -> Result<(), Refusal> {
        let key = key(path);
        if key.is_empty() {
            return refuse(ErrorCode::PermissionDenied, path);
        }
        if !self.nodes.contains_key(&key) {
            return refuse(ErrorCode::NotFound, path);
        }
        let below = format!("{key}/");
        if !recursive && self.nodes.keys().any(|path| path.starts_with(&below)) {
            return refuse(ErrorCode::NotEmpty, path);
        }
        self.nodes.retain(|path, _| *path != key && !path.starts_with(&below));
        Ok(())
    }

    pub(super) fn rename(&mut self, from: &str, to: &str, overwrite: bool) -> Result<(), Refusal> {
        let (source, target) = (key(from), key(to));
        if !self.nodes.contains_key(&source) {
            return refuse(ErrorCode::NotFound, from);
        }
        self.parent_of(&target, to)?;
        if self.nodes.contains_key(&target) && !overwrite {
            return refuse(ErrorCode::Exists, to);
        }
        let below = format!("{source}/");
        if target.starts_with(&below) {
            return refuse(ErrorCode::InvalidArgument, to);
        }
        let moved: Vec<String> = self
            .nodes
            .keys()
            .filter(|path| **path == source || path.starts_with(&below))
            .cloned()
            .collect();
        for old in moved {
            if let Some(node) = self.nodes.remove(&old) {
                self.nodes.insert(format!("{target}{}", &old[source.len()..]), node);
            }
        }
        Ok(())
    }
}

fn describe(node: &Node) -> FileStat {
    let (kind, size, mode) = match node {
        Node::File { data, mode } => (FileKind::File, data.len() as u64, *mode),
        Node::Directory { mode } => (FileKind::Directory, 0, *mode),
    };
    FileStat { kind: kind.into(), size, mode, ..FileStat::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_behave_as_on_a_disk() {
        let mut disk = Disk::new(10);
        disk.write("/tmp/a", b"12345", Some(0o600), false, false).unwrap();
        disk.write("/tmp/a", b"678", None, true, false).unwrap();
        assert_eq!(disk.read("/tmp/../tmp/a").unwrap(), &b"12345678"[..]);
        assert_eq!(disk.stat("/tmp/a").unwrap().mode, 0o600);
        let full = disk.write("/tmp/b", b"1234567", None, false, false).unwrap_err();
        assert_eq!(full.code, ErrorCode::NoSpace);
        assert_eq!(disk.remove("/tmp", false).unwrap_err().code, ErrorCode::NotEmpty);
        disk.rename("/tmp/a", "/root/c", false).unwrap();
        assert_eq!(disk.list("/root").unwrap()[0].0, "c");
        assert_eq!(disk.read("/tmp/a").unwrap_err().code, ErrorCode::NotFound);
        let missing = disk.write("/x/y", b"", None, false, false).unwrap_err();
        assert_eq!(missing.code, ErrorCode::NotFound);
        disk.write("/x/y", b"", None, false, true).unwrap();
        disk.remove("/x", true).unwrap();
        assert_eq!(disk.list("/").unwrap().len(), 3);
    }
}
