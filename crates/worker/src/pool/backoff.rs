//! Pauses after failures: longer each time, never the same for two pools, and said once.

use std::time::Duration;

use tokio::time::Instant;

const FIRST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_mins(5);

#[derive(Debug, Default)]
pub(super) struct Backoff {
    failures: u32,
    until: Option<Instant>,
}

impl Backoff {
    /// Whether this is the first failure in a row, which is the one to report.
    pub(super) fn failed(&mut self, now: Instant) -> bool {
        let pause = FIRST.saturating_mul(1 << self.failures.min(16)).min(LONGEST);
        self.failures = self.failures.saturating_add(1);
        self.until = Some(now + pause.mul_f64(jitter()));
        self.failures == 1
    }

    /// Not before then; `None` where now is well.
    pub(super) fn wait(&self, now: Instant) -> Option<Instant> {
        self.until.filter(|&until| until > now)
    }
}

/// From three quarters to five quarters.
fn jitter() -> f64 {
    let mut byte = [0; 1];
    // Without randomness every pause is as long as it says, which is well too.
    match getrandom::fill(&mut byte) {
        Ok(()) => 0.75 + f64::from(byte[0]) / 512.0,
        Err(_) => 1.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_bound() {
        let now = Instant::now();
        let mut backoff = Backoff::default();
        assert_eq!(backoff.wait(now), None);
        for n in 0..40 {
            assert_eq!(backoff.failed(now), n == 0);
            let whole = (FIRST * (1 << n.min(10))).min(LONGEST);
            let pause = backoff.wait(now).unwrap() - now;
            assert!(pause >= whole.mul_f64(0.74) && pause <= whole.mul_f64(1.26), "{n} {pause:?}");
        }
        assert_eq!(backoff.wait(now + LONGEST.mul_f64(1.26)), None);
    }
}
