//! Machines that die, templates that go, and the end.

use std::time::Duration;

use aether_streams::Pools as _;
use tokio::time::{Instant, sleep};

use super::fake::{Rig, pool, template};

#[tokio::test(start_paused = true)]
async fn a_machine_that_died_is_never_given_and_is_replaced() {
    let rig = Rig::new(&[pool("web:latest", 2, 2)]);
    rig.settle().await;
    sleep(Duration::from_mins(2)).await;
    let made = rig.world(|world| world.there.clone());
    let died = Instant::now();
    rig.fake.kill(made[0]);
    let mut world = rig.fake.world.subscribe();
    world.wait_for(|world| world.discarded.contains(&made[0])).await.unwrap();
    assert_eq!(Instant::now(), died, "at once");
    assert_eq!(rig.claim("web:latest").unwrap().machine, made[1]);
    rig.settle().await;
    assert_eq!(rig.ready(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_claimed_machine_that_dies_is_not_the_pools_business() {
    let rig = Rig::new(&[pool("web:latest", 1, 1)]);
    rig.settle().await;
    let claimed = rig.claim("web:latest").unwrap().machine;
    rig.fake.kill(claimed);
    rig.settle().await;
    assert_eq!(rig.world(|world| world.discarded.len()), 0);
    assert_eq!(rig.ready(), 1);
}

#[tokio::test(start_paused = true)]
async fn makes_that_fail_pause_longer_each_time_and_leave_nothing() {
    let rig = Rig::new(&[pool("web:latest", 1, 1)]);
    rig.change(|world| world.makes_fail = true);
    sleep(Duration::from_mins(10)).await;
    // One may be in the making just then.
    let mut world = rig.fake.world.subscribe();
    world.wait_for(|world| world.in_make == 0 && world.there.is_empty()).await.unwrap();
    let begun = rig.world(|world| world.begun.len());
    // Pauses of 1, 2, 4 … 256, 300 seconds, a quarter more or less.
    assert!((9..=12).contains(&begun), "{begun}");
    assert_eq!(rig.world(|world| (world.there.len(), world.discarded.len())), (0, begun));
    rig.change(|world| world.makes_fail = false);
    sleep(Duration::from_mins(8)).await;
    assert_eq!(rig.ready(), 1);
}

#[tokio::test(start_paused = true)]
async fn machines_that_die_as_soon_as_they_are_made_are_not_made_without_end() {
    let rig = Rig::new(&[pool("web:latest", 1, 1)]);
    rig.change(|world| world.still_born = true);
    sleep(Duration::from_mins(10)).await;
    let begun = rig.world(|world| world.begun.len());
    assert!((9..=12).contains(&begun), "{begun}");
    assert_eq!(rig.ready(), 0);
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_removed_is_tried_again() {
    let rig = Rig::new(&[pool("web:latest", 1, 1)]);
    rig.settle().await;
    rig.change(|world| world.discards_fail = true);
    rig.set_template("web:latest", None);
    sleep(Duration::from_secs(5)).await;
    assert_eq!(rig.world(|world| world.there.len()), 1);
    rig.change(|world| world.discards_fail = false);
    rig.settle().await;
    assert_eq!(rig.world(|world| world.there.len()), 0);
}

#[tokio::test(start_paused = true)]
async fn another_template_of_the_name_takes_the_place_of_the_one_before() {
    let rig = Rig::new(&[pool("web:latest", 2, 2)]);
    rig.settle().await;
    let (before, old) = (rig.template("web:latest"), rig.world(|world| world.there.clone()));
    rig.set_template("web:latest", Some(template(100)));
    rig.settle().await;
    assert_eq!(rig.world(|world| world.discarded.clone()), old);
    assert_eq!(rig.ready(), 2);
    let in_hand = rig.pools.begin();
    assert!(rig.pools.claim(before, &in_hand).is_none());
    drop(in_hand);
    assert!(rig.claim("web:latest").is_some());
}

#[tokio::test(start_paused = true)]
async fn a_machine_in_the_making_goes_with_its_template() {
    let rig = Rig::new(&[pool("web:latest", 1, 1)]);
    let mut world = rig.fake.world.subscribe();
    world.wait_for(|world| world.steps.len() == 2).await.unwrap();
    rig.set_template("web:latest", None);
    rig.settle().await;
    assert_eq!(rig.world(|world| (world.steps.len(), world.there.len())), (2, 0));
    assert_eq!(rig.pools.pools(), []);
    rig.set_template("web:latest", Some(template(100)));
    rig.settle().await;
    assert_eq!(rig.ready(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_store_that_does_not_answer_is_asked_again() {
    let rig = Rig::new(&[pool("web:latest", 1, 1)]);
    rig.change(|world| world.store_is_down = true);
    rig.settle().await;
    assert_eq!(rig.pools.pools(), []);
    rig.change(|world| world.store_is_down = false);
    rig.settle().await;
    assert_eq!(rig.ready(), 1);
    // And what is known stays while it does not.
    rig.change(|world| world.store_is_down = true);
    rig.pools.templates_changed();
    rig.settle().await;
    assert_eq!(rig.ready(), 1);
}

#[tokio::test(start_paused = true)]
async fn the_end_ends_the_making_and_leaves_nothing() {
    let rig = Rig::new(&[pool("web:latest", 3, 3)]);
    let mut world = rig.fake.world.subscribe();
    world.wait_for(|world| world.begun.len() == 2 && world.steps.len() == 4).await.unwrap();
    let stopped = Instant::now();
    let web = rig.template("web:latest");
    rig.stop.cancel();
    rig.keeper.await.unwrap();
    assert_eq!(Instant::now(), stopped, "nothing is waited for");
    assert!(rig.fake.world.borrow().there.is_empty());
    let in_hand = rig.pools.begin();
    assert!(rig.pools.claim(web, &in_hand).is_none());
}

#[tokio::test(start_paused = true)]
async fn a_keeper_that_is_dropped_leaves_its_machines_to_the_next_start() {
    let rig = Rig::new(&[pool("web:latest", 1, 1)]);
    rig.settle().await;
    rig.keeper.abort();
    assert!(rig.keeper.await.unwrap_err().is_cancelled());
    assert_eq!(rig.fake.world.borrow().there.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn without_pools_there_is_nothing_to_do() {
    let rig = Rig::new(&[]);
    rig.settle().await;
    assert!(rig.keeper.is_finished());
}
