//! The worker ends at any moment of a snapshot, a restore, a fork, a suspension, a build.

use std::time::Duration;

use aether_drivers::sim::{SimConfig, SimLatency};
use aether_types::{
    Origin, SnapshotState, TaskKind, TaskState, TemplateSpec, TemplateState, TemplateStep, VmState,
};

use crate::rig::{Rig, command, template_spec};

fn slow() -> SimConfig {
    let latency = SimLatency {
        create: Duration::from_micros(500),
        boot: Duration::from_millis(1),
        restore: Duration::from_millis(1),
        snapshot: Duration::from_millis(2),
        pause: Duration::from_micros(300),
        claim: Duration::from_micros(300),
        connect: Duration::from_micros(200),
        delete: Duration::from_micros(500),
    };
    SimConfig { latency, ..SimConfig::default() }
}

async fn crash_after(rig: &mut Rig, moment: u32) {
    // Moments spread over what the work takes; the scheduler does the rest.
    tokio::time::sleep(Duration::from_micros(u64::from(moment) * 397)).await;
    rig.crash().await;
    rig.start().await;
}

async fn delete(rig: &Rig, vm: aether_types::VmId) {
    let deletion = rig.request(vm, TaskKind::VmDelete).await;
    assert_eq!(rig.ended(deletion.id).await.state, TaskState::Completed);
}

#[tokio::test]
async fn a_snapshot_is_there_whole_or_not_at_all() {
    let mut rig = Rig::new(slow()).await;
    let vm = rig.create("source").await;
    rig.execute(vm, command(&["sh", "-c", "echo kept > /root/file"])).await;
    for moment in 0..40 {
        let (task, id) = rig.request_snapshot(vm, TaskKind::VmSnapshot).await;
        crash_after(&mut rig, moment).await;
        let task = rig.ended(task.id).await;
        assert_eq!(task.state, TaskState::Completed, "{moment}: {task:?}");
        let snapshot = rig.store().snapshot(id).await.unwrap().unwrap();
        assert_eq!(snapshot.state, SnapshotState::Ready);
        // The source goes on, and the snapshot is one.
        rig.in_state(vm, VmState::Running).await;
        let clone = rig.create_from(&format!("clone-{moment}"), Origin::Snapshot(id)).await;
        let execution = rig.execute(clone.id, command(&["cat", "/root/file"])).await;
        assert_eq!(rig.stdout(&execution).await, "kept\n");
        delete(&rig, clone.id).await;
        rig.store().delete_snapshot(id).await.unwrap();
    }
    delete(&rig, vm).await;
    rig.assert_clean().await;
    rig.crash().await;
    rig.start().await;
    rig.no_files("snapshots").await;
}

#[tokio::test]
async fn a_fork_is_finished() {
    let mut rig = Rig::new(slow()).await;
    let vm = rig.create("source").await;
    for moment in 0..25 {
        let tasks = rig.request_fork(vm, &format!("f{moment}"), 3).await;
        crash_after(&mut rig, moment * 2).await;
        for task in &tasks {
            let task = rig.ended(task.id).await;
            assert_eq!(task.state, TaskState::Completed, "{moment}: {task:?}");
        }
        for task in &tasks[1..] {
            let execution = rig.execute(task.vm_id.unwrap(), command(&["echo", "here"])).await;
            assert_eq!(rig.stdout(&execution).await, "here\n");
            delete(&rig, task.vm_id.unwrap()).await;
        }
    }
    delete(&rig, vm).await;
    rig.assert_clean().await;
    rig.no_files("snapshots").await;
}

/// A start from memory may cost the memory where it is interrupted, and never the disk.
#[tokio::test]
async fn a_suspended_vm_is_never_half_asleep() {
    let mut rig = Rig::new(slow()).await;
    let vm = rig.create("sleeper").await;
    rig.execute(vm, command(&["sh", "-c", "echo kept > /root/file"])).await;
    for moment in 0..30 {
        let (suspension, _) = rig.request_snapshot(vm, TaskKind::VmSuspend).await;
        crash_after(&mut rig, moment).await;
        let task = rig.ended(suspension.id).await;
        assert_eq!(task.state, TaskState::Completed, "{moment}: {task:?}");
        let stopped = rig.in_state(vm, VmState::Stopped).await;
        assert!(stopped.memory.is_some(), "{moment}");
        let start = rig.request(vm, TaskKind::VmStart).await;
        crash_after(&mut rig, moment).await;
        if rig.ended(start.id).await.state == TaskState::Failed {
            let failed = rig.in_state(vm, VmState::Failed).await;
            assert_eq!(failed.memory, None);
            let start = rig.request(vm, TaskKind::VmStart).await;
            assert_eq!(rig.ended(start.id).await.state, TaskState::Completed);
        }
        let execution = rig.execute(vm, command(&["cat", "/root/file"])).await;
        assert_eq!(rig.stdout(&execution).await, "kept\n", "{moment}");
    }
    delete(&rig, vm).await;
    rig.assert_clean().await;
    rig.no_files("snapshots").await;
}

#[tokio::test]
async fn a_build_is_finished_and_its_builder_goes() {
    let mut rig = Rig::new(slow()).await;
    for moment in 0..25 {
        let run = format!("echo {moment} > /root/number");
        let spec =
            TemplateSpec { steps: vec![TemplateStep { run, timeout_s: None }], ..template_spec() };
        let template = rig.request_build(&format!("t{moment}"), spec).await;
        crash_after(&mut rig, moment * 2).await;
        let template = rig.built(&template).await;
        assert_eq!(template.state, TemplateState::Ready, "{moment}: {template:?}");
        let task =
            rig.request_create_from(&format!("v{moment}"), Origin::Template(template.id)).await;
        crash_after(&mut rig, moment).await;
        let task = rig.ended(task.id).await;
        assert_eq!(task.state, TaskState::Completed, "{moment}: {task:?}");
        let execution = rig.execute(task.vm_id.unwrap(), command(&["cat", "/root/number"])).await;
        assert_eq!(rig.stdout(&execution).await, format!("{moment}\n"));
        delete(&rig, task.vm_id.unwrap()).await;
    }
    rig.assert_clean().await;
}
