//! Requests that make tasks, and questions about what came of them.

use std::{collections::BTreeMap, time::Duration};

use aether_api::{
    CreateVm,
    client::{CallOptions, PageQuery, TaskQuery, VmQuery, Waited},
};
use aether_types::{ErrorCode, ExecutionState, OutputStream, TaskState, VmState};
use reqwest::{Method, StatusCode};

use crate::rig::{Options, Rig, SOON, command, done, soon, waiting};

fn keyed(key: &str) -> CallOptions {
    CallOptions { wait: Some(SOON), idempotency_key: Some(key.into()) }
}

#[tokio::test]
async fn a_vm_lives_through_all_its_states() {
    let rig = Rig::new().await;
    let request = CreateVm {
        name: Some("a".into()),
        env: BTreeMap::from([("TOKEN".into(), "s3cret".into())]),
        timeout_s: Some(60),
        ..CreateVm::default()
    };
    let vm = done(rig.client.create_vm(&request, &waiting()).await.unwrap());
    assert_eq!((vm.state, vm.name.as_str()), (VmState::Running, "a"));
    assert_eq!(vm.env, ["TOKEN"]);
    assert_eq!(vm.isolation.as_deref(), Some("none: no machine"));
    assert!(vm.expires_at.is_some() && vm.worker_id.is_some());
    let text = rig.call(Method::GET, "/vms/a").send().await.unwrap().text().await.unwrap();
    assert!(!text.contains("s3cret"));

    let id = vm.id.to_string();
    for (answer, state) in [
        (rig.client.pause_vm("a", &waiting()).await, VmState::Paused),
        (rig.client.resume_vm(&id, &waiting()).await, VmState::Running),
        (rig.client.stop_vm("a", &waiting()).await, VmState::Stopped),
        (rig.client.start_vm(&id, &waiting()).await, VmState::Running),
        (rig.client.delete_vm("a", &waiting()).await, VmState::Deleted),
    ] {
        assert_eq!(done(answer.unwrap()).state, state);
    }
    // By its id it is still known, by its name no more.
    let vm = rig.client.vm(&id).await.unwrap();
    let states: Vec<_> = vm.history.unwrap().into_iter().map(|c| c.state).collect();
    assert_eq!(states.first(), Some(&VmState::Creating));
    assert_eq!(states.last(), Some(&VmState::Deleted));
    assert_eq!(rig.client.vm("a").await.unwrap_err().code(), Some(ErrorCode::VmNotFound));
    // Deleting again answers with the same task.
    let again = rig.client.delete_vm(&id, &waiting()).await.unwrap();
    assert_eq!(done(again).state, VmState::Deleted);
}

#[tokio::test]
async fn a_creation_answers_201_when_waited_for_and_202_else() {
    let rig = Rig::new().await;
    let create = |path: &str| rig.call(Method::POST, path).json(&serde_json::json!({}));
    let response = create("/vms?wait=20s").send().await.unwrap();
    assert_eq!(response.status(), StatusCode::CREATED);
    let response = create("/vms").send().await.unwrap();
    assert_eq!(response.status(), StatusCode::ACCEPTED);
    let location = response.headers()["location"].to_str().unwrap().to_owned();
    let accepted: aether_api::Accepted = response.json().await.unwrap();
    assert_eq!(location, format!("/api/v1/tasks/{}", accepted.task_id));
    assert_eq!(accepted.status, TaskState::Pending);
    let task = rig.client.task(accepted.task_id, Some(SOON)).await.unwrap();
    assert_eq!(task.status, TaskState::Completed);
    let vm = rig.client.vm(&accepted.vm_id.to_string()).await.unwrap();
    assert!(vm.name.starts_with("vm-"), "{}", vm.name);
}

