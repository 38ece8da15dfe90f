//! Waiting for the end of a task: on events, with a look at the store only where some were missed.

use std::time::Duration;

use aether_events::{Event, Received, Subscription};
use aether_types::{TaskId, TaskState};
use tokio::time::{Instant, sleep_until};

use crate::{parts::App, problem::ApiResult};

/// Hears of every task from the moment it is made. Make it before the task is recorded or read,
/// and nothing is missed between.
pub(crate) struct TaskWatch {
    app: App,
    events: Box<dyn Subscription>,
    is_closed: bool,
}

impl TaskWatch {
    pub(crate) fn new(app: &App) -> Self {
        Self { app: app.clone(), events: app.parts.bus.subscribe(), is_closed: false }
    }

    /// The state in which the task ended, or `None` when the time is over or the gateway ends.
    pub(crate) async fn ended_within(
        &mut self,
        task: TaskId,
        limit: Duration,
    ) -> ApiResult<Option<TaskState>> {
        let closing = self.app.closing.clone();
        let deadline = Instant::now() + limit;
        tokio::select! {
            // An end that has come counts, also at the last moment.
            biased;
            state = self.ended(task) => state.map(Some),
            () = closing.cancelled() => Ok(None),
            () = sleep_until(deadline) => Ok(None),
        }
    }

    /// Cancel-safe.
    pub(crate) async fn ended(&mut self, task: TaskId) -> ApiResult<TaskState> {
        loop {
            if self.is_closed {
                return std::future::pending().await;
            }
            match self.events.next().await {
                Received::Event(Event::Task { task_id, state, .. })
                    if task_id == task && state.is_end() =>
                {
                    return Ok(state);
                }
                Received::Event(_) => {}
                Received::Missed(_) => {
                    let now = self.app.store().task(task).await?;
                    if let Some(now) = now
                        && now.state.is_end()
                    {
                        return Ok(now.state);
                    }
                }
                Received::Closed => self.is_closed = true,
            }
        }
    }
}
