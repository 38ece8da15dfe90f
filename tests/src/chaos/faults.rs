//! What befalls a cluster.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aether_types::WorkerId;
use anyhow::Result;
use rustix::process::Signal;
use tokio::{task::block_in_place, time::sleep};

use super::{
    cluster::{Cluster, LEASE},
    proxy::Way,
};
use crate::Random;

/// How long a way stays broken, and a server away.
const SPELL: Duration = Duration::from_millis(1500);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// SIGKILL, and started again at once, as by a supervisor.
    Kill,
    /// SIGKILL, and away for longer than its lease.
    Lose,
    /// SIGSTOP for longer than its lease, then SIGCONT.
    Freeze,
    /// SIGTERM, and started again: a rolling restart.
    Restart,
    Redis(Way),
    Postgres(Way),
    /// Killed and started again; it has what it wrote down in time.
    RedisKilled,
    /// It forgets everything.
    RedisFlushed,
    RedisFull,
    PostgresKilled,
    /// Nothing can be written in the data directory.
    DiskFull,
    /// The wall clock of a member jumps by so many seconds, and back a moment later.
    Clock(i32),
}

/// A kill, and what was in hand then may be started once more.
#[derive(Debug, Clone)]
pub(crate) struct Inflicted {
    pub(crate) fault: Fault,
    pub(crate) at_ms: i64,
    pub(crate) worker: WorkerId,
}

#[derive(Debug)]
pub(crate) struct Faults {
    random: Random,
    pause_max: Duration,
    pub(crate) inflicted: Vec<Inflicted>,
}

fn now_ms() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_millis()).unwrap_or(i64::MAX)
}

impl Faults {
    pub(crate) fn new(seed: u64, pause_max: Duration) -> Self {
        Self { random: Random::with_seed(seed), pause_max, inflicted: Vec::new() }
    }

    pub(crate) async fn inflict(&mut self, cluster: &mut Cluster, fault: Fault) -> Result<()> {
        let pause = u64::try_from(self.pause_max.as_micros()).unwrap_or(u64::MAX).max(1);
        sleep(Duration::from_micros(self.random.below(pause))).await;
        let place = usize::try_from(self.random.below(cluster.members.len() as u64))?;
        let worker = cluster.members[place].worker()?;
        self.inflicted.push(Inflicted { fault, at_ms: now_ms(), worker });
        let member = &mut cluster.members[place];
        match fault {
            Fault::Kill => {
                member.kill()?;
                member.start_again()?;
            }
            Fault::Lose => {
                member.kill()?;
                sleep(LEASE * 2).await;
                member.start_again()?;
            }
            Fault::Freeze => {
                member.signal(Signal::STOP)?;
                sleep(LEASE * 2).await;
                member.signal(Signal::CONT)?;
            }
            Fault::Restart => {
                block_in_place(|| member.platform.terminate())?;
                member.start_again()?;
            }
            Fault::Redis(way) => {
                member.redis.set(way);
                sleep(SPELL).await;
                member.redis.set(Way::Open);
            }
            Fault::Postgres(way) => {
                member.postgres.set(way);
                sleep(SPELL).await;
                member.postgres.set(Way::Open);
            }
            Fault::RedisKilled => block_in_place(|| {
                cluster.redis.stop();
                cluster.redis.start_again();
            }),
            Fault::RedisFlushed => {
                block_in_place(|| {
                    cluster.redis.ask(&["FLUSHALL"]);
                    cluster.redis.stop();
                    cluster.redis.start_again();
                });
            }
            Fault::RedisFull => {
                cluster.redis.ask(&["CONFIG", "SET", "maxmemory", "1mb"]);
                sleep(SPELL).await;
                cluster.redis.ask(&["CONFIG", "SET", "maxmemory", "0"]);
            }
            Fault::DiskFull => {
                let full = block_in_place(|| member.platform.fill_disk())?;
                sleep(SPELL).await;
                drop(full);
            }
            Fault::Clock(seconds) => {
                member.shift_clock(seconds)?;
                sleep(SPELL).await;
                member.shift_clock(0)?;
            }
            Fault::PostgresKilled => block_in_place(|| {
                cluster.postgres.stop();
                cluster.postgres.start_again();
            }),
        }
        Ok(())
    }
}
