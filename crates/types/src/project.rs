//! Projects: whose VMs, tasks, snapshots, templates and keys they are. What is of one project does
//! not exist for another.

use serde::{Deserialize, Serialize};

use crate::{ProjectId, Timestamp};

/// Of the project that there is from the start.
pub const DEFAULT_PROJECT: &str = "default";

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Project {
    pub id: ProjectId,
    /// Unique among projects that are not deleted.
    pub name: String,
    pub created_at: Timestamp,
}
