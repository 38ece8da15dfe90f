//! Projects: for admins of the platform.

use aether_types::project::Quota;

use super::{
    Client, ClientError, PageQuery,
    http::{Query, segment},
};
use crate::{CreateProject, Page, ProjectView, QuotaView};

/// In every method `project` is an id or a name.
impl Client {
    pub async fn create_project(
        &self,
        request: &CreateProject,
    ) -> Result<ProjectView, ClientError> {
        self.post("/projects", &Query::default(), Some(request)).await
    }

    /// Newest first.
    pub async fn projects(&self, page: &PageQuery) -> Result<Page<ProjectView>, ClientError> {
        let mut q = Query::default();
        q.page(page);
        self.get("/projects", &q).await
    }

    pub async fn project(&self, project: &str) -> Result<ProjectView, ClientError> {
        self.get(&format!("/projects/{}", segment(project)), &Query::default()).await
    }

    /// In place of the quota that it had.
    pub async fn set_quota(
        &self,
        project: &str,
        quota: &Quota,
    ) -> Result<ProjectView, ClientError> {
        let path = format!("/projects/{}/quota", segment(project));
        self.put(&path, &Query::default(), quota).await
    }

    /// Of the project that the key is of.
    pub async fn quota(&self) -> Result<QuotaView, ClientError> {
        self.get("/quota", &Query::default()).await
    }

    /// With its keys; refused while it has anything else.
    pub async fn delete_project(&self, project: &str) -> Result<ProjectView, ClientError> {
        self.delete(&format!("/projects/{}", segment(project))).await
    }
}
