//! The contract of snapshots, restores, clones and claims.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use aether_drivers::{
    AfterSnapshot::{End, GoOn},
    DriverError, ExitReason, MachineSpec, MachineState,
    SnapshotDisk::{Include, Leave},
    SnapshotFiles, Start,
};
use aether_protocol::{ExitStatus, host};
use aether_types::{DriverKind, Egress, MachineId, NetworkPolicy, VmId};

use crate::{
    rig::{Kind, Rig, Vm},
    shot::{Shot, name_of, shot_file},
    suite::{self, ParseToken as _},
};

const SOON: Duration = Duration::from_secs(20);

async fn state(rig: &Rig, vm: &Vm) -> MachineState {
    rig.driver().inspect(vm.id).await.expect("inspect").expect("known").state
}

async fn boot_id(rig: &Rig, vm: &Vm) -> String {
    host::ping(rig.connect(vm).await, &vm.token, rig.guest_limit()).await.expect("ping").boot_id
}

/// What a guest says to a script.
async fn says(rig: &Rig, vm: &Vm, script: &str) -> String {
    String::from_utf8(rig.sh(vm, script).await.0).unwrap()
}

async fn stop_and_remove(rig: &Rig, vm: &Vm) {
    tokio::time::timeout(SOON, rig.driver().delete(vm.id)).await.expect("in time").expect("delete");
}

/// A snapshot of a guest that runs: the guest goes on, and clones of it go on from that moment,
/// each on its own, whatever becomes of the snapshot.
pub(crate) async fn clones(rig: Rig, count: usize) {
    let rig = Arc::new(rig);
    let driver = rig.driver();
    let source = rig.boot().await;
    rig.sh(&source, "echo here >/root/file; sync").await;
    rig.start_counting(&source).await;
    let first_boot = boot_id(&rig, &source).await;
    let before = rig.counts_beyond(&source, 2).await;

    let shot = rig.shoot(&source, Include, GoOn).await.expect("a snapshot");
    println!("{:?}: paused {} µs", rig.kind(), shot.taken.paused.as_micros());
    assert_eq!(state(&rig, &source).await, MachineState::Running);
    let after = rig.counts_beyond(&source, before).await;
    rig.counts_beyond(&source, after).await;
    assert_eq!(boot_id(&rig, &source).await, first_boot);

    let begun = Instant::now();
    let mut starting = tokio::task::JoinSet::new();
    for _ in 0..count {
        let (rig, shot) = (Arc::clone(&rig), shot.clone());
        starting.spawn(async move { rig.restore(&shot).await });
    }
    let clones = starting.join_all().await;
    println!("{:?}: {count} clones in {} ms", rig.kind(), begun.elapsed().as_millis());
    let mut boots = vec![first_boot];
    let mut networks = vec![driver.inspect(source.id).await.unwrap().unwrap().network.unwrap()];
    for clone in &clones {
        assert_eq!(rig.opens(clone, &shot.token).await, Some(false));
        boots.push(boot_id(&rig, clone).await);
        networks.push(driver.inspect(clone.id).await.unwrap().unwrap().network.unwrap());
        assert_eq!(
            says(&rig, clone, "hostname; cat /root/file").await.trim_end(),
            format!("{}\nhere", name_of(clone))
        );
        let reached = rig.counts_beyond(clone, before).await;
        assert!(reached > before);
    }
    let whole = boots.len();
    boots.sort_unstable();
    boots.dedup();
    assert_eq!(boots.len(), whole, "boot ids are not those of two guests");
    for (i, network) in networks.iter().enumerate() {
        for other in &networks[..i] {
            assert_ne!((&network.mac, &network.addresses), (&other.mac, &other.addresses));
        }
    }

    // Disks are each one's own.
    for clone in &clones {
        rig.sh(clone, &format!("echo {} >/root/own; sync", clone.id)).await;
    }
    for clone in &clones {
        assert_eq!(says(&rig, clone, "cat /root/own").await, format!("{}\n", clone.id));
    }
    assert_ne!(rig.sh(&source, "cat /root/own").await.1.status(), ExitStatus::Code(0));

    // The snapshot goes; nobody is harmed, not even who boots from its disk later.
    rig.remove_snapshot(&shot);
    for clone in &clones {
        rig.counts_beyond(clone, before + 1).await;
    }
    let rebooted = &clones[0];
    driver.kill(rebooted.id).await.unwrap();
    driver.release().await.unwrap();
    driver.start(rebooted.id, Start::Boot, rig.boot_limit()).await.expect("boot a clone's disk");
    let files = says(&rig, rebooted, "cat /root/file /root/own").await;
    assert_eq!(files, format!("here\n{}\n", rebooted.id));
    stop_and_remove(&rig, &source).await;
    for clone in &clones {
        stop_and_remove(&rig, clone).await;
    }
    let rig = Arc::into_inner(rig).expect("nobody else has it");
    rig.close().await;
}

