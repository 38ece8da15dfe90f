//! What is told, and what falls due.

use std::{sync::Arc, time::Duration};

use sqlx::{PgPool, postgres::PgListener};

use super::{Shared, sql};
use crate::{Lane, QueueError, error::Context};

pub(super) const CHANNEL: &str = "aetherium_queue";

/// Said instead of a lane where an entry was delayed.
pub(super) const LATER: &str = "later";

/// Between tries to listen again; it doubles, up to the longest.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// One connection that listens, and where the next one comes from.
#[derive(Debug)]
pub(super) struct Listening {
    listener: PgListener,
    pool: PgPool,
}

pub(super) async fn open(pool: PgPool) -> Result<Listening, QueueError> {
    Ok(Listening { listener: listen(&pool).await.context("listen for entries")?, pool })
}

async fn listen(pool: &PgPool) -> Result<PgListener, sqlx::Error> {
    let mut listener = PgListener::connect_with(pool).await?;
    listener.listen(CHANNEL).await?;
    Ok(listener)
}

/// Aborted with the queue; it holds nothing that an abort could leave half done.
pub(super) async fn run(listening: Listening, shared: Arc<Shared>) {
    let Listening { mut listener, pool } = listening;
    loop {
        match listener.try_recv().await {
            Ok(Some(word)) => hear(word.payload(), &shared),
            // It was away, and is back: what was told meanwhile was not heard.
            Ok(None) => look_again(&shared),
            Err(error) => {
                tracing::warn!(%error, "the queue does not hear of new entries; trying again");
                drop(listener);
                listener = listen_again(&pool).await;
                look_again(&shared);
            }
        }
    }
}

async fn listen_again(pool: &PgPool) -> PgListener {
    let mut pause = PAUSE_MIN;
    loop {
        match listen(pool).await {
            Ok(listener) => return listener,
            Err(error) => {
                tracing::debug!(%error, "listen again");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(PAUSE_MAX);
            }
        }
    }
}

fn look_again(shared: &Shared) {
    shared.waiters.wake_all();
    shared.delayed.notify_one();
}

fn hear(word: &str, shared: &Shared) {
    if word == LATER {
        shared.delayed.notify_one();
        return;
    }
    match sql::lane(word) {
        Some(lane) => shared.waiters.wake(lane),
        // Of a newer program.
        None => shared.waiters.wake(Lane::Shared),
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
        // A delay that begins after the question leaves its permit in `delayed`.
        match due.await {
            Ok(Some(left)) => {
                pause = PAUSE_MIN;
                let due = shared.clock.now().saturating_add(left);
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
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(PAUSE_MAX);
            }
        }
    }
}