#[tokio::test]
async fn a_waited_command_answers_with_its_result() {
    let rig = Rig::new().await;
    rig.vm("a").await;
    let run = async |name: &str, args: &[&str]| {
        done(rig.client.execute("a", &command(name, args), &waiting()).await.unwrap())
    };
    let echo = run("echo", &["hello", "there"]).await;
    assert_eq!(echo.stdout.as_deref(), Some("hello there\n"));
    assert_eq!((echo.exit_code, echo.stderr.as_deref()), (Some(0), Some("")));
    assert_eq!(echo.duration_ms, Some(1.5));
    // A command that fails by itself is completed; one that the platform lost is not.
    let three = run("exit", &["3"]).await;
    assert_eq!((three.status, three.exit_code), (ExecutionState::Completed, Some(3)));
    assert_eq!(rig.client.task(three.task_id, None).await.unwrap().attempts, 1);
    let dead = run("die", &[]).await;
    assert_eq!(dead.status, ExecutionState::Failed);
    assert_eq!(dead.error.unwrap().code, ErrorCode::GuestPanic);
    let binary = run("binary", &[]).await;
    assert_eq!(binary.stdout_base64.as_deref(), Some("AP9h"));
    let raw = rig.client.execution_output(binary.id, OutputStream::Stdout).await.unwrap();
    assert_eq!(&raw[..], [0, 0xff, b'a']);
    // The list has everything but output, newest first.
    let list = rig.client.executions("a", &PageQuery::default()).await.unwrap();
    assert_eq!(list.items.iter().map(|e| e.id).next(), Some(binary.id));
    assert!(list.items.iter().all(|e| e.stdout.is_none()));
    assert_eq!(rig.client.execution(echo.id).await.unwrap(), echo);
}

#[tokio::test]
async fn a_wait_that_is_too_short_answers_202_and_the_command_goes_on() {
    let rig = Rig::new().await;
    rig.vm("a").await;
    let short = CallOptions::waiting(Duration::from_millis(1));
    let answer = rig.client.execute("a", &command("gate", &[]), &short).await.unwrap();
    let Waited::Accepted(accepted) = answer else { panic!("{answer:?}") };
    rig.worker.gate.add_permits(1);
    let task = rig.client.task(accepted.task_id, Some(SOON)).await.unwrap();
    assert_eq!(task.status, TaskState::Completed);
    let execution = rig.client.execution(accepted.execution_id.unwrap()).await.unwrap();
    assert_eq!(execution.stdout.as_deref(), Some("through\n"));
}

#[tokio::test]
async fn many_wait_at_once_and_each_gets_its_own() {
    let rig = Rig::new().await;
    rig.vm("a").await;
    let runs = (0..64).map(|n| {
        let client = rig.client.clone();
        async move {
            let n = n.to_string();
            let ended = client.execute("a", &command("echo", &[&n]), &waiting()).await.unwrap();
            assert_eq!(done(ended).stdout, Some(format!("{n}\n")));
        }
    });
    soon(futures::future::join_all(runs)).await;
}

#[tokio::test]
async fn the_same_key_and_content_is_carried_out_once() {
    let rig = Rig::new().await;
    let vm = rig.vm("a").await;
    let echo = command("echo", &["once"]);
    let first = done(rig.client.execute("a", &echo, &keyed("k")).await.unwrap());
    let again = done(rig.client.execute("a", &echo, &keyed("k")).await.unwrap());
    assert_eq!(first, again);
    let other = rig.client.execute("a", &command("echo", &["twice"]), &keyed("k")).await;
    assert_eq!(other.unwrap_err().code(), Some(ErrorCode::IdempotencyConflict));
    // Another path is another request too.
    let other = rig.client.stop_vm("a", &keyed("k")).await;
    assert_eq!(other.unwrap_err().code(), Some(ErrorCode::IdempotencyConflict));

    let create = CreateVm { name: Some("b".into()), ..CreateVm::default() };
    let first = done(rig.client.create_vm(&create, &keyed("c")).await.unwrap());
    let again = done(rig.client.create_vm(&create, &keyed("c")).await.unwrap());
    assert_eq!(first.id, again.id);
    assert_ne!(first.id, vm.id);
    assert_eq!(rig.client.executions("a", &PageQuery::default()).await.unwrap().items.len(), 1);
}

