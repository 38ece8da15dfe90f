//! Migrations that go well, that contract, and that fail.

use std::sync::LazyLock;

use aether_postgres::{Database, Extent, MigrateError, Schema, check, status, testing, up};
use sqlx::{
    SqlSafeStr as _,
    migrate::{Migration, MigrationType, Migrator},
};

fn migration(version: i64, name: &'static str, sql: &'static str) -> Migration {
    Migration::new(version, name.into(), MigrationType::Simple, sql.into_sql_str(), false)
}

fn schema(migrator: &'static LazyLock<Migrator>) -> Schema {
    Schema { part: "test", migrator }
}

static OLD: LazyLock<Migrator> = LazyLock::new(|| {
    Migrator::with_migrations(vec![migration(1, "initial", "create table a (x bigint, y bigint)")])
});

static NEW: LazyLock<Migrator> = LazyLock::new(|| {
    Migrator::with_migrations(vec![
        migration(1, "initial", "create table a (x bigint, y bigint)"),
        migration(2, "expand with z", "alter table a add column z bigint"),
        migration(3, "contract y", "alter table a drop column y"),
        migration(4, "expand with b", "create table b (x bigint)"),
    ])
});

static BROKEN: LazyLock<Migrator> = LazyLock::new(|| {
    Migrator::with_migrations(vec![
        migration(1, "initial", "create table a (x bigint, y bigint)"),
        migration(2, "wrong", "create table c (x bigint); select nothing from nowhere"),
    ])
});

#[tokio::test]
async fn old_and_new_programs_run_together_until_it_is_said_that_none_is_old() {
    if !testing::available() {
        return;
    }
    let test = testing::empty_database().await;
    let database = Database::open(test.config.clone()).await.unwrap();
    let (old, new) = (schema(&OLD), schema(&NEW));
    up(&test.config, &[old], Extent::Expand).await.unwrap();
    check(&database, old).await.unwrap();
    assert!(matches!(check(&database, new).await, Err(MigrateError::Behind { pending: 2, .. })));

    let applied = up(&test.config, &[new], Extent::Expand).await.unwrap();
    assert_eq!(applied.iter().map(|step| step.version).collect::<Vec<_>>(), [2, 4]);
    check(&database, old).await.unwrap();
    check(&database, new).await.unwrap();
    let pending = status(&test.config, &[new]).await.unwrap().pending;
    assert_eq!((pending.len(), pending[0].version, pending[0].contracts), (1, 3, true));

    let applied = up(&test.config, &[new], Extent::Contract).await.unwrap();
    assert_eq!(applied.iter().map(|step| step.version).collect::<Vec<_>>(), [3]);
    check(&database, new).await.unwrap();
    assert!(matches!(check(&database, old).await, Err(MigrateError::Ahead { version: 3, .. })));
    assert!(up(&test.config, &[new], Extent::Contract).await.unwrap().is_empty());
}

#[tokio::test]
async fn a_migration_that_fails_leaves_nothing_and_can_be_mended() {
    if !testing::available() {
        return;
    }
    let test = testing::empty_database().await;
    let failed = up(&test.config, &[schema(&BROKEN)], Extent::Expand).await.unwrap_err();
    assert!(matches!(failed, MigrateError::Failed { version: 2, .. }), "{failed:?}");
    assert_eq!(test.execute("select to_regclass('c') is null").trim(), "t");
    let found = status(&test.config, &[schema(&NEW)]).await.unwrap();
    assert_eq!((found.applied.len(), found.pending.len()), (1, 3));
    up(&test.config, &[schema(&NEW)], Extent::Expand).await.unwrap();
}

/// A table that is in use is not waited for long: all who use it would wait behind.
#[tokio::test]
async fn a_table_in_use_is_left_alone() {
    if !testing::available() {
        return;
    }
    let test = testing::empty_database().await;
    up(&test.config, &[schema(&OLD)], Extent::Expand).await.unwrap();
    let database = Database::open(test.config.clone()).await.unwrap();
    let mut user = database.pool().begin().await.unwrap();
    sqlx::query("select * from a").execute(&mut *user).await.unwrap();
    let refused = up(&test.config, &[schema(&NEW)], Extent::Expand).await.unwrap_err();
    assert!(matches!(refused, MigrateError::InUse { version: 2, .. }), "{refused:?}");
    user.rollback().await.unwrap();
    up(&test.config, &[schema(&NEW)], Extent::Expand).await.unwrap();
}
