//! The store and the queue that were asked for: files of this data directory, or PostgreSQL.

use std::sync::Arc;

use aether_postgres::{Config, Database, Extent, MigrateError, OpenError, Schema};
use aether_queue::{PostgresQueue, Queue, QueueError, SqliteQueue};
use aether_store::{Durability, PostgresStore, SqliteStore, Store, StoreError};

use crate::{
    args::refused,
    datadir::LockedDataDir,
    exit::Exit,
    failure::{Failure, chain},
};

/// Everything that is kept in PostgreSQL.
pub(crate) const SCHEMAS: &[Schema] =
    &[aether_store::postgres::SCHEMA, aether_queue::postgres::SCHEMA];

/// What the platform is to be on.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "one exists in a program")]
pub(crate) enum Target {
    /// Files that this process alone uses. It brings them up to date itself.
    Files,
    Postgres {
        config: Config,
        migrate: bool,
    },
}

pub(crate) struct Opened {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) queue: Arc<dyn Queue>,
    /// To be closed when both have come to rest.
    pub(crate) database: Option<Database>,
}

impl Opened {
    pub(crate) async fn open(target: Target, dir: &LockedDataDir) -> Result<Self, Failure> {
        match target {
            Target::Files => Self::files(dir).await,
            Target::Postgres { config, migrate } => Self::postgres(config, migrate).await,
        }
    }

    async fn files(dir: &LockedDataDir) -> Result<Self, Failure> {
        let store = SqliteStore::open(&dir.store(), Durability::default())
            .await
            .map_err(|e| Failure::internal("open the store", &e))?;
        let queue = SqliteQueue::open(&dir.queue())
            .await
            .map_err(|e| Failure::internal("open the queue", &e))?;
        Ok(Self { store: Arc::new(store), queue: Arc::new(queue), database: None })
    }

    async fn postgres(config: Config, migrate: bool) -> Result<Self, Failure> {
        if migrate {
            for step in aether_postgres::up(&config, SCHEMAS, Extent::Expand)
                .await
                .map_err(|e| migration(&e))?
            {
                tracing::info!(
                    part = step.part,
                    version = step.version,
                    name = step.name,
                    "migrated"
                );
            }
        }
        let database = open(config).await?;
        let store = PostgresStore::open(&database).await.map_err(|error| match &error {
            StoreError::Schema(why) => migration(why),
            _ => Failure::internal("open the store", &error),
        })?;
        let queue = PostgresQueue::open(&database).await.map_err(|error| match &error {
            QueueError::Schema(why) => migration(why),
            _ => Failure::internal("open the queue", &error),
        })?;
        Ok(Self { store: Arc::new(store), queue: Arc::new(queue), database: Some(database) })
    }
}

pub(crate) async fn open(config: Config) -> Result<Database, Failure> {
    Database::open(config).await.map_err(|error| unreachable(&error))
}

pub(crate) fn unreachable(error: &OpenError) -> Failure {
    match error {
        OpenError::Config(error) => refused(error),
        OpenError::Connect { .. } | OpenError::Silent { .. } => {
            Failure::new("database_unreachable", Exit::Unavailable, chain(error))
                .hint("check that it runs, and DATABASE_URL or POSTGRES_HOST")
        }
    }
}

pub(crate) fn migration(error: &MigrateError) -> Failure {
    let failure = |code, exit| Failure::new(code, exit, chain(error));
    match error {
        MigrateError::Open(error) => unreachable(error),
        MigrateError::Locked => failure("migration_in_progress", Exit::Unavailable)
            .hint("wait for the other process, then run `aether migrate status`"),
        MigrateError::InUse { .. } => failure("migration_in_use", Exit::Unavailable)
            .hint("nothing was changed by it; run `aether migrate up` again at a quieter time"),
        MigrateError::Failed { .. } => failure("migration_failed", Exit::Failure)
            .hint("nothing was changed by it; the cause is said above"),
        MigrateError::Edited { .. } => failure("migration_edited", Exit::Conflict)
            .hint("use the program whose migrations these are"),
        MigrateError::Behind { .. } => failure("schema_behind", Exit::Conflict)
            .hint("run `aether migrate up`, or start it with --migrate"),
        MigrateError::Ahead { .. } => failure("schema_ahead", Exit::Conflict)
            .hint("use the newer program; this one cannot go back"),
        MigrateError::Database { .. } => failure("database_failed", Exit::Failure),
    }
}
