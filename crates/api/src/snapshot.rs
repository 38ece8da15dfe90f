use std::collections::BTreeMap;

use aether_types::{
    DriverKind, Fault, NetworkPolicy, Snapshot, SnapshotId, SnapshotPurpose, SnapshotState, TaskId,
    TaskState, Timestamp, VmId, WorkerId,
};
use serde::{Deserialize, Serialize};

use crate::{VmView, vm::ms};

/// `POST /vms/{vm}/snapshots`. The body may be left out.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct CreateSnapshot {
    /// Unique among snapshots that are not deleted.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(with = "Option<aether_types::schema::PlainName>"))]
    pub name: Option<String>,
}

/// A snapshot as it is now.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct SnapshotView {
    pub id: SnapshotId,
    pub name: Option<String>,
    pub purpose: SnapshotPurpose,
    pub state: SnapshotState,
    /// Why it is in this state, where it is more than a request being carried out.
    pub reason: Option<Fault>,
    /// The VM that it was taken of, which may be deleted by now.
    pub vm_id: VmId,
    pub worker_id: Option<WorkerId>,
    pub driver: DriverKind,
    pub image: String,
    pub vcpus: u32,
    pub memory_mb: u32,
    pub disk_mb: u32,
    /// Room that its files take on disk.
    pub size_bytes: Option<u64>,
    /// BLAKE3 of its manifest, in hex.
    pub digest: Option<String>,
    /// How long the VM stood still for it.
    pub paused_ms: Option<f64>,
    pub created_at: Timestamp,
    pub updated_at: Timestamp,
}

impl From<Snapshot> for SnapshotView {
    fn from(snapshot: Snapshot) -> Self {
        let Snapshot {
            id,
            // That of the key that asks.
            project_id: _,
            name,
            purpose,
            state,
            reason,
            vm_id,
            worker_id,
            driver,
            image,
            vcpus,
            memory_mb,
            disk_mb,
            size_bytes,
            digest,
            paused_us,
            created_at,
            updated_at,
        } = snapshot;
        Self {
            id,
            name,
            purpose,
            state,
            reason,
            vm_id,
            worker_id,
            driver,
            image,
            vcpus,
            memory_mb,
            disk_mb,
            size_bytes,
            digest,
            paused_ms: paused_us.map(ms),
            created_at,
            updated_at,
        }
    }
}

/// `POST /vms/{vm}/fork`. The body may be left out.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct ForkVm {
    /// 1 where it is not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = aether_types::limits::FORK_COUNT_MAX)))]
    pub count: Option<u32>,
    /// The clones are called so, with `-1`, `-2`, ... after it; made from ids where it is not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(with = "Option<aether_types::schema::VmName>"))]
    pub name_prefix: Option<String>,
    /// Instead of the source's. Values are never shown again.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(with = "Option<aether_types::schema::Env>"))]
    pub env: Option<BTreeMap<String, String>>,
    /// Instead of the source's.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(with = "Option<aether_types::schema::Labels>"))]
    pub labels: Option<BTreeMap<String, String>>,
    /// Time to live of the clones, from their creation; the source's where it is not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = aether_types::limits::VM_TIMEOUT_S_MAX)))]
    pub timeout_s: Option<u64>,
    /// Instead of the source's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkPolicy>,
}

/// The answer 202 to a fork: all of it is recorded and will be carried out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ForkAccepted {
    /// Of the snapshot.
    pub task_id: TaskId,
    /// The source.
    pub vm_id: VmId,
    /// Of the snapshot's task.
    pub status: TaskState,
    pub snapshot_id: SnapshotId,
    pub vms: Vec<CloneAccepted>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct CloneAccepted {
    pub vm_id: VmId,
    pub name: String,
    /// Of its creation.
    pub task_id: TaskId,
}

/// The answer 201 to a fork that was waited for: all clones run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Forked {
    /// How long the source stood still.
    pub paused_ms: Option<f64>,
    pub vms: Vec<VmView>,
}
