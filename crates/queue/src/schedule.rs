//! Which entry is claimed next: pure, synchronous, told the time.
//!
//! ```text
//!   insert ──► delayed ── due ──► ready ── lease ──► leased ── remove ──► gone
//!                 ▲                 ▲                  │
//!                 └── give back ────┴── give back ─────┘   (release, or the lease ran out)
//! ```
//!
//! - Within a lane and a priority the entry that came first goes first; one that is given back
//!   keeps its place.
//! - Priorities of a lane share by smooth weighted round robin: each claim adds every waiting
//!   priority's weight to its credit, takes the highest, and charges it the sum.
//! - A worker's own lane goes before the shared one, but after `OWN_RUN_MAX` claims in a row from
//!   its own it takes one from the shared.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::Duration,
};

use aether_types::{Priority, TaskId, WorkerId};

use crate::{
    Depth, Lane,
    share::{self, Credits, OWN_RUN_MAX, PRIORITIES},
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    Delayed { due: Duration },
    Ready,
    Leased { worker: WorkerId, epoch: i64, length: Duration, until: Duration },
}

#[derive(Debug, Clone, Copy)]
struct Item {
    lane: Lane,
    priority: Priority,
    seq: i64,
    place: Place,
}

/// The ready entries of a lane.
#[derive(Debug, Default)]
struct ReadyLane {
    queues: [BTreeMap<i64, TaskId>; PRIORITIES],
    credits: Credits,
}

impl ReadyLane {
    fn is_empty(&self) -> bool {
        self.queues.iter().all(BTreeMap::is_empty)
    }

    /// The credits after the next claim, and what it claims.
    fn next(&self) -> Option<(Credits, TaskId)> {
        let waiting = self.queues.each_ref().map(|queue| !queue.is_empty());
        let (credits, best) = share::next(self.credits, waiting)?;
        let (_, task) = self.queues[best].first_key_value()?;
        Some((credits, *task))
    }
}

/// An entry that was chosen. It stays ready until `lease` is called with it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Choice {
    pub(crate) task: TaskId,
    lane: Lane,
    credits: Credits,
    own_run: u32,
}

#[derive(Debug, Default)]
pub(crate) struct Schedule {
    items: HashMap<TaskId, Item>,
    lanes: HashMap<Lane, ReadyLane>,
    delayed: BTreeSet<(Duration, TaskId)>,
    lease_ends: BTreeSet<(Duration, TaskId)>,
    ready: usize,
    /// Claims in a row from its own lane, by worker; only those that are not 0.
    own_runs: HashMap<WorkerId, u32>,
}

impl Schedule {
    /// `false`: the task is here already, and stays as it is.
    pub(crate) fn insert(
        &mut self,
        task: TaskId,
        lane: Lane,
        priority: Priority,
        seq: i64,
        place: Place,
    ) -> bool {
        if self.items.contains_key(&task) {
            return false;
        }
        self.items.insert(task, Item { lane, priority, seq, place });
        self.enter(task);
        true
    }

    pub(crate) fn contains(&self, task: TaskId) -> bool {
        self.items.contains_key(&task)
    }

    pub(crate) fn lane(&self, task: TaskId) -> Option<Lane> {
        self.items.get(&task).map(|i| i.lane)
    }

    /// Moves delayed entries whose time has come. Returns their lanes.
    pub(crate) fn promote(&mut self, now: Duration) -> Vec<Lane> {
        let mut promoted = Vec::new();
        while let Some(&(due, task)) = self.delayed.first() {
            if due > now {
                break;
            }
            self.put(task, Place::Ready);
            promoted.extend(self.lane(task));
        }
        promoted
    }

    pub(crate) fn next_due(&self) -> Option<Duration> {
        self.delayed.first().map(|d| d.0)
    }

    pub(crate) fn next_lease_end(&self) -> Option<Duration> {
        self.lease_ends.first().map(|l| l.0)
    }

