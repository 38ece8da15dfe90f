//! The store on PostgreSQL.
//!
//! Transactions are `read committed`, and each locks first what it decides about: the VM's row
//! stands for all that happens to a VM. Compared with `serializable` nothing is undone because of
//! neighbours in an index (ids rise with time, so that all who write meet on one page), and a
//! request waits for another one only where they are about the same thing.
//!
//! What is left to chance (a deadlock, a lost connection) is undone by the server and repeated here
//! a few times. A connection that goes while it commits leaves in doubt whether that was done: the
//! number of the transaction, which it asked for when it began, tells.

mod tx;

use aether_postgres::{Database, Schema};
use sqlx::PgConnection;

pub(crate) use self::tx::PgTransaction;
use crate::{
    StoreError,
    sql::{
        OnSql, Sql,
        query::{Query, Row},
    },
};

static MIGRATIONS: sqlx::migrate::Migrator = sqlx::migrate!("./migrations/postgres");

/// The store's tables in PostgreSQL.
pub const SCHEMA: Schema = Schema { part: "store", migrator: &MIGRATIONS };

#[derive(Debug)]
pub struct PostgresStore {
    sql: Sql,
}

impl PostgresStore {
    /// On a database whose tables are up to date: see `aether_postgres::up` with [`SCHEMA`].
    pub async fn open(database: &Database) -> Result<Self, StoreError> {
        aether_postgres::check(database, SCHEMA).await.map_err(StoreError::schema)?;
        Ok(Self { sql: Sql::Postgres(database.pool().clone()) })
    }
}

impl OnSql for PostgresStore {
    fn sql(&self) -> &Sql {
        &self.sql
    }
}

pub(crate) async fn rows(
    query: Query<'_>,
    connection: &mut PgConnection,
) -> Result<Vec<Row>, sqlx::Error> {
    let rows = query.postgres().fetch_all(connection).await?;
    Ok(rows.into_iter().map(Row::Postgres).collect())
}
