//! What is under the queue.

use std::sync::Arc;

use aether_queue::{ManualClock, Queue, RedisQueue, SqliteQueue};
use aether_redis::testing::Server;

#[derive(Debug)]
pub(crate) enum Engine {
    /// A folder for each file: what closes an old one does not touch a new one.
    Sqlite(tempfile::TempDir),
    Redis(Server),
}

impl Engine {
    pub(crate) fn sqlite() -> Self {
        Self::Sqlite(tempfile::tempdir().unwrap())
    }

    pub(crate) fn redis() -> Option<Self> {
        aether_redis::testing::available().then(|| Self::Redis(Server::forgetful()))
    }

    /// As an empty queue has it.
    pub(crate) fn clear(&mut self) {
        match self {
            Self::Sqlite(folder) => *folder = tempfile::tempdir().unwrap(),
            Self::Redis(server) => {
                server.ask(&["FLUSHALL"]);
            }
        }
    }

    pub(crate) async fn open(&self, clock: Arc<ManualClock>) -> Box<dyn Queue> {
        match self {
            Self::Sqlite(folder) => {
                let path = folder.path().join("queue.db");
                Box::new(SqliteQueue::open_with_clock(&path, clock).await.unwrap())
            }
            Self::Redis(server) => Box::new(
                RedisQueue::open_with_clock(server.config(), "simulation", clock).await.unwrap(),
            ),
        }
    }
}
