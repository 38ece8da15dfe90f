//! What is told, and what falls due.

use std::{sync::Arc, time::Duration};

use aether_postgres::Listener;
use tokio::time::sleep;

use super::{Shared, sql};
use crate::Lane;

pub(super) const CHANNEL: &str = "aetherium_queue";

/// Said instead of a lane where an entry was delayed.
pub(super) const LATER: &str = "later";

/// Between tries to look for entries that fall due; it doubles, up to the longest.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(1);

impl Listener for Shared {
    fn message(&self, word: &str) {
        if word == LATER {
            self.delayed.notify_one();
            return;
        }
        match sql::lane(word) {
            Some(lane) => self.waiters.wake(lane),
            // Of a newer program.
            None => self.waiters.wake(Lane::Shared),
        }
    }

    fn connected(&self) {
        self.waiters.wake_all();
        self.delayed.notify_one();
    }
}

/// Makes entries ready when their delay is over. Every process does, whichever is first.
pub(super) async fn wake_when_due(shared: Arc<Shared>) {
    let mut pause = PAUSE_MIN;
    loop {
        let due = async {
            sql::promote(&shared.pool, shared.now_ms()).await?;
            sql::next_due(&shared.pool, shared.now_ms()).await
        };
        // Before the question, which takes time: too early is put right by asking again.
        let asked = shared.clock.now();
        // A delay that begins after the question leaves its permit in `delayed`.
        match due.await {
            Ok(Some(left)) => {
                pause = PAUSE_MIN;
                let due = asked.saturating_add(left);
                tokio::select! {
                    () = shared.clock.sleep_until(due) => {}
                    () = shared.delayed.notified() => {}
                }
            }
            Ok(None) => {
                pause = PAUSE_MIN;
                shared.delayed.notified().await;
            }
            Err(error) => {
                tracing::warn!(%error, "look for entries that fall due; trying again");
                sleep(pause).await;
                pause = (pause * 2).min(PAUSE_MAX);
            }
        }
    }
}
