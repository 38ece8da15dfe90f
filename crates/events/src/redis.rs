//! The bus over a Redis server: one channel, which every process publishes to and listens on.

use std::sync::Arc;

use aether_redis::{Config, Link, Listener, OpenError, redis::pipe};
use async_trait::async_trait;
use tokio::task::JoinHandle;

use crate::{Event, EventBus, PublishError, Subscription, relay::Relay};

const CHANNEL: &str = "events";

#[derive(Debug)]
pub struct RedisBus {
    relay: Arc<Relay>,
    sender: JoinHandle<()>,
}

impl RedisBus {
    /// The prefix of `config` separates one installation from another.
    pub async fn open(config: Config) -> Result<Self, OpenError> {
        let relay = Arc::new(Relay::new());
        let link = Link::open_on(config, CHANNEL, Arc::new(Hearer(Arc::clone(&relay)))).await?;
        let sender = tokio::spawn(send(Arc::clone(&relay), link));
        Ok(Self { relay, sender })
    }
}

impl Drop for RedisBus {
    fn drop(&mut self) {
        self.sender.abort();
    }
}

struct Hearer(Arc<Relay>);

impl Listener for Hearer {
    fn message(&self, text: &str) {
        self.0.hear(text);
    }

    fn connected(&self, _restarted: bool) {
        self.0.local.tell_gap();
    }
}

/// Aborted with the bus.
async fn send(relay: Arc<Relay>, link: Link) {
    loop {
        let messages = relay.outgoing().await;
        let mut publish = pipe();
        for message in &messages {
            publish.publish(link.channel(), message).ignore();
        }
        let publish = &publish;
        let sent = link
            .call::<(), _>(
                |mut connection| async move { publish.query_async(&mut connection).await },
            )
            .await;
        if let Err(error) = sent {
            tracing::debug!(%error, "tell other processes what has happened");
            relay.lost();
            // One that refuses is asked again when there is something more to tell, or the gap.
            link.is_up().await;
            tokio::time::sleep(super::AWAY_PAUSE).await;
        }
    }
}

#[async_trait]
impl EventBus for RedisBus {
    async fn publish(&self, event: Event) -> Result<(), PublishError> {
        self.relay.publish(event);
        Ok(())
    }

    fn subscribe(&self) -> Box<dyn Subscription> {
        self.relay.local.listener()
    }
}
