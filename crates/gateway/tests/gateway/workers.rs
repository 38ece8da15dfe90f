//! Workers, the cluster, and the queues, as clients see them.

use std::time::Duration;

use aether_api::{
    CreateKey, CreateProject, CreateVm, ExecuteRequest,
    client::{CallOptions, Client, PageQuery},
};
use aether_events::{Event, Received};
use aether_store::{AttemptEnd, NewWorker, Store};
use aether_types::{
    DriverKind, ErrorCode, Fault, Placement, Role, TaskState, VmState, Worker, WorkerCapacity,
    WorkerDriver, WorkerId, WorkerLoad, WorkerState, project::Quota,
};
use reqwest::Method;

use crate::rig::{Options, Rig, done, problem, soon, waiting};

fn new_worker(host: &str, zone: &str, lease: Duration) -> NewWorker {
    let driver = WorkerDriver {
        kind: DriverKind::Sim,
        version: "1".into(),
        accelerated: false,
        isolation: "none".into(),
        takes_snapshots: true,
    };
    NewWorker {
        id: WorkerId::new(),
        host: host.into(),
        zone: Some(zone.into()),
        labels: std::collections::BTreeMap::new(),
        drivers: vec![driver],
        capacity: WorkerCapacity {
            processors: 4,
            host_memory_mb: 4096,
            ..WorkerCapacity::default()
        },
        template_folder: None,
        stream_address: None,
        version: "1".into(),
        lease,
    }
}

async fn register(rig: &Rig, host: &str, zone: &str) -> Worker {
    let new = new_worker(host, zone, Duration::from_mins(5));
    rig.store.register_worker(new).await.unwrap()
}

/// Nobody claims: the workers are only in the registry.
async fn without_work() -> Rig {
    Rig::with(Options { has_worker: false, ..Options::default() }).await
}

async fn create(rig: &Rig, name: &str, zone: &str) -> aether_types::VmId {
    let placement = Placement { zone: Some(zone.into()), ..Placement::default() };
    let request =
        CreateVm { name: Some(name.into()), placement: Some(placement), ..CreateVm::default() };
    rig.client.create_vm(&request, &CallOptions::default()).await.unwrap().vm_id()
}

#[tokio::test]
async fn workers_are_shown_drained_and_activated() {
    let rig = without_work().await;
    let (one, two) = (register(&rig, "one", "a").await, register(&rig, "two", "b").await);
    let vm = create(&rig, "here", "a").await;
    create(&rig, "there", "b").await;
    let workers = rig.client.workers(&[]).await.unwrap();
    let ids: Vec<_> = workers.items.iter().map(|worker| worker.id).collect();
    assert_eq!((ids, workers.next_cursor), (vec![one.id, two.id], None));
    let shown = rig.client.worker("one").await.unwrap();
    assert_eq!(
        (shown.id, shown.state, shown.zone.as_deref()),
        (one.id, WorkerState::Active, Some("a"))
    );
    assert_eq!(shown.promised, WorkerLoad { vms: 1, vcpus: 1, memory_mb: 256 });
    let by_id = rig.client.worker(&one.id.to_string()).await.unwrap();
    assert_eq!(by_id, shown);
    let vms = rig.client.worker_vms("one", &PageQuery::default()).await.unwrap();
    assert_eq!(vms.items.iter().map(|vm| vm.id).collect::<Vec<_>>(), [vm]);
    for _ in 0..2 {
        let drained = rig.client.drain_worker("one").await.unwrap();
        assert_eq!((drained.state, drained.draining), (WorkerState::Draining, true));
    }
    // It had not begun there.
    assert_eq!(rig.client.vm("here").await.unwrap().worker_id, None);
    let draining = rig.client.workers(&["draining".into()]).await.unwrap();
    assert_eq!(draining.items.len(), 1);
    let stats = rig.client.cluster_stats().await.unwrap();
    assert_eq!((stats.processors, stats.host_memory_mb, stats.vms_waiting), (8, 8192, 1));
    assert_eq!(stats.workers[&WorkerState::Draining], 1);
    assert_eq!(stats.promised.vms, 1);
    let shares = rig.client.cluster_distribution().await.unwrap().items;
    let permille: Vec<_> = shares.iter().map(|share| share.vms_permille).collect();
    assert_eq!(permille, [0, 1000]);
    let active = rig.client.activate_worker("one").await.unwrap();
    assert_eq!(active.state, WorkerState::Active);
}

