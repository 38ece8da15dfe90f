//! Files.
//!
//! Paths are absolute and UTF-8. Every operation takes a user and has that user's rights; without
//! one it has root's.

use bytes::Bytes;

/// Answered by `FileStat`, `Data`s and `End`. Only regular files; symbolic links are followed.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ReadFile {
    #[prost(string, tag = "1")]
    pub path: String,
    #[prost(uint64, tag = "2")]
    pub offset: u64,
    /// Absent: to the end.
    #[prost(uint64, optional, tag = "3")]
    pub limit: Option<u64>,
    #[prost(string, optional, tag = "4")]
    pub user: Option<String>,
}

/// Followed by `Data`s and `End` from the host; answered by `Done`.
///
/// The file appears whole under its name at `End`, or not at all. A symbolic link is followed and
/// stays; the owner and, unless one is given, the mode of a replaced file stay too.
#[derive(Clone, PartialEq, prost::Message)]
pub struct WriteFile {
    #[prost(string, tag = "1")]
    pub path: String,
    #[prost(uint32, optional, tag = "2")]
    pub mode: Option<u32>,
    #[prost(string, optional, tag = "3")]
    pub user: Option<String>,
    #[prost(bool, tag = "4")]
    pub create_parents: bool,
    /// Add to the end of the file in place; not atomic.
    #[prost(bool, tag = "5")]
    pub append: bool,
    /// Wait until the file is on the disk.
    #[prost(bool, tag = "6")]
    pub sync: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Data {
    #[prost(bytes = "bytes", tag = "1")]
    pub data: Bytes,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct End {}

/// The operation is complete.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Done {
    /// Bytes written by a `WriteFile`.
    #[prost(uint64, tag = "1")]
    pub bytes: u64,
}

/// One page of a directory, sorted by name. Answered by `Listing`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct List {
    #[prost(string, tag = "1")]
    pub path: String,
    /// 0: as many as a page may have.
    #[prost(uint32, tag = "2")]
    pub limit: u32,
    /// `Listing::next` of the page before.
    #[prost(bytes = "bytes", tag = "3")]
    pub after: Bytes,
    #[prost(string, optional, tag = "4")]
    pub user: Option<String>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Listing {
    #[prost(message, repeated, tag = "1")]
    pub entries: Vec<Entry>,
    /// Empty on the last page.
    #[prost(bytes = "bytes", tag = "2")]
    pub next: Bytes,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Entry {
    /// Readable; what is not UTF-8 in it is replaced.
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(message, optional, tag = "2")]
    pub stat: Option<FileStat>,
    /// The true name, where it is not UTF-8.
    #[prost(bytes = "bytes", tag = "3")]
    pub raw_name: Bytes,
}

/// Answered by `FileStat`. A symbolic link is described, not followed, unless asked.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Stat {
    #[prost(string, tag = "1")]
    pub path: String,
    #[prost(string, optional, tag = "2")]
    pub user: Option<String>,
    #[prost(bool, tag = "3")]
    pub follow: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct FileStat {
    #[prost(enumeration = "FileKind", tag = "1")]
    pub kind: i32,
    #[prost(uint64, tag = "2")]
    pub size: u64,
    /// Permission bits only.
    #[prost(uint32, tag = "3")]
    pub mode: u32,
    #[prost(uint32, tag = "4")]
    pub uid: u32,
    #[prost(uint32, tag = "5")]
    pub gid: u32,
    #[prost(int64, tag = "6")]
    pub modified_unix_ns: i64,
    /// Where a symbolic link points; only in the answer to `Stat`.
    #[prost(string, optional, tag = "7")]
    pub link_target: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum FileKind {
    Unspecified = 0,
    File = 1,
    Directory = 2,
    Symlink = 3,
    Other = 4,
}

/// Answered by `Done`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Mkdir {
    #[prost(string, tag = "1")]
    pub path: String,
    /// Make missing parents, and take a directory that exists for done.
    #[prost(bool, tag = "2")]
    pub parents: bool,
    /// Absent: 0755.
    #[prost(uint32, optional, tag = "3")]
    pub mode: Option<u32>,
    #[prost(string, optional, tag = "4")]
    pub user: Option<String>,
}

/// Answered by `Done`. Within one file system it is atomic; across two it is refused.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Move {
    #[prost(string, tag = "1")]
    pub from: String,
    #[prost(string, tag = "2")]
    pub to: String,
    #[prost(bool, tag = "3")]
    pub overwrite: bool,
    #[prost(string, optional, tag = "4")]
    pub user: Option<String>,
}

/// Answered by `Done`. Symbolic links are removed, never followed.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Remove {
    #[prost(string, tag = "1")]
    pub path: String,
    #[prost(bool, tag = "2")]
    pub recursive: bool,
    #[prost(string, optional, tag = "3")]
    pub user: Option<String>,
}
