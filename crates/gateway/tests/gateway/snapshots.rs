//! Snapshots, forks, and VMs that begin as one.

use std::collections::BTreeMap;

use aether_api::{
    CreateSnapshot, CreateVm, ForkVm, OriginKind, Problem, VmView,
    client::{CallOptions, ClientError, SnapshotQuery, VmQuery, Waited},
};
use aether_gateway::GatewayConfig;
use aether_store::Capacity;
use aether_types::{
    ErrorCode, SnapshotPurpose, SnapshotState, StartKind, TaskKind, TaskState, VmState,
};
use reqwest::{Method, StatusCode};

use crate::rig::{Options, Rig, SOON, done, problem, soon, waiting};

fn keyed(key: &str) -> CallOptions {
    CallOptions { wait: Some(SOON), idempotency_key: Some(key.into()) }
}

fn named(name: &str) -> CreateSnapshot {
    CreateSnapshot { name: Some(name.into()) }
}

fn refusal<T: std::fmt::Debug>(answer: Result<T, ClientError>) -> Problem {
    match answer {
        Err(ClientError::Problem(problem)) => *problem,
        other => panic!("not refused: {other:?}"),
    }
}

#[tokio::test]
async fn a_snapshot_is_taken_used_and_deleted() {
    let rig = Rig::new().await;
    let vm = rig.vm("a").await;
    let taken = done(rig.client.create_snapshot("a", &named("s"), &waiting()).await.unwrap());
    assert_eq!((taken.state, taken.purpose), (SnapshotState::Ready, SnapshotPurpose::User));
    assert_eq!((taken.vm_id, taken.paused_ms), (vm.id, Some(1.5)));
    assert_eq!(rig.client.snapshot("s").await.unwrap(), taken);
    let list = rig.client.snapshots(&SnapshotQuery::default()).await.unwrap().items;
    assert_eq!(list, std::slice::from_ref(&taken));
    let of_vm = SnapshotQuery { vm: Some("a".into()), ..SnapshotQuery::default() };
    assert_eq!(rig.client.snapshots(&of_vm).await.unwrap().items.len(), 1);
    let answer = rig.call(Method::GET, "/vms/a/snapshots?state=ready").send().await.unwrap();
    let answer: serde_json::Value = answer.json().await.unwrap();
    assert_eq!(answer["items"][0]["name"], "s");

    // What is not said comes from the snapshot.
    let request = CreateVm {
        name: Some("b".into()),
        snapshot: Some("s".into()),
        vcpus: Some(1),
        ..CreateVm::default()
    };
    let vm = done(rig.client.create_vm(&request, &waiting()).await.unwrap());
    assert_eq!((vm.origin.kind, vm.origin.snapshot_id), (OriginKind::Snapshot, Some(taken.id)));
    let start = vm.start.unwrap();
    assert_eq!((start.kind, start.total_ms), (StartKind::Restore, 1.25));
    assert_eq!(start.phases.iter().map(|p| p.ms).collect::<Vec<_>>(), [0.25, 1.0]);

    let deleted = rig.client.delete_snapshot("s").await.unwrap();
    assert_eq!(deleted.state, SnapshotState::Deleted);
    let gone = refusal(rig.client.snapshot("s").await);
    assert_eq!(gone.error_code(), Some(ErrorCode::SnapshotNotFound));
    // By its id it is known for ever, and deleting it again is harmless.
    let id = taken.id.to_string();
    assert_eq!(rig.client.snapshot(&id).await.unwrap().state, SnapshotState::Deleted);
    assert_eq!(rig.client.delete_snapshot(&id).await.unwrap().state, SnapshotState::Deleted);
    // Its name is free again.
    done(rig.client.create_snapshot("a", &named("s"), &waiting()).await.unwrap());
}

