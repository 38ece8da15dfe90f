//! Queues as the store knows them, and dead letters.

use aether_store::{PageRequest, QueueStatus, Store, StoreError};
use aether_types::{ErrorCode, Priority, QueueName, TaskId, TaskKind, TaskState, VmEvent};

use crate::{
    support::{begin, create, execute, failed, fault, request},
    workers::{begin_as, running_on, worker},
};

async fn queue(store: &impl Store, name: QueueName) -> QueueStatus {
    let queues = store.queues().await.unwrap();
    queues.into_iter().find(|queue| queue.name == name).unwrap()
}

pub(crate) async fn queues_tell_what_waits_and_what_runs(store: &impl Store) {
    let shared = queue(store, QueueName::Shared).await;
    assert_eq!((shared.pending.len(), shared.running, shared.oldest_at), (0, 0, None));
    let one = worker(store, "one").await;
    let name = QueueName::Worker(one.id);
    assert_eq!(queue(store, name).await.running, 0);
    let vm = running_on(store, &one, "a").await;
    let (runs, _) = execute(store, vm).await;
    begin_as(store, &one, &runs, 1).await;
    let (oldest, _) = execute(store, vm).await;
    execute(store, vm).await;
    let again = failed(ErrorCode::Unavailable, None);
    begin_as(store, &one, &oldest, 1).await;
    store.retry_attempt(oldest.id, 1, fault(ErrorCode::Unavailable), again).await.unwrap();
    store.drain_worker(one.id).await.unwrap();
    let waits = create(store, "waits").await;
    let own = queue(store, name).await;
    assert_eq!(own.pending.get(&Priority::Default), Some(&2));
    assert_eq!((own.running, own.waiting, own.again, own.dead), (1, 0, 1, 0));
    assert_eq!(own.oldest_at, Some(oldest.created_at));
    let shared = queue(store, QueueName::Shared).await;
    assert_eq!((shared.waiting, shared.oldest_at), (1, Some(waits.task.created_at)));
}

pub(crate) async fn a_dead_letter_is_one_until_it_is_retried(store: &impl Store) {
    let made = create(store, "a").await;
    let exhausted = || failed(ErrorCode::Unavailable, Some(VmEvent::Failed));
    for epoch in 1..=3 {
        begin(store, made.task.id, epoch).await;
        let why = fault(ErrorCode::Unavailable);
        store.retry_attempt(made.task.id, epoch, why, exhausted()).await.unwrap();
    }
    // One that failed for good at its first attempt is none.
    let other = create(store, "b").await;
    begin(store, other.task.id, 1).await;
    store.end_attempt(other.task.id, 1, exhausted()).await.unwrap();
    let dead = || store.dead_tasks(QueueName::Shared, PageRequest::default());
    let found = dead().await.unwrap().items;
    assert_eq!(found.iter().map(|task| task.id).collect::<Vec<_>>(), [made.task.id]);
    assert_eq!(found[0].state, TaskState::Failed);
    assert_eq!(queue(store, QueueName::Shared).await.dead, 1);
    let one = worker(store, "one").await;
    let elsewhere = store.dead_tasks(QueueName::Worker(one.id), PageRequest::default());
    assert_eq!(elsewhere.await.unwrap().items, []);
    let again = request(store, made.vm.id, TaskKind::VmStart).await;
    store.retried(made.task.id, again.task.id).await.unwrap();
    assert_eq!(dead().await.unwrap().items, []);
    assert_eq!(queue(store, QueueName::Shared).await.dead, 0);
    // A task that has not failed is no dead letter.
    for task in [again.task.id, TaskId::new()] {
        let refused = store.retried(task, made.task.id).await;
        assert!(matches!(refused, Err(StoreError::TaskNotFound)));
    }
}
