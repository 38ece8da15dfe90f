//! Claim, lease and crash in virtual time: workers that die, stand still and come back, dispatchers
//! that die between two lines, and queues that start again or forget everything. Every seed is a
//! story of its own, and is told in full where something does not hold.
//!
//! ```text
//! AETHER_SIM_SEEDS=100000 cargo test --release -p aether-queue --test simulation -- --nocapture
//! AETHER_SIM_SEED=4711 …       that one again
//! ```

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(clippy::print_stdout, reason = "the story is for who reads the output of the test")]
#![expect(clippy::disallowed_methods, reason = "which seeds are run is asked for from outside")]

mod engine;
mod truth;
mod world;

use std::ops::Range;

use engine::Engine;
use world::World;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect("a number"))
}

/// The one that was asked for, or so many.
fn seeds(usual: u64) -> Range<u64> {
    match number("AETHER_SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("AETHER_SIM_SEEDS").unwrap_or(usual),
    }
}

async fn run(engine: &mut Engine, seeds: Range<u64>) {
    let mut told = Told::default();
    for seed in seeds {
        let mut world = World::new(engine, seed).await;
        world.live().await;
        told.add(&world);
    }
    // A simulation in which nothing goes wrong proves nothing.
    println!("{told:?}");
    assert!(told.seeds < 100 || told.kills * told.stops * told.refused * told.again > 0);
}

/// What happened in all of them.
#[derive(Debug, Default)]
struct Told {
    seeds: u64,
    tasks: usize,
    kills: u64,
    stops: u64,
    restarts: u64,
    /// Attempts after the first.
    again: u64,
    /// Answers of attempts that did not speak for their task any more.
    refused: u64,
}

impl Told {
    fn add(&mut self, world: &World<'_>) {
        self.seeds += 1;
        self.tasks += world.truth.count();
        self.kills += world.kills;
        self.stops += world.stops;
        self.restarts += world.restarts;
        self.again += world.truth.again;
        self.refused += world.truth.refused;
    }
}

#[tokio::test]
async fn nothing_is_lost_and_nothing_ends_twice_on_sqlite() {
    run(&mut Engine::sqlite(), seeds(150)).await;
}

#[tokio::test]
async fn nothing_is_lost_and_nothing_ends_twice_on_redis() {
    let Some(mut engine) = Engine::redis() else { return };
    run(&mut engine, seeds(150)).await;
}