#[tokio::test]
async fn a_snapshot_needs_no_body_and_tells_its_task() {
    let rig = Rig::new().await;
    rig.vm("a").await;
    let response = rig.call(Method::POST, "/vms/a/snapshots").send().await.unwrap();
    assert_eq!(response.status(), StatusCode::ACCEPTED);
    let accepted: aether_api::Accepted = response.json().await.unwrap();
    let id = accepted.snapshot_id.unwrap();
    let task = rig.client.task(accepted.task_id, Some(SOON)).await.unwrap();
    assert_eq!((task.kind, task.snapshot_id), (TaskKind::VmSnapshot, Some(id)));
    assert_eq!(task.status, TaskState::Completed);
    let response = rig.call(Method::POST, "/vms/a/snapshots?wait=20s").send().await.unwrap();
    assert_eq!(response.status(), StatusCode::CREATED);
    assert!(response.headers()["location"].to_str().unwrap().contains("/api/v1/snapshots/"));
    // A body that is there is read as every other.
    let response = rig.call(Method::POST, "/vms/a/snapshots").body("name=a").send().await.unwrap();
    assert_eq!(response.status(), StatusCode::UNSUPPORTED_MEDIA_TYPE);
}

#[tokio::test]
async fn a_snapshot_that_failed_says_why() {
    let rig = Rig::new().await;
    rig.vm("full").await;
    let failed = refusal(rig.client.create_snapshot("full", &named("s"), &waiting()).await);
    assert_eq!((failed.error_code(), failed.status), (Some(ErrorCode::NoSpace), 507));
    let kept = rig.client.snapshot("s").await.unwrap();
    assert_eq!(kept.state, SnapshotState::Failed);
    assert_eq!(kept.reason.unwrap().code, ErrorCode::NoSpace);
    let request = CreateVm { snapshot: Some("s".into()), ..CreateVm::default() };
    let refused = refusal(rig.client.create_vm(&request, &waiting()).await);
    assert_eq!(refused.error_code(), Some(ErrorCode::SnapshotStateConflict));
    assert!(refused.detail.contains("no room"), "{}", refused.detail);
}

#[tokio::test]
async fn one_key_takes_one_snapshot_and_makes_one_fork() {
    let rig = Rig::new().await;
    rig.vm("a").await;
    let first = done(rig.client.create_snapshot("a", &named("s"), &keyed("s")).await.unwrap());
    let again = done(rig.client.create_snapshot("a", &named("s"), &keyed("s")).await.unwrap());
    assert_eq!(first.id, again.id);
    let request = ForkVm { count: Some(3), ..ForkVm::default() };
    let first = done_fork(rig.client.fork_vm("a", &request, &keyed("f")).await.unwrap());
    let again = done_fork(rig.client.fork_vm("a", &request, &keyed("f")).await.unwrap());
    let ids = |vms: &[VmView]| vms.iter().map(|vm| vm.id).collect::<Vec<_>>();
    assert_eq!(ids(&first.vms), ids(&again.vms));
    assert_eq!(rig.client.vms(&VmQuery::default()).await.unwrap().items.len(), 4);
    let other = ForkVm { count: Some(4), ..ForkVm::default() };
    let refused = refusal(rig.client.fork_vm("a", &other, &keyed("f")).await);
    assert_eq!(refused.error_code(), Some(ErrorCode::IdempotencyConflict));
    // A stop and a stop that keeps the memory are two requests.
    done(rig.client.stop_vm("a", &keyed("stop")).await.unwrap());
    let refused = refusal(rig.client.suspend_vm("a", &keyed("stop")).await);
    assert_eq!(refused.error_code(), Some(ErrorCode::IdempotencyConflict));
}

fn done_fork(answer: Waited<aether_api::Forked, aether_api::ForkAccepted>) -> aether_api::Forked {
    match answer {
        Waited::Done(forked) => forked,
        Waited::Accepted(accepted) => panic!("not done: {accepted:?}"),
    }
}

