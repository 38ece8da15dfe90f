use std::time::Duration;

use aether_drivers::{
    MachineState,
    sim::{SimConfig, SimLatency},
};
use aether_store::VmPatch;
use aether_types::{ExecutionState, ExitStatus, TaskKind, TaskState, VmState, WorkerId};
use aether_worker::ShutdownMode;

use crate::rig::{Rig, command};

#[tokio::test]
async fn a_worker_that_starts_again_adopts_its_vms_and_the_commands_in_them() {
    let mut rig = Rig::new(SimConfig::default()).await;
    let vm = rig.create("adopted").await;
    let execution =
        rig.request_execution(vm, command(&["sh", "-c", "echo before; sleep 1; echo after"])).await;
    rig.execution_begun(&execution).await;
    rig.crash().await;
    rig.start().await;
    let execution = rig.execution_ended(&execution).await;
    assert_eq!(execution.state, ExecutionState::Completed, "{execution:?}");
    assert_eq!(execution.exit, Some(ExitStatus::Code(0)));
    assert!(rig.stdout(&execution).await.ends_with("after\n"));
    let task = rig.ended(execution.task_id).await;
    assert_eq!(task.attempts, 2);
    let next = rig.execute(vm, command(&["echo", "usable"])).await;
    assert_eq!(rig.stdout(&next).await, "usable\n");
}

#[tokio::test]
async fn a_creation_that_was_cut_short_is_finished() {
    let latency = SimLatency { boot: Duration::from_millis(200), ..Default::default() };
    let mut rig = Rig::new(SimConfig { latency, ..SimConfig::default() }).await;
    let task = rig.request_create("half").await;
    let mut events = rig.listen();
    while rig.host.leftovers().is_empty() {
        tokio::select! {
            _ = events.next() => {}
            () = tokio::time::sleep(Duration::from_millis(20)) => {}
        }
    }
    rig.crash().await;
    rig.start().await;
    assert_eq!(rig.ended(task.id).await.state, TaskState::Completed);
    let execution = rig.execute(task.vm_id.unwrap(), command(&["echo", "whole"])).await;
    assert_eq!(rig.stdout(&execution).await, "whole\n");
}

#[tokio::test]
async fn work_recorded_while_no_worker_lived_is_done() {
    let mut rig = Rig::new(SimConfig::default()).await;
    let vm = rig.create("later").await;
    rig.crash().await;
    let execution = rig.request_execution(vm, command(&["echo", "late"])).await;
    let deletion = rig.request_create("also-late").await;
    rig.start().await;
    let execution = rig.execution_ended(&execution).await;
    assert_eq!(rig.stdout(&execution).await, "late\n");
    assert_eq!(rig.ended(deletion.id).await.state, TaskState::Completed);
}

#[tokio::test]
async fn a_machine_that_died_while_no_worker_lived_is_found_dead() {
    let mut rig = Rig::new(SimConfig::default()).await;
    let vm = rig.create("gone").await;
    rig.crash().await;
    rig.host.panic_guest(vm.into());
    rig.start().await;
    let found = rig.in_state(vm, VmState::Failed).await;
    assert!(found.reason.is_some());
}

#[tokio::test]
async fn commands_left_by_a_clean_end_are_taken_up_again() {
    let mut rig = Rig::new(SimConfig::default()).await;
    let vm = rig.create("kept").await;
    let execution = rig.request_execution(vm, command(&["sh", "-c", "sleep 1; echo done"])).await;
    rig.execution_begun(&execution).await;
    rig.shut_down(ShutdownMode::KeepVms).await;
    rig.start().await;
    let execution = rig.execution_ended(&execution).await;
    assert_eq!(rig.stdout(&execution).await, "done\n");
}

