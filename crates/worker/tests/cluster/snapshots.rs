//! Snapshots, restores and forks.

use std::{fs, path::PathBuf, time::Duration};

use aether_drivers::{
    fault::FaultPoints,
    sim::{SimConfig, SimLatency},
};
use aether_store::NewVm;
use aether_types::{
    ErrorCode, Origin, Snapshot, SnapshotState, StartKind, TaskKind, TaskState, VmId, VmState,
};

use crate::rig::{Rig, command, vm_spec};

async fn with_file(rig: &Rig, name: &str) -> VmId {
    let vm = rig.create(name).await;
    rig.execute(vm, command(&["sh", "-c", "echo kept > /root/file"])).await;
    vm
}

async fn says(rig: &Rig, vm: VmId, words: &[&str]) -> String {
    let execution = rig.execute(vm, command(words)).await;
    rig.stdout(&execution).await
}

#[tokio::test]
async fn a_snapshot_begins_vms_that_are_themselves() {
    let rig = Rig::new(SimConfig::default()).await;
    let source = with_file(&rig, "source").await;
    let snapshot = rig.snapshot(source).await;
    assert_eq!(snapshot.state, SnapshotState::Ready);
    assert!(snapshot.size_bytes.is_some_and(|bytes| bytes > 0));
    assert!(snapshot.digest.is_some_and(|digest| digest.starts_with("blake3:")));
    assert!(snapshot.paused_us.is_some());
    rig.in_state(source, VmState::Running).await;

    let clone = rig.create_from("clone", Origin::Snapshot(snapshot.id)).await;
    let start = clone.start.unwrap();
    assert_eq!((start.kind, start.fallback), (StartKind::Restore, None));
    let names: Vec<_> = start.phases.iter().map(|phase| phase.name.as_str()).collect();
    for name in ["queue", "wait", "create", "load", "connect", "configure"] {
        assert!(names.contains(&name), "{names:?}");
    }
    assert_eq!(start.total_us, start.phases.iter().map(|phase| phase.us).sum::<u64>());

    assert_eq!(says(&rig, clone.id, &["cat", "/root/file"]).await, "kept\n");
    assert_eq!(says(&rig, clone.id, &["hostname"]).await, "clone\n");
    assert_eq!(says(&rig, source, &["hostname"]).await, "source\n");
    // Each goes on alone.
    rig.execute(clone.id, command(&["sh", "-c", "echo other > /root/file"])).await;
    assert_eq!(says(&rig, source, &["cat", "/root/file"]).await, "kept\n");
    assert_ne!(clone.address, rig.in_state(source, VmState::Running).await.address);
}

#[tokio::test]
async fn a_paused_vm_stays_paused_under_a_snapshot() {
    let rig = Rig::new(SimConfig::default()).await;
    let source = with_file(&rig, "paused").await;
    let pause = rig.request(source, TaskKind::VmPause).await;
    rig.ended(pause.id).await;
    let snapshot = rig.snapshot(source).await;
    rig.in_state(source, VmState::Paused).await;
    let clone = rig.create_from("awake", Origin::Snapshot(snapshot.id)).await;
    assert_eq!(says(&rig, clone.id, &["cat", "/root/file"]).await, "kept\n");
}

#[tokio::test]
async fn a_command_goes_on_under_a_snapshot() {
    let latency = SimLatency { snapshot: Duration::from_millis(50), ..Default::default() };
    let rig = Rig::new(SimConfig { latency, ..SimConfig::default() }).await;
    let vm = rig.create("busy").await;
    let running = rig.request_execution(vm, command(&["sh", "-c", "sleep 1; echo through"])).await;
    rig.execution_begun(&running).await;
    let snapshot = rig.snapshot(vm).await;
    assert!(snapshot.paused_us.is_some_and(|us| us >= 50_000), "{snapshot:?}");
    let running = rig.execution_ended(&running).await;
    assert_eq!(rig.stdout(&running).await, "through\n");
}

