//! Between the bus of this process and those of the others: what goes out waits in a bounded line,
//! so that no publisher waits for a server; what is lost on the way is told as a gap, so that who
//! listens reads the store.
//!
//! ```text
//!   publish ─┬─► listeners here
//!            └─► line ─► one sender ─► server ─► relays of others ─► listeners there
//! ```

use std::{
    collections::VecDeque,
    sync::{Mutex, PoisonError},
};

use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use uuid::Uuid;

use crate::{Event, LocalBus, local::CAPACITY};

/// Of the form on the wire. Another one is a gap: programs of two versions run side by side for a
/// while, and the store tells what a newer one meant.
const VERSION: u32 = 1;

/// Events in one message. PostgreSQL takes 8,000 bytes, an event has 250 at most.
pub(crate) const MESSAGE_EVENTS: usize = 24;

/// Messages that are sent together.
const BATCH_MESSAGES: usize = 32;

#[derive(Debug)]
pub(crate) struct Relay {
    pub(crate) local: LocalBus,
    /// Of this process: it hears itself, too.
    origin: Uuid,
    line: Mutex<Line>,
    filled: Notify,
}

#[derive(Debug, Default)]
struct Line {
    events: VecDeque<Event>,
    /// Some were not sent.
    gap: bool,
}

#[derive(Serialize)]
struct Sent<'a> {
    v: u32,
    from: Uuid,
    /// Before these events.
    gap: bool,
    events: &'a [Event],
}

#[derive(Deserialize)]
struct Heard {
    v: u32,
    from: Uuid,
    gap: bool,
    events: Vec<serde_json::Value>,
}

impl Relay {
    pub(crate) fn new() -> Self {
        Self {
            local: LocalBus::new(),
            origin: Uuid::new_v4(),
            line: Mutex::default(),
            filled: Notify::new(),
        }
    }

    /// Never waits.
    pub(crate) fn publish(&self, event: Event) {
        self.local.tell(event.clone());
        let mut line = self.line();
        if line.events.len() >= CAPACITY {
            // What is told late is worth less than what is told now.
            line.events.clear();
            line.gap = true;
        }
        line.events.push_back(event);
        drop(line);
        self.filled.notify_one();
    }

    /// What goes out next, as messages. They are gone from the line: what cannot be sent is to be
    /// told with `lost`.
    pub(crate) async fn outgoing(&self) -> Vec<String> {
        loop {
            let messages = self.take();
            if !messages.is_empty() {
                return messages;
            }
            self.filled.notified().await;
        }
    }

    fn take(&self) -> Vec<String> {
        let mut line = self.line();
        let mut gap = std::mem::take(&mut line.gap);
        let count = line.events.len().min(MESSAGE_EVENTS * BATCH_MESSAGES);
        let events: Vec<Event> = line.events.drain(..count).collect();
        drop(line);
        let mut messages = Vec::new();
        if events.is_empty() && gap {
            messages.extend(self.message(true, &[]));
        }
        for events in events.chunks(MESSAGE_EVENTS) {
            messages.extend(self.message(std::mem::take(&mut gap), events));
        }
        messages
    }

    /// An event of ids, words and times always has a JSON form.
    fn message(&self, gap: bool, events: &[Event]) -> Option<String> {
        serde_json::to_string(&Sent { v: VERSION, from: self.origin, gap, events }).ok()
    }

    pub(crate) fn lost(&self) {
        self.line().gap = true;
        self.filled.notify_one();
    }

    /// A message of some process.
    pub(crate) fn hear(&self, text: &str) {
        let heard: Heard = match serde_json::from_str(text) {
            Ok(heard) => heard,
            Err(error) => {
                tracing::debug!(%error, "an event in a form that is not ours");
                return self.local.tell_gap();
            }
        };
        if heard.from == self.origin {
            return;
        }
        if heard.gap || heard.v != VERSION {
            self.local.tell_gap();
        }
        if heard.v != VERSION {
            return;
        }
        for event in heard.events {
            match serde_json::from_value(event) {
                Ok(event) => self.local.tell(event),
                // A kind of a newer program: nobody here asks for it.
                Err(error) => tracing::debug!(%error, "an event of a kind that is not known"),
            }
        }
    }

