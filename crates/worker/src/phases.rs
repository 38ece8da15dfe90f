//! Where the time of a start goes: steps that follow one another without a gap.

use aether_drivers::Phase;
use aether_types::{StartKind, StartPhase, StartReport, Timestamp};
use tokio::time::Instant;

use std::time::Duration;

/// Begins at the moment at which the request was recorded, which may have been in another process:
/// the time until now is by the wall's clock, and all after it by this process's.
#[derive(Debug)]
pub(crate) struct PhaseClock {
    last: Instant,
    phases: Vec<StartPhase>,
}

impl PhaseClock {
    pub(crate) fn since(recorded: Timestamp) -> Self {
        let ms = Timestamp::now().unix_ms().saturating_sub(recorded.unix_ms());
        let queued = Duration::from_millis(u64::try_from(ms).unwrap_or(0));
        let mut clock = Self { last: Instant::now(), phases: Vec::with_capacity(8) };
        clock.push("queue", queued);
        clock
    }

    /// Ends a step; the next one begins. A step that comes again goes on.
    pub(crate) fn mark(&mut self, name: &str) {
        let now = Instant::now();
        self.push(name, now - self.last);
        self.last = now;
    }

    /// Steps that the driver measured. What it took beyond them belongs to the next step.
    pub(crate) fn take(&mut self, phases: &[Phase]) {
        for phase in phases {
            let took = phase.took.min(self.last.elapsed());
            self.push(phase.name, took);
            self.last += took;
        }
    }

    pub(crate) fn report(self, kind: StartKind, fallback: Option<String>) -> StartReport {
        StartReport::new(kind, self.phases, fallback)
    }

    fn push(&mut self, name: &str, took: Duration) {
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        match self.phases.iter_mut().find(|phase| phase.name == name) {
            Some(phase) => phase.us = phase.us.saturating_add(us),
            None => self.phases.push(StartPhase { name: name.to_owned(), us }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn steps_follow_one_another_and_sum_to_the_whole() {
        let begun = Instant::now();
        let mut clock = PhaseClock::since(Timestamp::now());
        tokio::time::advance(Duration::from_millis(3)).await;
        clock.mark("wait");
        tokio::time::advance(Duration::from_millis(10)).await;
        clock.take(&[
            Phase { name: "process", took: Duration::from_millis(4) },
            Phase { name: "load", took: Duration::from_millis(5) },
        ]);
        tokio::time::advance(Duration::from_millis(1)).await;
        clock.mark("connect");
        let report = clock.report(StartKind::Restore, None);
        let names: Vec<_> = report.phases.iter().map(|p| (p.name.as_str(), p.us)).collect();
        assert_eq!(
            names[1..],
            [("wait", 3000), ("process", 4000), ("load", 5000), ("connect", 2000)]
        );
        let elapsed = u64::try_from(begun.elapsed().as_micros()).unwrap();
        assert_eq!(report.total_us, elapsed + report.phases[0].us);
    }
}