/// Snapshots of paused guests, of clones, and ones that end the guest; and adoption of clones.
pub(crate) async fn generations(mut rig: Rig) {
    let source = rig.boot().await;
    rig.sh(&source, "echo first >/root/file; sync").await;
    rig.start_counting(&source).await;
    rig.driver().pause(source.id).await.unwrap();
    let first = rig.shoot(&source, Include, GoOn).await.expect("a snapshot of a paused guest");
    assert_eq!(first.taken.paused, Duration::ZERO);
    assert_eq!(state(&rig, &source).await, MachineState::Paused);
    rig.driver().resume(source.id).await.unwrap();
    let reached = rig.counts_beyond(&source, 2).await;

    // A clone runs, although what it comes from stood still.
    let child = rig.restore(&first).await;
    assert_eq!(state(&rig, &child).await, MachineState::Running);
    rig.counts_beyond(&child, 2).await;
    rig.sh(&child, "echo second >>/root/file; sync").await;

    // A worker that restarts knows it as a VM like any other.
    rig.reopen().await;
    assert_eq!(says(&rig, &child, "cat /root/file").await, "first\nsecond\n");
    rig.driver().pause(child.id).await.unwrap();
    rig.driver().resume(child.id).await.unwrap();

    let second = rig.shoot(&child, Include, End).await.expect("a snapshot that ends the guest");
    assert_eq!(state(&rig, &child).await, MachineState::Exited(ExitReason::Killed));
    let ended = rig.shoot(&child, Include, GoOn).await.map(drop);
    assert!(matches!(ended, Err(DriverError::WrongState { .. })), "{ended:?}");
    stop_and_remove(&rig, &child).await;
    rig.remove_snapshot(&first);

    let grandchild = rig.restore(&second).await;
    rig.counts_beyond(&grandchild, 2).await;
    assert_eq!(says(&rig, &grandchild, "cat /root/file").await, "first\nsecond\n");
    assert_eq!(rig.opens(&grandchild, &child.token).await, Some(false));
    rig.counts_beyond(&source, reached).await;
    // The snapshot was not of this machine's disk, nor is the disk new any more.
    rig.driver().kill(grandchild.id).await.unwrap();
    let again = rig.driver().start(grandchild.id, second.start(), SOON).await;
    assert!(matches!(again, Err(DriverError::WrongState { .. })), "{again:?}");
    stop_and_remove(&rig, &grandchild).await;
    stop_and_remove(&rig, &source).await;
    rig.close().await;
}

