//! Figures of a benchmark: taken interleaved in one run, reported as ratios.

use std::time::Duration;

use anyhow::{Result, ensure};

/// Times of one kind.
#[derive(Debug, Clone, Default)]
pub struct Times(Vec<Duration>);

impl Times {
    pub fn push(&mut self, time: Duration) {
        self.0.push(time);
    }

    /// The value that a part of the times is below. Zero where nothing was measured.
    #[must_use]
    pub fn quantile(&self, part: f64) -> Duration {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "an index into a list of some hundred times"
        )]
        let index = ((sorted.len() as f64) * part) as usize;
        let last = sorted.len().saturating_sub(1);
        sorted.get(index.min(last)).copied().unwrap_or_default()
    }
}

/// One comparison with its bar.
#[derive(Debug)]
pub struct Comparison {
    pub name: &'static str,
    pub ours: Times,
    pub bare: Times,
    /// Ours may take at most this many times what the bare thing takes, at the median.
    pub at_most: f64,
    /// The same at the 99th percentile, where that has a bar.
    pub at_most_p99: Option<f64>,
}

impl Comparison {
    #[must_use]
    pub fn new(name: &'static str, at_most: f64) -> Self {
        Self { name, ours: Times::default(), bare: Times::default(), at_most, at_most_p99: None }
    }

    #[must_use]
    pub fn with_p99(mut self, at_most: f64) -> Self {
        self.at_most_p99 = Some(at_most);
        self
    }

    #[must_use]
    pub fn ratio(&self, part: f64) -> f64 {
        self.ours.quantile(part).as_secs_f64() / self.bare.quantile(part).as_secs_f64()
    }

    /// A line for people, or with `--json` one for programs. Fails past the bar, but only where
    /// `--enforce` asks for it: times are no gate on a shared machine.
    pub fn report(&self) -> Result<()> {
        let milliseconds = |time: Duration| time.as_secs_f64() * 1000.0;
        let (ours, bare) = (self.ours.quantile(0.5), self.bare.quantile(0.5));
        let (ratio, high) = (self.ratio(0.5), self.ratio(0.99));
        let holds = ratio <= self.at_most && self.at_most_p99.is_none_or(|most| high <= most);
        #[expect(clippy::print_stdout, reason = "the output of a benchmark")]
        if has_flag("--json") {
            println!(
                "{}",
                serde_json::json!({
                    "name": self.name,
                    "samples": self.ours.0.len(),
                    "ours_ms_p50": milliseconds(ours),
                    "bare_ms_p50": milliseconds(bare),
                    "ratio_p50": ratio,
                    "ratio_p99": high,
                    "bar": self.at_most,
                    "bar_p99": self.at_most_p99,
                    "holds": holds,
                })
            );
        } else {
            println!(
                "{:24} ours {:9.3} ms   bare {:9.3} ms   ratio {ratio:5.3} (bar {:4.2}, p99 {high:5.3}, {} samples)",
                self.name,
                milliseconds(ours),
                milliseconds(bare),
                self.at_most,
                self.ours.0.len(),
            );
        }
        ensure!(
            holds || !has_flag("--enforce"),
            "{}: {ratio:.3} (p99 {high:.3}) is past {}",
            self.name,
            self.at_most
        );
        Ok(())
    }
}

#[must_use]
pub fn has_flag(flag: &str) -> bool {
    std::env::args().any(|argument| argument == flag)
}

/// `--samples N`, or what is usual.
#[must_use]
pub fn samples(usual: usize) -> usize {
    let mut arguments = std::env::args().skip_while(|argument| argument != "--samples");
    arguments.nth(1).and_then(|count| count.parse().ok()).unwrap_or(usual)
}
