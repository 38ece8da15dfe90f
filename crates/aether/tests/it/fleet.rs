//! Several platforms on one database: one fleet.

use std::{
    io::{BufRead as _, BufReader},
    process::{Child, Stdio},
    time::Duration,
};

use aether_api::{
    ExecuteRequest, TaskView,
    client::{CallOptions, Client, Waited},
};
use aether_types::{ErrorCode, TaskId, TaskState};
use rustix::process::Signal;

use crate::{postgres::Server, rig::Rig};

/// As long as a server lets a request wait.
const LONG: Duration = Duration::from_mins(2);

/// A platform whose worker is known soon to be lost; its host and zone have this name.
fn member(server: &Server, name: &str, more: &[(&str, &str)]) -> Rig {
    let options = ["--no-default-template", "--pool", "none", "--migrate"];
    let mut env = vec![
        ("DATABASE_URL", server.url.as_str()),
        ("AETHER_WORKER_HOST", name),
        ("AETHER_WORKER_ZONE", name),
        ("AETHER_WORKER_HEARTBEAT", "1s"),
        ("AETHER_WORKER_LEASE", "3s"),
    ];
    env.extend(more);
    Rig::with_env(&options, &env, "Aetherium is ready")
}

fn json(rig: &Rig, args: &[&str]) -> serde_json::Value {
    let all: Vec<&str> = std::iter::once("--json").chain(args.iter().copied()).collect();
    serde_json::from_str(&rig.ok(&all)).unwrap()
}

fn count(server: &Server, what: &str) -> u64 {
    server.test.execute(&format!("select count(*) from {what}")).trim().parse().unwrap()
}

/// The host that a VM is on.
fn host_of(server: &Server, vm: &str) -> String {
    let sql = "select host from vms join workers on workers.id = worker_id where name = ";
    server.test.execute(&format!("{sql}'{vm}'")).trim().to_owned()
}

/// Asks the server of this platform.
fn ask<T>(rig: &Rig, question: impl AsyncFnOnce(Client) -> T) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let address = std::fs::read_to_string(rig.data().join("listen")).unwrap();
    let key = std::fs::read_to_string(rig.data().join("admin-key")).unwrap();
    let url = format!("http://{}", address.trim());
    runtime.block_on(async { question(Client::new(&url, Some(key.trim())).unwrap()).await })
}

/// The task at its end.
fn ended(rig: &Rig, task: &str) -> TaskView {
    let id: TaskId = task.parse().unwrap();
    let task = ask(rig, async |client| client.task(id, Some(LONG)).await.unwrap());
    assert!(task.status.is_end(), "{task:?}");
    task
}

/// What a command says, asked of a server whose worker need not have the VM.
fn says(rig: &Rig, vm: &str, word: &str) -> String {
    let args = vec![word.to_owned()];
    let request = ExecuteRequest { command: "echo".into(), args, ..ExecuteRequest::default() };
    let waiting = CallOptions::waiting(LONG);
    let answer = ask(rig, async |client| client.execute(vm, &request, &waiting).await.unwrap());
    let Waited::Done(execution) = answer else { panic!("not done: {answer:?}") };
    execution.stdout.unwrap()
}

/// A command that runs until its VM ends, once it runs.
fn runs_for_ever(rig: &Rig, vm: &str) -> Child {
    let script = "echo begun; sleep infinity";
    let mut child = rig
        .command(&["exec", "-n", vm, "--", "sh", "-c", script])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "begun\n");
    child
}

