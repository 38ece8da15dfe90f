//! A process is killed with SIGKILL again and again while it writes: what it was told is done is
//! there when the next one opens the store.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "contract/support.rs"]
#[expect(dead_code, reason = "shared with the contract suite, which uses all of it")]
mod support;

use std::{
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Command, Stdio},
};

use aether_store::{Durability, SqliteStore, Store};
use aether_types::{Origin, SnapshotState, TaskId, TaskState, VmEvent, VmId, VmState};

const FILE: &str = "AETHER_TEST_STORE_FILE";
const ROUNDS: usize = 12;

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// The process that is killed: this program again, with this test alone.
#[test]
#[ignore = "is started by the test below"]
fn writer() {
    let Some(path) = std::env::var_os(FILE) else { return };
    runtime().block_on(async {
        let store = SqliteStore::open(Path::new(&path), Durability::Process).await.unwrap();
        // Past the test harness, which would keep what is printed.
        let say = |line: String| {
            let mut out = std::io::stdout();
            writeln!(out, "\nsaid {line}").unwrap();
            out.flush().unwrap();
        };
        loop {
            let made = support::create(&store, &format!("vm-{}", VmId::new())).await;
            say(format!("made {} {}", made.vm.id, made.task.id));
            support::carry_out(&store, &made.task, Some(VmEvent::Started)).await;
            say(format!("runs {} {}", made.vm.id, made.task.id));
            let (task, _) = support::execute(&store, made.vm.id).await;
            say(format!("asked {} {}", made.vm.id, task.id));
            support::begin(&store, task.id, 1).await;
            store.end_attempt(task.id, 1, support::exited(0)).await.unwrap();
            say(format!("ran {} {}", made.vm.id, task.id));
            let names = [(); 2].map(|()| format!("clone-{}", VmId::new()));
            let forked = support::fork(&store, made.vm.id, &names).await;
            for (clone, task) in &forked.clones {
                say(format!("forked {} {}", clone.id, task.id));
            }
            let (asked, _) = support::suspend(&store, made.vm.id).await;
            support::begin(&store, asked.task.id, 1).await;
            let end = support::made(Some(VmEvent::Stopped));
            store.end_attempt(asked.task.id, 1, end).await.unwrap();
            say(format!("sleeps {} {}", made.vm.id, asked.task.id));
        }
    });
}

#[test]
fn acknowledged_writes_survive_sigkill() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.db");
    let mut said = Vec::new();
    for round in 0..ROUNDS {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "writer", "--ignored", "--nocapture"])
            .env(FILE, &path)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut heard = 0;
        for line in lines.map(Result::unwrap) {
            let Some(fact) = line.strip_prefix("said ") else { continue };
            said.push(fact.to_owned());
            heard += 1;
            if heard == 3 + round * 7 {
                // SIGKILL; what it has said until it is dead is read to the end.
                child.kill().unwrap();
            }
        }
        child.wait().unwrap();
        assert!(heard >= 3 + round * 7, "the writer ended by itself");
        runtime().block_on(check(&path, &said));
    }
}

async fn check(path: &Path, said: &[String]) {
    let store = SqliteStore::open(path, Durability::Process).await.unwrap();
    for fact in said {
        let words: Vec<_> = fact.split(' ').collect();
        let [what, vm, task] = words.as_slice() else {
            // The last line may have been cut by the kill.
            continue;
        };
        let (Ok(vm), Ok(task)) = (vm.parse::<VmId>(), task.parse::<TaskId>()) else { continue };
        let vm = store.vm(vm).await.unwrap().unwrap();
        let task = store.task(task).await.unwrap().unwrap();
        match *what {
            "made" | "asked" => assert_eq!(task.vm_id, Some(vm.id)),
            "runs" => {
                let later = [VmState::Stopping, VmState::Stopped];
                assert!(vm.state == VmState::Running || later.contains(&vm.state), "{vm:?}");
                assert_eq!(task.state, TaskState::Completed);
            }
            "forked" => {
                let Origin::Snapshot(id) = vm.spec.origin else { panic!("{vm:?}") };
                let snapshot = store.snapshot(id).await.unwrap().unwrap();
                let source = store.vm(snapshot.vm_id).await.unwrap().unwrap();
                assert!(source.name.starts_with("vm-"));
            }
            "sleeps" => {
                assert_eq!(vm.state, VmState::Stopped);
                let memory = store.snapshot(vm.memory.unwrap()).await.unwrap().unwrap();
                assert_eq!(memory.state, SnapshotState::Ready);
                assert_eq!(task.snapshot_id, vm.memory);
            }
            "ran" => {
                assert_eq!(task.state, TaskState::Completed);
                let execution = store.execution(task.execution_id.unwrap()).await.unwrap();
                assert!(execution.unwrap().exit.is_some());
            }
            other => panic!("{other}"),
        }
    }
    store.ping().await.unwrap();
}
