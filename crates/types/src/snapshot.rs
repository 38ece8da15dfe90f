//! A snapshot: memory, devices and disk of a VM at one moment.
//!
//! ```text
//!   creating ── taken ──► ready ── delete ──► deleted
//!      └── failed ──► failed ─── delete ────────┘
//! ```

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{DriverKind, Fault, ProjectId, SnapshotId, Timestamp, VmId, WorkerId, limits};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum SnapshotState {
    Creating,
    /// On disk with its digest.
    Ready,
    Failed,
    /// Its files are removed, or are about to be.
    Deleted,
}

impl SnapshotState {
    pub const ALL: &'static [Self] = &[Self::Creating, Self::Ready, Self::Failed, Self::Deleted];

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Ready => "ready",
            Self::Failed => "failed",
            Self::Deleted => "deleted",
        }
    }
}

impl fmt::Display for SnapshotState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for SnapshotState {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.iter().copied().find(|s| s.as_str() == text).ok_or_else(|| {
            "unknown snapshot state; one of creating, ready, failed, deleted".to_owned()
        })
    }
}

/// Why a snapshot exists, which decides who removes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum SnapshotPurpose {
    /// A client asked for it, and deletes it; retention rules apply.
    User,
    /// For the VMs of one fork; removed when they have begun. Not listed.
    Fork,
    /// A stopped VM's memory, without its disk; removed when it is started or deleted. Not listed.
    Memory,
    /// A template's; removed with it. Not listed.
    Template,
}

impl SnapshotPurpose {
    pub const ALL: &'static [Self] = &[Self::User, Self::Fork, Self::Memory, Self::Template];

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Fork => "fork",
            Self::Memory => "memory",
            Self::Template => "template",
        }
    }
}

impl FromStr for SnapshotPurpose {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .iter()
            .copied()
            .find(|p| p.as_str() == text)
            .ok_or_else(|| "unknown purpose of a snapshot".to_owned())
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    pub id: SnapshotId,
    /// Its VM's.
    pub project_id: ProjectId,
    /// Unique among the project's snapshots that are not deleted, where it is given.
    pub name: Option<String>,
    pub purpose: SnapshotPurpose,
    pub state: SnapshotState,
    /// Of the present state.
    pub reason: Option<Fault>,
    /// The VM that it was taken of, which may be deleted by now.
    pub vm_id: VmId,
    /// The worker that has the files.
    pub worker_id: Option<WorkerId>,
    pub driver: DriverKind,
    pub image: String,
    pub vcpus: u32,
    pub memory_mb: u32,
    pub disk_mb: u32,
    /// Room that its files take on disk, holes not counted.
    pub size_bytes: Option<u64>,
    /// BLAKE3 of its manifest, which has the digests of its files.
    pub digest: Option<String>,
    /// How long the VM stood still for it.
    pub paused_us: Option<u64>,
    pub created_at: Timestamp,
    pub updated_at: Timestamp,
}

/// A name is lower-case letters and digits with hyphens, dots and underscores between them. It
/// cannot look like an id, since routes take either.
pub fn validate_snapshot_name(name: &str) -> Result<(), String> {
    if is_plain_name(name, limits::SNAPSHOT_NAME_BYTES_MAX) {
        Ok(())
    } else {
        Err(format!(
            "name: 1 to {} lower-case letters, digits and inner `-`, `.`, `_`, and not an id",
            limits::SNAPSHOT_NAME_BYTES_MAX
        ))
    }
}

/// Of snapshots and templates.
pub(crate) fn is_plain_name(name: &str, bytes_max: usize) -> bool {
    let outer = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let plain = |b: u8| outer(b) || matches!(b, b'-' | b'.' | b'_');
    name.len() <= bytes_max
        && name.bytes().next().is_some_and(outer)
        && name.bytes().last().is_some_and(outer)
        && name.bytes().all(plain)
        && name.parse::<SnapshotId>().is_err()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_and_purposes_spell_themselves() {
        for &state in SnapshotState::ALL {
            assert_eq!(serde_json::to_string(&state).unwrap(), format!("\"{state}\""));
            assert_eq!(state.to_string().parse(), Ok(state));
        }
        for &purpose in SnapshotPurpose::ALL {
            let text = purpose.as_str();
            assert_eq!(serde_json::to_string(&purpose).unwrap(), format!("\"{text}\""));
            assert_eq!(text.parse(), Ok(purpose));
        }
        assert!("gone".parse::<SnapshotState>().is_err());
        assert!("gone".parse::<SnapshotPurpose>().is_err());
    }

    #[test]
    fn names_are_plain_and_no_ids() {
        for good in ["a", "0", "before-upgrade", "v1.2_rc", &"x".repeat(63)] {
            assert_eq!(validate_snapshot_name(good), Ok(()), "{good}");
        }
        let id = SnapshotId::new().to_string();
        for bad in
            ["", "-a", "a-", ".a", "a.", "A", "a b", "a/b", "a:b", "\u{e4}", &"x".repeat(64), &id]
        {
            let error = validate_snapshot_name(bad).unwrap_err();
            assert!(error.starts_with("name: 1 to 63 "), "{bad}: {error}");
        }
    }
}
