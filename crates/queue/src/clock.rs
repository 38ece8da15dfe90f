//! Monotonic time, so that a wall clock that jumps neither ends a lease nor holds a task back.

use std::{
    fmt,
    time::{Duration, Instant},
};

use futures::future::BoxFuture;
use tokio::sync::watch;

/// Time since some moment that stays the same.
pub trait Clock: fmt::Debug + Send + Sync + 'static {
    fn now(&self) -> Duration;

    /// Ends when `now` has reached `at`. Dropping it does nothing.
    fn sleep_until(&self, at: Duration) -> BoxFuture<'_, ()>;
}

/// The machine's monotonic clock.
#[derive(Debug)]
pub struct SystemClock {
    origin: Instant,
}

impl SystemClock {
    #[must_use]
    #[expect(clippy::new_without_default, reason = "a clock is made on purpose")]
    pub fn new() -> Self {
        Self { origin: Instant::now() }
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    fn sleep_until(&self, at: Duration) -> BoxFuture<'_, ()> {
        let Some(at) = self.origin.checked_add(at) else {
            return Box::pin(std::future::pending());
        };
        Box::pin(tokio::time::sleep_until(at.into()))
    }
}

/// A clock for tests: it stands still until it is told to go on.
#[derive(Debug)]
pub struct ManualClock {
    now: watch::Sender<Duration>,
}

impl ManualClock {
    #[must_use]
    #[expect(clippy::new_without_default, reason = "a clock is made on purpose")]
    pub fn new() -> Self {
        Self { now: watch::Sender::new(Duration::ZERO) }
    }

    pub fn advance(&self, by: Duration) {
        self.now.send_modify(|now| *now += by);
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Duration {
        *self.now.borrow()
    }

    fn sleep_until(&self, at: Duration) -> BoxFuture<'_, ()> {
        let mut now = self.now.subscribe();
        Box::pin(async move {
            // The sender lives as long as this borrow of the clock.
            let _reached = now.wait_for(|now| *now >= at).await;
        })
    }
}
