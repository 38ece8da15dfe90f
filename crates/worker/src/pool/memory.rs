//! Whether the host has memory for machines that nobody uses yet.
//!
//! Pressure begins when less than the reserve is available, or when tasks of the host stall for
//! memory (the kernel says so through `/proc/pressure/memory`). It is over when the reserve and a
//! quarter more has been available, and nothing has stalled, for [`CALM`].

use std::{
    fmt,
    fs::{File, OpenOptions},
    io::{self, Write as _},
    sync::Arc,
    time::Duration,
};

use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::watch,
    time::{Instant, MissedTickBehavior, interval},
};

/// The available memory has no event; it is looked at this often, while there are pools.
pub(super) const SWEEP: Duration = Duration::from_secs(2);
/// Pressure is over when it has not shown for this long.
pub(super) const CALM: Duration = Duration::from_secs(10);
/// A tenth of two seconds in which at least one task waited for memory. Windows of two seconds are
/// the only ones that a process without privileges may ask for.
const STALL_TRIGGER: &[u8] = b"some 200000 2000000\0";

/// The memory that is available, in MiB. `None`: not to be known here, and then never short.
pub(super) type Available = Arc<dyn Fn() -> Option<u64> + Send + Sync>;

/// Where the state of the host's memory is read.
pub(crate) struct Meter {
    pub(super) available: Available,
    stalls: Option<AsyncFd<File>>,
}

impl fmt::Debug for Meter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Meter").finish_non_exhaustive()
    }
}

impl Meter {
    /// This host's. Without pressure information in the kernel only the available memory counts.
    pub(crate) fn of_host() -> Self {
        let stalls = stalls()
            .inspect_err(|error| {
                tracing::debug!(%error, "the kernel does not tell of stalls for memory");
            })
            .ok();
        Self { available: Arc::new(|| meminfo_mb("MemAvailable:")), stalls }
    }

    #[cfg(test)]
    pub(super) fn of(available: Available) -> Self {
        Self { available, stalls: None }
    }

    /// Completes when tasks have stalled.
    async fn stalled(&mut self) {
        let Some(stalls) = &self.stalls else { return std::future::pending().await };
        let broken = match stalls.ready(Interest::PRIORITY).await {
            Ok(mut guard) => {
                let broken = guard.ready().is_error();
                guard.clear_ready();
                broken
            }
            Err(_) => true,
        };
        if broken {
            self.stalls = None;
        }
    }
}

/// Memory of this host altogether.
#[must_use]
pub fn host_memory_mb() -> Option<u64> {
    meminfo_mb("MemTotal:")
}

fn meminfo_mb(field: &str) -> Option<u64> {
    // A file of the kernel's: reading it waits for nothing.
    parse_meminfo(&std::fs::read_to_string("/proc/meminfo").ok()?, field)
}

fn parse_meminfo(text: &str, field: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.starts_with(field))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib / 1024)
}

fn stalls() -> io::Result<AsyncFd<File>> {
    let mut file = OpenOptions::new().read(true).write(true).open("/proc/pressure/memory")?;
    file.write_all(STALL_TRIGGER)?;
    #[expect(unsafe_code, reason = "registering a descriptor with the runtime")]
    // SAFETY: the file owns its descriptor, never gives another one, and is not replaced while it
    // is registered: `AsyncFd` owns it and lends it out only by shared reference.
    let registered = unsafe { AsyncFd::register_with_interest(file, Interest::PRIORITY) };
    Ok(registered?)
}

/// What is known of the pressure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Pressure {
    pub(super) is_high: bool,
    /// Times that it showed. Each costs a machine.
    pub(super) strikes: u64,
}

/// Watches for ever. Cancel-safe.
pub(super) async fn watch(mut meter: Meter, reserve_mb: u64, pressure: &watch::Sender<Pressure>) {
    let mut gauge = Gauge::new(reserve_mb);
    let mut ticks = interval(SWEEP);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let stalled = tokio::select! {
            _ = ticks.tick() => false,
            () = meter.stalled() => meter.stalls.is_some(),
        };
        let seen = gauge.see(Instant::now(), (meter.available)(), stalled);
        pressure.send_if_modified(|pressure| {
            let before = *pressure;
            pressure.is_high = seen.is_high;
            pressure.strikes += u64::from(seen.strikes);
            *pressure != before
        });
    }
}

struct Seen {
    is_high: bool,
    strikes: bool,
}

/// Decides, with hysteresis in level and in time.
#[derive(Debug)]
struct Gauge {
    reserve_mb: u64,
    /// The last time that it showed.
    shown: Option<Instant>,
}

impl Gauge {
    fn new(reserve_mb: u64) -> Self {
        Self { reserve_mb, shown: None }
    }

    fn see(&mut self, now: Instant, available_mb: Option<u64>, stalled: bool) -> Seen {
        let available = available_mb.unwrap_or(u64::MAX);
        let strikes = stalled || available < self.reserve_mb;
        let is_near = self.shown.is_some() && available < comfortable_mb(self.reserve_mb);
        if strikes || is_near {
            self.shown = Some(now);
        } else if self.shown.is_some_and(|shown| now.duration_since(shown) >= CALM) {
            self.shown = None;
        }
        Seen { is_high: self.shown.is_some(), strikes }
    }
}

/// As much must be available for pressure to be over.
pub(super) fn comfortable_mb(reserve_mb: u64) -> u64 {
    reserve_mb.saturating_add(reserve_mb / 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pressure_has_hysteresis_in_level_and_time() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut gauge = Gauge::new(1000);
        assert!(!gauge.see(at(0), Some(1000), false).is_high);
        let seen = gauge.see(at(2), Some(999), false);
        assert!(seen.is_high && seen.strikes);
        // Above the reserve, and not by enough: high, and no more is taken for it.
        let seen = gauge.see(at(4), Some(1249), false);
        assert!(seen.is_high && !seen.strikes);
        // By enough, and not for long enough.
        assert!(gauge.see(at(6), Some(1250), false).is_high);
        assert!(gauge.see(at(13), Some(1250), false).is_high);
        assert!(!gauge.see(at(14), Some(1250), false).is_high);
        // Within the band nothing begins.
        assert!(!gauge.see(at(16), Some(1001), false).is_high);
    }

    #[test]
    fn a_stall_is_pressure_however_much_is_available() {
        let start = Instant::now();
        let mut gauge = Gauge::new(1000);
        let seen = gauge.see(start, Some(1_000_000), true);
        assert!(seen.is_high && seen.strikes);
        assert!(gauge.see(start + CALM / 2, Some(1_000_000), false).is_high);
        assert!(!gauge.see(start + CALM, Some(1_000_000), false).is_high);
    }

    #[test]
    fn what_cannot_be_known_is_no_pressure() {
        assert!(!Gauge::new(u64::MAX).see(Instant::now(), None, false).is_high);
    }

    #[test]
    fn the_kernel_tells_how_much_memory_there_is() {
        let text = "MemTotal:       24683656 kB\nMemAvailable:   24068020 kB\n";
        assert_eq!(parse_meminfo(text, "MemAvailable:"), Some(23503));
        assert_eq!(parse_meminfo(text, "Swap:"), None);
        assert_eq!(parse_meminfo("MemTotal: much", "MemTotal:"), None);
        let (all, available) = (host_memory_mb().unwrap(), meminfo_mb("MemAvailable:").unwrap());
        assert!(all >= available && available > 0);
    }
}
