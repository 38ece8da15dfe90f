//! Snapshots, forks, and a stop that keeps the memory.

use reqwest::Method;

use super::{
    CallOptions, Client, ClientError, PageQuery, Waited,
    http::{Query, segment},
};
use crate::{CreateSnapshot, ForkAccepted, ForkVm, Forked, Page, SnapshotView, VmView};

/// Filters of `GET /snapshots`. Empty: every snapshot that is not deleted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SnapshotQuery {
    /// State names; several are an "or".
    pub states: Vec<String>,
    /// Of this VM: an id or a name.
    pub vm: Option<String>,
    pub page: PageQuery,
}

/// In every method `snapshot` is an id or a name.
impl Client {
    /// Stops a VM and keeps its memory: [`Client::start_vm`] goes on where it was.
    pub async fn suspend_vm(
        &self,
        vm: &str,
        options: &CallOptions,
    ) -> Result<Waited<VmView>, ClientError> {
        let path = format!("/vms/{}/stop", segment(vm));
        let mut query = Query::default();
        query.add("keep_memory", "true");
        self.submit_with(Method::POST, &path, query, None::<&()>, options).await
    }

    pub async fn create_snapshot(
        &self,
        vm: &str,
        request: &CreateSnapshot,
        options: &CallOptions,
    ) -> Result<Waited<SnapshotView>, ClientError> {
        let path = format!("/vms/{}/snapshots", segment(vm));
        self.submit(Method::POST, &path, Some(request), options).await
    }

    pub async fn snapshots(
        &self,
        query: &SnapshotQuery,
    ) -> Result<Page<SnapshotView>, ClientError> {
        let mut q = Query::default();
        q.all("state", &query.states).opt("vm", query.vm.as_deref()).page(&query.page);
        self.get("/snapshots", &q).await
    }

    pub async fn snapshot(&self, snapshot: &str) -> Result<SnapshotView, ClientError> {
        self.get(&format!("/snapshots/{}", segment(snapshot)), &Query::default()).await
    }

    pub async fn delete_snapshot(&self, snapshot: &str) -> Result<SnapshotView, ClientError> {
        self.delete(&format!("/snapshots/{}", segment(snapshot))).await
    }

    /// With a wait: the clones, once all of them run.
    pub async fn fork_vm(
        &self,
        vm: &str,
        request: &ForkVm,
        options: &CallOptions,
    ) -> Result<Waited<Forked, ForkAccepted>, ClientError> {
        let path = format!("/vms/{}/fork", segment(vm));
        self.submit(Method::POST, &path, Some(request), options).await
    }
}
