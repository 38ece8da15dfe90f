//! The pools in virtual time.

mod fake;
mod life;
mod memory;

use std::{collections::HashSet, sync::Arc, time::Duration};

use aether_streams::Pools as _;
use tokio::time::{Instant, sleep};

use self::fake::{Rig, STEP, pool, template};
use super::{demand::HISTORY, traffic::SETTLE};

#[tokio::test(start_paused = true)]
async fn a_pool_is_filled_to_its_least_and_gives_the_oldest_first() {
    let rig = Rig::new(&[pool("web:latest", 2, 4)]);
    assert!(rig.claim("web:latest").is_none(), "empty at first, and no wait");
    rig.settle().await;
    assert_eq!((rig.status().ready, rig.status().target), (2, 2));
    let made = rig.world(|world| world.begun.iter().map(|(id, ..)| *id).collect::<Vec<_>>());
    let claimed = rig.claim("web:latest").unwrap().machine;
    assert_eq!(claimed, made[0]);
    rig.settle().await;
    assert_eq!(rig.ready(), 2);
    let status = rig.status();
    assert_eq!((status.hits, status.template.as_str()), (1, "web:latest"));
    assert!(rig.world(|world| !world.discarded.contains(&claimed)), "it is a VM's now");
}

#[tokio::test(start_paused = true)]
async fn claims_of_other_templates_find_nothing() {
    let rig = Rig::new(&[pool("web:latest", 1, 4)]);
    rig.settle().await;
    let in_hand = rig.pools.begin();
    assert!(rig.pools.claim(template(1).id, &in_hand).is_none());
    assert_eq!((rig.status().hits, rig.status().misses, rig.ready()), (0, 0, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_fifty_claims_at_once_each_machine_goes_to_one() {
    let rig = Rig::new(&[pool("web:latest", 8, 8)]);
    let mut world = rig.fake.world.subscribe();
    world.wait_for(|world| world.begun.len() == 8 && world.in_make == 0).await.unwrap();
    while rig.ready() < 8 {
        tokio::task::yield_now().await;
    }
    let template = rig.template("web:latest");
    let start = Arc::new(tokio::sync::Barrier::new(50));
    let claims: Vec<_> = (0..50)
        .map(|_| {
            let (pools, start) = (Arc::clone(&rig.pools), Arc::clone(&start));
            tokio::spawn(async move {
                start.wait().await;
                let in_hand = pools.begin();
                let machine = pools.claim(template, &in_hand).map(|spare| spare.machine);
                // Nobody makes another one while the fifty claim.
                start.wait().await;
                machine
            })
        })
        .collect();
    let mut given = Vec::new();
    for claim in claims {
        given.extend(claim.await.unwrap());
    }
    assert_eq!(given.len(), 8);
    assert_eq!(given.iter().collect::<HashSet<_>>().len(), 8);
    assert_eq!((rig.status().hits, rig.status().misses), (8, 42));
}

#[tokio::test(start_paused = true)]
async fn nothing_is_made_while_somebody_waits() {
    let rig = Rig::new(&[pool("web:latest", 1, 1)]);
    let in_hand = rig.pools.begin();
    let other = rig.pools.begin();
    rig.settle().await;
    drop(other);
    rig.settle().await;
    assert_eq!(rig.world(|world| world.begun.len()), 0);
    let freed = Instant::now();
    drop(in_hand);
    rig.settle().await;
    assert_eq!(rig.ready(), 1);
    assert!(rig.world(|world| world.begun[0].2) >= freed + SETTLE);
}

#[tokio::test(start_paused = true)]
async fn a_machine_in_the_making_waits_between_two_steps() {
    let rig = Rig::new(&[pool("web:latest", 1, 1)]);
    let mut world = rig.fake.world.subscribe();
    world.wait_for(|world| world.steps.len() == 2).await.unwrap();
    let in_hand = rig.pools.begin();
    rig.settle().await;
    assert_eq!(rig.world(|world| (world.in_make, world.steps.len())), (1, 2));
    let freed = Instant::now();
    drop(in_hand);
    rig.settle().await;
    assert_eq!(rig.world(|world| world.steps[2]), freed + SETTLE);
    assert_eq!((rig.ready(), rig.world(|world| world.begun.len())), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn starts_that_follow_closely_on_one_another_leave_no_gap() {
    let rig = Rig::new(&[pool("web:latest", 1, 1)]);
    for _ in 0..50 {
        let in_hand = rig.pools.begin();
        sleep(SETTLE / 2).await;
        drop(in_hand);
        sleep(SETTLE / 2).await;
    }
    assert_eq!(rig.world(|world| world.begun.len()), 0);
    rig.settle().await;
    assert_eq!(rig.ready(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_burst_makes_the_pool_as_large_as_it_was_for_a_while() {
    let rig = Rig::new(&[pool("web:latest", 1, 4)]);
    rig.settle().await;
    for _ in 0..3 {
        rig.claim("web:latest");
    }
    rig.settle().await;
    assert_eq!((rig.status().target, rig.ready()), (3, 3));
    for _ in 0..9 {
        rig.claim("web:latest");
    }
    rig.settle().await;
    assert_eq!((rig.status().target, rig.ready()), (4, 4), "no more than the most");
    let before = rig.world(|world| world.there.len());
    sleep(HISTORY).await;
    assert_eq!((rig.status().target, rig.ready()), (1, 1), "and then it is forgotten");
    assert_eq!(rig.world(|world| world.there.len()), before - 3);
}

#[tokio::test(start_paused = true)]
async fn a_pool_without_a_least_is_filled_by_its_first_claim() {
    let rig = Rig::new(&[pool("web:latest", 0, 4)]);
    rig.settle().await;
    assert_eq!((rig.status().target, rig.ready()), (0, 0));
    assert!(rig.claim("web:latest").is_none());
    rig.settle().await;
    assert_eq!((rig.status().target, rig.ready(), rig.status().misses), (1, 1, 1));
}

#[tokio::test(start_paused = true)]
async fn the_emptiest_pool_is_served_first() {
    let rig = Rig::new(&[pool("web:latest", 2, 4), pool("api:latest", 4, 4)]);
    rig.settle().await;
    assert_eq!(rig.ready(), 6);
    let (web, api) = (rig.template("web:latest"), rig.template("api:latest"));
    let order = rig.world(|world| world.begun.iter().map(|(_, of, _)| *of).collect::<Vec<_>>());
    assert_eq!(order, [web, api, api, web, api, api]);
    let ready: Vec<_> = rig.pools.pools().iter().map(|pool| pool.ready).collect();
    assert_eq!(ready, [2, 4]);
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_is_too_old_is_replaced_without_a_gap() {
    let age_max = Duration::from_mins(2);
    let rig = Rig::with_age(&[pool("web:latest", 2, 2)], age_max);
    rig.settle().await;
    let first = rig.world(|world| world.there.clone());
    let until = Instant::now() + age_max + Duration::from_secs(20);
    while Instant::now() < until {
        assert_eq!(rig.ready(), 2);
        sleep(STEP / 2).await;
    }
    assert_eq!(rig.world(|world| world.discarded.clone()), first, "one by one, the oldest first");
    assert_eq!(rig.world(|world| world.there.len()), 2);
}
