//! The chaos rig: several platforms on one PostgreSQL and one Redis of their own, clients that write
//! down what they were told, faults by a seed, and an oracle that compares both with the truth.

mod cluster;
mod faults;
mod journal;
mod load;
mod oracle;
mod proxy;

use std::{sync::Arc, time::Duration};

use anyhow::{Result, ensure};
use cluster::Cluster;
pub use cluster::{available, can_reach_hosts};
pub use faults::Fault;
use faults::Faults;
use journal::Journal;
pub use oracle::Verdict;
pub use proxy::Way;
use tokio::sync::watch;

use crate::Random;

const CLIENTS: u64 = 6;

/// What is tried.
#[derive(Debug, Clone)]
pub struct Plan {
    pub seed: u64,
    pub members: usize,
    /// Disks can be filled and clocks moved.
    pub hosts: bool,
    /// One after another, each at a random moment.
    pub faults: Vec<Fault>,
    /// The longest time between two of them.
    pub pause_max: Duration,
}

/// Carries the plan out and says what came of it. What was done is printed, by its seed.
pub async fn run(plan: Plan) -> Result<Verdict> {
    let mut cluster = Cluster::start(plan.members, plan.hosts).await?;
    let journal = Arc::new(Journal::default());
    let stop = watch::Sender::new(false);
    let clients: Vec<_> = (0..CLIENTS)
        .map(|number| {
            let load = load::Load {
                journal: Arc::clone(&journal),
                gateways: cluster.gateways(),
                stop: stop.subscribe(),
            };
            let random = Random::with_seed(plan.seed.wrapping_add(number).wrapping_add(1));
            tokio::spawn(load.run(format!("client-{number}"), random))
        })
        .collect();
    let mut faults = Faults::new(plan.seed, plan.pause_max);
    for fault in &plan.faults {
        faults.inflict(&mut cluster, *fault).await?;
    }
    cluster.heal()?;
    stop.send_replace(true);
    for client in clients {
        client.await?;
    }
    let verdict = oracle::judge(&cluster, &journal, &faults).await?;
    cluster.finish().await?;
    ensure!(journal.tries() > 0, "no client has done anything");
    Ok(verdict)
}
