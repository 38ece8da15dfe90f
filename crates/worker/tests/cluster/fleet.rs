//! Several workers: who gets what, and a worker that was declared lost while it lived.

use std::{sync::Arc, time::Duration};

use aether_drivers::sim::SimConfig;
use aether_queue::SqliteQueue;
use aether_store::{NewWorker, Registration};
use aether_types::{ErrorCode, ExecutionState, TaskKind, TaskState, VmState, WorkerState};
use aether_worker::{FleetConfig, ShutdownMode, WorkerConfig};
use tempfile::TempDir;
use tokio::time::timeout;

use crate::rig::{Rig, command};

const LIMIT: Duration = Duration::from_secs(25);

/// A worker that finds out soon that it was declared lost.
async fn attentive(change: impl FnOnce(&mut FleetConfig)) -> Rig {
    let dir = TempDir::new().unwrap();
    let queue = SqliteQueue::open(&dir.path().join("queue.db")).await.unwrap();
    let set_up = |config: &mut WorkerConfig| {
        config.fleet.heartbeat = Duration::from_millis(100);
        change(&mut config.fleet);
    };
    Rig::on(Arc::new(queue), dir, SimConfig::default(), set_up).await
}

/// As a gateway does that heard nothing of the worker for its lease: it is silent for no time at
/// all, since the lease that the registry has of it is over at once.
async fn declare_lost(rig: &Rig) {
    let (worker, _) = rig.store().worker(rig.parts.id).await.unwrap().unwrap();
    let silent = NewWorker {
        id: worker.id,
        host: worker.host,
        zone: worker.zone,
        labels: worker.labels,
        drivers: worker.drivers,
        capacity: worker.capacity,
        template_folder: None,
        stream_address: None,
        version: worker.version,
        lease: Duration::ZERO,
    };
    let silent = rig.store().register_worker(silent).await.unwrap();
    let seen = Registration::from(&silent);
    let lost = rig.store().lose_worker(seen, silent.heartbeat_at).await.unwrap();
    assert_eq!(lost.unwrap().state(), WorkerState::Lost);
}

#[tokio::test]
async fn a_worker_that_was_declared_lost_lets_go_and_comes_back() {
    let mut rig = attentive(|_| {}).await;
    let (taken, kept) = (rig.create("taken").await, rig.create("kept").await);
    let run = rig.request_execution(taken, command(&["sleep", "infinity"])).await;
    rig.execution_begun(&run).await;
    declare_lost(&rig).await;
    // Whoever settles gets to one of the two before the worker is back.
    let orphan = rig.store().settle_orphan(taken).await.unwrap();
    let settled = orphan.map(|orphan| (orphan.vm.state, orphan.ended.len()));
    assert_eq!(settled, Some((VmState::Failed, 1)));
    // Its machine is ended, which nobody but the worker does.
    let machine = rig.parts.drivers[0].exited(taken.into());
    timeout(LIMIT, machine).await.unwrap().unwrap();
    // It claims again.
    let made = rig.create("made").await;
    let (worker, load) = rig.store().worker(rig.parts.id).await.unwrap().unwrap();
    assert_eq!((worker.state(), worker.epoch, load.vms), (WorkerState::Active, 3, 2));
    let execution = rig.store().execution(run.id).await.unwrap().unwrap();
    assert_eq!(execution.state, ExecutionState::Failed);
    assert_eq!(execution.error.unwrap().code, ErrorCode::ExecutionLost);
    for vm in [kept, made] {
        let here = rig.execute(vm, command(&["echo", "here"])).await;
        assert_eq!(rig.stdout(&here).await, "here\n");
    }
    // The disk of the one that failed is there.
    let start = rig.request(taken, TaskKind::VmStart).await;
    assert_eq!(rig.ended(start.id).await.state, TaskState::Completed);
    for vm in [taken, kept, made] {
        let deletion = rig.request(vm, TaskKind::VmDelete).await;
        assert_eq!(rig.ended(deletion.id).await.state, TaskState::Completed);
    }
    rig.shut_down(ShutdownMode::StopVms).await;
    rig.assert_clean().await;
}

#[tokio::test]
async fn vms_that_wait_for_room_are_made_when_there_is() {
    let mut rig = attentive(|fleet| fleet.vms_max = Some(1)).await;
    let first = rig.create("first").await;
    let waits = rig.request_create("waits").await;
    assert_eq!(rig.store().waiting_vms().await.unwrap(), 1);
    let stop = rig.request(first, TaskKind::VmStop).await;
    assert_eq!(rig.ended(stop.id).await.state, TaskState::Completed);
    assert_eq!(rig.ended(waits.id).await.state, TaskState::Completed);
    let (_, load) = rig.store().worker(rig.parts.id).await.unwrap().unwrap();
    assert_eq!(load.vms, 1);
    rig.shut_down(ShutdownMode::StopVms).await;
    let (worker, _) = rig.store().worker(rig.parts.id).await.unwrap().unwrap();
    assert_eq!(worker.state(), WorkerState::Left);
}

#[tokio::test]
async fn a_worker_that_drains_serves_its_vms_and_gets_no_others() {
    let one = attentive(|_| {}).await;
    let vm = one.create("here").await;
    one.store().drain_worker(one.parts.id).await.unwrap();
    let two = one.another(SimConfig::default()).await;
    for n in 0..4 {
        let made = one.create(&format!("elsewhere-{n}")).await;
        let made = one.store().vm(made).await.unwrap().unwrap();
        assert_eq!(made.worker_id, Some(two.parts.id));
    }
    for kind in [TaskKind::VmStop, TaskKind::VmStart] {
        let task = one.request(vm, kind).await;
        assert_eq!(one.ended(task.id).await.state, TaskState::Completed);
    }
    let run = one.execute(vm, command(&["echo", "here"])).await;
    assert_eq!(one.stdout(&run).await, "here\n");
    one.store().activate_worker(one.parts.id).await.unwrap();
    let back = one.create("back").await;
    let back = one.store().vm(back).await.unwrap().unwrap();
    assert_eq!(back.worker_id, Some(one.parts.id));
}