#[tokio::test]
async fn clones_are_the_source_but_for_what_is_said() {
    let rig = Rig::new().await;
    let request = CreateVm {
        name: Some("a".into()),
        env: BTreeMap::from([("KEPT".into(), "s3cret".into())]),
        labels: BTreeMap::from([("tier".into(), "web".into())]),
        memory_mb: Some(512),
        timeout_s: Some(600),
        ..CreateVm::default()
    };
    done(rig.client.create_vm(&request, &waiting()).await.unwrap());
    let fork = ForkVm { count: Some(2), name_prefix: Some("c".into()), ..ForkVm::default() };
    let forked = done_fork(rig.client.fork_vm("a", &fork, &waiting()).await.unwrap());
    assert_eq!(forked.paused_ms, Some(1.5));
    let names: Vec<_> = forked.vms.iter().map(|vm| vm.name.as_str()).collect();
    assert_eq!(names, ["c-1", "c-2"]);
    for vm in &forked.vms {
        assert_eq!((vm.state, vm.memory_mb, vm.timeout_s), (VmState::Running, 512, Some(600)));
        assert_eq!((vm.env.clone(), vm.labels["tier"].as_str()), (vec!["KEPT".into()], "web"));
        assert_eq!(vm.origin.kind, OriginKind::Snapshot);
    }
    // The snapshot of a fork is nobody's to see in a list, to use or to delete.
    assert!(rig.client.snapshots(&SnapshotQuery::default()).await.unwrap().items.is_empty());
    let id = forked.vms[0].origin.snapshot_id.unwrap().to_string();
    assert_eq!(rig.client.snapshot(&id).await.unwrap().purpose, SnapshotPurpose::Fork);
    for refused in [
        refusal(rig.client.delete_snapshot(&id).await),
        refusal(
            rig.client
                .create_vm(
                    &CreateVm { snapshot: Some(id.clone()), ..CreateVm::default() },
                    &waiting(),
                )
                .await,
        ),
    ] {
        assert_eq!(refused.error_code(), Some(ErrorCode::SnapshotStateConflict), "{refused}");
    }

    let fork = ForkVm {
        env: Some(BTreeMap::from([("NEW".into(), "1".into())])),
        labels: Some(BTreeMap::new()),
        timeout_s: Some(60),
        ..ForkVm::default()
    };
    let forked = done_fork(rig.client.fork_vm("a", &fork, &waiting()).await.unwrap());
    let vm = &forked.vms[0];
    assert_eq!((vm.env.as_slice(), vm.timeout_s), (&["NEW".to_owned()][..], Some(60)));
    assert!(vm.labels.is_empty() && vm.name.starts_with("vm-"));
}

#[tokio::test]
async fn a_fork_is_told_at_once_to_who_does_not_wait() {
    let rig = Rig::new().await;
    rig.vm("a").await;
    let fork = ForkVm { count: Some(2), name_prefix: Some("c".into()), ..ForkVm::default() };
    let answer = rig.client.fork_vm("a", &fork, &CallOptions::default()).await.unwrap();
    let Waited::Accepted(accepted) = answer else { panic!("{answer:?}") };
    assert_eq!(accepted.vms.iter().map(|c| c.name.as_str()).collect::<Vec<_>>(), ["c-1", "c-2"]);
    for clone in &accepted.vms {
        let task = rig.client.task(clone.task_id, Some(SOON)).await.unwrap();
        assert_eq!((task.status, task.vm_id), (TaskState::Completed, Some(clone.vm_id)));
    }
    let snapshot = rig.client.task(accepted.task_id, None).await.unwrap();
    assert_eq!(snapshot.snapshot_id, Some(accepted.snapshot_id));
}

