//! VMs that are stopped with their memory kept.

use std::{fs, time::Duration};

use aether_drivers::{fault::FaultPoints, sim::SimConfig};
use aether_types::{ErrorCode, StartKind, TaskKind, TaskState, VmState};

use crate::rig::{Rig, command};

#[tokio::test]
async fn a_suspended_vm_goes_on_where_it_was() {
    let rig = Rig::new(SimConfig::default()).await;
    let vm = rig.create("sleeper").await;
    rig.execute(vm, command(&["sh", "-c", "echo kept > /root/file"])).await;
    for round in 0..2 {
        let stopped = rig.suspend(vm).await;
        assert!(stopped.memory.is_some());
        assert!(!rig.host.leftovers().iter().any(|holding| holding.contains("Process")));
        let task = rig.request(vm, TaskKind::VmStart).await;
        assert_eq!(rig.ended(task.id).await.state, TaskState::Completed, "round {round}");
        let running = rig.in_state(vm, VmState::Running).await;
        assert_eq!(running.start.unwrap().kind, StartKind::Restore);
        assert_eq!(running.memory, None);
        let execution = rig.execute(vm, command(&["cat", "/root/file"])).await;
        assert_eq!(rig.stdout(&execution).await, "kept\n");
        // The memory is used up.
        rig.no_files("snapshots").await;
    }
}

#[tokio::test]
async fn a_paused_vm_can_be_suspended_and_runs_when_it_starts() {
    let rig = Rig::new(SimConfig::default()).await;
    let vm = rig.create("deep").await;
    let pause = rig.request(vm, TaskKind::VmPause).await;
    rig.ended(pause.id).await;
    rig.suspend(vm).await;
    let task = rig.request(vm, TaskKind::VmStart).await;
    assert_eq!(rig.ended(task.id).await.state, TaskState::Completed);
    let execution = rig.execute(vm, command(&["echo", "awake"])).await;
    assert_eq!(rig.stdout(&execution).await, "awake\n");
}

#[tokio::test]
async fn commands_in_a_vm_that_is_suspended_end_with_the_reason() {
    let rig = Rig::new(SimConfig::default()).await;
    let vm = rig.create("interrupts").await;
    let execution = rig.request_execution(vm, command(&["sleep", "3600"])).await;
    rig.execution_begun(&execution).await;
    rig.suspend(vm).await;
    let execution = rig.execution_ended(&execution).await;
    assert_eq!(execution.error.unwrap().code, ErrorCode::VmStopped);
}

#[tokio::test]
async fn the_memory_goes_with_its_vm() {
    let rig = Rig::new(SimConfig::default()).await;
    let vm = rig.create("forgotten").await;
    rig.suspend(vm).await;
    assert!(!rig.files("snapshots").is_empty());
    let deletion = rig.request(vm, TaskKind::VmDelete).await;
    assert_eq!(rig.ended(deletion.id).await.state, TaskState::Completed);
    rig.no_files("snapshots").await;
    rig.assert_clean().await;
}

#[tokio::test]
async fn a_memory_that_cannot_be_restored_is_dropped_and_the_disk_boots() {
    let rig = Rig::new(SimConfig::default()).await;
    let vm = rig.create("amnesic").await;
    rig.execute(vm, command(&["sh", "-c", "echo kept > /root/file"])).await;
    rig.suspend(vm).await;
    for file in rig.files("snapshots") {
        fs::remove_file(file).unwrap();
    }
    let task = rig.request(vm, TaskKind::VmStart).await;
    let task = rig.ended(task.id).await;
    assert_eq!((task.state, task.attempts), (TaskState::Failed, 1));
    let failed = rig.in_state(vm, VmState::Failed).await;
    assert_eq!(failed.reason.unwrap().code, ErrorCode::SnapshotDamaged);
    assert_eq!(failed.memory, None);
    let task = rig.request(vm, TaskKind::VmStart).await;
    assert_eq!(rig.ended(task.id).await.state, TaskState::Completed);
    let running = rig.in_state(vm, VmState::Running).await;
    assert_eq!(running.start.unwrap().kind, StartKind::Boot);
    let execution = rig.execute(vm, command(&["cat", "/root/file"])).await;
    assert_eq!(rig.stdout(&execution).await, "kept\n");
}

#[tokio::test]
async fn a_suspension_that_fails_once_is_tried_again() {
    let fault = FaultPoints::recording();
    let rig = Rig::new(SimConfig { fault: fault.clone(), ..SimConfig::default() }).await;
    let vm = rig.create("stubborn").await;
    for point in [
        "sim snapshot",
        "sim snapshot: write",
        "sim snapshot: written",
        "sim pause",
        "sim kill",
        "sim killed",
    ] {
        fault.arm(point);
        rig.suspend(vm).await;
        assert!(!fault.disarm(), "{point} was not met");
        let task = rig.request(vm, TaskKind::VmStart).await;
        assert_eq!(rig.ended(task.id).await.state, TaskState::Completed, "{point}");
        assert_eq!(
            rig.in_state(vm, VmState::Running).await.start.unwrap().kind,
            StartKind::Restore
        );
    }
}

#[tokio::test]
async fn the_worker_may_end_between_the_suspension_and_the_start() {
    let mut rig = Rig::new(SimConfig::default()).await;
    let vm = rig.create("long").await;
    rig.execute(vm, command(&["sh", "-c", "echo kept > /root/file"])).await;
    rig.suspend(vm).await;
    rig.crash().await;
    rig.start().await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let task = rig.request(vm, TaskKind::VmStart).await;
    assert_eq!(rig.ended(task.id).await.state, TaskState::Completed);
    let execution = rig.execute(vm, command(&["cat", "/root/file"])).await;
    assert_eq!(rig.stdout(&execution).await, "kept\n");
}
