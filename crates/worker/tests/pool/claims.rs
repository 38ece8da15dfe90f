//! VMs that come from a pool.

use std::collections::HashSet;

use aether_drivers::{MachineState, sim::SimConfig};
use aether_types::{Origin, StartKind, TaskKind, VmState};

use crate::{house::House, rig::command};

#[tokio::test]
async fn a_vm_from_the_pool_is_like_any_other() {
    let house = House::new(SimConfig::default(), 2, 2).await;
    let spares: HashSet<_> = house.spares().await.into_iter().collect();
    for machine in house.machines().await {
        assert_eq!(machine.state, MachineState::Paused);
    }
    let vm = house.create("first").await;
    let start = vm.start.clone().unwrap();
    assert_eq!(start.kind, StartKind::Pool, "{start:?}");
    assert_eq!(start.fallback, None);
    assert_eq!(start.total_us, start.phases.iter().map(|phase| phase.us).sum::<u64>());
    assert!(spares.contains(&house.machine_of(vm.id).await));

    let said = house.rig.execute(vm.id, command(&["env"])).await;
    let env = house.rig.stdout(&said).await;
    assert!(env.contains("GREETING=hello, first"), "{env}");
    assert!(env.contains("FROM=template"), "{env}");

    // The machine's id is not the VM's, and all that is done to a VM finds it.
    for (kind, state) in [
        (TaskKind::VmPause, VmState::Paused),
        (TaskKind::VmResume, VmState::Running),
        (TaskKind::VmStop, VmState::Stopped),
        (TaskKind::VmStart, VmState::Running),
    ] {
        let task = house.rig.request(vm.id, kind).await;
        house.rig.ended(task.id).await;
        assert_eq!(house.rig.in_state(vm.id, state).await.state, state);
    }
    house.filled(2).await;
    house.close(&[vm.id]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_fifty_creations_at_once_each_has_a_machine_of_its_own() {
    let house = House::new(SimConfig::default(), 8, 8).await;
    let spares: HashSet<_> = house.spares().await.into_iter().collect();
    let mut tasks = Vec::new();
    for n in 0..50 {
        let name = format!("vm-{n}");
        tasks.push(house.request(&name, Origin::Template(house.template.id)).await);
    }
    let mut vms = Vec::new();
    for task in &tasks {
        vms.push(house.created(task).await);
    }
    let mut machines = HashSet::new();
    let mut of_pool = 0;
    for vm in &vms {
        let machine = house.machine_of(vm.id).await;
        assert!(machines.insert(machine), "given twice");
        let from_pool = vm.start.as_ref().unwrap().kind == StartKind::Pool;
        of_pool += u64::from(from_pool);
        // Each runs its own commands, with its own environment.
        let said = house.rig.execute(vm.id, command(&["env"])).await;
        let env = house.rig.stdout(&said).await;
        assert!(env.contains(&format!("GREETING=hello, {}\n", vm.name)), "{env}");
    }
    let status = house.status().unwrap();
    assert_eq!((status.hits, status.hits + status.misses), (of_pool, 50));
    assert!(of_pool >= 8, "{of_pool}");
    assert!(spares.iter().all(|spare| machines.contains(spare)));
    let ids: Vec<_> = vms.iter().map(|vm| vm.id).collect();
    house.close(&ids).await;
}

#[tokio::test]
async fn an_empty_pool_is_no_reason_to_wait() {
    let house = House::new(SimConfig::default(), 0, 2).await;
    let vm = house.create("alone").await;
    assert_eq!(vm.start.unwrap().kind, StartKind::Restore);
    assert_eq!(house.status().unwrap().misses, 1);
    // From now on one is expected.
    house.filled(1).await;
    let next = house.create("next").await;
    assert_eq!(next.start.unwrap().kind, StartKind::Pool);
    house.close(&[vm.id, next.id]).await;
}

#[tokio::test]
async fn a_machine_whose_process_died_is_not_given() {
    let house = House::new(SimConfig::default(), 2, 2).await;
    let dead = house.spares().await;
    for &machine in &dead {
        house.rig.host.kill_vmm(machine);
    }
    let vm = house.create("later").await;
    assert!(!dead.contains(&house.machine_of(vm.id).await));
    house.close(&[vm.id]).await;
}

#[tokio::test]
async fn a_claim_that_fails_falls_back_to_a_restore() {
    let config = SimConfig {
        fault: aether_drivers::fault::FaultPoints::recording(),
        ..SimConfig::default()
    };
    let house = House::new(config, 1, 1).await;
    for point in ["sim claim", "sim claimed", "sim resume"] {
        house.filled(1).await;
        house.rig.host.fault().arm(point);
        let vm = house.create("fallen").await;
        assert!(!house.rig.host.fault().disarm(), "{point} was not met");
        let start = vm.start.unwrap();
        assert_eq!(start.kind, StartKind::Restore, "{point}");
        assert!(start.fallback.is_some_and(|why| why.contains("pool")), "{point}");
        let task = house.rig.request(vm.id, TaskKind::VmDelete).await;
        house.rig.ended(task.id).await;
    }
    house.close(&[]).await;
}
