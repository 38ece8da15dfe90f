//! The store, the queue and the bus that were asked for: files of this data directory, PostgreSQL, Redis.

use std::sync::Arc;

use aether_events::{EventBus, LocalBus, PostgresBus, RedisBus};
use aether_gateway::{LocalLimiter, RateLimiter};
use aether_postgres::{Config, Database, Extent, MigrateError, OpenError, Schema};
use aether_queue::{PostgresQueue, Queue, QueueError, RedisQueue, SqliteQueue};
use aether_store::{Durability, PostgresStore, SqliteStore, Store, StoreError};
use aether_types::WorkerId;

use crate::{
    args::{refused, refused_redis},
    datadir::LockedDataDir,
    exit::Exit,
    failure::{Failure, chain},
    rate_limiter::RedisLimiter,
};

/// Everything that is kept in PostgreSQL.
pub(crate) const SCHEMAS: &[Schema] =
    &[aether_store::postgres::SCHEMA, aether_queue::postgres::SCHEMA];

/// What the platform is to be on.
#[derive(Debug)]
pub(crate) struct Target {
    pub(crate) store: StoreTarget,
    /// `None`: the queue is beside the store.
    pub(crate) redis: Option<aether_redis::Config>,
}

#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "one exists in a program")]
pub(crate) enum StoreTarget {
    /// A file that this process alone uses. It brings it up to date itself.
    Files,
    Postgres {
        config: Config,
        migrate: bool,
    },
}

pub(crate) struct Opened {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) queue: Arc<dyn Queue>,
    /// Over the server that the queue is on.
    pub(crate) bus: Arc<dyn EventBus>,
    /// Counts requests with all others that are on the same Redis, or for itself.
    pub(crate) limiter: Arc<dyn RateLimiter>,
    /// To be closed when they have come to rest.
    pub(crate) database: Option<Database>,
}

impl Target {
    pub(crate) fn files() -> Self {
        Self { store: StoreTarget::Files, redis: None }
    }
}

impl Opened {
    pub(crate) async fn open(target: Target, dir: &LockedDataDir) -> Result<Self, Failure> {
        let Target { store, redis } = target;
        let (store, database): (Arc<dyn Store>, _) = match store {
            StoreTarget::Files => {
                let opened = SqliteStore::open(&dir.store(), Durability::default()).await;
                (Arc::new(opened.map_err(|e| Failure::internal("open the store", &e))?), None)
            }
            StoreTarget::Postgres { config, migrate } => {
                let database = postgres(config, migrate).await?;
                let opened = PostgresStore::open(&database).await;
                (Arc::new(opened.map_err(|e| store_failure(&e))?), Some(database))
            }
        };
        let limiter = limiter(redis.as_ref()).await?;
        let (queue, bus): (Arc<dyn Queue>, Arc<dyn EventBus>) = match (redis, &database) {
            (Some(config), _) => {
                let owner = installation(&*store).await?;
                let queue = RedisQueue::open(config.clone(), &owner).await;
                let queue = queue.map_err(|e| queue_failure(&e))?;
                let bus = RedisBus::open(config).await.map_err(|e| redis_unreachable(&e))?;
                (Arc::new(queue), Arc::new(bus))
            }
            (None, Some(database)) => {
                let queue = PostgresQueue::open(database).await.map_err(|e| queue_failure(&e))?;
                let bus = PostgresBus::open(database).await;
                let bus = bus.map_err(|e| Failure::internal("listen for events", &e))?;
                (Arc::new(queue), Arc::new(bus))
            }
            (None, None) => {
                let queue = SqliteQueue::open(&dir.queue()).await;
                let queue = queue.map_err(|e| Failure::internal("open the queue", &e))?;
                (Arc::new(queue), Arc::new(LocalBus::new()))
            }
        };
        Ok(Self { store, queue, bus, limiter, database })
    }
}

async fn limiter(redis: Option<&aether_redis::Config>) -> Result<Arc<dyn RateLimiter>, Failure> {
    let Some(config) = redis else { return Ok(Arc::new(LocalLimiter::default())) };
    let limiter = RedisLimiter::open(config.clone()).await;
    Ok(Arc::new(limiter.map_err(|e| redis_unreachable(&e))?))
}

async fn postgres(config: Config, migrate: bool) -> Result<Database, Failure> {
    if migrate {
        let applied = aether_postgres::up(&config, SCHEMAS, Extent::Expand).await;
        for step in applied.map_err(|e| migration(&e))? {
            let (part, version, name) = (step.part, step.version, step.name);
            tracing::info!(part, version, name, "migrated");
        }
    }
    open(config).await
}

/// The store's name for itself: what is outside of it and belongs to it has this on it.
async fn installation(store: &dyn Store) -> Result<String, Failure> {
    let failed = |e: &dyn std::error::Error| Failure::internal("read the store's name", e);
    let proposed = WorkerId::new().to_string();
    let kept = store.shared_secret("installation", proposed.as_bytes()).await;
    String::from_utf8(kept.map_err(|e| failed(&e))?).map_err(|e| failed(&e))
}

fn store_failure(error: &StoreError) -> Failure {
    match error {
        StoreError::Schema(why) => migration(why),
        _ => Failure::internal("open the store", error),
    }
}

fn queue_failure(error: &QueueError) -> Failure {
    match error {
        QueueError::Schema(why) => migration(why),
        QueueError::Open(why) => redis_unreachable(why),
        QueueError::Foreign { .. } => {
            Failure::new("redis_of_another", Exit::Conflict, error.to_string())
                .hint("choose another --redis-prefix, or remove what is left of the other there")
        }
        _ => Failure::internal("open the queue", error),
    }
}

pub(crate) fn redis_unreachable(error: &aether_redis::OpenError) -> Failure {
    use aether_redis::OpenError;
    match error {
        OpenError::Config(error) => refused_redis(error),
        OpenError::Connect(error) if error.trouble == aether_redis::Trouble::Refused => {
            Failure::new("redis_refused", Exit::Unauthorized, chain(error))
                .hint("check REDIS_PASSWORD, and what the user may do")
        }
        OpenError::Connect(error) => {
            Failure::new("redis_unreachable", Exit::Unavailable, chain(error))
                .hint("check that it runs, and REDIS_URL or REDIS_ADDR")
        }
        OpenError::TooOld { .. } => Failure::new("redis_too_old", Exit::Failure, chain(error))
            .hint("use a newer one, or none: PostgreSQL has a queue too"),
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
