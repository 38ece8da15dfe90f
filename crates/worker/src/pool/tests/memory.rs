//! What the pools do when the host is short of memory.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::fake::{RESERVE_MB, Rig, pool, template};
use crate::pool::memory::{CALM, SWEEP};

#[tokio::test(start_paused = true)]
async fn the_newest_go_first_and_come_back_when_it_is_over() {
    let rig = Rig::new(&[pool("web:latest", 3, 3)]);
    rig.settle().await;
    let made = rig.world(|world| world.there.clone());
    // Enough again as soon as two are gone.
    rig.change(|world| world.freed_mb = 5);
    rig.set_available_mb(RESERVE_MB - 10);
    rig.settle().await;
    assert_eq!(rig.world(|world| world.discarded.clone()), [made[2], made[1]]);
    assert_eq!((rig.ready(), rig.status().target), (1, 1));
    // One that is claimed is not replaced.
    assert_eq!(rig.claim("web:latest").unwrap().machine, made[0]);
    rig.settle().await;
    assert_eq!((rig.ready(), rig.status().target), (0, 0));
    let over = Instant::now();
    rig.set_available_mb(RESERVE_MB * 2);
    rig.settle().await;
    assert_eq!(rig.ready(), 3);
    let again = rig.world(|world| world.begun[3].2);
    assert!(again >= over + CALM - SWEEP, "not before it is calm");
}

#[tokio::test(start_paused = true)]
async fn pressure_ends_a_machine_in_the_making() {
    let rig = Rig::new(&[pool("web:latest", 1, 1)]);
    let mut world = rig.fake.world.subscribe();
    world.wait_for(|world| world.steps.len() == 1).await.unwrap();
    let in_hand = rig.pools.begin();
    rig.set_available_mb(RESERVE_MB - 1);
    // Memory is given back even while somebody waits.
    rig.settle().await;
    assert_eq!(rig.world(|world| (world.in_make, world.there.len())), (0, 0));
    drop(in_hand);
}

#[tokio::test(start_paused = true)]
async fn a_machine_is_made_only_where_all_of_its_memory_fits() {
    let rig = Rig::new(&[pool("web:latest", 1, 1)]);
    rig.set_available_mb(RESERVE_MB * 5 / 4 + 511);
    rig.set_template("web:latest", Some(template(512)));
    rig.settle().await;
    assert_eq!(rig.world(|world| world.begun.len()), 0);
    assert_eq!(rig.status().target, 0, "there shall be none now");
    rig.set_available_mb(RESERVE_MB * 5 / 4 + 512);
    sleep(SWEEP + Duration::from_secs(1)).await;
    assert_eq!((rig.ready(), rig.status().target), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn what_is_too_old_stays_while_memory_is_short() {
    let rig = Rig::with_age(&[pool("web:latest", 2, 2)], Duration::from_mins(1));
    rig.settle().await;
    let made = rig.world(|world| world.there.clone());
    rig.change(|world| world.freed_mb = 1);
    rig.set_available_mb(RESERVE_MB - 1);
    sleep(Duration::from_mins(5)).await;
    assert_eq!(rig.world(|world| world.there.clone()), made[..1]);
    // Calm, and too little for one more.
    rig.set_available_mb(RESERVE_MB * 5 / 4 + 99);
    sleep(Duration::from_mins(5)).await;
    assert_eq!(rig.world(|world| world.there.clone()), made[..1]);
    rig.set_available_mb(RESERVE_MB * 2);
    rig.settle().await;
    assert_eq!((rig.ready(), rig.world(|world| world.discarded.contains(&made[0]))), (2, true));
}