#[tokio::test]
async fn a_worker_that_is_not_there_or_not_the_only_one_is_refused() {
    let rig = without_work().await;
    register(&rig, "twin", "a").await;
    register(&rig, "twin", "a").await;
    for (method, path) in [
        (Method::GET, "/workers/nobody".to_owned()),
        (Method::GET, format!("/workers/{}", WorkerId::new())),
        (Method::GET, "/workers/nobody/vms".to_owned()),
        (Method::POST, "/workers/nobody/drain".to_owned()),
        (Method::POST, format!("/workers/{}/activate", WorkerId::new())),
    ] {
        let refused = problem(rig.call(method, &path).send().await.unwrap()).await;
        assert_eq!((refused.status, refused.error_code()), (404, Some(ErrorCode::WorkerNotFound)));
    }
    let refused = rig.call(Method::GET, "/workers/twin").send().await.unwrap();
    let refused = problem(refused).await;
    assert_eq!(refused.error_code(), Some(ErrorCode::InvalidRequest));
    assert!(refused.detail.contains("2 workers are on that host"), "{}", refused.detail);
    let refused = rig.call(Method::GET, "/workers?state=asleep").send().await.unwrap();
    assert_eq!(problem(refused).await.field.as_deref(), Some("state"));
    for body in [r#"{"placement":{"zone":""}}"#, r#"{"placement":{"labels":{"a b":"c"}}}"#] {
        let asked = rig.call(Method::POST, "/vms").header("content-type", "application/json");
        let refused = problem(asked.body(body).send().await.unwrap()).await;
        assert_eq!(refused.field.as_deref(), Some("placement"), "{}", refused.detail);
    }
}

#[tokio::test]
async fn a_silent_worker_is_lost_and_its_vms_are_settled() {
    let rig = without_work().await;
    let mut events = rig.bus.subscribe();
    let short = new_worker("short", "a", Duration::from_millis(300));
    let short = rig.store.register_worker(short).await.unwrap();
    let vm = create(&rig, "web", "a").await;
    assert_eq!(rig.client.vm("web").await.unwrap().worker_id, Some(short.id));
    // The second event is what becomes of it; the first was its creation.
    for _ in 0..2 {
        soon(async {
            while !matches!(events.next().await,
                Received::Event(Event::Vm { vm_id, .. }) if vm_id == vm)
            {}
        })
        .await;
    }
    let lost = rig.client.worker("short").await.unwrap();
    assert_eq!(lost.state, WorkerState::Lost);
    let waits = rig.client.vm("web").await.unwrap();
    assert_eq!((waits.state, waits.worker_id), (VmState::Creating, None));
    assert_eq!(rig.client.cluster_stats().await.unwrap().vms_waiting, 1);
}

