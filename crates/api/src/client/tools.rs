//! Tools: what there is of them, and layers built ahead of VMs.

use std::time::Duration;

use aether_types::TaskId;
use reqwest::Method;

use super::{
    CallOptions, Client, ClientError, PageQuery, Waited,
    http::{Query, segment},
};
use crate::{
    BuildTools, LockedToolView, Page, PruneTools, TaskView, ToolBuildAccepted, ToolVersionsView,
    ToolView, ToolsPruned, ToolsRefreshed, format_wait,
};

/// In every method `tool` is a name or an alias.
impl Client {
    /// By name.
    pub async fn tools(&self) -> Result<Page<ToolView>, ClientError> {
        self.get("/tools", &Query::default()).await
    }

    /// Newest first.
    pub async fn tool_versions(
        &self,
        tool: &str,
        page: &PageQuery,
    ) -> Result<ToolVersionsView, ClientError> {
        let mut q = Query::default();
        q.page(page);
        self.get(&format!("/tools/{}/versions", segment(tool)), &q).await
    }

    pub async fn tools_lock(&self) -> Result<Page<LockedToolView>, ClientError> {
        self.get("/tools/lock", &Query::default()).await
    }

    /// With a wait: the task at its end, with what came of each tool.
    pub async fn build_tools(
        &self,
        request: &BuildTools,
        options: &CallOptions,
    ) -> Result<Waited<TaskView, ToolBuildAccepted>, ClientError> {
        self.submit(Method::POST, "/tools/builds", Some(request), options).await
    }

    /// What `latest` and ranges of versions come to is asked anew.
    pub async fn refresh_tools(&self) -> Result<ToolsRefreshed, ClientError> {
        self.post("/tools/refresh", &Query::default(), None::<&()>).await
    }

    pub async fn prune_tools(&self, request: &PruneTools) -> Result<ToolsPruned, ClientError> {
        self.post("/tools/prune", &Query::default(), Some(request)).await
    }

    /// The task when its progress has passed this generation, or it has ended, or the time is over.
    pub async fn task_wait(
        &self,
        id: TaskId,
        generation: i64,
        wait: Duration,
    ) -> Result<TaskView, ClientError> {
        let mut q = Query::default();
        q.add("wait", format_wait(wait)).add("generation", generation.to_string());
        self.get(&format!("/tasks/{id}"), &q).await
    }
}
