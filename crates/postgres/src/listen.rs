//! What is told with NOTIFY, on a connection that comes back by itself.

use std::time::Duration;

use sqlx::postgres::PgListener;
use tokio::time::{sleep, timeout};

use crate::Database;

/// A connection on which nothing is said may have been cut without a word, by a router that forgot
/// it: after so long it is asked, and has so long to answer.
const QUIET_MAX: Duration = Duration::from_secs(20);
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// Between tries to listen again; it doubles, up to the longest.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// Who hears what comes by itself. Called on the connection's own task: it must not wait.
pub trait Listener: Send + Sync + 'static {
    /// Something was told on the channel.
    fn message(&self, text: &str);

    /// The connection is there again; what was told meanwhile was not heard.
    fn connected(&self);
}

/// One connection that listens, and where the next one comes from.
#[derive(Debug)]
pub struct Listening {
    listener: PgListener,
    database: Database,
    channel: &'static str,
}

impl Listening {
    /// What is told from now on is heard.
    pub async fn open(database: &Database, channel: &'static str) -> Result<Self, sqlx::Error> {
        let listener = listen(database, channel).await?;
        Ok(Self { listener, database: database.clone(), channel })
    }

    /// Never completes. It holds nothing that an abort could leave half done.
    pub async fn run(self, hearer: &dyn Listener) {
        let Self { mut listener, database, channel } = self;
        loop {
            let lost = match timeout(QUIET_MAX, listener.try_recv()).await {
                Ok(Ok(Some(word))) => {
                    hearer.message(word.payload());
                    continue;
                }
                // It was away, and is back.
                Ok(Ok(None)) => {
                    hearer.connected();
                    continue;
                }
                Ok(Err(error)) => error,
                Err(_) => match is_there(&mut listener).await {
                    Ok(()) => continue,
                    Err(error) => error,
                },
            };
            tracing::warn!(channel, error = %lost, "the database is not heard; trying again");
            listener = listen_again(&database, channel).await;
            hearer.connected();
        }
    }
}

/// From a pool of its own each time: a lost connection keeps its place in the old one until it has
/// said goodbye, which may never be heard.
async fn listen(database: &Database, channel: &str) -> Result<PgListener, sqlx::Error> {
    let mut listener = PgListener::connect_with(&database.listening_pool()).await?;
    listener.listen(channel).await?;
    Ok(listener)
}

async fn is_there(listener: &mut PgListener) -> Result<(), sqlx::Error> {
    let asked = sqlx::query("select 1").execute(listener);
    match timeout(ANSWER_MAX, asked).await {
        Ok(answer) => answer.map(drop),
        Err(_) => Err(sqlx::Error::Io(std::io::ErrorKind::TimedOut.into())),
    }
}

async fn listen_again(database: &Database, channel: &str) -> PgListener {
    let mut pause = PAUSE_MIN;
    loop {
        match listen(database, channel).await {
            Ok(listener) => return listener,
            Err(error) => {
                tracing::debug!(%error, channel, "listen again");
                sleep(pause).await;
                pause = (pause * 2).min(PAUSE_MAX);
            }
        }
    }
}
