//! How a worker keeps its pool.

use std::time::Duration;

use aether_drivers::{
    fault::FaultPoints,
    sim::{ManualClock, SimClock, SimConfig, SimLatency},
};
use aether_types::{Origin, StartKind, TemplateState};
use tokio::time::timeout;

use crate::house::House;

fn recording() -> SimConfig {
    SimConfig { fault: FaultPoints::recording(), ..SimConfig::default() }
}

/// A host on which these take as long as a test lets them.
fn held(latency: SimLatency) -> SimConfig {
    let clock = SimClock::Manual(ManualClock::default());
    SimConfig { clock, latency, ..SimConfig::default() }
}

fn held_boots() -> SimConfig {
    held(SimLatency { boot: Duration::from_secs(1), ..SimLatency::default() })
}

/// The last step of making a machine.
fn held_pauses() -> SimConfig {
    held(SimLatency { pause: Duration::from_secs(1), ..SimLatency::default() })
}

#[tokio::test]
async fn nothing_is_made_while_a_creation_is_in_hand() {
    let house = House::new(held_boots(), 1, 1).await;
    let boot = house.request("booted", Origin::Image).await;
    while house.machines().await.len() < 2 {
        tokio::task::yield_now().await;
    }
    let claimed = house.create("claimed").await;
    assert_eq!(claimed.start.unwrap().kind, StartKind::Pool);
    // Many times as long as a pool waits after the last start.
    let one_more = house.until("no machine", |pool| pool.is_some_and(|pool| pool.ready > 0));
    assert!(timeout(Duration::from_millis(500), one_more).await.is_err());
    assert_eq!(house.machines().await.len(), 2, "none is being made");
    let booted = house.passing(house.created(&boot)).await;
    assert_eq!(booted.start.unwrap().kind, StartKind::Boot);
    house.filled(1).await;
    house.close(&[claimed.id, booted.id]).await;
}

#[tokio::test]
async fn a_host_that_is_short_of_memory_has_no_pool_and_all_else() {
    let mut house = House::without_pool(SimConfig::default()).await;
    house.open(2, 2, u64::MAX / 4).await;
    house.until("pools are looked at", |pool| pool.is_some()).await;
    let vm = house.create("restored").await;
    assert_eq!(vm.start.unwrap().kind, StartKind::Restore);
    let status = house.status().unwrap();
    assert_eq!((status.ready, status.target, status.misses), (0, 0, 1));
    assert_eq!(house.spares().await, []);
    house.close(&[vm.id]).await;
}

#[tokio::test]
async fn a_crash_leaves_no_machine_of_a_pool() {
    let mut house = House::new(SimConfig::default(), 2, 2).await;
    let before = house.spares().await;
    let vm = house.create("kept").await;
    let machine = house.machine_of(vm.id).await;
    house.rig.crash().await;
    house.rig.start().await;
    house.filled(2).await;
    let after = house.spares().await;
    assert!(after.iter().all(|spare| !before.contains(spare)), "they were made anew");
    assert_eq!(house.machine_of(vm.id).await, machine, "a claimed machine is a VM's");
    assert_eq!(house.machines().await.len(), 3);
    house.close(&[vm.id]).await;
}

#[tokio::test]
async fn a_crash_while_a_machine_is_made_leaves_nothing_of_it() {
    let mut house = House::without_pool(held_pauses()).await;
    house.open(2, 2, 0).await;
    let mut left = Vec::new();
    for _ in 0..3 {
        while house.machines().await.is_empty() {
            tokio::task::yield_now().await;
        }
        house.rig.crash().await;
        left.extend(house.spares().await);
        house.start().await;
    }
    house.filled(2).await;
    assert!(left.len() >= 3);
    let machines = house.machines().await;
    assert_eq!(machines.len(), 2);
    assert!(machines.iter().all(|machine| !left.contains(&machine.id)));
    house.close(&[]).await;
}

#[tokio::test]
async fn the_end_while_a_machine_is_made_leaves_nothing_of_it() {
    let mut house = House::without_pool(held_pauses()).await;
    house.open(2, 2, 0).await;
    while house.machines().await.is_empty() {
        tokio::task::yield_now().await;
    }
    house.close(&[]).await;
}

#[tokio::test]
async fn a_step_that_fails_leaves_nothing_and_is_tried_again() {
    let mut house = House::without_pool(recording()).await;
    for point in [
        "sim created directory",
        "sim attached network",
        "sim start process",
        "sim started process",
        "sim set background",
        "sim pause",
    ] {
        house.rig.host.fault().arm(point);
        house.open(1, 1, 0).await;
        house.filled(1).await;
        assert!(!house.rig.host.fault().disarm(), "{point} was not met");
        assert_eq!(house.machines().await.len(), 1, "{point}");
    }
    house.close(&[]).await;
}

#[tokio::test]
async fn the_machines_go_with_their_template() {
    let house = House::new(SimConfig::default(), 2, 2).await;
    let deleted = house.rig.store().delete_template(house.template.id).await.unwrap();
    assert_eq!(deleted.state, TemplateState::Deleted);
    let event = aether_events::Event::Template {
        template_id: deleted.id,
        state: deleted.state,
        at: deleted.updated_at,
    };
    house.rig.parts.bus.publish(event).await.unwrap();
    house.until("no pool", |pool| pool.is_none()).await;
    while !house.machines().await.is_empty() {
        tokio::task::yield_now().await;
    }
    house.close(&[]).await;
}
