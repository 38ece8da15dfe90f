//! The time of simulated machines: real, or moved by a test.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{sync::watch, time::Instant};

/// Where a simulated host takes its time from.
#[derive(Debug, Clone)]
pub enum SimClock {
    /// tokio's: real time, or paused with the test's runtime.
    Tokio {
        origin: Instant,
    },
    Manual(ManualClock),
}

/// Time stands still until a test moves it.
#[derive(Debug, Clone)]
pub struct ManualClock {
    now: Arc<watch::Sender<Duration>>,
    /// Moves are one at a time, so that none is lost.
    moving: Arc<Mutex<()>>,
}

impl Default for ManualClock {
    fn default() -> Self {
        Self { now: Arc::new(watch::Sender::new(Duration::ZERO)), moving: Arc::default() }
    }
}

impl ManualClock {
    pub fn advance(&self, by: Duration) {
        let _moving = self.moving.lock().unwrap_or_else(PoisonError::into_inner);
        self.now.send_modify(|now| *now += by);
    }
}

impl Default for SimClock {
    fn default() -> Self {
        Self::Tokio { origin: Instant::now() }
    }
}

impl SimClock {
    /// Since the clock was made.
    pub fn now(&self) -> Duration {
        match self {
            Self::Tokio { origin } => origin.elapsed(),
            Self::Manual(clock) => *clock.now.borrow(),
        }
    }

    pub async fn sleep(&self, duration: Duration) {
        match self {
            _ if duration.is_zero() => {}
            Self::Tokio { .. } => tokio::time::sleep(duration).await,
            Self::Manual(clock) => {
                let mut now = clock.now.subscribe();
                let until = *now.borrow() + duration;
                // The sender lives in `self`: waiting cannot fail.
                let _ = now.wait_for(|now| *now >= until).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn manual_time_moves_when_it_is_moved() {
        let manual = ManualClock::default();
        let clock = SimClock::Manual(manual.clone());
        let sleeper = clock.sleep(Duration::from_secs(10));
        tokio::pin!(sleeper);
        assert!(futures_poll(&mut sleeper).await.is_none());
        manual.advance(Duration::from_secs(9));
        assert!(futures_poll(&mut sleeper).await.is_none());
        manual.advance(Duration::from_secs(1));
        sleeper.await;
        assert_eq!(clock.now(), Duration::from_secs(10));
    }

    async fn futures_poll<F: Future<Output = ()> + Unpin>(future: &mut F) -> Option<()> {
        tokio::select! { biased; () = future => Some(()), () = tokio::task::yield_now() => None }
    }
}