/// A guest is put aside without its disk, and goes on where it was, once.
pub(crate) async fn suspension(mut rig: Rig) {
    let vm = rig.boot().await;
    rig.sh(&vm, "echo kept >/root/file").await;
    rig.start_counting(&vm).await;
    let before = rig.counts_beyond(&vm, 2).await;
    let shot = rig.shoot(&vm, Leave, End).await.expect("suspend");
    assert_eq!(state(&rig, &vm).await, MachineState::Exited(ExitReason::Killed));
    // As at the end of a clean shutdown.
    rig.driver().release().await.unwrap();
    rig.reopen().await;
    rig.driver().start(vm.id, shot.start(), rig.boot_limit()).await.expect("wake up");
    let itself = Vm { token: vm.token.clone(), ..vm.clone() };
    rig.make_itself(&itself, &shot).await;
    rig.counts_beyond(&vm, before).await;
    assert_eq!(says(&rig, &vm, "cat /root/file").await, "kept\n");

    // Its disk has gone on since.
    rig.driver().kill(vm.id).await.unwrap();
    let again = rig.driver().start(vm.id, shot.start(), SOON).await;
    assert!(matches!(again, Err(DriverError::WrongState { .. })), "{again:?}");
    stop_and_remove(&rig, &vm).await;
    rig.close().await;
}

fn changed(
    shot: &Shot,
    change: impl FnOnce(&mut aether_drivers::SnapshotMachine),
) -> SnapshotFiles {
    let mut files = shot.files.clone();
    change(&mut files.machine);
    files
}

/// What is not of this machine is refused by name, and leaves nothing.
pub(crate) async fn refusals(rig: Rig) {
    let driver = rig.driver();
    let vm = rig.boot().await;
    let shot = rig.shoot(&vm, Include, End).await.expect("a snapshot");
    stop_and_remove(&rig, &vm).await;

    let other_driver = match shot.files.machine.driver {
        DriverKind::Sim => DriverKind::Qemu,
        _ => DriverKind::Sim,
    };
    for files in [
        changed(&shot, |machine| machine.driver = other_driver),
        changed(&shot, |machine| machine.disk_mb += 1),
    ] {
        let spec = MachineSpec { disk_from: Some(files), ..rig.spec() };
        let refused = driver.create(spec).await;
        assert!(matches!(refused, Err(DriverError::Incompatible { .. })), "{refused:?}");
        assert_eq!(rig.leftovers(), Vec::<String>::new());
    }

    let spec = rig.clone_spec(&shot);
    let id = spec.id;
    driver.create(spec).await.unwrap();
    for files in [
        changed(&shot, |machine| machine.format.push('x')),
        changed(&shot, |machine| machine.vcpus += 1),
        changed(&shot, |machine| machine.memory_mb += 1),
        changed(&shot, |machine| machine.boot.kernel.push("x")),
    ] {
        let refused = driver.start(id, Start::Restore(files), SOON).await;
        assert!(matches!(refused, Err(DriverError::Incompatible { .. })), "{refused:?}");
    }
    // A file that is cut short or gone fails the restore, which leaves no process.
    let damaged = damaged_copy(&rig, &shot);
    let spec = MachineSpec { disk_from: Some(damaged.clone()), ..rig.spec() };
    let other = spec.id;
    if driver.create(spec).await.is_ok() {
        let refused = driver.start(other, Start::Restore(damaged), rig.boot_limit()).await;
        println!("{:?}: {:?}", rig.kind(), refused.expect_err("a damaged snapshot is restored"));
        assert_eq!(driver.inspect(other).await.unwrap().unwrap().pid, None);
        driver.delete(other).await.unwrap();
    }
    // All of that has left it as it was.
    driver.start(id, shot.start(), rig.boot_limit()).await.expect("restore");
    driver.delete(id).await.unwrap();
    rig.close().await;
}

/// The snapshot with every file but the disk cut short.
fn damaged_copy(rig: &Rig, shot: &Shot) -> SnapshotFiles {
    let directory = rig.snapshots().join("damaged");
    std::fs::create_dir(&directory).unwrap();
    for entry in std::fs::read_dir(&shot.files.directory).unwrap().map(Result::unwrap) {
        let to = directory.join(entry.file_name());
        if entry.file_name().to_str().unwrap().starts_with("disk") {
            std::fs::copy(entry.path(), to).unwrap();
        } else {
            std::fs::write(to, b"short").unwrap();
        }
    }
    SnapshotFiles { directory, ..shot.files.clone() }
}

