//! Whose turn it is: smooth weighted round robin among the priorities of a lane, and a bound on
//! how long a worker's own lane goes before the shared one.

use std::collections::HashMap;

use aether_types::{Priority, WorkerId};

use crate::Lane;

/// Claims in a row from a worker's own lane while the shared one waits. Work for a VM that is
/// there already is mostly short commands, which people wait for.
pub(crate) const OWN_RUN_MAX: u32 = 7;

pub(crate) const PRIORITIES: usize = Priority::ALL.len();

/// By priority, the most urgent first.
pub(crate) type Credits = [i64; PRIORITIES];

/// Which of the priorities that have work is next, and the credits after that.
pub(crate) fn next(mut credits: Credits, waiting: [bool; PRIORITIES]) -> Option<(Credits, usize)> {
    let mut sum = 0;
    let mut best: Option<usize> = None;
    for (i, priority) in Priority::ALL.iter().enumerate() {
        if !waiting[i] {
            // Credit is for waiting; who has nothing does not wait.
            credits[i] = 0;
            continue;
        }
        let weight = i64::from(priority.weight());
        credits[i] += weight;
        sum += weight;
        if best.is_none_or(|b| credits[i] > credits[b]) {
            best = Some(i);
        }
    }
    let best = best?;
    credits[best] -= sum;
    Some((credits, best))
}

/// The turns of one process. Each process of several has its own, so that all together share by
/// weight too.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    /// Only lanes that have work.
    credits: HashMap<Lane, Credits>,
    /// Claims in a row from its own lane, by worker; only those that are not 0.
    own_runs: HashMap<WorkerId, u32>,
}

impl Turns {
    /// The lane and the priority to take from, which are charged for it at once: where another
    /// process is faster, the turn was still theirs.
    pub(crate) fn take(
        &mut self,
        worker: WorkerId,
        own: [bool; PRIORITIES],
        shared: [bool; PRIORITIES],
    ) -> Option<(Lane, usize)> {
        let has = |waiting: [bool; PRIORITIES]| waiting.contains(&true);
        let run = self.own_runs.get(&worker).copied().unwrap_or(0);
        let (lane, waiting, run) = match (has(own), has(shared)) {
            (true, true) if run < OWN_RUN_MAX => (Lane::Worker(worker), own, run + 1),
            (true, false) => (Lane::Worker(worker), own, 0),
            (_, true) | (false, false) => (Lane::Shared, shared, 0),
        };
        if run == 0 {
            self.own_runs.remove(&worker);
        } else {
            self.own_runs.insert(worker, run);
        }
        if !has(own) {
            self.credits.remove(&Lane::Worker(worker));
        }
        let (credits, priority) =
            next(self.credits.get(&lane).copied().unwrap_or_default(), waiting)?;
        self.credits.insert(lane, credits);
        Some((lane, priority))
    }
}