#[tokio::test]
async fn lists_come_in_pages_and_filtered() {
    let rig = Rig::new().await;
    for (name, tier) in [("a", "web"), ("b", "db"), ("c", "web")] {
        let request = CreateVm {
            name: Some(name.into()),
            labels: BTreeMap::from([("tier".into(), tier.into()), ("all".into(), "x=y".into())]),
            ..CreateVm::default()
        };
        done(rig.client.create_vm(&request, &waiting()).await.unwrap());
    }
    done(rig.client.stop_vm("a", &waiting()).await.unwrap());
    let names = async |query: VmQuery| {
        let mut names = Vec::new();
        let mut query = query;
        loop {
            let page = rig.client.vms(&query).await.unwrap();
            assert!(page.items.len() <= 2);
            names.extend(page.items.into_iter().map(|vm| vm.name));
            query.page.cursor = page.next_cursor;
            if query.page.cursor.is_none() {
                return names.join("");
            }
        }
    };
    let page = PageQuery { limit: Some(2), cursor: None };
    let label = |k: &str, v: &str| vec![(k.to_owned(), v.to_owned())];
    let all = VmQuery { page, ..VmQuery::default() };
    assert_eq!(names(all.clone()).await, "cba");
    let web = VmQuery { labels: label("tier", "web"), ..all.clone() };
    assert_eq!(names(web.clone()).await, "ca");
    assert_eq!(names(VmQuery { labels: label("all", "x=y"), ..all.clone() }).await, "cba");
    assert_eq!(names(VmQuery { states: vec!["stopped".into()], ..web }).await, "a");
    assert_eq!(names(VmQuery { name: Some("b".into()), ..all.clone() }).await, "b");
    assert_eq!(names(VmQuery { driver: Some("qemu".into()), ..all }).await, "");
    let tasks = |query: TaskQuery| async move { query };
    let query = tasks(TaskQuery {
        kind: Some("vm:create".into()),
        states: vec!["completed".into(), "failed".into()],
        vm: Some("b".into()),
        ..TaskQuery::default()
    })
    .await;
    let found = rig.client.tasks(&query).await.unwrap();
    assert_eq!(found.items.len(), 1);
}

#[tokio::test]
async fn a_task_that_has_not_begun_is_cancelled_at_once_and_its_waiter_hears() {
    let rig = Rig::with(Options { has_worker: false, ..Options::default() }).await;
    let created = rig.client.create_vm(&CreateVm::default(), &CallOptions::default()).await;
    let Waited::Accepted(accepted) = created.unwrap() else { panic!() };
    let client = rig.client.clone();
    let waiter =
        tokio::spawn(async move { client.task(accepted.task_id, Some(SOON)).await.unwrap() });
    let cancelled = rig.client.cancel_task(accepted.task_id, None).await.unwrap();
    assert_eq!(cancelled.status, TaskState::Cancelled);
    assert_eq!(soon(waiter).await.unwrap().status, TaskState::Cancelled);
    // Whether its entry is gone is not asked: the outbox may have been about to enqueue it once more,
    // and who claims such an entry is refused.
    let vm = rig.client.vm(&accepted.vm_id.to_string()).await.unwrap();
    assert_eq!(vm.state, VmState::Failed);
}

#[tokio::test]
async fn a_deletion_ends_what_had_not_begun_and_its_waiters_hear() {
    let rig = Rig::with(Options { has_worker: false, ..Options::default() }).await;
    let created = rig.client.create_vm(&CreateVm::default(), &CallOptions::default()).await;
    let vm = created.unwrap().vm_id().to_string();
    let client = rig.client.clone();
    let mut events = rig.bus.subscribe();
    let (id, name) = (vm.clone(), command("echo", &[]));
    let waiter = tokio::spawn(async move { client.execute(&id, &name, &waiting()).await.unwrap() });
    // Its event says that it is recorded and waited for.
    soon(events.next()).await;
    rig.client.delete_vm(&vm, &CallOptions::default()).await.unwrap();
    let ended = done(soon(waiter).await.unwrap());
    assert_eq!(ended.status, ExecutionState::Cancelled);
    assert_eq!(ended.error.unwrap().code, ErrorCode::VmStopped);
}

#[tokio::test]
#[ignore = "a measurement; run it alone"]
async fn measure_what_a_warm_execute_costs() {
    let rig = Rig::new().await;
    let vm = rig.vm("a").await.id.to_string();
    let echo = command("echo", &["x"]);
    let mut times = Vec::new();
    for n in 0..2200 {
        let begun = std::time::Instant::now();
        done(rig.client.execute(&vm, &echo, &waiting()).await.unwrap());
        if n >= 200 {
            times.push(begun.elapsed());
        }
    }
    times.sort();
    println!(
        "execute?wait= over HTTP, store, queue and a worker that does nothing: \
         median {:?}, 95% {:?}, 99% {:?}",
        times[1000], times[1900], times[1980]
    );
}
