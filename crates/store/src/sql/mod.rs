//! The store in SQL, on either engine. What happens is written once, here; the engines differ in
//! how a transaction begins, what it must lock, and how it ends.
//!
//! | | SQLite | PostgreSQL |
//! |---|---|---|
//! | who writes | one connection, behind a mutex | any connection of the pool |
//! | transactions | one after another | at once, `read committed` |
//! | [`Lock`]s | nothing to do: nobody else writes | rows and advisory locks, taken first |
//! | in each other's way | never | undone, and repeated by `store::repeated` |
//!
//! Cancellation: a method's future may be dropped at any point. The transaction is then rolled
//! back, or was committed whole.
//!
//! Statements that write and answer with rows are read to their end (`fetch_all`): the commit of a
//! lone statement happens at its last step, and an error of it must not be lost.

mod attempts;
mod audit;
mod create;
mod events;
mod executions;
mod keys;
mod lock;
mod orphans;
mod place;
mod projects;
pub(crate) mod query;
mod queues;
mod quotas;
mod requests;
mod rows;
mod snapshots;
mod store;
mod tasks;
mod templates;
mod vms;
mod workers;
mod write;

use sqlx::{PgPool, Sqlite, SqliteConnection, SqlitePool, Transaction};
use tokio::sync::{Mutex, MutexGuard};

use self::query::{Batch, Order, Query, Row, Target};
pub(crate) use self::{lock::Lock, store::OnSql};
use crate::{
    StoreError,
    error::Context,
    postgres::{self, PgTransaction},
};

/// A store's database.
#[derive(Debug)]
pub(crate) enum Sql {
    Sqlite { writer: Mutex<SqliteConnection>, readers: SqlitePool },
    Postgres(PgPool),
}

/// The right to write.
#[derive(Debug)]
pub(crate) enum Writer<'s> {
    Sqlite(MutexGuard<'s, SqliteConnection>),
    Postgres(&'s PgPool),
}

/// A transaction. It is rolled back where it is dropped before it is committed.
#[derive(Debug)]
pub(crate) enum Tx<'w> {
    Sqlite(Transaction<'w, Sqlite>),
    Postgres(PgTransaction),
}

impl Sql {
    pub(crate) async fn writer(&self) -> Writer<'_> {
        match self {
            Self::Sqlite { writer, .. } => Writer::Sqlite(writer.lock().await),
            Self::Postgres(pool) => Writer::Postgres(pool),
        }
    }
}

impl Sql {
    pub(crate) async fn close(self) -> Result<(), StoreError> {
        use sqlx::Connection as _;
        match self {
            Self::Sqlite { writer, readers } => {
                readers.close().await;
                writer.into_inner().close().await.context("close the store")
            }
            // Others may be on the same pool; whoever opened the database closes it.
            Self::Postgres(_) => Ok(()),
        }
    }
}

