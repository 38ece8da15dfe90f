//! How many VMs there may be.

use aether_store::{Capacity, Store, StoreError};
use aether_types::{ErrorCode, ProjectId, SnapshotPurpose, TaskKind, VmEvent, VmId};

use crate::support::{
    carry_out, clones, create, key, new_snapshot, new_task, new_vm, request, running,
};

async fn try_create(
    store: &impl Store,
    name: &str,
    vms_max: Option<u32>,
    starting_max: Option<u32>,
) -> Result<VmId, StoreError> {
    let capacity = Capacity { vms_max, starting_max };
    let task = new_task(TaskKind::VmCreate);
    store.create_vm(new_vm(name), task, capacity, None).await.map(|made| made.vm.id)
}

pub(crate) async fn there_are_no_more_vms_than_there_may_be(store: &impl Store) {
    let first = try_create(store, "a", Some(2), None).await.unwrap();
    try_create(store, "b", Some(2), None).await.unwrap();
    let refused = try_create(store, "c", Some(2), None).await.unwrap_err();
    assert_eq!(refused.code(), ErrorCode::TooManyVms);
    assert_eq!(
        refused.to_string(),
        "there is no room for more: 2 VMs at once are the most that is configured"
    );
    // A VM counts until it is deleted.
    let deletion = request(store, first, TaskKind::VmDelete).await;
    assert!(try_create(store, "c", Some(2), None).await.is_err());
    carry_out(store, &deletion.task, Some(VmEvent::Deleted)).await;
    try_create(store, "c", Some(2), None).await.unwrap();
    assert!(try_create(store, "d", Some(0), None).await.is_err());
    try_create(store, "d", None, None).await.unwrap();
}

pub(crate) async fn no_more_vms_start_at_once_than_may(store: &impl Store) {
    let running = running(store, "a").await;
    let one = create(store, "b").await;
    let refused = try_create(store, "c", None, Some(1)).await.unwrap_err();
    assert!(matches!(refused, StoreError::TooManyVms { max: 1, .. }));
    carry_out(store, &one.task, Some(VmEvent::Started)).await;
    let stop = request(store, running, TaskKind::VmStop).await;
    carry_out(store, &stop.task, Some(VmEvent::Stopped)).await;
    let start = request(store, running, TaskKind::VmStart).await;
    assert!(try_create(store, "c", None, Some(1)).await.is_err(), "one is being started");
    carry_out(store, &start.task, Some(VmEvent::Started)).await;
    try_create(store, "c", None, Some(1)).await.unwrap();
}

pub(crate) async fn creations_at_the_same_time_do_not_exceed_the_bound(store: &impl Store) {
    let creations = (0..16).map(|i| async move {
        match try_create(store, &format!("vm-{i}"), Some(5), Some(5)).await {
            Ok(_) => 1,
            Err(StoreError::TooManyVms { .. }) => 0,
            Err(other) => panic!("{other:?}"),
        }
    });
    let made = all(creations.map(Box::pin).collect()).await;
    assert_eq!(made.iter().sum::<i32>(), 5);
    assert_eq!(store.open_tasks().await.unwrap().len(), 5);
}

/// Polls all of them each time, so that they are under way together.
pub(crate) async fn all<T, F: Future<Output = T> + Unpin>(mut futures: Vec<F>) -> Vec<T> {
    let mut done = Vec::new();
    std::future::poll_fn(|context| {
        futures.retain_mut(|future| match std::pin::Pin::new(future).poll(context) {
            std::task::Poll::Ready(value) => {
                done.push(value);
                false
            }
            std::task::Poll::Pending => true,
        });
        if futures.is_empty() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
    done
}

pub(crate) async fn a_fork_has_room_for_all_of_its_vms_or_is_refused(store: &impl Store) {
    let source = running(store, "a").await;
    let fork = async |names: &[String], vms_max, starting_max| {
        let (new, task) = (new_snapshot(SnapshotPurpose::Fork), new_task(TaskKind::VmSnapshot));
        let capacity = Capacity { vms_max, starting_max };
        store.fork_vm(source, new, task, clones(names), capacity, None).await
    };
    let names = ["c0".to_owned(), "c1".to_owned(), "c2".to_owned()];
    for (vms_max, starting_max) in [(Some(3), None), (None, Some(2))] {
        let refused = fork(&names, vms_max, starting_max).await.unwrap_err();
        assert_eq!(refused.code(), ErrorCode::TooManyVms);
        assert_eq!(store.vm_by_name(ProjectId::DEFAULT, "c0").await.unwrap(), None);
        assert_eq!(store.open_tasks().await.unwrap(), []);
    }
    fork(&names, Some(4), Some(3)).await.unwrap();
}

pub(crate) async fn a_repetition_needs_no_room(store: &impl Store) {
    let make = || {
        let capacity = Capacity { vms_max: Some(1), starting_max: Some(1) };
        store.create_vm(new_vm("a"), new_task(TaskKind::VmCreate), capacity, Some(key("k", 1)))
    };
    let first = make().await.unwrap();
    let again = make().await.unwrap();
    assert!(again.repeated);
    assert_eq!(again.vm.id, first.vm.id);
}
