//! A transaction that knows its number.

use std::time::Duration;

use aether_postgres::{Trouble, trouble};
use sqlx::{PgConnection, PgPool, Postgres, Row as _, Transaction};
use tokio::time::Instant;

use crate::{StoreError, sql::Lock};

/// From a lost connection to finding out what became of its commit: a server that restarts is back
/// by then.
const DOUBT_MAX: Duration = Duration::from_secs(5);
/// The server may not have noticed yet that the client is gone.
const DOUBT_PAUSE: Duration = Duration::from_millis(50);

/// Keeps these advisory locks apart from others in the database.
const LOCKS_KEY: i32 = 0x6165_7401;
const LOCKS_TEMPLATE: i32 = 0x6165_7402;
const LOCK_CREATION: i64 = 0x6165_7468_6572_0002;
const LOCK_EVENTS: i64 = 0x6165_7468_6572_0003;

#[derive(Debug)]
pub(crate) struct PgTransaction {
    tx: Transaction<'static, Postgres>,
    pool: PgPool,
    /// The server's number of it, as text.
    number: String,
}

impl PgTransaction {
    pub(crate) async fn begin(pool: &PgPool, locks: &[Lock<'_>]) -> Result<Self, sqlx::Error> {
        let mut tx = pool.begin().await?;
        let number = sqlx::query("select pg_current_xact_id()::text")
            .fetch_one(&mut *tx)
            .await?
            .try_get(0)?;
        let mut tx = Self { tx, pool: pool.clone(), number };
        for lock in locks {
            tx.lock(lock).await?;
        }
        Ok(tx)
    }

    pub(crate) fn connection(&mut self) -> &mut PgConnection {
        &mut self.tx
    }

    /// A statement after this one sees what the earlier holder has committed.
    pub(crate) async fn lock(&mut self, lock: &Lock<'_>) -> Result<(), sqlx::Error> {
        const VM_OF: &str = "select 1 from vms where id = (select vm_id from tasks where id = $1) \
             for no key update";
        let hashed = "select pg_advisory_xact_lock($2, hashtext($1))";
        let (sql, text) = match lock {
            Lock::Key(key) => return self.lock_text(hashed, key, LOCKS_KEY).await,
            Lock::TemplateName { project, name, tag } => {
                let name = format!("{project}/{name}:{tag}");
                return self.lock_text(hashed, &name, LOCKS_TEMPLATE).await;
            }
            Lock::Creation => return self.lock_number(LOCK_CREATION).await,
            Lock::Events => return self.lock_number(LOCK_EVENTS).await,
            Lock::Project(id) => {
                ("select 1 from projects where id = $1 for no key update", id.to_string())
            }
            Lock::ProjectStays(id) => {
                ("select 1 from projects where id = $1 for share", id.to_string())
            }
            Lock::Worker(id) => {
                ("select 1 from workers where id = $1 for no key update", id.to_string())
            }
            Lock::WorkerStays(id) => {
                ("select 1 from workers where id = $1 for share", id.to_string())
            }
            Lock::Vm(id) => ("select 1 from vms where id = $1 for no key update", id.to_string()),
            Lock::VmState(id) => ("select 1 from vms where id = $1 for share", id.to_string()),
            Lock::Task(id) => {
                sqlx::query(VM_OF).bind(id.to_string()).execute(self.connection()).await?;
                ("select 1 from tasks where id = $1 for no key update", id.to_string())
            }
            Lock::Snapshot(id) => {
                ("select 1 from snapshots where id = $1 for no key update", id.to_string())
            }
            Lock::Template(id) => {
                ("select 1 from templates where id = $1 for no key update", id.to_string())
            }
            Lock::OriginSnapshot(id) => {
                ("select 1 from snapshots where id = $1 for share", id.to_string())
            }
            Lock::OriginTemplate(id) => {
                ("select 1 from templates where id = $1 for share", id.to_string())
            }
        };
        sqlx::query(sql).bind(text).execute(self.connection()).await?;
        Ok(())
    }

    /// What it is at this very moment, not at the transaction's begin: locks may have been waited
    /// for.
    pub(crate) async fn now(&mut self) -> Result<aether_types::Timestamp, sqlx::Error> {
        let now = "select (extract(epoch from clock_timestamp()) * 1000)::bigint";
        let row = sqlx::query(now).fetch_one(self.connection()).await?;
        row.try_get(0).map(aether_types::Timestamp::from_unix_ms)
    }

    async fn lock_number(&mut self, number: i64) -> Result<(), sqlx::Error> {
        let lock = sqlx::query("select pg_advisory_xact_lock($1)").bind(number);
        lock.execute(self.connection()).await.map(drop)
    }

    async fn lock_text(
        &mut self,
        sql: &'static str,
        text: &str,
        space: i32,
    ) -> Result<(), sqlx::Error> {
        sqlx::query(sql).bind(text).bind(space).execute(self.connection()).await?;
        Ok(())
    }

    pub(crate) async fn commit(self, context: &'static str) -> Result<(), StoreError> {
        let Self { tx, pool, number } = self;
        let Err(source) = tx.commit().await else { return Ok(()) };
        if trouble(&source) != Trouble::Lost {
            return Err(StoreError::database(context, source));
        }
        match outcome(&pool, &number).await {
            Some(Outcome::Committed) => Ok(()),
            Some(Outcome::Undone) => Err(StoreError::database(context, source)),
            None => Err(StoreError::InDoubt { context, source: Some(source) }),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Committed,
    Undone,
}

/// Asks the server what became of a transaction. `None`: it cannot be known in time.
async fn outcome(pool: &PgPool, number: &str) -> Option<Outcome> {
    let deadline = Instant::now() + DOUBT_MAX;
    loop {
        let asked =
            sqlx::query("select pg_xact_status($1::text::xid8)").bind(number).fetch_one(pool);
        let answer = tokio::time::timeout_at(deadline, asked).await.ok()?;
        let status = answer.and_then(|row| row.try_get::<Option<String>, _>(0));
        match status.as_ref().map(Option::as_deref) {
            Ok(Some("committed")) => return Some(Outcome::Committed),
            Ok(Some("aborted")) => return Some(Outcome::Undone),
            // Under way still, for the server has not seen that we are gone; or it is away.
            Ok(Some(_)) | Err(_) => {}
            // Too old to be known; it would have to be billions of transactions.
            Ok(None) => return None,
        }
        if Instant::now() + DOUBT_PAUSE >= deadline {
            return None;
        }
        tokio::time::sleep(DOUBT_PAUSE).await;
    }
}
