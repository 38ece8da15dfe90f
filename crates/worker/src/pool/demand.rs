//! How many machines of a template are wanted, from how many were.
//!
//! A machine that is claimed is back after the refill time: the moving average of how long it took
//! to make one, the waiting for quiet included. What comes within less than that is served by what
//! is there already. So a pool's demand is the largest number of creations that fell into any
//! window of [`SAFETY`] refill times within the last [`HISTORY`].

use std::{collections::VecDeque, time::Duration};

use tokio::time::Instant;

/// What was asked for longer ago is forgotten.
pub(super) const HISTORY: Duration = Duration::from_mins(10);
/// A window is this many refill times: the next machine may begin late and take long.
pub(super) const SAFETY: u32 = 2;
pub(super) const WINDOW_MIN: Duration = Duration::from_secs(1);
pub(super) const WINDOW_MAX: Duration = Duration::from_mins(1);
/// Until one was made.
const REFILL_GUESS: Duration = Duration::from_secs(1);
/// Creations that are remembered. More than that in ten minutes shorten the memory; no pool is as
/// large.
const REMEMBERED: usize = 1024;

#[derive(Debug)]
pub(super) struct Demand {
    asked: VecDeque<Instant>,
    refill: Duration,
}

impl Default for Demand {
    fn default() -> Self {
        Self { asked: VecDeque::with_capacity(REMEMBERED), refill: REFILL_GUESS }
    }
}

impl Demand {
    /// Someone creates a VM of the template, whether there was a machine or not.
    pub(super) fn ask(&mut self, now: Instant) {
        if self.asked.len() == REMEMBERED {
            self.asked.pop_front();
        }
        self.asked.push_back(now);
    }

    /// A machine was made. Three quarters of what is known of the refill time stay.
    pub(super) fn refilled(&mut self, took: Duration) {
        self.refill = (self.refill * 3 + took) / 4;
    }

    pub(super) fn window(&self) -> Duration {
        (self.refill * SAFETY).clamp(WINDOW_MIN, WINDOW_MAX)
    }

    /// The most creations that any window had. Two that are a whole window apart share none.
    pub(super) fn peak(&mut self, now: Instant) -> u32 {
        while self.asked.front().is_some_and(|&at| now.duration_since(at) >= HISTORY) {
            self.asked.pop_front();
        }
        let window = self.window();
        let mut most = 0;
        let mut first = 0;
        for (last, &at) in self.asked.iter().enumerate() {
            while at.duration_since(self.asked[first]) >= window {
                first += 1;
            }
            most = most.max(last + 1 - first);
        }
        u32::try_from(most).unwrap_or(u32::MAX)
    }

    /// When the oldest creation that is remembered will be forgotten.
    pub(super) fn next_change(&self) -> Option<Instant> {
        self.asked.front().map(|&at| at + HISTORY)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    #[test]
    fn the_peak_is_the_fullest_window_of_the_history() {
        let start = Instant::now();
        let mut demand = Demand::default();
        assert_eq!(demand.peak(start), 0);
        // The window is twice the guess of a second.
        for at in [0, 1, 10, 11, 11, 11, 13, 60] {
            demand.ask(start + seconds(at));
        }
        assert_eq!(demand.peak(start + seconds(60)), 4);
        assert_eq!(demand.next_change(), Some(start + HISTORY));
    }

    #[test]
    fn creations_a_whole_window_apart_are_served_by_one_machine() {
        let start = Instant::now();
        let mut demand = Demand::default();
        for at in 0..20 {
            demand.ask(start + demand.window() * at);
        }
        assert_eq!(demand.peak(start + demand.window() * 20), 1);
    }

    #[test]
    fn what_is_older_than_the_history_counts_no_more() {
        let start = Instant::now();
        let mut demand = Demand::default();
        for _ in 0..5 {
            demand.ask(start);
        }
        demand.ask(start + seconds(5));
        assert_eq!(demand.peak(start + HISTORY - seconds(1)), 5);
        assert_eq!(demand.peak(start + HISTORY), 1);
        assert_eq!(demand.peak(start + HISTORY + seconds(5)), 0);
        assert_eq!(demand.next_change(), None);
    }

    #[test]
    fn slow_refills_widen_the_window_within_bounds() {
        let mut demand = Demand::default();
        assert_eq!(demand.window(), seconds(2));
        demand.refilled(seconds(5));
        assert_eq!(demand.window(), seconds(4));
        for _ in 0..50 {
            demand.refilled(seconds(600));
        }
        assert_eq!(demand.window(), WINDOW_MAX);
        for _ in 0..50 {
            demand.refilled(Duration::from_millis(10));
        }
        assert_eq!(demand.window(), WINDOW_MIN);
    }

    #[test]
    fn memory_of_demand_is_bounded() {
        let start = Instant::now();
        let mut demand = Demand::default();
        for _ in 0..5000 {
            demand.ask(start);
        }
        assert_eq!(demand.peak(start), 1024);
        assert_eq!(demand.asked.capacity(), REMEMBERED);
    }
}
