use aether_types::{
    Project, ProjectId, Timestamp,
    project::{Quota, Usage},
};
use serde::{Deserialize, Serialize};

/// `POST /projects`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct CreateProject {
    /// Unique among projects that are not deleted.
    #[cfg_attr(feature = "schema", schemars(with = "aether_types::schema::PlainName"))]
    pub name: String,
    #[serde(default)]
    pub quota: Quota,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ProjectView {
    pub id: ProjectId,
    pub name: String,
    pub created_at: Timestamp,
    #[serde(default)]
    pub quota: Quota,
    /// Not in lists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used: Option<Usage>,
}

/// `GET /quota`: of the project that the key is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct QuotaView {
    pub quota: Quota,
    pub used: Usage,
}

impl From<Project> for ProjectView {
    fn from(project: Project) -> Self {
        let Project { id, name, created_at, quota } = project;
        Self { id, name, created_at, quota, used: None }
    }
}
