//! Who is waiting for a machine. A pool works only while nobody is.

use std::time::Duration;

use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

/// After the last start that somebody waited for: its first command has run by then.
pub(super) const SETTLE: Duration = Duration::from_millis(100);

#[derive(Debug, Clone, Copy)]
struct Flow {
    in_hand: usize,
    /// When the last one ended.
    quiet_since: Option<Instant>,
}

/// Counts the creations, claims and restores in hand.
#[derive(Debug)]
pub(crate) struct Traffic {
    flow: watch::Sender<Flow>,
}

impl Default for Traffic {
    fn default() -> Self {
        Self { flow: watch::Sender::new(Flow { in_hand: 0, quiet_since: None }) }
    }
}

impl Traffic {
    /// Somebody waits until the answer is dropped.
    pub(crate) fn begin(&self) -> InHand {
        // Wakes nobody: whoever works for a pool asks before each step.
        self.flow.send_if_modified(|flow| {
            flow.in_hand += 1;
            false
        });
        InHand { flow: self.flow.clone() }
    }

    pub(super) fn turn(&self) -> Turn {
        Turn { flow: self.flow.subscribe() }
    }
}

/// A start that somebody waits for.
#[derive(Debug)]
pub(crate) struct InHand {
    flow: watch::Sender<Flow>,
}

impl Drop for InHand {
    fn drop(&mut self) {
        self.flow.send_if_modified(|flow| {
            flow.in_hand -= 1;
            if flow.in_hand == 0 {
                flow.quiet_since = Some(Instant::now());
            }
            flow.in_hand == 0
        });
    }
}

/// The right to work for a pool, asked for again before every step.
#[derive(Debug, Clone)]
pub(crate) struct Turn {
    flow: watch::Receiver<Flow>,
}

impl Turn {
    /// Completes once nobody waits for a machine and the last who did has settled. It has no limit
    /// of its own: a host that is never quiet has no time for spare machines. Cancel-safe.
    pub(crate) async fn pass(&self) {
        let mut flow = self.flow.clone();
        loop {
            let now = *flow.borrow_and_update();
            let settled = match (now.in_hand, now.quiet_since) {
                (0, None) => return,
                (0, Some(since)) => Some(since + SETTLE),
                (_, _) => None,
            };
            match settled {
                Some(at) if at <= Instant::now() => return,
                Some(at) => sleep_until(at).await,
                None => {
                    if flow.changed().await.is_err() {
                        return;
                    }
                }
            }
        }
    }

    /// Completes when the last who waited waits no more. Cancel-safe.
    pub(super) async fn ebb(&mut self) {
        if self.flow.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Whether `pass` would complete at once.
    pub(super) fn is_free(&self) -> bool {
        let flow = *self.flow.borrow();
        flow.in_hand == 0 && flow.quiet_since.is_none_or(|at| at + SETTLE <= Instant::now())
    }
}
