use aether_types::{Project, ProjectId, Timestamp};
use serde::{Deserialize, Serialize};

/// `POST /projects`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateProject {
    /// Unique among projects that are not deleted.
    pub name: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProjectView {
    pub id: ProjectId,
    pub name: String,
    pub created_at: Timestamp,
}

impl From<Project> for ProjectView {
    fn from(project: Project) -> Self {
        let Project { id, name, created_at } = project;
        Self { id, name, created_at }
    }
}
