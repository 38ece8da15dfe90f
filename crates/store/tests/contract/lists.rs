//! Lists, pages, the outbox, expiry and secrets.

use aether_store::{Capacity, NewVm, PageRequest, Store, StoreError, TaskFilter, VmFilter};
use aether_types::{DriverKind, TaskKind, TaskState, Timestamp, VmEvent, VmState, WorkerId};

use crate::support::{begin, carry_out, create, execute, new_task, new_vm, request, running, spec};

pub(crate) async fn pages_are_newest_first_and_complete(store: &impl Store) {
    let vm = running(store, "a").await;
    let mut made = Vec::new();
    for _ in 0..7 {
        made.push(execute(store, vm).await.1.id);
    }
    made.reverse();
    for limit in [1, 2, 3, 6, 7, 8] {
        let mut seen = Vec::new();
        let mut cursor: Option<String> = None;
        loop {
            let page = PageRequest::new(Some(limit), cursor.as_deref()).unwrap();
            let page = store.executions(vm, page).await.unwrap();
            assert!(page.items.len() <= usize::try_from(limit).unwrap());
            seen.extend(page.items.iter().map(|e| e.id));
            cursor = page.next.map(|c| c.to_string());
            if cursor.is_none() {
                break;
            }
            assert!(!page.items.is_empty());
        }
        assert_eq!(seen, made, "in pages of {limit}");
    }
    let bad = PageRequest::new(None, Some("no cursor"));
    assert!(matches!(bad, Err(StoreError::BadCursor)));

    for name in ["b", "c"] {
        create(store, name).await;
    }
    let first = PageRequest { limit: 2, after: None };
    let page = store.vms(VmFilter::default(), first).await.unwrap();
    let names = |vms: &[aether_types::Vm]| vms.iter().map(|v| v.name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&page.items), ["c", "b"]);
    let rest = PageRequest { limit: 2, after: page.next };
    let page = store.vms(VmFilter::default(), rest).await.unwrap();
    assert_eq!((names(&page.items), page.next), (vec!["a".to_owned()], None));
}

pub(crate) async fn vms_are_filtered(store: &impl Store) {
    let one = running(store, "one").await;
    let mut other = NewVm { spec: spec(), ..new_vm("two") };
    other.spec.driver = DriverKind::Qemu;
    other.spec.labels.insert("tier".into(), "x".into());
    let two = store
        .create_vm(other, new_task(TaskKind::VmCreate), Capacity::default(), None)
        .await
        .unwrap()
        .vm
        .id;
    let gone = running(store, "three").await;
    let deletion = request(store, gone, TaskKind::VmDelete).await;
    carry_out(store, &deletion.task, Some(VmEvent::Deleted)).await;
    let worker = WorkerId::new();
    let patch = aether_store::VmPatch { worker_id: Some(worker), ..Default::default() };
    store.patch_vm(one, patch).await.unwrap();

    let label = |key: &str, value: &str| vec![(key.to_owned(), value.to_owned())];
    let both = [label("team", "blue"), label("tier", "x")].concat();
    let cases = [
        (VmFilter::default(), vec![two, one]),
        (VmFilter { states: vec![VmState::Running], ..Default::default() }, vec![one]),
        (VmFilter { states: VmState::ALL.to_vec(), ..Default::default() }, vec![gone, two, one]),
        (VmFilter { driver: Some(DriverKind::Qemu), ..Default::default() }, vec![two]),
        (VmFilter { name: Some("one".into()), ..Default::default() }, vec![one]),
        (VmFilter { labels: label("team", "blue"), ..Default::default() }, vec![two, one]),
        (VmFilter { labels: both, ..Default::default() }, vec![two]),
        (VmFilter { labels: label("team", "red"), ..Default::default() }, vec![]),
        (VmFilter { worker_id: Some(worker), ..Default::default() }, vec![one]),
    ];
    for (filter, expected) in cases {
        let found = store.vms(filter.clone(), PageRequest::default()).await.unwrap();
        let ids: Vec<_> = found.items.iter().map(|v| v.id).collect();
        assert_eq!(ids, expected, "{filter:?}");
    }
}

