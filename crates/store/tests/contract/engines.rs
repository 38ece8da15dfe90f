//! Stores on a real server, for tests that run on both engines.

use aether_postgres::{Database, Extent, testing, testing::TestDatabase};
use aether_store::{PostgresStore, postgres::SCHEMA};

/// A store in a database of its own; `None` where no server is installed, which is said.
pub(crate) async fn postgres() -> Option<(PostgresStore, TestDatabase)> {
    if !testing::available() {
        return None;
    }
    let test = testing::database("store", async |config| {
        aether_postgres::up(&config, &[SCHEMA], Extent::Expand).await.unwrap();
    })
    .await;
    let database = Database::open(test.config.clone()).await.unwrap();
    Some((PostgresStore::open(&database).await.unwrap(), test))
}
