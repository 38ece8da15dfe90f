//! A store of an earlier version is brought up to date, with what is in it.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "contract/support.rs"]
#[expect(dead_code, reason = "shared with the contract suite, which uses all of it")]
mod support;

use std::path::Path;

use aether_store::{Capacity, Durability, PageRequest, SqliteStore, Store, VmFilter};
use aether_types::{Origin, Scope, TaskKind, Timestamp, VmEvent, VmState};
use sqlx::{Connection, SqliteConnection, migrate::Migrator, sqlite::SqliteConnectOptions};

const VM: &str = "0192f0c4-7b1e-7c3a-9d52-3f6a1b2c4d5e";
const TASK: &str = "0192f0c4-7b1e-7c3a-9d52-3f6a1b2c4d5f";

/// As the first version left it: a VM that runs, whose specification names no origin.
async fn first_version(path: &Path) {
    let folder = tempfile::tempdir().unwrap();
    let first = Path::new(env!("CARGO_MANIFEST_DIR")).join("migrations/sqlite/0001_initial.sql");
    std::fs::copy(first, folder.path().join("0001_initial.sql")).unwrap();
    let options = SqliteConnectOptions::new().filename(path).create_if_missing(true);
    let mut connection = SqliteConnection::connect_with(&options).await.unwrap();
    Migrator::new(folder.path())
        .await
        .unwrap()
        .run_direct(None, &mut connection, false)
        .await
        .unwrap();
    let spec = r#"{"vcpus":1,"memory_mb":256,"disk_mb":512,"image":"debian","driver":"sim"}"#;
    sqlx::query(
        "insert into vms (id, name, state, spec, driver, created_at, updated_at, generation) \
         values ($1, 'old', 'running', $3, 'sim', 1, 2, 2); \
         insert into vm_changes (vm_id, generation, state, at) values ($1, 2, 'running', 2); \
         insert into tasks (id, kind, state, priority, vm_id, attempts, max_attempts, epoch, \
         cancel_requested, created_at) \
         values ($2, 'vm:create', 'completed', 'default', $1, 1, 3, 1, 0, 1); \
         insert into idempotency (key, digest, task_id, created_at) values ('k', x'00', $2, 1); \
         insert into api_keys (id, name, prefix, hash, created_at) \
         values ($2, 'admin', 'ae_12345678', x'0000000000000000000000000000000000000000000000000000000000000001', 1); \
         insert into outbox (task_id) values ($2)",
    )
    .bind(VM)
    .bind(TASK)
    .bind(spec)
    .execute(&mut connection)
    .await
    .unwrap();
    connection.close().await.unwrap();
}

#[tokio::test]
async fn a_store_of_the_first_version_is_brought_up_to_date() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.db");
    first_version(&path).await;
    let store = SqliteStore::open(&path, Durability::Process).await.unwrap();
    let vm = store.vm(VM.parse().unwrap()).await.unwrap().unwrap();
    assert_eq!((vm.state, vm.spec.origin), (VmState::Running, Origin::Image));
    assert_eq!((vm.start.clone(), vm.memory), (None, None));
    let task = store.task(TASK.parse().unwrap()).await.unwrap().unwrap();
    assert_eq!((task.snapshot_id, task.vm_id), (None, Some(vm.id)));
    assert_eq!((&task.tools[..], &task.progress), (&[][..], &None));
    assert_eq!(vm.tools, []);
    an_early_key_opens_everything(&store).await;
    let listed = store.vms(VmFilter::default(), PageRequest::default()).await.unwrap();
    assert_eq!(listed.items, std::slice::from_ref(&vm));
    // It counts, and does what a new one does.
    let full = Capacity { vms_max: Some(1), starting_max: None };
    let refused =
        store.create_vm(support::new_vm("new"), support::new_task(TaskKind::VmCreate), full, None);
    assert!(refused.await.is_err());
    let (asked, memory) = support::suspend(&store, vm.id).await;
    support::begin(&store, asked.task.id, 1).await;
    store.end_attempt(asked.task.id, 1, support::made(Some(VmEvent::Stopped))).await.unwrap();
    assert_eq!(store.vm(vm.id).await.unwrap().unwrap().memory, Some(memory.id));
    let built = store.build_tools(Vec::new(), support::new_task(TaskKind::ToolBuild), None);
    let built = built.await.unwrap().task;
    assert_eq!(store.task(built.id).await.unwrap().unwrap().vm_id, None);
    // What was dispatched and never confirmed has ended by now.
    let owed = store.undispatched(10).await.unwrap();
    assert_eq!(owed.iter().map(|task| task.id).collect::<Vec<_>>(), [built.id]);
    store.close().await.unwrap();
    references_hold(&path).await;
    SqliteStore::open(&path, Durability::Process).await.unwrap();
}

async fn an_early_key_opens_everything(store: &SqliteStore) {
    let mut hash = [0; 32];
    hash[31] = 1;
    let key = store.key_by_hash(&hash).await.unwrap().unwrap();
    assert!(Scope::all().all(|scope| key.access().allows(scope)));
    assert!(!key.has_expired(Timestamp::now()));
}

/// Tables that were rebuilt are still what others refer to.
async fn references_hold(path: &Path) {
    let options = SqliteConnectOptions::new().filename(path).foreign_keys(true);
    let mut connection = SqliteConnection::connect_with(&options).await.unwrap();
    let broken = sqlx::query("pragma foreign_key_check").fetch_all(&mut connection).await.unwrap();
    assert!(broken.is_empty());
    let ended = sqlx::query("select 1 from outbox where task_id = $1").bind(TASK);
    assert!(ended.fetch_all(&mut connection).await.unwrap().is_empty());
    let nobody = sqlx::query("insert into outbox (task_id) values ('nobody')");
    assert!(nobody.execute(&mut connection).await.is_err());
    connection.close().await.unwrap();
}
