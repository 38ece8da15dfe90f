//! A request's future is dropped at every point: each is done whole or not at all, and the store
//! goes on.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "contract/support.rs"]
#[expect(dead_code, reason = "shared with the contract suite, which uses all of it")]
mod support;

use std::{pin::pin, task::Poll};

use aether_store::{Durability, SqliteStore, Store};
use aether_types::TaskKind;

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
        let answer = cut_short(store.create_vm(new, task, key.clone()), polls).await;
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
        let again = store.create_vm(again, support::new_task(TaskKind::VmCreate), key).await;
        assert_eq!(again.unwrap().repeated, vm.is_some());
    }
    assert!(done > 0);
}