#[test]
fn a_killed_worker_is_lost_and_its_work_ends_once() {
    let Some(server) = Server::start() else { return };
    let one = member(&server, "one", &[]);
    let mut two = member(&server, "two", &[]);
    let workers = json(&one, &["worker", "list"]);
    let hosts: Vec<_> = workers["items"].as_array().unwrap().iter().map(|w| &w["host"]).collect();
    assert_eq!(hosts, ["one", "two"]);
    one.ok(&["vm", "create", "--name", "stays", "--zone", "one"]);
    // Asked of the one, made by the other.
    one.ok(&["vm", "create", "--name", "goes", "--zone", "two"]);
    assert_eq!(says(&one, "goes", "far"), "far\n");
    two.ok(&["vm", "create", "--name", "deleted", "--zone", "two"]);
    two.ok(&["vm", "create", "--name", "stopped", "--zone", "two"]);
    two.ok(&["vm", "stop", "stopped"]);
    let mut client = runs_for_ever(&two, "goes");
    let sql = "select id from tasks where state = 'running'";
    let command = server.test.execute(sql).trim().to_owned();
    two.end(Signal::KILL);
    client.wait().unwrap();
    // Recorded while nobody knows: one waits for the worker, the other for any.
    let accepted = json(&one, &["vm", "create", "--name", "new", "--zone", "two", "--no-wait"]);

    let lost = ended(&one, &command);
    assert_eq!(lost.status, TaskState::Failed);
    assert_eq!(lost.error.unwrap().code, ErrorCode::WorkerLost);
    assert_eq!(lost.attempts, 1, "a command is handed over once");
    let worker = json(&one, &["worker", "get", "two"]);
    assert_eq!((worker["state"].as_str(), worker["epoch"].as_i64()), (Some("lost"), Some(1)));
    let vm = json(&one, &["vm", "get", "goes"]);
    assert_eq!(vm["state"], "failed");
    assert_eq!(vm["reason"]["code"], "worker_lost");
    let executions = "executions where state not in ('completed', 'failed')";
    assert_eq!(count(&server, executions), 0);
    let (status, said) = one.fails(&["vm", "start", "stopped"]);
    assert!(status == 4 && said.contains("[vm_state_conflict]"), "{status} {said}");
    assert_eq!(one.ok(&["exec", "-n", "stays", "--", "echo", "here"]), "here\n");
    one.ok(&["vm", "delete", "deleted"]);
    let stats = json(&one, &["worker", "list", "--state", "lost"]);
    assert_eq!(stats["items"].as_array().unwrap().len(), 1);

    // It is back, with its old id, and gets what waited for its zone.
    two.restart();
    let task = accepted["task_id"].as_str().unwrap();
    assert_eq!(ended(&one, task).status, TaskState::Completed);
    assert_eq!(host_of(&server, "new"), "two");
    let worker = json(&one, &["worker", "get", "two"]);
    assert_eq!((worker["state"].as_str(), worker["epoch"].as_i64()), (Some("active"), Some(2)));
    for vm in ["goes", "stays", "new", "stopped"] {
        one.ok(&["vm", "delete", vm]);
    }
    assert_eq!(count(&server, "vms where state <> 'deleted'"), 0);
    assert_eq!(count(&server, "tasks where state in ('pending', 'running')"), 0);
    for mut rig in [one, two] {
        assert!(rig.end(Signal::TERM).0.success());
    }
    assert_eq!(count(&server, "queue_entries"), 0);
    assert_eq!(count(&server, "workers where presence = 'left'"), 2);
}

#[test]
fn a_worker_is_drained_under_load() {
    let Some(server) = Server::start() else { return };
    let one = member(&server, "one", &[]);
    let two = member(&server, "two", &[]);
    let load = std::thread::scope(|scope| {
        let creators: Vec<_> = [&one, &two]
            .into_iter()
            .enumerate()
            .map(|(n, rig)| {
                scope.spawn(move || {
                    let name = |i| format!("load-{n}-{i}");
                    (0..8).for_each(|i| drop(rig.ok(&["vm", "create", "--name", &name(i)])));
                })
            })
            .collect();
        let drained = json(&two, &["worker", "drain", "one"]);
        assert_eq!(drained["state"], "draining");
        // From here on it gets none.
        let there = count(&server, "vms join workers on workers.id = worker_id where host = 'one'");
        for creator in creators {
            creator.join().unwrap();
        }
        there
    });
    let now = count(&server, "vms join workers on workers.id = worker_id where host = 'one'");
    assert!(now <= load, "{now} VMs, and there were {load} when it was drained");
    assert_eq!(count(&server, "vms where state = 'running'"), 16);
    one.ok(&["vm", "create", "--name", "after"]);
    assert_eq!(host_of(&server, "after"), "two");
    let shares = json(&one, &["worker", "vms", "two"]);
    assert_eq!(shares["items"].as_array().unwrap().len() as u64, 17 - now);
    let active = json(&one, &["worker", "activate", "one"]);
    assert_eq!(active["state"], "active");
    one.ok(&["vm", "create", "--name", "again"]);
    assert_eq!(host_of(&server, "again"), "one", "it has promised the least");
    assert_eq!(one.fails(&["worker", "drain", "three"]).0, 3);
}

#[test]
fn what_no_worker_has_room_for_waits() {
    let Some(server) = Server::start() else { return };
    let one = member(&server, "one", &[("AETHER_WORKER_VMS", "1")]);
    one.ok(&["vm", "create", "--name", "first"]);
    let waits = json(&one, &["vm", "create", "--name", "waits", "--no-wait"]);
    let task = waits["task_id"].as_str().unwrap();
    let shown = json(&one, &["task", "get", task]);
    assert_eq!(shown["progress"]["now"], "waits for a worker; of 1: 1 has no room");
    one.ok(&["vm", "delete", "first"]);
    assert_eq!(ended(&one, task).status, TaskState::Completed);
}
