//! How long each method takes. Ignored: figures are read by people, and compared within one run.
//! `cargo test --release -p aether-store --test timing -- --ignored --nocapture`

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(clippy::print_stdout, reason = "figures for people")]

#[path = "contract/support.rs"]
#[expect(dead_code, reason = "shared with the contract suite, which uses all of it")]
mod support;

use std::time::{Duration, Instant};

use aether_store::{Capacity, Durability, NewExecution, PageRequest, SqliteStore, Store};
use aether_types::{ExecutionId, ExecutionSpec, TaskKind, WorkerId};

const ROUNDS: usize = 2000;

/// As a server is configured: both bounds are checked, and neither is met.
const CAPACITY: Capacity = Capacity { vms_max: Some(10_000), starting_max: Some(1_000) };

#[derive(Default)]
struct Watch {
    names: Vec<&'static str>,
    times: Vec<Vec<Duration>>,
}

impl Watch {
    async fn time<T>(&mut self, name: &'static str, work: impl Future<Output = T>) -> T {
        let begun = Instant::now();
        let value = work.await;
        let taken = begun.elapsed();
        if let Some(at) = self.names.iter().position(|n| *n == name) {
            self.times[at].push(taken);
        } else {
            self.names.push(name);
            self.times.push(vec![taken]);
        }
        value
    }

    fn print(&mut self) {
        for (name, times) in self.names.iter().zip(&mut self.times) {
            times.sort();
            let at = |part: usize| times[times.len() * part / 100].as_micros();
            println!("{name:24} {:6} us median {:6} us p99", at(50), at(99));
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "measures"]
async fn methods() {
    for durability in [Durability::Process, Durability::Power] {
        let folder = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(&folder.path().join("store.db"), durability).await.unwrap();
        let vm = support::running(&store, "vm").await;
        let worker = WorkerId::new();
        let mut watch = Watch::default();
        for round in 0..ROUNDS {
            let begun = Instant::now();
            let execution = NewExecution {
                id: ExecutionId::new(),
                spec: ExecutionSpec { command: "true".into(), ..Default::default() },
            };
            let new = support::new_task(TaskKind::VmExecute);
            let request = store.request_execution(vm, execution, new, None);
            let (accepted, execution) = watch.time("request_execution", request).await.unwrap();
            let task = accepted.task.id;
            watch.time("begin_attempt", store.begin_attempt(task, worker.into(), 1)).await.unwrap();
            let started = store.execution_started(task, 1, execution.id, "boot");
            watch.time("execution_started", started).await.unwrap();
            let end = store.end_attempt(task, 1, support::exited(0));
            watch.time("end_attempt", end).await.unwrap();
            let taken = begun.elapsed();
            watch.time("confirm_dispatched", store.confirm_dispatched(&[task])).await.unwrap();
            watch.time("vm", store.vm(vm)).await.unwrap();
            watch.time("task", store.task(task)).await.unwrap();
            watch.time("undispatched", store.undispatched(100)).await.unwrap();
            watch.time("open_tasks", store.open_tasks()).await.unwrap();
            watch.time("executions", store.executions(vm, PageRequest::default())).await.unwrap();
            watch.time("ping", store.ping()).await.unwrap();
            if round % 20 == 0 {
                let name = format!("vm-{round}");
                let new = support::new_task(TaskKind::VmCreate);
                let create = store.create_vm(support::new_vm(&name), new, CAPACITY, None);
                let made = watch.time("create_vm", create).await.unwrap();
                let new = support::new_task(TaskKind::VmDelete);
                let delete = store.request_on_vm(made.vm.id, new, None);
                watch.time("request_on_vm (delete)", delete).await.unwrap();
            }
            if let Some(at) = watch.names.iter().position(|n| *n == "the four of an execute") {
                watch.times[at].push(taken);
            } else {
                watch.names.push("the four of an execute");
                watch.times.push(vec![taken]);
            }
        }
        println!("{durability:?}");
        watch.print();
    }
}