#[tokio::test]
async fn clones_wait_for_their_snapshot_and_it_goes_when_they_run() {
    let latency = SimLatency { snapshot: Duration::from_millis(300), ..Default::default() };
    let rig = Rig::new(SimConfig { latency, ..SimConfig::default() }).await;
    let source = with_file(&rig, "source").await;
    let tasks = rig.request_fork(source, "clone", 8).await;
    for task in &tasks {
        let task = rig.ended(task.id).await;
        assert_eq!(task.state, TaskState::Completed, "{task:?}");
    }
    let mut addresses = std::collections::HashSet::new();
    for task in &tasks[1..] {
        let vm = rig.in_state(task.vm_id.unwrap(), VmState::Running).await;
        assert!(addresses.insert(vm.address));
        assert_eq!(says(&rig, vm.id, &["cat", "/root/file"]).await, "kept\n");
        assert_eq!(says(&rig, vm.id, &["hostname"]).await, format!("{}\n", vm.name));
    }
    rig.no_files("snapshots").await;
    assert_eq!(says(&rig, tasks[1].vm_id.unwrap(), &["cat", "/root/file"]).await, "kept\n");
}

#[tokio::test]
async fn of_eight_clones_one_that_fails_once_is_made_again() {
    let fault = FaultPoints::recording();
    let rig = Rig::new(SimConfig { fault: fault.clone(), ..SimConfig::default() }).await;
    let source = with_file(&rig, "source").await;
    for point in ["sim restore", "sim restored", "sim create disk", "sim start process"] {
        fault.arm(point);
        let tasks = rig.request_fork(source, "clone", 8).await;
        let mut attempts = 0;
        for task in &tasks {
            let task = rig.ended(task.id).await;
            assert_eq!(task.state, TaskState::Completed, "{point}: {task:?}");
            attempts += task.attempts;
        }
        assert!(!fault.disarm(), "{point} was not met");
        assert_eq!(attempts, 10, "{point}: each once, and one of them twice");
        for task in &tasks[1..] {
            let deletion = rig.request(task.vm_id.unwrap(), TaskKind::VmDelete).await;
            rig.ended(deletion.id).await;
        }
    }
    let deletion = rig.request(source, TaskKind::VmDelete).await;
    rig.ended(deletion.id).await;
    rig.assert_clean().await;
    rig.no_files("snapshots").await;
}

fn largest(rig: &Rig, snapshot: &Snapshot) -> PathBuf {
    let id = snapshot.id.to_string();
    let own = rig.files("snapshots").into_iter().filter(|path| {
        path.components().any(|part| part.as_os_str().to_string_lossy() == id)
            && !path.ends_with("manifest.json")
    });
    own.max_by_key(|path| fs::metadata(path).unwrap().len()).unwrap()
}

async fn refused(rig: &Rig, name: &str, snapshot: &Snapshot) -> aether_types::Fault {
    let task = rig.request_create_from(name, Origin::Snapshot(snapshot.id)).await;
    let task = rig.ended(task.id).await;
    assert_eq!((task.state, task.attempts), (TaskState::Failed, 1), "{task:?}");
    rig.in_state(task.vm_id.unwrap(), VmState::Failed).await;
    task.error.unwrap()
}

#[tokio::test]
async fn a_damaged_file_is_named_and_never_booted() {
    let rig = Rig::new(SimConfig::default()).await;
    let source = with_file(&rig, "source").await;
    let snapshot = rig.snapshot(source).await;
    let file = largest(&rig, &snapshot);
    let content = fs::read(&file).unwrap();
    let mut other = content.clone();
    let last = other.len() - 1;
    other[last] ^= 1;
    // Sealed files are read-only, for root too by habit alone.
    fs::remove_file(&file).unwrap();
    fs::write(&file, other).unwrap();
    let fault = refused(&rig, "damaged", &snapshot).await;
    assert_eq!(fault.code, ErrorCode::SnapshotDamaged, "{fault:?}");
    let name = file.file_name().unwrap().to_string_lossy().into_owned();
    assert!(fault.message.contains(&name), "{fault:?}");
    assert!(!fault.message.contains(rig.dir.path().to_str().unwrap()), "{fault:?}");

    fs::remove_file(&file).unwrap();
    let fault = refused(&rig, "missing", &snapshot).await;
    assert_eq!(fault.code, ErrorCode::SnapshotDamaged);
    assert!(fault.message.contains(&name), "{fault:?}");
}

