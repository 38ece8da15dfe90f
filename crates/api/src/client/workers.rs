use super::{
    Client, ClientError, PageQuery,
    http::{Query, segment},
};
use crate::{ClusterStats, Page, VmView, WorkerShare, WorkerView};

/// In every method `worker` is an id, or the name of a host that has one worker.
impl Client {
    /// All of them: one page.
    pub async fn workers(&self, states: &[String]) -> Result<Page<WorkerView>, ClientError> {
        let mut q = Query::default();
        q.all("state", states);
        self.get("/workers", &q).await
    }

    pub async fn worker(&self, worker: &str) -> Result<WorkerView, ClientError> {
        self.get(&format!("/workers/{}", segment(worker)), &Query::default()).await
    }

    /// Newest first.
    pub async fn worker_vms(
        &self,
        worker: &str,
        page: &PageQuery,
    ) -> Result<Page<VmView>, ClientError> {
        let mut q = Query::default();
        q.page(page);
        self.get(&format!("/workers/{}/vms", segment(worker)), &q).await
    }

    /// The worker takes no new VMs from now on.
    pub async fn drain_worker(&self, worker: &str) -> Result<WorkerView, ClientError> {
        self.steer(worker, "drain").await
    }

    pub async fn activate_worker(&self, worker: &str) -> Result<WorkerView, ClientError> {
        self.steer(worker, "activate").await
    }

    async fn steer(&self, worker: &str, verb: &str) -> Result<WorkerView, ClientError> {
        let path = format!("/workers/{}/{verb}", segment(worker));
        self.post(&path, &Query::default(), None::<&()>).await
    }

    pub async fn cluster_stats(&self) -> Result<ClusterStats, ClientError> {
        self.get("/cluster/stats", &Query::default()).await
    }

    pub async fn cluster_distribution(&self) -> Result<Page<WorkerShare>, ClientError> {
        self.get("/cluster/distribution", &Query::default()).await
    }
}