    fn line(&self) -> std::sync::MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use aether_types::{ExecutionId, TaskId, TaskState, Timestamp, VmId, WorkerId};

    use super::*;
    use crate::{Received, Subscription};

    fn started() -> Event {
        Event::ExecutionStarted {
            execution_id: ExecutionId::new(),
            vm_id: VmId::new(),
            at: Timestamp::from_unix_ms(i64::MAX / 2),
        }
    }

    async fn next(listener: &mut Box<dyn Subscription>) -> Received {
        listener.next().await
    }

    #[tokio::test]
    async fn others_hear_in_order_and_nobody_hears_twice() {
        let (here, there) = (Relay::new(), Relay::new());
        let (mut near, mut far) = (here.local.listener(), there.local.listener());
        let events: Vec<_> = (0..=MESSAGE_EVENTS).map(|_| started()).collect();
        for event in &events {
            here.publish(event.clone());
        }
        let messages = here.outgoing().await;
        assert_eq!(messages.len(), 2);
        for message in &messages {
            here.hear(message);
            there.hear(message);
        }
        let last = started();
        there.publish(last.clone());
        here.hear(&there.outgoing().await[0]);
        for event in events {
            assert_eq!(next(&mut near).await, Received::Event(event.clone()));
            assert_eq!(next(&mut far).await, Received::Event(event));
        }
        assert_eq!(next(&mut near).await, Received::Event(last));
    }

    #[tokio::test]
    async fn what_is_lost_is_told() {
        let (here, there) = (Relay::new(), Relay::new());
        let mut far = there.local.listener();
        for _ in 0..=CAPACITY {
            here.publish(started());
        }
        there.hear(&here.outgoing().await[0]);
        assert_eq!(next(&mut far).await, Received::Missed);
        assert!(matches!(next(&mut far).await, Received::Event(_)));
        here.lost();
        there.hear(&here.outgoing().await[0]);
        assert_eq!(next(&mut far).await, Received::Missed);
    }

    #[tokio::test]
    async fn other_forms_are_gaps_and_other_kinds_nothing() {
        let here = Relay::new();
        let mut near = here.local.listener();
        let from = Uuid::new_v4();
        here.hear(&format!("{{\"v\":2,\"from\":\"{from}\",\"gap\":false,\"events\":[]}}"));
        here.hear("no JSON");
        let event = serde_json::to_string(&started()).unwrap();
        let unknown = "{\"type\":\"comet\"}";
        here.hear(&format!(
            "{{\"v\":1,\"from\":\"{from}\",\"gap\":false,\"events\":[{unknown},{event}]}}"
        ));
        assert_eq!(next(&mut near).await, Received::Missed);
        assert_eq!(next(&mut near).await, Received::Missed);
        assert!(matches!(next(&mut near).await, Received::Event(_)));
    }

    /// The server refuses a message that is longer.
    #[test]
    fn a_message_fits_into_a_notification() {
        let here = Relay::new();
        for _ in 0..MESSAGE_EVENTS {
            here.publish(Event::Task {
                task_id: TaskId::new(),
                vm_id: Some(VmId::new()),
                state: TaskState::Completed,
                at: Timestamp::from_unix_ms(i64::MAX / 2),
            });
        }
        let longest = here.take();
        assert_eq!(longest.len(), 1);
        assert!(longest[0].len() < 7000, "{}", longest[0].len());
        let worker_id = Some(WorkerId::new());
        here.publish(Event::CancelRequested { task_id: TaskId::new(), worker_id });
        assert!(here.take()[0].len() < 7000 / MESSAGE_EVENTS + 100);
    }
}
