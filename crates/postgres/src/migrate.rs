//! Bringing tables up to date while programs of the version before are using them.
//!
//! A migration **expands** (adds what the old program does not mind) unless its name begins with
//! `contract`: that one takes away what an old program needs. `up` applies what expands; what
//! contracts waits for [`Extent::Contract`], which a person asks for when no old program is left.
//! So at each moment the program before and this one both work:
//!
//! ```text
//!   old programs        old and new programs           new programs
//!   ────────────────┬────────────────────────────┬──────────────────►
//!                expand (up)              contract (up --contract)
//! ```
//!
//! - Whoever migrates holds an advisory lock: the others wait, and then find nothing to do.
//! - A migration and the record of it are one transaction, unless it says `-- no-transaction`.
//! - A statement waits for the lock of a table that is in use for a few seconds only, since all who
//!   use the table wait behind it. It fails then, and is repeated by a person at a better time.
//! - A migration that was applied is never edited; one that was is refused by its checksum.

use std::{collections::BTreeMap, time::Duration};

use sqlx::{
    AssertSqlSafe, Connection as _, PgConnection, Row as _,
    migrate::{Migration, Migrator},
};

use crate::{Config, OpenError, Trouble, database, trouble};

/// Any number that no other program takes.
const LOCK: i64 = 0x6165_7468_6572_0001;

/// For whoever migrates before us.
const LOCK_WAIT: Duration = Duration::from_mins(2);
/// For a table that others use.
const TABLE_WAIT: Duration = Duration::from_secs(5);
/// A migration may rewrite or index a table of many millions of rows.
const STATEMENT_MAX: Duration = Duration::from_hours(2);

