use aether_types::TemplateId;
use serde::{Deserialize, Serialize};

/// Machines of a template that wait, restored and paused, to become VMs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct PoolView {
    pub template_id: TemplateId,
    /// `name:tag`.
    pub template: String,
    /// Machines that can be had now.
    pub ready: u32,
    /// Machines that there shall be now, by configuration, demand and memory.
    pub target: u32,
    pub min: u32,
    pub max: u32,
    /// VMs that were one since the server started, and VMs that found the pool empty.
    pub hits: u64,
    pub misses: u64,
}
