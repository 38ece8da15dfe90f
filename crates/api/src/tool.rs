use aether_types::{TaskId, TaskState, Timestamp};
use serde::{Deserialize, Serialize};

/// A tool of the catalogue.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ToolView {
    pub name: String,
    /// Other names that requests may use.
    pub aliases: Vec<String>,
    pub summary: String,
    /// Where it comes from, in words, such as `npm: @anthropic-ai/claude-code`.
    pub source: String,
    /// What it puts on the path.
    pub commands: Vec<String>,
    /// The version that every VM has which asks for no other; `null` where it is no default.
    pub default: Option<String>,
    /// Layers that are there, newest use first: a VM that asks for one of these waits for nothing.
    pub cached: Vec<CachedToolView>,
}

/// A layer of a tool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CachedToolView {
    pub version: String,
    pub size_bytes: u64,
    /// When the tool was run to see that it works.
    pub verified_at: Timestamp,
    pub used_at: Timestamp,
}

/// A version that the source has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ToolVersionView {
    pub version: String,
    /// Only had by asking for exactly this.
    pub is_prerelease: bool,
    /// Its layer is there.
    pub is_cached: bool,
    /// It is in the lock file: with its layer or a mirror it is served without a network.
    pub is_locked: bool,
}

/// A line of the lock file: what a request came to, and from what.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockedToolView {
    pub name: String,
    pub asked: String,
    pub got: String,
    /// Where its artefacts came from, in words.
    pub source: String,
    /// Digests of what was fetched, as the source gives them.
    pub artefacts: Vec<String>,
    /// Of the layer, BLAKE3 in hex.
    pub layer: String,
    pub size_bytes: u64,
    pub verified_at: Timestamp,
    /// The layer is there.
    pub is_cached: bool,
}

/// `POST /tools/builds`: layers for VMs to come.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BuildTools {
    /// `go`, `go@1.23.1`, `go=1.23`.
    pub tools: Vec<String>,
}

/// The answer 202 to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ToolBuildAccepted {
    pub task_id: TaskId,
    /// Of the task.
    pub status: TaskState,
}

/// `POST /tools/prune`: the layers that were used longest ago go, until the rest fits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PruneTools {
    /// What the rest may take; the configured budget where it is not given. 0 removes every layer.
    /// VMs keep what they have either way.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_bytes: Option<u64>,
}

/// What a pruning came to.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ToolsPruned {
    /// `name@version` of the layers that went.
    pub removed: Vec<String>,
    pub freed_bytes: u64,
    pub kept_bytes: u64,
}
