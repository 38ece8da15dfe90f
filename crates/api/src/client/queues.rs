use aether_types::TaskId;

use super::{
    Client, ClientError, PageQuery,
    http::{Query, segment},
};
use crate::{Page, QueueView, Retried, TaskView};

/// In every method `queue` is `shared`, or a worker's id.
impl Client {
    /// All of them: one page.
    pub async fn queues(&self) -> Result<Page<QueueView>, ClientError> {
        self.get("/queues", &Query::default()).await
    }

    /// Tasks that used up their attempts, newest first.
    pub async fn dead_tasks(
        &self,
        queue: &str,
        page: &PageQuery,
    ) -> Result<Page<TaskView>, ClientError> {
        let mut q = Query::default();
        q.page(page);
        self.get(&format!("/queues/{}/dead", segment(queue)), &q).await
    }

    /// Asks again for what the task was to do; repeating it gives the same new task.
    pub async fn retry_dead(&self, queue: &str, task: TaskId) -> Result<Retried, ClientError> {
        let path = format!("/queues/{}/dead/{task}/retry", segment(queue));
        self.post(&path, &Query::default(), None::<&()>).await
    }
}
