//! The store on SQLite.
//!
//! One connection writes, behind a mutex, in transactions that begin `IMMEDIATE`: writers queue
//! here, never on the file's lock, and no transaction fails because it read before it wrote. A few
//! connections read; the write-ahead log lets them read while one writes, and what was
//! acknowledged is seen at once.
//!
//! What it does with them is in `sql`.

use std::{fs::OpenOptions, os::unix::fs::OpenOptionsExt, path::Path, time::Duration};

use sqlx::{
    ConnectOptions,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};
use tokio::sync::Mutex;

use crate::{
    StoreError,
    error::Context,
    sql::{OnSql, Sql},
};

/// Enough for a gateway on a few processors; each costs a thread and a page cache.
const READERS_MAX: u32 = 4;

/// For the lock that another process may hold for a moment (a backup); our own writers wait on
/// the mutex.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// The log is cut to this size after a checkpoint, so that one burst does not keep the room.
const LOG_BYTES_KEPT: &str = "67108864";

/// 32 MiB of log. The commit that fills it does the checkpoint and waits for the disk; SQLite's
/// own 1000 pages would make that many more commits wait.
const CHECKPOINT_PAGES: &str = "8000";

/// More than there are statements: each is prepared once.
const STATEMENTS_CACHED: usize = 256;

static MIGRATIONS: sqlx::migrate::Migrator = sqlx::migrate!("./migrations/sqlite");

/// What an acknowledged change survives. Either way it survives the death of the process, SIGKILL
/// included: a commit is written to the log, which the kernel has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Durability {
    /// The death of the process (`synchronous=NORMAL`). After a power loss the last moments may be
    /// missing; nothing is damaged.
    #[default]
    Process,
    /// Power loss too (`synchronous=FULL`): each transaction waits for one flush of the disk.
    Power,
}

#[derive(Debug)]
pub struct SqliteStore {
    sql: Sql,
}

impl SqliteStore {
    /// Opens the store, made with mode 0600 where there is none, and brings its tables up to date.
    pub async fn open(path: &Path, durability: Durability) -> Result<Self, StoreError> {
        // SQLite gives its log the mode of the file, and the file holds environments.
        OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(path)
            .map_err(sqlx::Error::Io)
            .context("make the store's file")?;
        let synchronous = match durability {
            Durability::Process => SqliteSynchronous::Normal,
            Durability::Power => SqliteSynchronous::Full,
        };
        let options = SqliteConnectOptions::new()
            .filename(path)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(synchronous)
            .foreign_keys(true)
            .busy_timeout(BUSY_TIMEOUT)
            .statement_cache_capacity(STATEMENTS_CACHED)
            .pragma("wal_autocheckpoint", CHECKPOINT_PAGES)
            .pragma("journal_size_limit", LOG_BYTES_KEPT)
            .pragma("temp_store", "memory")
            .disable_statement_logging();
        let mut writer = options.clone().connect().await.context("open the store")?;
        // Not `run`: its future is not `Send` for every lifetime, and callers spawn.
        MIGRATIONS
            .run_direct(None, &mut writer, false)
            .await
            .map_err(|e| StoreError::Migration(Box::new(e)))?;
        let readers = SqlitePoolOptions::new()
            .max_connections(READERS_MAX)
            .min_connections(1)
            .acquire_timeout(BUSY_TIMEOUT)
            .idle_timeout(None)
            .max_lifetime(None)
            .test_before_acquire(false)
            .connect_with(options.read_only(true))
            .await
            .context("open the store for reading")?;
        Ok(Self { sql: Sql::Sqlite { writer: Mutex::new(writer), readers } })
    }

    /// Waits for transactions under way and closes the file; the log is merged into it.
    pub async fn close(self) -> Result<(), StoreError> {
        self.sql.close().await
    }
}

impl OnSql for SqliteStore {
    fn sql(&self) -> &Sql {
        &self.sql
    }
}