    pub(crate) fn choose(&self, worker: WorkerId) -> Option<Choice> {
        let own = self.lanes.get(&Lane::Worker(worker)).and_then(ReadyLane::next);
        let shared = self.lanes.get(&Lane::Shared).and_then(ReadyLane::next);
        let run = self.own_runs.get(&worker).copied().unwrap_or(0);
        let (lane, (credits, task), own_run) = match (own, shared) {
            (Some(own), Some(_)) if run < OWN_RUN_MAX => (Lane::Worker(worker), own, run + 1),
            (Some(own), None) => (Lane::Worker(worker), own, 0),
            (_, Some(shared)) => (Lane::Shared, shared, 0),
            (None, None) => return None,
        };
        Some(Choice { task, lane, credits, own_run })
    }

    /// Leases what `choose` chose, with nothing between the two.
    pub(crate) fn lease(
        &mut self,
        choice: Choice,
        worker: WorkerId,
        epoch: i64,
        length: Duration,
        now: Duration,
    ) {
        if let Some(lane) = self.lanes.get_mut(&choice.lane) {
            lane.credits = choice.credits;
        }
        if choice.own_run == 0 {
            self.own_runs.remove(&worker);
        } else {
            self.own_runs.insert(worker, choice.own_run);
        }
        let until = now.saturating_add(length);
        self.put(choice.task, Place::Leased { worker, epoch, length, until });
    }

    /// `false`: not leased with this epoch.
    pub(crate) fn holds(&self, task: TaskId, held_epoch: i64) -> bool {
        matches!(
            self.items.get(&task).map(|i| i.place),
            Some(Place::Leased { epoch, .. }) if epoch == held_epoch
        )
    }

    pub(crate) fn extend(&mut self, task: TaskId, now: Duration) {
        if let Some(Place::Leased { worker, epoch, length, .. }) =
            self.items.get(&task).map(|i| i.place)
        {
            let until = now.saturating_add(length);
            self.put(task, Place::Leased { worker, epoch, length, until });
        }
    }

    /// Makes a leased entry ready, now or at `due`.
    pub(crate) fn give_back(&mut self, task: TaskId, due: Option<Duration>) {
        self.put(task, due.map_or(Place::Ready, |due| Place::Delayed { due }));
    }

    pub(crate) fn is_leased(&self, task: TaskId) -> bool {
        matches!(self.items.get(&task).map(|i| i.place), Some(Place::Leased { .. }))
    }

    pub(crate) fn remove(&mut self, task: TaskId) {
        self.leave(task);
        self.items.remove(&task);
    }

    /// Leases that have run out.
    pub(crate) fn run_out(&self, now: Duration) -> Vec<TaskId> {
        self.lease_ends.iter().take_while(|l| l.0 <= now).map(|l| l.1).collect()
    }

    /// Leases of one worker.
    pub(crate) fn leases_of(&self, holder: WorkerId) -> Vec<TaskId> {
        let held = |task: &&(Duration, TaskId)| {
            matches!(
                self.items.get(&task.1).map(|i| i.place),
                Some(Place::Leased { worker, .. }) if worker == holder
            )
        };
        self.lease_ends.iter().filter(held).map(|l| l.1).collect()
    }

    pub(crate) fn depth(&self) -> Depth {
        let count = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
        Depth {
            ready: count(self.ready),
            delayed: count(self.delayed.len()),
            leased: count(self.lease_ends.len()),
        }
    }

    fn put(&mut self, task: TaskId, place: Place) {
        self.leave(task);
        if let Some(item) = self.items.get_mut(&task) {
            item.place = place;
            self.enter(task);
        }
    }

    /// Adds a task to the index of its place.
    fn enter(&mut self, task: TaskId) {
        let Some(item) = self.items.get(&task) else { return };
        match item.place {
            Place::Delayed { due } => {
                self.delayed.insert((due, task));
            }
            Place::Ready => {
                let lane = self.lanes.entry(item.lane).or_default();
                lane.queues[index(item.priority)].insert(item.seq, task);
                self.ready += 1;
            }
            Place::Leased { until, .. } => {
                self.lease_ends.insert((until, task));
            }
        }
    }