/// The worker is dropped at many moments of a create, execute, delete cycle.
#[tokio::test]
async fn a_crash_at_any_moment_leaves_nothing_and_loses_nothing() {
    let latency = SimLatency {
        create: Duration::from_micros(300),
        boot: Duration::from_micros(700),
        connect: Duration::from_micros(100),
        delete: Duration::from_micros(300),
        ..Default::default()
    };
    let mut rig = Rig::new(SimConfig { latency, ..SimConfig::default() }).await;
    for cycle in 0_u32..60 {
        let creation = rig.request_create(&format!("cycle-{cycle}")).await;
        let vm = creation.vm_id.unwrap();
        let execution = rig.request_execution(vm, command(&["echo", "once"])).await;
        // Moments spread over what a cycle takes; the scheduler does the rest.
        tokio::time::sleep(Duration::from_micros(u64::from(cycle) * 211)).await;
        rig.crash().await;
        rig.start().await;
        assert!(rig.ended(creation.id).await.state.is_end());
        assert!(rig.execution_ended(&execution).await.state.is_end());
        let deletion = rig.request(vm, TaskKind::VmDelete).await;
        if cycle % 3 == 0 {
            rig.crash().await;
            rig.start().await;
        }
        assert_eq!(rig.ended(deletion.id).await.state, TaskState::Completed);
    }
    rig.assert_clean().await;
}

async fn has_running_machine(rig: &Rig) -> bool {
    let machines = rig.parts.drivers[0].list().await.unwrap();
    machines.iter().any(|machine| machine.state == MachineState::Running)
}

/// The worker is asked to end before it takes up what its predecessor had in hand.
#[tokio::test]
async fn a_clean_end_leaves_no_machine_of_a_task_that_was_not_taken_up() {
    // It runs, and is not configured yet.
    let latency = SimLatency { connect: Duration::from_millis(300), ..Default::default() };
    let mut rig = Rig::new(SimConfig { latency, ..SimConfig::default() }).await;
    let begun = rig.request_create("begun").await;
    while !has_running_machine(&rig).await {
        tokio::task::yield_now().await;
    }
    rig.crash().await;
    assert!(has_running_machine(&rig).await);
    // Nothing that it spawned has run when it is told to end: there is one thread.
    rig.start().await;
    rig.shut_down(ShutdownMode::StopVms).await;
    assert_eq!(rig.host.leftovers(), Vec::<String>::new());
    rig.start().await;
    assert_eq!(rig.ended(begun.id).await.state, TaskState::Completed);
    let delete = rig.request(begun.vm_id.unwrap(), TaskKind::VmDelete).await;
    assert_eq!(rig.ended(delete.id).await.state, TaskState::Completed);
    rig.assert_clean().await;
}

/// A store that two workers share: what one of them finds missing may be the other's.
#[tokio::test]
async fn a_worker_that_starts_leaves_alone_what_another_has() {
    let latency = SimLatency { boot: Duration::from_millis(300), ..Default::default() };
    let config = || SimConfig { latency: latency.clone(), ..SimConfig::default() };
    let mut one = Rig::new(config()).await;
    let run = one.create("run").await;
    let stopped = one.create("stopped").await;
    let stop = one.request(stopped, TaskKind::VmStop).await;
    assert_eq!(one.ended(stop.id).await.state, TaskState::Completed);
    // It has no worker yet, and this one is making it.
    let begun = one.request_create("begun").await;
    one.begun(begun.id).await;
    let mut two = one.another(config()).await;
    for _ in 0..3 {
        two.crash().await;
        two.start().await;
    }
    assert_eq!(one.ended(begun.id).await.state, TaskState::Completed);
    let vm = one.store().vm(begun.vm_id.unwrap()).await.unwrap().unwrap();
    assert_eq!(vm.worker_id, Some(one.parts.id));
    for id in [run, vm.id] {
        one.in_state(id, VmState::Running).await;
        let execution = one.execute(id, command(&["echo", "whole"])).await;
        assert_eq!(one.stdout(&execution).await, "whole\n");
    }
    // The one that has them finds its own again.
    one.crash().await;
    one.start().await;
    one.in_state(run, VmState::Running).await;
    two.crash().await;
}

/// A worker that was taken for dead comes back with the machine of a VM that another made.
#[tokio::test]
async fn a_machine_whose_vm_another_worker_has_is_removed() {
    let mut one = Rig::new(SimConfig::default()).await;
    let vm = one.create("taken").await;
    one.crash().await;
    let other = WorkerId::new();
    let patch = VmPatch { worker_id: Some(other), ..VmPatch::default() };
    one.store().patch_vm(vm, patch).await.unwrap();
    one.start().await;
    assert_eq!(one.host.leftovers(), Vec::<String>::new());
    let vm = one.store().vm(vm).await.unwrap().unwrap();
    assert_eq!((vm.state, vm.worker_id), (VmState::Running, Some(other)));
}
