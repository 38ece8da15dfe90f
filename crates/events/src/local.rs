//! The bus of one process.

use async_trait::async_trait;
use tokio::sync::broadcast::{Receiver, Sender, channel, error::RecvError};

use crate::{Event, EventBus, PublishError, Received, Subscription};

/// Events held for a slow listener before it is told that it missed some. An event is some
/// hundred bytes; a burst of requests makes a few thousand.
pub(crate) const CAPACITY: usize = 8192;

#[derive(Debug)]
pub struct LocalBus {
    sender: Sender<Told>,
}

#[derive(Debug, Clone)]
enum Told {
    Event(Event),
    /// Others published something that was not heard here.
    Gap,
}

impl LocalBus {
    #[must_use]
    #[expect(clippy::new_without_default, reason = "a bus is made on purpose, in one place")]
    pub fn new() -> Self {
        Self { sender: channel(CAPACITY).0 }
    }

    /// An error of the channel means that nobody listens, which is no failure.
    pub(crate) fn tell(&self, event: Event) {
        let _ = self.sender.send(Told::Event(event));
    }

    pub(crate) fn tell_gap(&self) {
        let _ = self.sender.send(Told::Gap);
    }

    pub(crate) fn listener(&self) -> Box<dyn Subscription> {
        Box::new(LocalSubscription(self.sender.subscribe()))
    }
}

#[async_trait]
impl EventBus for LocalBus {
    async fn publish(&self, event: Event) -> Result<(), PublishError> {
        self.tell(event);
        Ok(())
    }

    fn subscribe(&self) -> Box<dyn Subscription> {
        self.listener()
    }
}

struct LocalSubscription(Receiver<Told>);

#[async_trait]
impl Subscription for LocalSubscription {
    async fn next(&mut self) -> Received {
        match self.0.recv().await {
            Ok(Told::Event(event)) => Received::Event(event),
            Ok(Told::Gap) | Err(RecvError::Lagged(_)) => Received::Missed,
            Err(RecvError::Closed) => Received::Closed,
        }
    }
}

#[cfg(test)]
mod tests {
    use aether_types::{TaskId, TaskState, Timestamp, VmId};

    use super::*;

    fn event() -> Event {
        Event::Task {
            task_id: TaskId::new(),
            vm_id: Some(VmId::new()),
            state: TaskState::Completed,
            at: Timestamp::from_unix_ms(0),
        }
    }

    #[tokio::test]
    async fn a_listener_gets_what_comes_after_it_subscribed() {
        let bus = LocalBus::new();
        bus.publish(event()).await.unwrap();
        let mut listener = bus.subscribe();
        let second = event();
        bus.publish(second.clone()).await.unwrap();
        assert_eq!(listener.next().await, Received::Event(second));
        drop(bus);
        assert_eq!(listener.next().await, Received::Closed);
    }

    #[tokio::test]
    async fn a_slow_listener_is_told_and_holds_nobody_up() {
        let bus = LocalBus::new();
        let mut listener = bus.subscribe();
        for _ in 0..=CAPACITY {
            bus.publish(event()).await.unwrap();
        }
        assert_eq!(listener.next().await, Received::Missed);
    }
}