    /// Takes a task from the index of its place.
    fn leave(&mut self, task: TaskId) {
        let Some(item) = self.items.get(&task) else { return };
        match item.place {
            Place::Delayed { due } => {
                self.delayed.remove(&(due, task));
            }
            Place::Ready => {
                if let Some(lane) = self.lanes.get_mut(&item.lane) {
                    lane.queues[index(item.priority)].remove(&item.seq);
                    // The shared lane keeps its credits; workers come and go.
                    if lane.is_empty() && item.lane != Lane::Shared {
                        self.lanes.remove(&item.lane);
                    }
                }
                self.ready -= 1;
            }
            Place::Leased { until, .. } => {
                self.lease_ends.remove(&(until, task));
            }
        }
    }
}

pub(crate) fn index(priority: Priority) -> usize {
    match priority {
        Priority::Critical => 0,
        Priority::High => 1,
        Priority::Default => 2,
        Priority::Low => 3,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn claim(schedule: &mut Schedule, worker: WorkerId) -> Option<TaskId> {
        let choice = schedule.choose(worker)?;
        schedule.lease(choice, worker, 1, Duration::from_secs(1), Duration::ZERO);
        Some(choice.task)
    }

    #[test]
    fn priorities_share_by_weight_in_every_round() {
        let mut schedule = Schedule::default();
        let mut by_task = HashMap::new();
        for seq in 0..240 {
            let priority = Priority::ALL[usize::try_from(seq % 4).unwrap()];
            let task = TaskId::new();
            by_task.insert(task, priority);
            schedule.insert(task, Lane::Shared, priority, seq, Place::Ready);
        }
        let worker = WorkerId::new();
        for _ in 0..4 {
            let mut round = HashMap::new();
            for _ in 0..15 {
                let task = claim(&mut schedule, worker).unwrap();
                *round.entry(by_task[&task].as_str()).or_insert(0) += 1;
            }
            let expected =
                HashMap::from([("critical", 8), ("high", 4), ("default", 2), ("low", 1)]);
            assert_eq!(round, expected);
        }
    }

    #[test]
    fn the_shared_lane_is_not_starved_by_a_workers_own() {
        let mut schedule = Schedule::default();
        let worker = WorkerId::new();
        let mut shared = Vec::new();
        for seq in 0..64 {
            let task = TaskId::new();
            let lane = if seq % 2 == 0 { Lane::Shared } else { Lane::Worker(worker) };
            if lane == Lane::Shared {
                shared.push(task);
            }
            schedule.insert(task, lane, Priority::Default, seq, Place::Ready);
        }
        let own = usize::try_from(OWN_RUN_MAX).unwrap();
        for _ in 0..3 {
            let run: Vec<_> = (0..=own).map(|_| claim(&mut schedule, worker).unwrap()).collect();
            assert!(run[..own].iter().all(|t| !shared.contains(t)));
            assert!(shared.contains(&run[own]));
        }
    }

    proptest! {
        /// However entries come and whatever priorities have work, the first of a priority is
        /// claimed within two rounds.
        #[test]
        fn no_priority_starves(arrivals in prop::collection::vec(prop::collection::vec(0..4_usize, 0..3), 0..200)) {
            let mut schedule = Schedule::default();
            let mut waiting: HashMap<TaskId, usize> = HashMap::new();
            let mut waited = [0_u32; PRIORITIES];
            let worker = WorkerId::new();
            let mut seq = 0;
            let drain = std::iter::repeat_n(Vec::new(), 400);
            for arriving in arrivals.into_iter().chain(drain) {
                for priority in arriving {
                    let task = TaskId::new();
                    seq += 1;
                    schedule.insert(task, Lane::Shared, Priority::ALL[priority], seq, Place::Ready);
                    waiting.insert(task, priority);
                }
                let Some(task) = claim(&mut schedule, worker) else { continue };
                let claimed = waiting.remove(&task).unwrap();
                for (priority, waited) in waited.iter_mut().enumerate() {
                    let waits = waiting.values().any(|p| *p == priority);
                    *waited = if waits && priority != claimed { *waited + 1 } else { 0 };
                    prop_assert!(*waited <= 30, "priority {} waits for {} claims", priority, waited);
                }
            }
            prop_assert!(waiting.is_empty());
        }
    }
}
