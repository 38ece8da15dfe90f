//! Files in a VM. Paths are absolute.

use aether_types::Timestamp;
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum FileKind {
    File,
    Directory,
    Symlink,
    /// A device, socket or pipe.
    Other,
}

/// `GET /vms/{vm}/files/stat`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct FileView {
    pub kind: FileKind,
    pub size: u64,
    /// Permission bits in octal, such as `0644`.
    pub mode: String,
    pub uid: u32,
    pub gid: u32,
    pub modified_at: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link_target: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct FileEntry {
    /// What is not UTF-8 in it is replaced by U+FFFD.
    pub name: String,
    /// The true name, where `name` is not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name_base64: Option<String>,
    #[serde(flatten)]
    pub file: FileView,
}

/// `GET /vms/{vm}/files/list`: one page of a directory, sorted by name.
pub type FileListing = crate::Page<FileEntry>;

/// `PUT /vms/{vm}/files`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct FileWritten {
    pub bytes: u64,
}

/// `POST /vms/{vm}/files/mkdir`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct MkdirRequest {
    #[cfg_attr(feature = "schema", schemars(with = "aether_types::schema::AbsolutePath"))]
    pub path: String,
    /// Make missing parents, and take a directory that exists for done.
    #[serde(default)]
    pub parents: bool,
    /// Octal; `0755` where it is not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(with = "Option<aether_types::schema::Mode>"))]
    pub mode: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(with = "Option<aether_types::schema::User>"))]
    pub user: Option<String>,
}

/// `POST /vms/{vm}/files/move`. Atomic within one file system of the VM, refused across two.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct MoveRequest {
    #[cfg_attr(feature = "schema", schemars(with = "aether_types::schema::AbsolutePath"))]
    pub from: String,
    #[cfg_attr(feature = "schema", schemars(with = "aether_types::schema::AbsolutePath"))]
    pub to: String,
    #[serde(default)]
    pub overwrite: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(with = "Option<aether_types::schema::User>"))]
    pub user: Option<String>,
}
