//! A request's future is dropped at every point: each is done whole or not at all, and the store
//! goes on.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "contract/support.rs"]
#[expect(dead_code, reason = "shared with the contract suite, which uses all of it")]
mod support;

use std::{pin::pin, task::Poll};

use aether_store::{Capacity, Durability, SqliteStore, Store};
use aether_types::{SnapshotPurpose, TaskKind, TaskState, VmId};

/// Polls at most `polls` times.
async fn cut_short<T>(work: impl Future<Output = T>, polls: usize) -> Option<T> {
    let mut work = pin!(work);
    let mut left = polls;
    std::future::poll_fn(|context| {
        if left == 0 {
            return Poll::Ready(None);
        }
        left -= 1;
        work.as_mut().poll(context).map(Some)
    })
    .await
}

#[tokio::test]
async fn a_dropped_request_is_done_whole_or_not_at_all() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.db");
    let store = SqliteStore::open(&path, Durability::Process).await.unwrap();
    let mut done = 0;
    for polls in (0..40).cycle().take(400) {
        let new = support::new_vm(&format!("vm-{polls}-{done}"));
        let id = new.id;
        let task = support::new_task(TaskKind::VmCreate);
        let task_id = task.id;
        let key = Some(support::key(&id.to_string(), 1));
        let answer =
            cut_short(store.create_vm(new, task, Capacity::default(), key.clone()), polls).await;
        // The next writer waits for the end of what was dropped.
        store.confirm_dispatched(&[]).await.unwrap();
        let vm = store.vm(id).await.unwrap();
        let task = store.task(task_id).await.unwrap();
        assert_eq!(vm.is_some(), task.is_some());
        if let Some(answer) = answer {
            answer.unwrap();
            assert!(vm.is_some());
            done += 1;
        }
        let again = support::new_vm(&format!("again-{id}"));
        let again = store
            .create_vm(again, support::new_task(TaskKind::VmCreate), Capacity::default(), key)
            .await;
        assert_eq!(again.unwrap().repeated, vm.is_some());
    }
    assert!(done > 0);
}

#[tokio::test]
async fn a_dropped_fork_is_done_whole_or_not_at_all() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.db");
    let store = SqliteStore::open(&path, Durability::Process).await.unwrap();
    let source = support::running(&store, "source").await;
    let mut done = 0;
    for polls in (0..60).cycle().take(240) {
        let new = support::new_snapshot(SnapshotPurpose::Fork);
        let id = new.id;
        let clones = support::clones(&[(); 3].map(|()| format!("c-{}", VmId::new())));
        let vms: Vec<_> = clones.iter().map(|(vm, _)| vm.id).collect();
        let task = support::new_task(TaskKind::VmSnapshot);
        let task_id = task.id;
        let fork = store.fork_vm(source, new, task, clones, Capacity::default(), None);
        let answer = cut_short(fork, polls).await;
        store.confirm_dispatched(&[]).await.unwrap();
        let recorded = store.snapshot(id).await.unwrap().is_some();
        if answer.is_some() {
            assert!(recorded);
            done += 1;
        }
        let task = store.task(task_id).await.unwrap();
        assert_eq!(task.map(|t| t.state), recorded.then_some(TaskState::Pending));
        for vm in vms {
            assert_eq!(store.vm(vm).await.unwrap().is_some(), recorded);
        }
    }
    assert!(done > 0);
}
