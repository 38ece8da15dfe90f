//! The seam to events: what has happened, told to whoever listens now. Events are history, never
//! truth: a listener that fell behind or came late reads the store.
//!
//! Between processes they go over the server that the queue is on. Events of one process arrive
//! everywhere in its order; those of two have no order between them.

mod local;
mod postgres;
mod redis;
mod relay;

use std::time::Duration;

use aether_types::{
    ExecutionId, SnapshotId, SnapshotState, TaskId, TaskState, TemplateId, TemplateState,
    Timestamp, VmId, VmState, WorkerId,
};
use async_trait::async_trait;
use serde::{Deserialize, Serialize};

pub use local::LocalBus;
pub use postgres::PostgresBus;
pub use redis::RedisBus;

/// Between tries to tell others something, while the server does not take it.
const AWAY_PAUSE: Duration = Duration::from_millis(250);

/// What happened. The topic's name is `kind()`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Event {
    /// A VM is in a new state.
    Vm { vm_id: VmId, state: VmState, at: Timestamp },
    /// A task was recorded, began, has come further, was given back or ended.
    Task { task_id: TaskId, vm_id: Option<VmId>, state: TaskState, at: Timestamp },
    /// A snapshot is in a new state.
    Snapshot { snapshot_id: SnapshotId, state: SnapshotState, at: Timestamp },
    /// A template is in a new state, or its build has come further.
    Template { template_id: TemplateId, state: TemplateState, at: Timestamp },
    /// Someone asks for the end of a running task.
    CancelRequested { task_id: TaskId, worker_id: Option<WorkerId> },
    /// A command was handed to a guest.
    ExecutionStarted { execution_id: ExecutionId, vm_id: VmId, at: Timestamp },
}

/// The bus does not take the event.
#[derive(Debug, thiserror::Error)]
#[error("publish an event: {0}")]
pub struct PublishError(pub String);

/// What a subscription gives next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Received {
    Event(Event),
    /// The listener was too slow, or other processes were not heard: events are gone, read the
    /// store.
    Missed,
    /// The bus has ended.
    Closed,
}

#[async_trait]
pub trait EventBus: Send + Sync + 'static {
    async fn publish(&self, event: Event) -> Result<(), PublishError>;

    /// Everything published from now on. Subscribe first, then read the store: nothing is missed
    /// between.
    fn subscribe(&self) -> Box<dyn Subscription>;
}

#[async_trait]
pub trait Subscription: Send {
    /// Cancel-safe.
    async fn next(&mut self) -> Received;
}
