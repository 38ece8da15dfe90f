//! Migrations as processes meet them.

use aether_postgres::{Database, Extent, MigrateError, testing};
use aether_store::{PostgresStore, StoreError, postgres::SCHEMA};

#[tokio::test]
async fn processes_that_migrate_at_once_apply_each_migration_once() {
    if !testing::available() {
        return;
    }
    let test = testing::empty_database().await;
    let mut processes = tokio::task::JoinSet::new();
    for _ in 0..6 {
        let config = test.config.clone();
        processes.spawn(async move {
            aether_postgres::up(&config, &[SCHEMA], Extent::Expand).await.unwrap().len()
        });
    }
    let applied = processes.join_all().await;
    assert_eq!(applied.iter().filter(|count| **count > 0).count(), 1, "{applied:?}");
    let status = aether_postgres::status(&test.config, &[SCHEMA]).await.unwrap();
    assert_eq!(status.applied.len(), applied.iter().sum::<usize>());
    assert!(status.pending.is_empty() && status.newer.is_empty());
}

#[tokio::test]
async fn a_store_is_not_opened_on_tables_that_do_not_fit() {
    if !testing::available() {
        return;
    }
    let test = testing::empty_database().await;
    let database = Database::open(test.config.clone()).await.unwrap();
    let behind = PostgresStore::open(&database).await.unwrap_err();
    let StoreError::Schema(why) = behind else { panic!("{behind:?}") };
    assert!(matches!(*why, MigrateError::Behind { part: "store", pending: 10 }), "{why:?}");
    let status = aether_postgres::status(&test.config, &[SCHEMA]).await.unwrap();
    assert_eq!((status.applied.len(), status.pending.len()), (0, 10));

    aether_postgres::up(&test.config, &[SCHEMA], Extent::Expand).await.unwrap();
    PostgresStore::open(&database).await.unwrap();

    // A newer program has been here. What it added does not matter.
    let newer = |name: &str| {
        format!(
            "insert into aether_migrations (part, version, name, checksum) \
             values ('store', (select max(version) + 1 from aether_migrations), '{name}', '')"
        )
    };
    test.execute(&newer("add something"));
    PostgresStore::open(&database).await.unwrap();
    let status = aether_postgres::status(&test.config, &[SCHEMA]).await.unwrap();
    assert_eq!(status.newer[0].name, "add something");
    // What it took away does.
    test.execute(&newer("contract something"));
    let ahead = PostgresStore::open(&database).await.unwrap_err();
    let StoreError::Schema(why) = ahead else { panic!("{ahead:?}") };
    assert!(matches!(*why, MigrateError::Ahead { part: "store", .. }), "{why:?}");

    test.execute("update aether_migrations set checksum = '' where version = 4");
    let edited = aether_postgres::up(&test.config, &[SCHEMA], Extent::Expand).await.unwrap_err();
    assert!(matches!(edited, MigrateError::Edited { part: "store", version: 4 }), "{edited:?}");
}