#[tokio::test]
async fn a_dead_letter_is_listed_and_retried_once() {
    let rig = without_work().await;
    let new = CreateVm { name: Some("web".into()), ..CreateVm::default() };
    let vm = rig.client.create_vm(&new, &CallOptions::default()).await.unwrap().vm_id();
    rig.worker.carry_out_next().await;
    let worker = rig.client.vm("web").await.unwrap().worker_id.unwrap();
    let name = worker.to_string();
    let name = name.as_str();
    let request = ExecuteRequest { command: "echo".into(), ..ExecuteRequest::default() };
    let accepted = rig.client.execute("web", &request, &CallOptions::default()).await.unwrap();
    let dead = accepted.task_id().unwrap();
    use_up(&*rig.store, dead).await;
    let queues = rig.client.queues().await.unwrap().items;
    let shared = queues.iter().find(|queue| queue.name == name).unwrap();
    assert_eq!((shared.dead, shared.running), (1, 0));
    let listed = rig.client.dead_tasks(name, &PageQuery::default()).await.unwrap().items;
    assert_eq!(listed.iter().map(|task| task.id).collect::<Vec<_>>(), [dead]);
    rig.worker.start();
    let first = rig.client.retry_dead(name, dead).await.unwrap();
    assert_eq!((first.retry_of, first.vm_id), (dead, Some(vm)));
    let second = rig.client.retry_dead(name, dead).await.unwrap();
    assert_eq!(second.task_id, first.task_id);
    let ended = rig.client.task(first.task_id, waiting().wait).await.unwrap();
    assert_eq!(ended.status, TaskState::Completed);
    let listed = rig.client.dead_tasks(name, &PageQuery::default()).await.unwrap();
    assert_eq!(listed.items, []);
    // What did not die is no dead letter, and a queue that is none has none.
    for (path, code) in [
        (format!("/queues/{name}/dead/{}/retry", first.task_id), ErrorCode::TaskNotFound),
        (format!("/queues/{}/dead/{dead}/retry", WorkerId::new()), ErrorCode::TaskNotFound),
        (format!("/queues/shared/dead/{dead}/retry"), ErrorCode::TaskNotFound),
        (format!("/queues/nothing/dead/{dead}/retry"), ErrorCode::QueueNotFound),
    ] {
        let refused = problem(rig.call(Method::POST, &path).send().await.unwrap()).await;
        assert_eq!((refused.status, refused.error_code()), (404, Some(code)), "{path}");
    }
    done(rig.client.delete_vm("web", &waiting()).await.unwrap());
}

/// Whoever of the platform asks for it.
#[tokio::test]
async fn a_retry_is_of_the_project_that_the_dead_letter_is_of() {
    let rig = without_work().await;
    let project = CreateProject { name: "other".into(), quota: Quota::default() };
    let project = rig.client.create_project(&project).await.unwrap();
    let key = CreateKey {
        name: "a".into(),
        role: Role::Operator,
        scopes: Vec::new(),
        expires_in_s: None,
        project: Some(project.name),
    };
    let key = rig.client.create_key(&key).await.unwrap().key;
    let other = Client::new(&rig.base, Some(&key)).unwrap();
    let new = CreateVm { name: Some("web".into()), ..CreateVm::default() };
    other.create_vm(&new, &CallOptions::default()).await.unwrap();
    rig.worker.carry_out_next().await;
    let queue = other.vm("web").await.unwrap().worker_id.unwrap().to_string();
    let request = ExecuteRequest { command: "echo".into(), ..ExecuteRequest::default() };
    let accepted = other.execute("web", &request, &CallOptions::default()).await.unwrap();
    let dead = accepted.task_id().unwrap();
    use_up(&*rig.store, dead).await;
    let again = rig.client.retry_dead(&queue, dead).await.unwrap();
    let task = rig.store.task(again.task_id).await.unwrap().unwrap();
    assert_eq!(task.project_id, project.id);
}

async fn use_up(store: &dyn Store, task: aether_types::TaskId) {
    let why = || Fault::new(ErrorCode::Unavailable, "it is a test");
    let end = || AttemptEnd {
        state: TaskState::Failed,
        error: Some(why()),
        vm: None,
        execution: None,
        snapshot: None,
        template: None,
        tools: None,
    };
    for epoch in 1.. {
        store.begin_attempt(task, WorkerId::new().into(), epoch).await.unwrap();
        let now = store.retry_attempt(task, epoch, why(), end()).await.unwrap();
        if now.state.is_end() {
            return;
        }
    }
}
