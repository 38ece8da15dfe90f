//! A server that goes away, and one that is full.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use aether_postgres::{
    Database, Extent, Limits,
    testing::{self, Server, ServerOptions},
};
use aether_store::{PostgresStore, Store, StoreError, postgres::SCHEMA};
use aether_types::ErrorCode;

use crate::support;

async fn own(options: ServerOptions, limits: Limits) -> Option<(Server, PostgresStore)> {
    if !testing::available() {
        return None;
    }
    let server = Server::start(&options);
    aether_postgres::up(&server.config(), &[SCHEMA], Extent::Expand).await.unwrap();
    let database = Database::open(server.config_tcp("127.0.0.1").limits(limits)).await.unwrap();
    Some((server, PostgresStore::open(&database).await.unwrap()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_recover_when_the_server_is_back() {
    let Some((mut server, store)) = own(ServerOptions::default(), Limits::default()).await else {
        return;
    };
    let store = Arc::new(store);
    // Many connections, all of which will be dead.
    let mut before = tokio::task::JoinSet::new();
    for i in 0..12 {
        let store = Arc::clone(&store);
        before.spawn(async move { support::create(&*store, &format!("before-{i}")).await });
    }
    before.join_all().await;
    server.stop();
    // Asked while it is away; answered when it is back.
    let waiting = tokio::spawn({
        let store = Arc::clone(&store);
        async move { support::create(&*store, "meanwhile").await }
    });
    server.start_again();
    let back = Instant::now();
    let mut after = tokio::task::JoinSet::new();
    for i in 0..12 {
        let store = Arc::clone(&store);
        after.spawn(async move { support::create(&*store, &format!("after-{i}")).await });
    }
    after.join_all().await;
    waiting.await.unwrap();
    let took = back.elapsed();
    assert!(took < Duration::from_secs(1), "recovered after {took:?}");
    assert_eq!(store.open_tasks().await.unwrap().len(), 25);
}

#[tokio::test]
async fn a_server_without_a_free_connection_is_busy_and_recovers() {
    let options = ServerOptions { connections_max: Some(4), ..ServerOptions::default() };
    let limits = Limits { acquire_timeout: Duration::from_secs(1), ..Limits::default() };
    let Some((server, store)) = own(options, limits).await else { return };
    let hog = Database::open(server.config().limits(limits)).await.unwrap();
    let mut held = Vec::new();
    while let Ok(connection) = hog.pool().acquire().await {
        held.push(connection);
    }
    // The store may have kept one of its own.
    let busy = async {
        let mut asked = tokio::task::JoinSet::new();
        let store = Arc::new(store);
        for i in 0..8 {
            let store = Arc::clone(&store);
            asked.spawn(async move {
                let task = support::new_task(aether_types::TaskKind::VmCreate);
                let vm = support::new_vm(&format!("vm-{i}"));
                store.create_vm(vm, task, aether_store::Capacity::default(), None).await
            });
        }
        (asked.join_all().await, store)
    };
    let (answers, store) = busy.await;
    for error in answers.into_iter().filter_map(Result::err) {
        assert!(matches!(error, StoreError::Busy), "{error:?}");
        assert_eq!(error.code(), ErrorCode::Unavailable);
    }
    drop(held);
    support::create(&*store, "again").await;
}

#[tokio::test]
async fn a_pool_without_a_free_connection_is_busy_and_says_so_in_time() {
    let limits =
        Limits { connections_max: 2, acquire_timeout: Duration::from_secs(1), ..Limits::default() };
    let Some((_, test)) = crate::engines::postgres().await else { return };
    let database = Database::open(test.config.clone().limits(limits)).await.unwrap();
    let store = PostgresStore::open(&database).await.unwrap();
    let held = (database.pool().acquire().await.unwrap(), database.pool().acquire().await.unwrap());
    let asked = Instant::now();
    assert!(matches!(store.ping().await, Err(StoreError::Busy)));
    assert!(asked.elapsed() < Duration::from_secs(3));
    drop(held);
    store.ping().await.unwrap();
}
