//! What is told, and what falls due.

use std::{sync::Arc, time::Duration};

use aether_postgres::Database;
use sqlx::postgres::PgListener;

use super::{Shared, sql};
use crate::{Lane, QueueError, error::Context};

pub(super) const CHANNEL: &str = "aetherium_queue";

/// Said instead of a lane where an entry was delayed.
pub(super) const LATER: &str = "later";

/// A connection on which nothing is said may have been cut without a word, by a router that forgot
/// it: after so long it is asked, and has so long to answer.
const QUIET_MAX: Duration = Duration::from_secs(20);
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// Between tries to listen again; it doubles, up to the longest.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// One connection that listens, and where the next one comes from.
#[derive(Debug)]
pub(super) struct Listening {
    listener: PgListener,
    database: Database,
}

pub(super) async fn open(database: &Database) -> Result<Listening, QueueError> {
    let listener = listen(database).await.context("listen for entries")?;
    Ok(Listening { listener, database: database.clone() })
}

/// From a pool of its own each time: a lost connection keeps its place in the old one until it has
/// said goodbye, which may never be heard.
async fn listen(database: &Database) -> Result<PgListener, sqlx::Error> {
    let mut listener = PgListener::connect_with(&database.listening_pool()).await?;
    listener.listen(CHANNEL).await?;
    Ok(listener)
}

/// Aborted with the queue; it holds nothing that an abort could leave half done.
pub(super) async fn run(listening: Listening, shared: Arc<Shared>) {
    let Listening { mut listener, database } = listening;
    loop {
        let lost = match tokio::time::timeout(QUIET_MAX, listener.try_recv()).await {
            Ok(Ok(Some(word))) => {
                hear(word.payload(), &shared);
                continue;
            }
            // It was away, and is back: what was told meanwhile was not heard.
            Ok(Ok(None)) => {
                look_again(&shared);
                continue;
            }
            Ok(Err(error)) => error,
            Err(_) => match is_there(&mut listener).await {
                Ok(()) => continue,
                Err(error) => error,
            },
        };
        tracing::warn!(error = %lost, "the queue does not hear of new entries; trying again");
        listener = listen_again(&database).await;
        look_again(&shared);
    }
}

async fn is_there(listener: &mut PgListener) -> Result<(), sqlx::Error> {
    let asked = sqlx::query("select 1").execute(listener);
    match tokio::time::timeout(ANSWER_MAX, asked).await {
        Ok(answer) => answer.map(drop),
        Err(_) => Err(sqlx::Error::Io(std::io::ErrorKind::TimedOut.into())),
    }
}

async fn listen_again(database: &Database) -> PgListener {
    let mut pause = PAUSE_MIN;
    loop {
        match listen(database).await {
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
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(PAUSE_MAX);
            }
        }
    }
}
