use aether_drivers::{
    fault::FaultPoints,
    sim::{SimConfig, SimLatency},
};
use aether_types::{ErrorCode, TaskKind, TaskState, VmState};
use aether_worker::ShutdownMode;

use crate::rig::{Rig, command};

#[tokio::test]
async fn a_vm_goes_through_its_whole_life() {
    let rig = Rig::new(SimConfig::default()).await;
    let vm = rig.create("life").await;
    let running = rig.in_state(vm, VmState::Running).await;
    assert_eq!(running.worker_id, Some(rig.parts.id));
    assert!(running.address.is_some());
    for (kind, state) in [
        (TaskKind::VmPause, VmState::Paused),
        (TaskKind::VmResume, VmState::Running),
        (TaskKind::VmStop, VmState::Stopped),
        (TaskKind::VmStart, VmState::Running),
        (TaskKind::VmDelete, VmState::Deleted),
    ] {
        let task = rig.request(vm, kind).await;
        assert_eq!(rig.ended(task.id).await.state, TaskState::Completed, "{kind}");
        rig.in_state(vm, state).await;
    }
    let history = rig.store().vm_history(vm).await.unwrap();
    let states: Vec<_> = history.iter().map(|change| change.state.as_str()).collect();
    assert_eq!(
        states,
        [
            "creating", "running", "paused", "running", "stopping", "stopped", "starting",
            "running", "deleting", "deleted"
        ]
    );
    rig.assert_clean().await;
}

#[tokio::test]
async fn files_survive_a_stop_and_a_start() {
    let rig = Rig::new(SimConfig::default()).await;
    let vm = rig.create("keeps").await;
    rig.execute(vm, command(&["sh", "-c", "echo kept > /root/file"])).await;
    for kind in [TaskKind::VmStop, TaskKind::VmStart] {
        let task = rig.request(vm, kind).await;
        rig.ended(task.id).await;
    }
    let execution = rig.execute(vm, command(&["cat", "/root/file"])).await;
    assert_eq!(rig.stdout(&execution).await, "kept\n");
}

#[tokio::test]
async fn every_step_of_a_creation_may_fail_once_and_leaves_nothing() {
    let fault = FaultPoints::recording();
    let rig = Rig::new(SimConfig { fault: fault.clone(), ..SimConfig::default() }).await;
    rig.create("first").await;
    let points = fault.seen();
    assert!(points.len() >= 4, "{points:?}");
    for point in points {
        fault.arm(point);
        let task = rig.request_create(&format!("vm-{}", point.replace(['.', '_'], "-"))).await;
        // The fault is gone at the second attempt.
        let task = rig.ended(task.id).await;
        assert_eq!(task.state, TaskState::Completed, "{point}: {task:?}");
        let deletion = rig.request(task.vm_id.unwrap(), TaskKind::VmDelete).await;
        rig.ended(deletion.id).await;
        let own = task.vm_id.unwrap().to_string();
        let left = rig.host.leftovers();
        assert!(!left.iter().any(|holding| holding.contains(&own)), "{point}: {left:?}");
    }
}

#[tokio::test]
async fn a_creation_that_never_succeeds_fails_with_its_reason_and_leaves_nothing() {
    let fault = FaultPoints::recording();
    let rig = Rig::new(SimConfig { fault: fault.clone(), ..SimConfig::default() }).await;
    let probe = rig.create("probe").await;
    let point = *fault.seen().last().unwrap();
    let deletion = rig.request(probe, TaskKind::VmDelete).await;
    rig.ended(deletion.id).await;
    let task = rig.request_create("never").await;
    let mut events = rig.listen();
    fault.arm(point);
    // Armed again each time it was used up, until the attempts are.
    let task = loop {
        let now = rig.store().task(task.id).await.unwrap().unwrap();
        if now.state.is_end() {
            break now;
        }
        fault.arm(point);
        events.next().await;
    };
    if task.state == TaskState::Failed {
        let vm = rig.in_state(task.vm_id.unwrap(), VmState::Failed).await;
        assert_eq!(vm.reason.unwrap().code, ErrorCode::VmStartFailed);
        assert_eq!(rig.host.leftovers(), Vec::<String>::new());
    }
}

#[tokio::test]
async fn a_vm_that_is_being_created_can_be_deleted() {
    let latency = SimLatency { boot: std::time::Duration::from_hours(1), ..Default::default() };
    let rig = Rig::new(SimConfig { latency, ..SimConfig::default() }).await;
    let creation = rig.request_create("early").await;
    let deletion = rig.request(creation.vm_id.unwrap(), TaskKind::VmDelete).await;
    assert_eq!(rig.ended(deletion.id).await.state, TaskState::Completed);
    assert_eq!(rig.ended(creation.id).await.state, TaskState::Cancelled);
    rig.in_state(creation.vm_id.unwrap(), VmState::Deleted).await;
    rig.assert_clean().await;
}

#[tokio::test]
async fn the_end_of_a_machine_is_noticed_and_named() {
    let rig = Rig::new(SimConfig::default()).await;
    type End = fn(&aether_drivers::sim::SimHost, aether_types::VmId);
    let ends: [(&str, End, VmState, ErrorCode); 3] = [
        ("panics", |h, id| h.panic_guest(id.into()), VmState::Failed, ErrorCode::GuestPanic),
        ("dies", |h, id| h.kill_vmm(id.into()), VmState::Failed, ErrorCode::VmmExited),
        (
            "leaves",
            |h, id| h.power_off_guest(id.into()),
            VmState::Stopped,
            ErrorCode::GuestShutdown,
        ),
    ];
    for (name, end, state, code) in ends {
        let vm = rig.create(name).await;
        end(&rig.host, vm);
        let ended = rig.in_state(vm, state).await;
        assert_eq!(ended.reason.unwrap().code, code);
        // It starts again on its disk.
        let task = rig.request(vm, TaskKind::VmStart).await;
        assert_eq!(rig.ended(task.id).await.state, TaskState::Completed, "{name}");
    }
}

#[tokio::test]
async fn a_clean_end_stops_vms_and_the_next_start_can_start_them() {
    let mut rig = Rig::new(SimConfig::default()).await;
    let vm = rig.create("stays").await;
    rig.shut_down(ShutdownMode::StopVms).await;
    let stopped = rig.store().vm(vm).await.unwrap().unwrap();
    assert_eq!(stopped.state, VmState::Stopped);
    assert!(!rig.host.leftovers().iter().any(|holding| holding.contains("Process")));
    rig.start().await;
    let task = rig.request(vm, TaskKind::VmStart).await;
    assert_eq!(rig.ended(task.id).await.state, TaskState::Completed);
}

#[tokio::test]
async fn a_vm_that_is_being_started_can_be_deleted() {
    let fault = FaultPoints::none();
    let latency = SimLatency { boot: std::time::Duration::from_millis(300), ..Default::default() };
    let rig = Rig::new(SimConfig { fault, latency, ..SimConfig::default() }).await;
    let vm = rig.create("slow").await;
    let stop = rig.request(vm, TaskKind::VmStop).await;
    rig.ended(stop.id).await;
    let start = rig.request(vm, TaskKind::VmStart).await;
    let deletion = rig.request(vm, TaskKind::VmDelete).await;
    assert_eq!(rig.ended(deletion.id).await.state, TaskState::Completed);
    assert_eq!(rig.ended(start.id).await.state, TaskState::Cancelled);
    rig.assert_clean().await;
}
