//! What is acknowledged is dispatched, whatever fails after.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use aether_api::{CreateVm, client::CallOptions};
use aether_queue::{Depth, Entry, Lease, Queue, QueueError};
use aether_types::{TaskId, WorkerId};
use async_trait::async_trait;

use crate::rig::{Options, Rig, command, done, waiting};

/// Refuses the first entries.
struct Flaky {
    queue: Arc<dyn Queue>,
    failures: AtomicU32,
}

#[async_trait]
impl Queue for Flaky {
    async fn enqueue(&self, entries: &[Entry]) -> Result<(), QueueError> {
        let fail = |left: u32| left.checked_sub(1);
        match self.failures.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fail) {
            Ok(_) => Err(QueueError::Busy),
            Err(_) => self.queue.enqueue(entries).await,
        }
    }

    async fn claim(
        &self,
        worker: WorkerId,
        lease: Duration,
        wait: Duration,
    ) -> Result<Option<Lease>, QueueError> {
        self.queue.claim(worker, lease, wait).await
    }

    async fn renew(&self, lease: &Lease) -> Result<(), QueueError> {
        self.queue.renew(lease).await
    }

    async fn complete(&self, lease: &Lease) -> Result<(), QueueError> {
        self.queue.complete(lease).await
    }

    async fn release(&self, lease: &Lease, delay: Duration) -> Result<(), QueueError> {
        self.queue.release(lease, delay).await
    }

    async fn remove(&self, task: TaskId) -> Result<bool, QueueError> {
        self.queue.remove(task).await
    }

    async fn sweep(&self) -> Result<u64, QueueError> {
        self.queue.sweep().await
    }

    async fn next_lease_end(&self) -> Result<Option<Duration>, QueueError> {
        self.queue.next_lease_end().await
    }

    async fn reclaim(&self, worker: WorkerId) -> Result<u64, QueueError> {
        self.queue.reclaim(worker).await
    }

    async fn contains(&self, task: TaskId) -> Result<bool, QueueError> {
        self.queue.contains(task).await
    }

    async fn depth(&self) -> Result<Depth, QueueError> {
        self.queue.depth().await
    }
}

#[tokio::test]
async fn a_task_that_could_not_be_enqueued_is_dispatched_later() {
    let options = Options {
        queue: |queue| Arc::new(Flaky { queue, failures: 3.into() }),
        ..Options::default()
    };
    let rig = Rig::with(options).await;
    rig.vm("a").await;
    let ended = rig.client.execute("a", &command("echo", &["x"]), &waiting()).await.unwrap();
    assert_eq!(done(ended).stdout.as_deref(), Some("x\n"));
}

#[tokio::test]
async fn what_was_dispatched_is_confirmed_by_the_end() {
    let rig = Rig::with(Options { has_worker: false, ..Options::default() }).await;
    rig.client.create_vm(&CreateVm::default(), &CallOptions::default()).await.unwrap();
    rig.shutdown.cancel();
    rig.served.await.unwrap().unwrap();
    assert_eq!(rig.queue.depth().await.unwrap().ready, 1);
    assert!(rig.store.undispatched(10).await.unwrap().is_empty());
    // The session of a stream that nobody took would be here.
    assert!(rig.sessions.take(aether_types::ExecutionId::new()).is_none());
}