/// A spare machine, warmed and paused, is found again and becomes a VM's once.
pub(crate) async fn claims(mut rig: Rig) {
    let source = rig.boot().await;
    let shot = rig.shoot(&source, Include, End).await.expect("a snapshot");
    stop_and_remove(&rig, &source).await;

    let spec = rig.clone_spec(&shot);
    let spare = Vm { id: spec.id, token: spec.token.parse_token() };
    rig.driver().create(spec).await.unwrap();
    rig.driver().start(spare.id, shot.start(), rig.boot_limit()).await.unwrap();
    rig.driver().set_background(spare.id, true).await.unwrap();
    rig.make_itself(&spare, &shot).await;
    assert_eq!(says(&rig, &spare, "echo warm").await, "warm\n");
    rig.driver().pause(spare.id).await.unwrap();

    rig.reopen().await;
    let found = rig.driver().list().await.unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].state, MachineState::Paused);
    assert_eq!(found[0].spec.as_ref().unwrap().vm, None);

    let (vm, other) = (VmId::new(), VmId::new());
    let policy = NetworkPolicy { egress: Egress::None, ..NetworkPolicy::default() };
    rig.driver().claim(spare.id, vm, &policy).await.expect("claim");
    rig.driver().claim(spare.id, vm, &policy).await.expect("claim again");
    let refused = rig.driver().claim(spare.id, other, &policy).await;
    assert!(matches!(refused, Err(DriverError::WrongState { .. })), "{refused:?}");
    let unknown = rig.driver().claim(MachineId::new(), other, &policy).await;
    assert!(matches!(unknown, Err(DriverError::UnknownVm(_))), "{unknown:?}");

    let begun = Instant::now();
    rig.driver().resume(spare.id).await.unwrap();
    assert_eq!(says(&rig, &spare, "echo mine").await, "mine\n");
    println!("{:?}: resumed and ran in {} ms", rig.kind(), begun.elapsed().as_millis());
    rig.driver().set_background(spare.id, false).await.unwrap();

    rig.reopen().await;
    let spec = rig.driver().inspect(spare.id).await.unwrap().unwrap().spec.unwrap();
    assert_eq!((spec.vm, &spec.network), (Some(vm), &policy));
    assert_eq!(says(&rig, &spare, "hostname").await.trim_end(), name_of(&spare));
    stop_and_remove(&rig, &spare).await;
    rig.close().await;
}

/// What a clone of a snapshot can live through.
pub(crate) async fn second_life(rig: &Rig, base: &Shot) -> Result<(), DriverError> {
    let driver = rig.driver();
    let spec = rig.clone_spec(base);
    let vm = Vm { id: spec.id, token: spec.token.parse_token() };
    if let Err(error) = driver.create(spec).await {
        assert!(driver.inspect(vm.id).await?.is_none(), "after {error}");
        assert_eq!(rig.leftovers(), Vec::<String>::new(), "after {error}");
        return Err(error);
    }
    if let Err(error) = driver.start(vm.id, base.start(), rig.boot_limit()).await {
        let machine = driver.inspect(vm.id).await?.expect("what was created stays");
        assert_eq!(machine.pid, None, "after {error}");
        // What failed can be tried again.
        driver.start(vm.id, base.start(), rig.boot_limit()).await.expect("restore again");
        return Err(error);
    }
    driver.set_background(vm.id, true).await?;
    rig.make_itself(&vm, base).await;
    if let Err(error) = rig.shoot(&vm, Include, GoOn).await {
        goes_on(rig, &vm, &error).await;
        return Err(error);
    }
    driver.claim(vm.id, VmId::new(), &NetworkPolicy::default()).await?;
    let asleep = match rig.shoot(&vm, Leave, End).await {
        Ok(shot) => shot,
        Err(error) => {
            if state(rig, &vm).await == MachineState::Running {
                goes_on(rig, &vm, &error).await;
            }
            return Err(error);
        }
    };
    driver.start(vm.id, asleep.start(), rig.boot_limit()).await?;
    rig.make_itself(&vm, &asleep).await;
    driver.delete(vm.id).await
}