#[tokio::test]
async fn the_first_problem_of_a_fork_names_all_its_vms() {
    let rig = Rig::new().await;
    rig.vm("full").await;
    let fork = ForkVm { count: Some(3), ..ForkVm::default() };
    let failed = refusal(rig.client.fork_vm("full", &fork, &waiting()).await);
    assert_eq!(failed.error_code(), Some(ErrorCode::NoSpace));
    assert_eq!(failed.vm_ids.len(), 3);
    for id in failed.vm_ids {
        rig.client.vm(&id.to_string()).await.unwrap();
    }
    // Where a name is taken nothing is made.
    rig.vm("c-2").await;
    let fork = ForkVm { count: Some(3), name_prefix: Some("c".into()), ..ForkVm::default() };
    let refused = refusal(rig.client.fork_vm("c-2", &fork, &waiting()).await);
    assert_eq!(refused.error_code(), Some(ErrorCode::NameTaken));
    assert_eq!(refused.field.as_deref(), Some("name_prefix"));
    assert!(rig.client.vm("c-1").await.is_err());
}

#[tokio::test]
async fn a_vm_that_keeps_its_memory_says_so() {
    let rig = Rig::new().await;
    rig.vm("a").await;
    let stopped = done(rig.client.suspend_vm("a", &waiting()).await.unwrap());
    assert_eq!((stopped.state, stopped.memory_kept), (VmState::Stopped, true));
    // Its memory is no snapshot that anybody can use.
    assert!(rig.client.snapshots(&SnapshotQuery::default()).await.unwrap().items.is_empty());
    let started = done(rig.client.start_vm("a", &waiting()).await.unwrap());
    assert_eq!((started.state, started.memory_kept), (VmState::Running, false));
    let stopped = done(rig.client.stop_vm("a", &waiting()).await.unwrap());
    assert!(!stopped.memory_kept);
}

#[tokio::test]
async fn past_the_configured_number_of_vms_the_answer_is_503_at_once() {
    let capacity = Capacity { vms_max: Some(2), starting_max: None };
    let config = GatewayConfig { capacity, ..GatewayConfig::default() };
    let rig = Rig::with(Options { config, ..Options::default() }).await;
    rig.vm("a").await;
    rig.vm("b").await;
    let create = rig.call(Method::POST, "/vms?wait=20s").json(&serde_json::json!({}));
    let response = soon(create.send()).await.unwrap();
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(response.headers()["retry-after"], "1");
    assert_eq!(problem(response).await.error_code(), Some(ErrorCode::TooManyVms));
    let refused = refusal(rig.client.fork_vm("a", &ForkVm::default(), &waiting()).await);
    assert_eq!(refused.error_code(), Some(ErrorCode::TooManyVms));
    assert_eq!(refused.retry_after_s, Some(1));
    done(rig.client.delete_vm("a", &waiting()).await.unwrap());
    rig.vm("c").await;
}

#[tokio::test]
async fn too_many_at_once_are_refused_too() {
    let capacity = Capacity { vms_max: None, starting_max: Some(2) };
    let config = GatewayConfig { capacity, ..GatewayConfig::default() };
    let rig = Rig::with(Options { config, has_worker: false, ..Options::default() }).await;
    for _ in 0..2 {
        rig.client.create_vm(&CreateVm::default(), &CallOptions::default()).await.unwrap();
    }
    let refused =
        refusal(rig.client.create_vm(&CreateVm::default(), &CallOptions::default()).await);
    assert_eq!((refused.error_code(), refused.status), (Some(ErrorCode::TooManyVms), 503));
}

#[tokio::test]
async fn a_snapshot_that_has_not_begun_can_be_cancelled() {
    let rig = Rig::with(Options { has_worker: false, ..Options::default() }).await;
    let vm = rig.client.create_vm(&CreateVm::default(), &CallOptions::default()).await.unwrap();
    let vm = vm.vm_id();
    rig.worker.carry_out_next().await;
    let options = CallOptions::default();
    let answer = rig.client.create_snapshot(&vm.to_string(), &named("s"), &options).await.unwrap();
    let Waited::Accepted(accepted) = answer else { panic!("{answer:?}") };
    let task = rig.client.cancel_task(accepted.task_id, None).await.unwrap();
    assert_eq!(task.status, TaskState::Cancelled);
    assert_eq!(rig.client.snapshot("s").await.unwrap().state, SnapshotState::Failed);
}
