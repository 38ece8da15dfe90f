//! The bus over a PostgreSQL server: NOTIFY on one channel of the database.

use std::sync::Arc;

use aether_postgres::{Database, Listener, Listening};
use async_trait::async_trait;
use tokio::task::JoinHandle;

use crate::{Event, EventBus, PublishError, Subscription, relay::Relay};

const CHANNEL: &str = "aetherium_events";

#[derive(Debug)]
pub struct PostgresBus {
    relay: Arc<Relay>,
    tasks: [JoinHandle<()>; 2],
}

impl PostgresBus {
    pub async fn open(database: &Database) -> Result<Self, sqlx::Error> {
        let relay = Arc::new(Relay::new());
        let listening = Listening::open(database, CHANNEL).await?;
        let hearer = Hearer(Arc::clone(&relay));
        let tasks = [
            tokio::spawn(async move { listening.run(&hearer).await }),
            tokio::spawn(send(Arc::clone(&relay), database.clone())),
        ];
        Ok(Self { relay, tasks })
    }
}

impl Drop for PostgresBus {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

struct Hearer(Arc<Relay>);

impl Listener for Hearer {
    fn message(&self, text: &str) {
        self.0.hear(text);
    }

    fn connected(&self) {
        self.0.local.tell_gap();
    }
}

/// Aborted with the bus. Messages that wait together are one transaction: each that notifies takes
/// a lock of the whole server for a moment.
async fn send(relay: Arc<Relay>, database: Database) {
    loop {
        let messages = relay.outgoing().await;
        let sent = sqlx::query("select pg_notify($1, message) from unnest($2::text[]) as message")
            .bind(CHANNEL)
            .bind(messages)
            .execute(database.pool())
            .await;
        if let Err(error) = sent {
            tracing::debug!(%error, "tell other processes what has happened");
            relay.lost();
            tokio::time::sleep(super::AWAY_PAUSE).await;
        }
    }
}

#[async_trait]
impl EventBus for PostgresBus {
    async fn publish(&self, event: Event) -> Result<(), PublishError> {
        self.relay.publish(event);
        Ok(())
    }

    fn subscribe(&self) -> Box<dyn Subscription> {
        self.relay.local.listener()
    }
}