pub(crate) async fn tasks_are_filtered(store: &impl Store) {
    let one = create(store, "one").await;
    let two = create(store, "two").await;
    let begun = begin(store, two.task.id, 1).await;
    let (run, _) = execute(store, two.vm.id).await;
    let cases = [
        (TaskFilter::default(), vec![run.id, two.task.id, one.task.id]),
        (TaskFilter { states: vec![TaskState::Running], ..Default::default() }, vec![two.task.id]),
        (TaskFilter { kind: Some(TaskKind::VmExecute), ..Default::default() }, vec![run.id]),
        (TaskFilter { vm_id: Some(two.vm.id), ..Default::default() }, vec![run.id, two.task.id]),
        (TaskFilter { worker_id: begun.worker_id, ..Default::default() }, vec![two.task.id]),
    ];
    for (filter, expected) in cases {
        let found = store.tasks(filter.clone(), PageRequest::default()).await.unwrap();
        let ids: Vec<_> = found.items.iter().map(|t| t.id).collect();
        assert_eq!(ids, expected, "{filter:?}");
    }
}

pub(crate) async fn the_outbox_holds_what_is_owed_oldest_first(store: &impl Store) {
    let mut owed = Vec::new();
    for name in ["a", "b", "c", "d"] {
        owed.push(create(store, name).await.task.id);
    }
    let ids = |tasks: Vec<aether_types::Task>| tasks.iter().map(|t| t.id).collect::<Vec<_>>();
    assert_eq!(ids(store.undispatched(2).await.unwrap()), owed[..2]);
    store.confirm_dispatched(&owed[..2]).await.unwrap();
    store.confirm_dispatched(&[]).await.unwrap();
    assert_eq!(ids(store.undispatched(9).await.unwrap()), owed[2..]);
    begin(store, owed[2], 1).await;
    assert_eq!(ids(store.undispatched(9).await.unwrap()), owed[3..]);
}

pub(crate) async fn open_tasks_are_those_that_have_not_ended(store: &impl Store) {
    let one = create(store, "one").await.task;
    let two = create(store, "two").await.task;
    let three = create(store, "three").await.task;
    carry_out(store, &two, Some(VmEvent::Started)).await;
    begin(store, three.id, 1).await;
    let open = store.open_tasks().await.unwrap();
    assert_eq!(open.iter().map(|t| t.id).collect::<Vec<_>>(), [one.id, three.id]);
}

pub(crate) async fn expired_vms_are_found_until_they_are_deleted(store: &impl Store) {
    assert_eq!(store.next_expiry().await.unwrap(), None);
    let mut new = new_vm("a");
    new.spec.timeout_s = Some(60);
    let vm = store
        .create_vm(new, new_task(TaskKind::VmCreate), Capacity::default(), None)
        .await
        .unwrap()
        .vm;
    create(store, "forever").await;
    let end = vm.expires_at.unwrap();
    assert_eq!(end, vm.created_at.plus_ms(60_000));
    assert_eq!(store.next_expiry().await.unwrap(), Some(end));
    assert_eq!(store.expired_vms(Timestamp::now()).await.unwrap(), []);
    assert_eq!(store.expired_vms(end).await.unwrap(), [vm.id]);
    request(store, vm.id, TaskKind::VmDelete).await;
    assert_eq!(store.expired_vms(end).await.unwrap(), []);
    assert_eq!(store.next_expiry().await.unwrap(), None);
}

pub(crate) async fn a_secret_is_the_first_that_was_proposed(store: &impl Store) {
    let kept = store.shared_secret("a", &[1, 2]).await.unwrap();
    assert_eq!(kept, [1, 2]);
    assert_eq!(store.shared_secret("a", &[3]).await.unwrap(), [1, 2]);
    assert_eq!(store.shared_secret("b", &[3]).await.unwrap(), [3]);
}

pub(crate) async fn those_who_propose_a_secret_at_once_get_the_same(store: &impl Store) {
    let ask = |proposed: &'static [u8]| store.shared_secret("one", proposed);
    let (a, b, c, d) = tokio::join!(ask(&[1]), ask(&[2]), ask(&[3]), ask(&[4]));
    let kept = [a, b, c, d].map(Result::unwrap);
    assert!(kept.iter().all(|one| *one == kept[0]), "{kept:?}");
}

pub(crate) async fn ping_answers(store: &impl Store) {
    store.ping().await.unwrap();
}