/// Tables that one part of the platform keeps, and their migrations.
#[derive(Debug, Clone, Copy)]
pub struct Schema {
    /// Such as `store`.
    pub part: &'static str,
    pub migrator: &'static Migrator,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    pub part: &'static str,
    pub version: i64,
    pub name: String,
    /// It takes something away that older programs need.
    pub contracts: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Status {
    pub applied: Vec<Step>,
    /// In the order in which they will be applied.
    pub pending: Vec<Step>,
    /// Applied by a newer program than this one.
    pub newer: Vec<Step>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    Expand,
    /// Everything: no older program is left.
    Contract,
}

#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error("another process has been migrating for {} s", LOCK_WAIT.as_secs())]
    Locked,
    #[error("migration {version} ({name}) of the {part} waits for tables that are in use")]
    InUse { part: &'static str, version: i64, name: String },
    #[error("migration {version} ({name}) of the {part}")]
    Failed {
        part: &'static str,
        version: i64,
        name: String,
        #[source]
        source: sqlx::Error,
    },
    #[error("migration {version} of the {part} was edited after it had been applied")]
    Edited { part: &'static str, version: i64 },
    #[error("the tables of the {part} lack {pending} migrations of this program")]
    Behind { part: &'static str, pending: usize },
    #[error(
        "the tables of the {part} belong to a newer program: migration {version} took away what this one needs"
    )]
    Ahead { part: &'static str, version: i64 },
    #[error("{context}")]
    Database {
        context: &'static str,
        #[source]
        source: sqlx::Error,
    },
}

fn failed(context: &'static str) -> impl Fn(sqlx::Error) -> MigrateError {
    move |source| MigrateError::Database { context, source }
}

/// Applies what is to be applied. Gives what it applied; nothing where all was done before.
pub async fn up(
    config: &Config,
    schemas: &[Schema],
    extent: Extent,
) -> Result<Vec<Step>, MigrateError> {
    config.check().map_err(OpenError::from)?;
    let mut connection = connect(config).await?;
    lock(&mut connection).await?;
    let mut done = Vec::new();
    for schema in schemas {
        for step in read(&mut connection, *schema).await?.pending {
            if step.contracts && extent == Extent::Expand {
                continue;
            }
            let migration = schema.migrator.iter().find(|m| m.version == step.version);
            if let Some(migration) = migration {
                apply(&mut connection, &step, migration).await?;
                done.push(step);
            }
        }
    }
    // The lock goes with the session.
    let _ = connection.close().await;
    Ok(done)
}

pub async fn status(config: &Config, schemas: &[Schema]) -> Result<Status, MigrateError> {
    config.check().map_err(OpenError::from)?;
    let mut connection = connect(config).await?;
    let mut all = Status::default();
    for schema in schemas {
        let Status { applied, pending, newer } = read(&mut connection, *schema).await?;
        all.applied.extend(applied);
        all.pending.extend(pending);
        all.newer.extend(newer);
    }
    let _ = connection.close().await;
    Ok(all)
}

/// Can this program use the tables as they are?
pub async fn check(database: &crate::Database, schema: Schema) -> Result<(), MigrateError> {
    let mut connection =
        database.pool().acquire().await.map_err(failed("read which migrations were applied"))?;
    let found = read(&mut connection, schema).await?;
    let part = schema.part;
    // What contracts is for later.
    match found.pending.iter().filter(|step| !step.contracts).count() {
        0 => {}
        pending => return Err(MigrateError::Behind { part, pending }),
    }
    match found.newer.iter().find(|step| step.contracts) {
        None => Ok(()),
        Some(step) => Err(MigrateError::Ahead { part, version: step.version }),
    }
}

async fn connect(config: &Config) -> Result<PgConnection, MigrateError> {
    let ms = |time: Duration| time.as_millis().to_string();
    let session = [("statement_timeout", ms(STATEMENT_MAX)), ("lock_timeout", ms(LOCK_WAIT))];
    Ok(database::connect(config, &session).await?)
}

async fn lock(connection: &mut PgConnection) -> Result<(), MigrateError> {
    let locked =
        sqlx::query("select pg_advisory_lock($1)").bind(LOCK).execute(&mut *connection).await;
    locked.map_err(|source| match trouble(&source) {
        Trouble::Busy => MigrateError::Locked,
        Trouble::Conflict | Trouble::Lost | Trouble::Other => {
            failed("wait for the right to migrate")(source)
        }
    })?;
    let wait = format!("set lock_timeout = {}", TABLE_WAIT.as_millis());
    sqlx::raw_sql(AssertSqlSafe(wait))
        .execute(&mut *connection)
        .await
        .map_err(failed("prepare to migrate"))?;
    sqlx::raw_sql(
        "create table if not exists aether_migrations (\
         part text not null, version bigint not null, name text not null, \
         checksum bytea not null, applied_at timestamptz not null default now(), \
         primary key (part, version))",
    )
    .execute(connection)
    .await
    .map_err(failed("make the table of migrations"))?;
    Ok(())
}

async fn read(connection: &mut PgConnection, schema: Schema) -> Result<Status, MigrateError> {
    let mut applied = recorded(connection, schema.part).await?;
    let mut found = Status::default();
    for migration in schema.migrator.iter() {
        let step = step(schema.part, migration.version, &migration.description);
        match applied.remove(&migration.version) {
            None => found.pending.push(step),
            Some((_, checksum)) if *checksum == *migration.checksum => found.applied.push(step),
            Some(_) => {
                let (part, version) = (schema.part, migration.version);
                return Err(MigrateError::Edited { part, version });
            }
        }
    }
    let newer = applied.into_iter().map(|(version, (name, _))| step(schema.part, version, &name));
    found.newer.extend(newer);
    Ok(found)
}

fn step(part: &'static str, version: i64, name: &str) -> Step {
    Step { part, version, name: name.to_owned(), contracts: name.starts_with("contract") }
}

/// By version: name and checksum.
async fn recorded(
    connection: &mut PgConnection,
    part: &str,
) -> Result<BTreeMap<i64, (String, Vec<u8>)>, MigrateError> {
    let context = failed("read which migrations were applied");
    let there = sqlx::query("select to_regclass('aether_migrations') is not null")
        .fetch_one(&mut *connection)
        .await
        .map_err(&context)?;
    if !there.try_get::<bool, _>(0).map_err(&context)? {
        return Ok(BTreeMap::new());
    }
    let rows = sqlx::query("select version, name, checksum from aether_migrations where part = $1")
        .bind(part)
        .fetch_all(connection)
        .await
        .map_err(&context)?;
    let row = |row: &sqlx::postgres::PgRow| {
        Ok((row.try_get(0)?, (row.try_get(1)?, row.try_get::<Vec<u8>, _>(2)?)))
    };
    rows.iter().map(row).collect::<Result<_, sqlx::Error>>().map_err(context)
}

async fn apply(
    connection: &mut PgConnection,
    step: &Step,
    migration: &Migration,
) -> Result<(), MigrateError> {
    let applied = if migration.no_tx {
        execute(connection, step, migration).await
    } else {
        async {
            let mut tx = connection.begin().await?;
            execute(&mut tx, step, migration).await?;
            tx.commit().await
        }
        .await
    };
    let (part, version, name) = (step.part, step.version, step.name.clone());
    applied.map_err(|source| match trouble(&source) {
        Trouble::Busy => MigrateError::InUse { part, version, name },
        Trouble::Conflict | Trouble::Lost | Trouble::Other => {
            MigrateError::Failed { part, version, name, source }
        }
    })
}

async fn execute(
    connection: &mut PgConnection,
    step: &Step,
    migration: &Migration,
) -> Result<(), sqlx::Error> {
    sqlx::raw_sql(migration.sql.clone()).execute(&mut *connection).await?;
    sqlx::query(
        "insert into aether_migrations (part, version, name, checksum) values ($1, $2, $3, $4)",
    )
    .bind(step.part)
    .bind(step.version)
    .bind(&step.name)
    .bind(&*migration.checksum)
    .execute(connection)
    .await?;
    Ok(())
}