#[tokio::test]
async fn a_snapshot_of_another_platform_is_refused() {
    let (rig, other) = (Rig::new(SimConfig::default()).await, Rig::new(SimConfig::default()).await);
    let ours = rig.snapshot(rig.create("ours").await).await;
    let theirs = other.snapshot(other.create("theirs").await).await;
    let entry =
        |rig: &Rig, id: &Snapshot| rig.dir.path().join("snapshots/entries").join(id.id.to_string());
    fs::remove_dir_all(entry(&rig, &ours)).unwrap();
    fs::rename(entry(&other, &theirs), entry(&rig, &ours)).unwrap();
    let fault = refused(&rig, "foreign", &ours).await;
    assert_eq!(fault.code, ErrorCode::SnapshotDamaged, "{fault:?}");
}

#[tokio::test]
async fn a_vm_of_another_size_is_not_restored() {
    let rig = Rig::new(SimConfig::default()).await;
    let snapshot = rig.snapshot(rig.create("small").await).await;
    let mut spec = vm_spec(Origin::Snapshot(snapshot.id));
    spec.memory_mb = 512;
    let new = NewVm { id: VmId::new(), name: "large".into(), spec };
    let task = rig.request_create_of(new).await;
    let task = rig.ended(task.id).await;
    assert_eq!(task.error.unwrap().code, ErrorCode::SnapshotIncompatible);
}

#[tokio::test]
async fn a_snapshot_that_fails_leaves_nothing_and_its_vm_runs() {
    let fault = FaultPoints::recording();
    let rig = Rig::new(SimConfig { fault: fault.clone(), ..SimConfig::default() }).await;
    let vm = rig.create("source").await;
    rig.snapshot(vm).await;
    let points: Vec<_> =
        fault.seen().into_iter().filter(|point| point.starts_with("sim snapshot")).collect();
    assert!(points.len() >= 3, "{points:?}");
    for point in points {
        fault.arm(point);
        let snapshot = rig.snapshot(vm).await;
        assert!(!fault.disarm(), "{point} was not met");
        // Only whole ones are there.
        let drafts: Vec<_> = rig
            .files("snapshots")
            .into_iter()
            .filter(|path| path.components().any(|part| part.as_os_str() == "drafts"))
            .collect();
        assert_eq!(drafts, Vec::<PathBuf>::new(), "{point}");
        assert_eq!(says(&rig, vm, &["echo", "on"]).await, "on\n");
        rig.create_from(&format!("of-{}", snapshot.id), Origin::Snapshot(snapshot.id)).await;
    }
}

#[tokio::test]
async fn a_deletion_ends_a_snapshot_and_leaves_nothing() {
    let latency = SimLatency { snapshot: Duration::from_millis(200), ..Default::default() };
    let rig = Rig::new(SimConfig { latency, ..SimConfig::default() }).await;
    let vm = rig.create("brief").await;
    let (task, id) = rig.request_snapshot(vm, TaskKind::VmSnapshot).await;
    let deletion = rig.request(vm, TaskKind::VmDelete).await;
    assert_eq!(rig.ended(deletion.id).await.state, TaskState::Completed);
    assert!(rig.ended(task.id).await.state.is_end());
    let snapshot = rig.store().snapshot(id).await.unwrap().unwrap();
    if snapshot.state != SnapshotState::Ready {
        rig.no_files("snapshots").await;
    }
    rig.assert_clean().await;
}

#[tokio::test]
async fn what_is_past_what_is_kept_goes() {
    let mut rig = Rig::new(SimConfig::default()).await;
    rig.crash().await;
    rig.parts.config.retention =
        aether_worker::Retention { snapshots_per_vm_max: Some(2), ..Default::default() };
    rig.start().await;
    let vm = rig.create("often").await;
    let mut taken = Vec::new();
    for _ in 0..4 {
        taken.push(rig.snapshot(vm).await.id);
    }
    let clone = rig.create_from("of-the-newest", Origin::Snapshot(taken[3])).await;
    let settled = async {
        loop {
            let mut states = Vec::new();
            for id in &taken {
                states.push(rig.store().snapshot(*id).await.unwrap().unwrap().state);
            }
            if states[..2] == [SnapshotState::Deleted; 2] {
                break states;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let states = tokio::time::timeout(Duration::from_secs(20), settled).await.unwrap();
    assert_eq!(states[2..], [SnapshotState::Ready; 2]);
    assert_eq!(says(&rig, clone.id, &["echo", "well"]).await, "well\n");
}
