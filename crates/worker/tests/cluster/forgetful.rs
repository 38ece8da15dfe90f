//! A queue that forgets: Redis without a file, killed and started again.

use std::sync::Arc;

use aether_drivers::sim::SimConfig;
use aether_queue::RedisQueue;
use aether_redis::{testing, testing::Server};
use aether_types::{ExecutionState, TaskState};
use tempfile::TempDir;

use crate::rig::{Rig, command};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_queue_forgot_is_done_and_what_runs_is_not_begun_again() {
    if !testing::available() {
        return;
    }
    let mut server = Server::forgetful();
    let queue = RedisQueue::open(server.config(), "test").await.unwrap();
    // One task at a time, so that the others wait in the queue.
    let one_at_a_time = |config: &mut aether_worker::WorkerConfig| config.tasks_at_once = 1;
    let dir = TempDir::new().unwrap();
    let rig = Rig::on(Arc::new(queue), dir, SimConfig::default(), one_at_a_time).await;
    let vm = rig.create("source").await;
    for round in 0..3 {
        let runs = rig.request_execution(vm, command(&["sh", "-c", "sleep 1; echo ran"])).await;
        rig.execution_begun(&runs).await;
        let waits = rig.request_execution(vm, command(&["echo", "waited"])).await;
        let creation = rig.request_create(&format!("other-{round}")).await;
        server.stop();
        server.start_again();
        let waited = rig.execution_ended(&waits).await;
        assert_eq!(rig.stdout(&waited).await, "waited\n");
        assert_eq!(rig.ended(creation.id).await.state, TaskState::Completed);
        let ran = rig.execution_ended(&runs).await;
        assert_eq!(
            (ran.state, rig.stdout(&ran).await),
            (ExecutionState::Completed, "ran\n".into())
        );
        for execution in [&runs, &waits] {
            assert_eq!(rig.ended(execution.task_id).await.attempts, 1);
        }
    }
}