impl Writer<'_> {
    /// A statement that is a transaction of its own, and must not be done twice: where its outcome
    /// could be in doubt it is given one that can be asked for.
    pub(crate) async fn lone(
        &mut self,
        query: Query<'_>,
        context: &'static str,
    ) -> Result<Vec<Row>, StoreError> {
        match self {
            Self::Sqlite(writer) => sqlite_rows(query, writer).await.context(context),
            Self::Postgres(_) => {
                let mut tx = self.begin(&[]).await?;
                let rows = query.fetch_all(&mut tx).await.context(context)?;
                tx.commit(context).await?;
                Ok(rows)
            }
        }
    }

    /// Begins a transaction in which what is locked is as it will be until its end.
    pub(crate) async fn begin(&mut self, locks: &[Lock<'_>]) -> Result<Tx<'_>, StoreError> {
        use sqlx::Connection as _;
        match self {
            Self::Sqlite(writer) => {
                let begun = writer.begin_with("begin immediate").await;
                Ok(Tx::Sqlite(begun.context("begin a transaction")?))
            }
            Self::Postgres(pool) => {
                let begun = PgTransaction::begin(pool, locks).await;
                Ok(Tx::Postgres(begun.context("begin a transaction")?))
            }
        }
    }
}

impl Tx<'_> {
    pub(crate) async fn commit(self, context: &'static str) -> Result<(), StoreError> {
        match self {
            Self::Sqlite(tx) => tx.commit().await.context(context),
            Self::Postgres(tx) => tx.commit(context).await,
        }
    }

    /// Locks what the transaction has come to know of. It must not hold anything that stands
    /// after it in the order of [`Lock`].
    pub(crate) async fn lock(&mut self, lock: Lock<'_>) -> Result<(), StoreError> {
        match self {
            Self::Sqlite(_) => Ok(()),
            Self::Postgres(tx) => tx.lock(&lock).await.context("lock what is to be changed"),
        }
    }

    /// By the store's own clock: one for all processes that share it.
    pub(crate) async fn now(&mut self) -> Result<aether_types::Timestamp, StoreError> {
        match self {
            // One process has the file, and its host's clock is the store's.
            Self::Sqlite(_) => Ok(aether_types::Timestamp::now()),
            Self::Postgres(tx) => tx.now().await.context("read the store's clock"),
        }
    }

    pub(crate) async fn run(&mut self, batch: Batch<'_>) -> Result<(), sqlx::Error> {
        match (&mut *self, batch.order) {
            (Self::Sqlite(_), _) => batch.joined().execute(self).await.map(drop),
            (Self::Postgres(_), Order::Free) => batch.nested().execute(self).await.map(drop),
            (Self::Postgres(_), Order::Kept) => {
                for statement in batch.statements() {
                    statement.execute(&mut *self).await?;
                }
                Ok(())
            }
        }
    }
}

impl Target for &mut Tx<'_> {
    async fn fetch_all(self, query: Query<'_>) -> Result<Vec<Row>, sqlx::Error> {
        match self {
            Tx::Sqlite(tx) => sqlite_rows(query, tx).await,
            Tx::Postgres(tx) => postgres::rows(query, tx.connection()).await,
        }
    }

    async fn execute(self, query: Query<'_>) -> Result<u64, sqlx::Error> {
        match self {
            Tx::Sqlite(tx) => Ok(query.sqlite().execute(&mut **tx).await?.rows_affected()),
            Tx::Postgres(tx) => {
                Ok(query.postgres().execute(tx.connection()).await?.rows_affected())
            }
        }
    }
}

/// A lone statement, which is its own transaction.
impl Target for &mut Writer<'_> {
    async fn fetch_all(self, query: Query<'_>) -> Result<Vec<Row>, sqlx::Error> {
        match self {
            Writer::Sqlite(writer) => sqlite_rows(query, writer).await,
            Writer::Postgres(pool) => postgres::rows(query, &mut *pool.acquire().await?).await,
        }
    }

    async fn execute(self, query: Query<'_>) -> Result<u64, sqlx::Error> {
        match self {
            Writer::Sqlite(writer) => {
                Ok(query.sqlite().execute(&mut **writer).await?.rows_affected())
            }
            Writer::Postgres(pool) => Ok(query.postgres().execute(*pool).await?.rows_affected()),
        }
    }
}

/// The readers.
impl Target for &Sql {
    async fn fetch_all(self, query: Query<'_>) -> Result<Vec<Row>, sqlx::Error> {
        match self {
            Sql::Sqlite { readers, .. } => {
                let rows = query.sqlite().fetch_all(readers).await?;
                Ok(rows.into_iter().map(Row::Sqlite).collect())
            }
            Sql::Postgres(pool) => postgres::rows(query, &mut *pool.acquire().await?).await,
        }
    }

    async fn execute(self, query: Query<'_>) -> Result<u64, sqlx::Error> {
        self.fetch_all(query).await.map(|_| 0)
    }
}

async fn sqlite_rows(
    query: Query<'_>,
    connection: &mut SqliteConnection,
) -> Result<Vec<Row>, sqlx::Error> {
    let rows = query.sqlite().fetch_all(connection).await?;
    Ok(rows.into_iter().map(Row::Sqlite).collect())
}