/// A snapshot that failed has left the guest as it was.
async fn goes_on(rig: &Rig, vm: &Vm, error: &DriverError) {
    assert_eq!(state(rig, vm).await, MachineState::Running, "after {error}");
    assert_eq!(rig.opens(vm, &vm.token).await, Some(true), "after {error}");
}

pub(crate) async fn base(rig: &Rig) -> Shot {
    let vm = rig.boot().await;
    let shot = rig.shoot(&vm, Include, End).await.expect("a snapshot");
    stop_and_remove(rig, &vm).await;
    shot
}

/// Every step of a restore, a snapshot and a claim fails once before and once after it took
/// effect: nothing is left. `tried`: of which points.
pub(crate) async fn faults(mut rig: Rig, tried: impl Fn(&str) -> bool) {
    let base = base(&rig).await;
    second_life(&rig, &base).await.expect("a life without faults");
    assert_eq!(rig.leftovers(), Vec::<String>::new());
    let mut failures = 0;
    for point in rig.fault.seen().into_iter().filter(|point| tried(point)) {
        rig.fault.arm(point);
        let result = second_life(&rig, &base).await;
        // Some lie in the opening of the driver or in a boot, and so in no clone's life.
        if rig.fault.disarm() {
            continue;
        }
        match result {
            Err(DriverError::Injected(failed)) => assert_eq!(failed, point),
            Err(error) => panic!("{point}: {error:?}"),
            Ok(()) => panic!("{point}: the failure was swallowed"),
        }
        failures += 1;
        rig.reopen().await;
        for machine in rig.driver().list().await.unwrap() {
            rig.driver().delete(machine.id).await.expect("delete after a fault");
        }
        assert_eq!(rig.leftovers(), Vec::<String>::new(), "after {point}");
    }
    println!("{:?}: {failures} failures", rig.kind());
    assert!(failures >= 10, "{failures}");
    rig.close().await;
}

/// The worker is killed at every step of a clone's life. `worker` is the name of the test that is
/// the worker.
pub(crate) async fn crashes(mut rig: Rig, worker: &str) {
    let base = base(&rig).await;
    base.save(&shot_file(rig.folder()));
    second_life(&rig, &base).await.expect("a life without faults");
    let mut deaths = 0;
    for point in rig.fault.seen() {
        deaths += usize::from(suite::dies_at(&mut rig, worker, point).await);
        for machine in rig.driver().list().await.unwrap() {
            let spec = machine.spec.expect("a sound record");
            let vm = Vm { id: machine.id, token: spec.token.parse_token() };
            // It has not been made itself yet, or it has.
            if machine.state == MachineState::Running
                && rig.opens(&vm, &vm.token).await != Some(true)
            {
                assert_eq!(rig.opens(&vm, &base.token).await, Some(true), "{point}");
            }
            assert_ne!(machine.state, MachineState::Paused, "{point}");
            rig.driver().delete(vm.id).await.expect("delete after a crash");
        }
        assert_eq!(rig.leftovers(), Vec::<String>::new(), "after a crash at {point}");
    }
    println!("{:?}: {deaths} deaths", rig.kind());
    assert!(deaths >= 15, "{deaths}");
    rig.close().await;
}

/// As many as a host of this kind restores at once in a test.
pub(crate) fn clone_count(kind: Kind) -> usize {
    match kind {
        Kind::Sim => 16,
        Kind::Docker | Kind::Qemu | Kind::QemuDebian | Kind::QemuAuto => 8,
        Kind::Firecracker | Kind::FirecrackerJailed => 2,
    }
}
