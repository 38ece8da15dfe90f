//! Many at once about the same things: what one writer keeps on SQLite, locks keep here.

use std::sync::Arc;

use aether_postgres::Database;
use aether_store::{
    AttemptEnd, Begin, Capacity, ExecutionEnd, NewExecution, PageRequest, PostgresStore, Store,
    StoreError, VmFilter,
};
use aether_types::{
    ExecutionId, ExecutionSpec, ExecutionState, TaskKind, TaskState, TemplateState, VmEvent, VmId,
    VmState, WorkerId,
};
use tokio::task::JoinSet;

use crate::support;

/// Two processes on one database.
async fn two() -> Option<([Arc<PostgresStore>; 2], impl Sized)> {
    let (one, test) = crate::engines::postgres().await?;
    let database = Database::open(test.config.clone()).await.unwrap();
    let two = PostgresStore::open(&database).await.unwrap();
    Some(([Arc::new(one), Arc::new(two)], test))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repeated_request_at_the_same_time_is_one_request() {
    let Some((stores, _kept)) = two().await else { return };
    let mut asked = JoinSet::new();
    for i in 0..12 {
        let store = Arc::clone(&stores[i % 2]);
        asked.spawn(async move {
            let (vm, task) = (support::new_vm("one"), support::new_task(TaskKind::VmCreate));
            let key = Some(support::key("same", 1));
            store.create_vm(vm, task, Capacity::default(), key).await.unwrap()
        });
    }
    let answers = asked.join_all().await;
    assert_eq!(answers.iter().filter(|a| !a.repeated).count(), 1);
    assert!(answers.iter().all(|a| a.task.id == answers[0].task.id));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_goes_to_one_of_many() {
    let Some((stores, _kept)) = two().await else { return };
    let mut asked = JoinSet::new();
    for i in 0..12 {
        let store = Arc::clone(&stores[i % 2]);
        asked.spawn(async move {
            let (vm, task) = (support::new_vm("one"), support::new_task(TaskKind::VmCreate));
            store.create_vm(vm, task, Capacity::default(), None).await
        });
    }
    let answers = asked.join_all().await;
    let mut taken = 0;
    for answer in &answers {
        match answer {
            Ok(_) => {}
            Err(StoreError::NameTaken { .. }) => taken += 1,
            Err(other) => panic!("{other:?}"),
        }
    }
    assert_eq!(taken, 11);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_is_begun_by_one_of_many_with_the_same_epoch() {
    let Some((stores, _kept)) = two().await else { return };
    let made = support::create(&*stores[0], "vm").await;
    let mut begun = JoinSet::new();
    for i in 0..8 {
        let store = Arc::clone(&stores[i % 2]);
        let task = made.task.id;
        begun.spawn(
            async move { store.begin_attempt(task, WorkerId::new().into(), 1).await.unwrap() },
        );
    }
    let begun = begun.join_all().await;
    assert_eq!(begun.iter().filter(|b| matches!(b, Begin::Go(_))).count(), 1);
}

/// Commands are asked for, begun, ended and cancelled while the VM is stopped and deleted: nothing
/// is left open that nobody will end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deletion_among_commands_leaves_nothing_open() {
    let Some((stores, _kept)) = two().await else { return };
    for round in 0..6 {
        let vm = support::running(&*stores[0], &format!("vm-{round}")).await;
        let mut work = JoinSet::new();
        for i in 0..10 {
            let store = Arc::clone(&stores[i % 2]);
            work.spawn(async move { command(&store, vm, i).await });
        }
        for (i, kind) in [TaskKind::VmStop, TaskKind::VmDelete].into_iter().enumerate() {
            let store = Arc::clone(&stores[i]);
            work.spawn(async move { change(&store, vm, kind).await });
        }
        work.join_all().await;
        finish(&stores[0], vm).await;
        assert_eq!(stores[0].vm(vm).await.unwrap().unwrap().state, VmState::Deleted);
        assert!(stores[0].open_tasks().await.unwrap().is_empty());
        let ran = stores[0].executions(vm, PageRequest::default()).await.unwrap().items;
        assert!(ran.iter().all(|execution| execution.state.is_end()), "{ran:?}");
    }
}

/// As a client and a worker do together.
async fn command(store: &PostgresStore, vm: VmId, i: usize) {
    let new = NewExecution { id: ExecutionId::new(), spec: ExecutionSpec::default() };
    let task = support::new_task(TaskKind::VmExecute);
    let (asked, execution) = match store.request_execution(vm, new, task, None).await {
        Ok(asked) => asked,
        Err(StoreError::WrongState { .. }) => return,
        Err(other) => panic!("{other:?}"),
    };
    let id = asked.task.id;
    if i.is_multiple_of(3) {
        store.cancel_task(id).await.unwrap();
    }
    if !matches!(store.begin_attempt(id, WorkerId::new().into(), 1).await.unwrap(), Begin::Go(_)) {
        return;
    }
    store.execution_started(id, 1, execution.id, "boot").await.unwrap();
    let end = AttemptEnd {
        execution: Some(ExecutionEnd {
            state: ExecutionState::Completed,
            ..support::exited(0).execution.unwrap()
        }),
        ..support::completed(None)
    };
    store.end_attempt(id, 1, end).await.unwrap();
}

async fn change(store: &PostgresStore, vm: VmId, kind: TaskKind) {
    match store.request_on_vm(vm, support::new_task(kind), None).await {
        Ok(_) | Err(StoreError::WrongState { .. }) => {}
        Err(other) => panic!("{other:?}"),
    }
}

/// Carries out what is open, as a worker would that comes late.
async fn finish(store: &PostgresStore, vm: VmId) {
    change(store, vm, TaskKind::VmDelete).await;
    for task in store.open_tasks().await.unwrap() {
        let event = match task.kind {
            TaskKind::VmStop => VmEvent::Stopped,
            TaskKind::VmDelete => VmEvent::Deleted,
            other => panic!("{other} is open"),
        };
        let done = support::carry_out(store, &task, Some(event)).await;
        assert_eq!(done.state, TaskState::Completed);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn templates_of_one_name_that_are_ready_at_once_leave_one() {
    let Some((stores, _kept)) = two().await else { return };
    let mut work = JoinSet::new();
    for i in 0..6 {
        let store = Arc::clone(&stores[i % 2]);
        work.spawn(async move {
            let mut new = support::new_template("web");
            new.spec.memory_mb += u32::try_from(i).unwrap();
            let (asked, template) = support::build_as(&*store, new, None).await;
            support::begin(&*store, asked.task.id, 1).await;
            let end = support::template_made(&format!("d{i}"));
            store.end_attempt(asked.task.id, 1, end).await.unwrap();
            template.id
        });
    }
    let mut ready = 0;
    for id in work.join_all().await {
        let state = stores[0].template(id).await.unwrap().unwrap().state;
        ready += usize::from(state == TemplateState::Ready);
    }
    assert_eq!(ready, 1);
}

/// A VM is created from a snapshot while that is deleted: one of the two is refused.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_vm_begins_as_is_not_deleted_under_it() {
    let Some((stores, _kept)) = two().await else { return };
    let source = support::running(&*stores[0], "source").await;
    for round in 0..12 {
        let (asked, snapshot) = support::snapshot(&*stores[0], source).await;
        support::begin(&*stores[0], asked.task.id, 1).await;
        stores[0].end_attempt(asked.task.id, 1, support::made(None)).await.unwrap();
        let mut vm = support::new_vm(&format!("vm-{round}"));
        vm.spec.origin = aether_types::Origin::Snapshot(snapshot.id);
        let task = support::new_task(TaskKind::VmCreate);
        let (made, deleted) = tokio::join!(
            stores[0].create_vm(vm, task, Capacity::default(), None),
            stores[1].delete_snapshot(snapshot.id),
        );
        assert!(made.is_ok() != deleted.is_ok(), "{made:?} {deleted:?}");
    }
    let all = stores[0].vms(VmFilter::default(), PageRequest::default()).await.unwrap();
    assert!(!all.items.is_empty());
}
