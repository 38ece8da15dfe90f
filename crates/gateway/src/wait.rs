//! Waiting for the end of tasks, and for news of a template: on events, with a look at the store only
//! where some were missed, or may have been: a process that died may have told nobody what it did
//! last, which shows as a change of the workers.

use std::{collections::HashSet, time::Duration};

use aether_events::{Event, Received, Subscription};
use aether_types::{Task, TaskId, TaskState, TemplateId};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

use crate::{
    parts::App,
    problem::{ApiError, ApiResult},
};

/// Hears of every task from the moment it is made. Make it before the task is recorded or read,
/// and nothing is missed between.
pub(crate) struct TaskWatch {
    app: App,
    events: Box<dyn Subscription>,
    fleet: watch::Receiver<()>,
    is_closed: bool,
}

impl TaskWatch {
    pub(crate) fn new(app: &App) -> Self {
        Self {
            app: app.clone(),
            events: app.parts.bus.subscribe(),
            fleet: app.fleet_changed.subscribe(),
            is_closed: false,
        }
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
            match self.heard().await {
                Heard::Ended(id, state) if id == task => return Ok(state),
                Heard::Ended(..) => {}
                Heard::Missed => {
                    let now = self.app.store().task(task).await?;
                    if let Some(now) = now
                        && now.state.is_end()
                    {
                        return Ok(now.state);
                    }
                }
            }
        }
    }

    /// The task may have changed. Cancel-safe.
    pub(crate) async fn changed(&mut self, task: TaskId) {
        loop {
            if self.is_closed {
                return std::future::pending().await;
            }
            let received = tokio::select! {
                received = self.events.next() => received,
                Ok(()) = self.fleet.changed() => return,
            };
            match received {
                Received::Event(Event::Task { task_id, .. }) if task_id == task => return,
                Received::Missed => return,
                Received::Event(_) => {}
                Received::Closed => self.is_closed = true,
            }
        }
    }

    /// What came of all these tasks within the limit.
    pub(crate) async fn all_within(
        &mut self,
        tasks: &[Task],
        limit: Duration,
    ) -> ApiResult<Together> {
        let closing = self.app.closing.clone();
        let deadline = Instant::now() + limit;
        tokio::select! {
            biased;
            together = self.all(tasks) => together,
            () = closing.cancelled() => Ok(Together::Open),
            () = sleep_until(deadline) => Ok(Together::Open),
        }
    }

    async fn all(&mut self, tasks: &[Task]) -> ApiResult<Together> {
        let mut open = HashSet::new();
        for task in tasks {
            match task.state {
                TaskState::Pending | TaskState::Running => drop(open.insert(task.id)),
                TaskState::Completed => {}
                TaskState::Failed | TaskState::Cancelled => {
                    return Ok(Together::Bad(Box::new(task.clone())));
                }
            }
        }
        while !open.is_empty() {
            let ended = match self.heard().await {
                Heard::Ended(id, TaskState::Completed) => {
                    open.remove(&id);
                    continue;
                }
                Heard::Ended(id, _) if open.contains(&id) => vec![id],
                Heard::Ended(..) => continue,
                Heard::Missed => open.iter().copied().collect(),
            };
            for id in ended {
                let task = self.app.store().task(id).await?.ok_or_else(ApiError::internal)?;
                match task.state {
                    TaskState::Pending | TaskState::Running => {}
                    TaskState::Completed => drop(open.remove(&id)),
                    TaskState::Failed | TaskState::Cancelled => {
                        return Ok(Together::Bad(Box::new(task)));
                    }
                }
            }
        }
        Ok(Together::Completed)
    }

    /// The next end of a task. Cancel-safe.
    async fn heard(&mut self) -> Heard {
        loop {
            if self.is_closed {
                return std::future::pending().await;
            }
            let received = tokio::select! {
                biased;
                received = self.events.next() => received,
                // The sender is the gateway's own.
                Ok(()) = self.fleet.changed() => return Heard::Missed,
            };
            match received {
                Received::Event(Event::Task { task_id, state, .. }) if state.is_end() => {
                    return Heard::Ended(task_id, state);
                }
                Received::Event(_) => {}
                Received::Missed => return Heard::Missed,
                Received::Closed => self.is_closed = true,
            }
        }
    }
}

enum Heard {
    Ended(TaskId, TaskState),
    /// Some events are gone: the store knows.
    Missed,
}

/// What came of several tasks.
pub(crate) enum Together {
    Completed,
    /// The first that was heard to have ended badly.
    Bad(Box<Task>),
    /// The time is over, or the gateway ends.
    Open,
}

/// Hears of every template from the moment it is made.
pub(crate) struct TemplateWatch {
    events: Box<dyn Subscription>,
    fleet: watch::Receiver<()>,
}

impl TemplateWatch {
    pub(crate) fn new(app: &App) -> Self {
        Self { events: app.parts.bus.subscribe(), fleet: app.fleet_changed.subscribe() }
    }

    /// The template may have changed. Cancel-safe.
    pub(crate) async fn changed(&mut self, template: TemplateId) {
        loop {
            let received = tokio::select! {
                received = self.events.next() => received,
                Ok(()) = self.fleet.changed() => return,
            };
            match received {
                Received::Event(Event::Template { template_id, .. }) if template_id == template => {
                    return;
                }
                Received::Missed => return,
                Received::Event(_) => {}
                Received::Closed => std::future::pending().await,
            }
        }
    }
}
