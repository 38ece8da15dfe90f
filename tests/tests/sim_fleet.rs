//! Several platforms on one PostgreSQL and one Redis, with simulated machines, under faults: no
//! acknowledged task is lost, none ends twice, and nothing is left.
//!
//! `AETHER_CHAOS_KILLS` and `AETHER_SEED` make a longer run, and the same one again.

use std::time::Duration;

use aether_tests::{
    Random,
    chaos::{self, Fault, Plan, Verdict, Way},
};
use anyhow::{Result, ensure};

#[expect(clippy::disallowed_methods, reason = "tests are configured by their environment")]
fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn seed() -> u64 {
    number("AETHER_SEED").unwrap_or_else(|| u64::from(std::process::id()))
}

#[expect(clippy::print_stdout, reason = "what replays a failure, and what is measured")]
async fn carried_out(faults: Vec<Fault>, pause_max: Duration) -> Result<Option<Verdict>> {
    if !chaos::available() {
        return Ok(None);
    }
    let seed = seed();
    println!(
        "AETHER_SEED={seed}, {} faults, first {:?}",
        faults.len(),
        &faults[..faults.len().min(12)]
    );
    let hosts = faults.iter().any(|fault| matches!(fault, Fault::DiskFull | Fault::Clock(_)));
    let verdict = chaos::run(Plan { seed, members: 3, hosts, faults, pause_max }).await?;
    println!("{verdict:#?}");
    verdict.ensure()?;
    Ok(Some(verdict))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kills_lose_nothing() -> Result<()> {
    let kills = usize::try_from(number("AETHER_CHAOS_KILLS").unwrap_or(12))?;
    let faults = vec![Fault::Kill; kills];
    let Some(verdict) = carried_out(faults, Duration::from_millis(700)).await? else {
        return Ok(());
    };
    ensure!(verdict.kills == kills && verdict.acknowledged > kills, "{verdict:#?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_that_are_lost_or_stand_still_change_nothing() -> Result<()> {
    let faults = vec![Fault::Lose, Fault::Freeze, Fault::Freeze];
    carried_out(faults, Duration::from_millis(500)).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_that_fail_lose_nothing() -> Result<()> {
    let slow = Way::Slow(Duration::from_millis(20));
    let mut faults = vec![
        Fault::RedisKilled,
        Fault::RedisFlushed,
        Fault::RedisFull,
        Fault::PostgresKilled,
        Fault::Redis(Way::Cut),
        Fault::Redis(Way::OneWay),
        Fault::Redis(Way::Silent),
        Fault::Redis(slow),
        Fault::Postgres(Way::Cut),
        Fault::Postgres(Way::OneWay),
        Fault::Postgres(slow),
    ];
    let mut random = Random::with_seed(seed());
    for place in (1..faults.len()).rev() {
        faults.swap(place, usize::try_from(random.below(place as u64 + 1))?);
    }
    carried_out(faults, Duration::from_millis(300)).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hosts_that_fail_lose_nothing() -> Result<()> {
    if !chaos::can_reach_hosts() {
        return Ok(());
    }
    let hour = 3600;
    let faults = vec![
        Fault::DiskFull,
        Fault::Clock(hour),
        Fault::Kill,
        Fault::Clock(-hour),
        Fault::DiskFull,
        Fault::Kill,
    ];
    carried_out(faults, Duration::from_millis(500)).await?;
    Ok(())
}

/// Each in turn is ended and started again, while clients that retry go on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolling_restart_fails_no_request() -> Result<()> {
    carried_out(vec![Fault::Restart; 6], Duration::from_millis(300)).await?;
    Ok(())
}
