//! Recording a request and setting it going.

use aether_events::Event;
use aether_store::{Accepted, NewTask};
use aether_types::{
    Priority, ProjectId, Snapshot, Task, TaskId, TaskKind, Template, Timestamp, Vm, limits,
};

use crate::{
    auth::Caller,
    parts::App,
    problem::{ApiError, ApiResult},
};

/// A request that is in the store.
pub(crate) struct Recorded<T = ()> {
    pub(crate) accepted: Accepted,
    /// VMs that were recorded with it, each with the task that creates it.
    pub(crate) clones: Vec<(Vm, Task)>,
    /// What was recorded with the task.
    pub(crate) made: T,
}

impl<T> Recorded<T> {
    pub(crate) fn new(accepted: Accepted, made: T) -> Self {
        Self { accepted, clones: Vec::new(), made }
    }
}

pub(crate) fn new_task(kind: TaskKind, caller: &Caller) -> NewTask {
    new_task_of(kind, caller.project())
}

pub(crate) fn new_task_of(kind: TaskKind, project: ProjectId) -> NewTask {
    let priority = match kind {
        // They give back what others wait for.
        TaskKind::VmStop | TaskKind::VmSuspend | TaskKind::VmDelete => Priority::High,
        TaskKind::VmCreate
        | TaskKind::VmStart
        | TaskKind::VmPause
        | TaskKind::VmResume
        | TaskKind::VmSnapshot
        | TaskKind::VmExecute => Priority::Default,
        // It takes minutes, and nobody's VM waits for it.
        TaskKind::TemplateBuild | TaskKind::ToolBuild => Priority::Low,
    };
    NewTask {
        id: TaskId::new(),
        kind,
        priority,
        max_attempts: limits::TASK_ATTEMPTS_MAX,
        project: Some(project),
    }
}

/// Runs `record`, then tells the queue and the bus. Goes on where the client leaves, so that what
/// is recorded is also dispatched.
pub(crate) async fn submit<T: Made>(
    app: &App,
    record: impl Future<Output = ApiResult<Recorded<T>>> + Send + 'static,
) -> ApiResult<Recorded<T>> {
    let shared = app.clone();
    attend(app, "recording a request", async move {
        let recorded = record.await?;
        if !recorded.accepted.repeated {
            if let Some(event) = recorded.made.event() {
                shared.publish(event).await;
            }
            set_going(&shared, &recorded.accepted).await;
            for (vm, task) in &recorded.clones {
                publish_task(&shared, task).await;
                shared.publish(vm_event(vm)).await;
                shared.dispatcher.dispatch(task, vm.worker_id).await;
            }
        }
        Ok(recorded)
    })
    .await
}

/// Runs `work` to its end, also where the client leaves.
pub(crate) async fn attend<T: Send + 'static>(
    app: &App,
    what: &'static str,
    work: impl Future<Output = ApiResult<T>> + Send + 'static,
) -> ApiResult<T> {
    app.tasks.spawn(work).await.unwrap_or_else(|error| {
        tracing::error!(%error, what, "cut off");
        Err(ApiError::internal())
    })
}

/// What a request records besides its task.
pub(crate) trait Made: Send + 'static {
    /// That it is there.
    fn event(&self) -> Option<Event>;
}

impl Made for () {
    fn event(&self) -> Option<Event> {
        None
    }
}

impl Made for aether_types::Execution {
    // Its task's event says it.
    fn event(&self) -> Option<Event> {
        None
    }
}

impl Made for Snapshot {
    fn event(&self) -> Option<Event> {
        Some(snapshot_event(self))
    }
}

impl Made for Template {
    fn event(&self) -> Option<Event> {
        Some(template_event(self))
    }
}

async fn set_going(app: &App, accepted: &Accepted) {
    let Accepted { vm, task, cancelled, repeated: _ } = accepted;
    // Told before the queue hands it to a worker, whose own events follow.
    publish_task(app, task).await;
    match task.kind {
        TaskKind::VmCreate
        | TaskKind::VmStart
        | TaskKind::VmStop
        | TaskKind::VmSuspend
        | TaskKind::VmDelete
        | TaskKind::TemplateBuild => app.publish(vm_event(vm)).await,
        // They change no state yet.
        TaskKind::VmPause
        | TaskKind::VmResume
        | TaskKind::VmSnapshot
        | TaskKind::ToolBuild
        | TaskKind::VmExecute => {}
    }
    app.dispatcher.dispatch(task, vm.worker_id).await;
    for other in cancelled {
        if other.state.is_end() {
            publish_task(app, other).await;
            app.dispatcher.withdraw(other.id).await;
        } else {
            // A worker has it in hand: a deletion does not wait for a boot to end.
            let (task_id, worker_id) = (other.id, other.worker_id);
            app.publish(Event::CancelRequested { task_id, worker_id }).await;
        }
    }
}

pub(crate) async fn publish_task(app: &App, task: &Task) {
    let at = task.finished_at.or(task.started_at).unwrap_or_else(Timestamp::now);
    app.publish(Event::Task { task_id: task.id, vm_id: task.vm_id, state: task.state, at }).await;
}

pub(crate) fn vm_event(vm: &Vm) -> Event {
    Event::Vm { vm_id: vm.id, state: vm.state, at: vm.updated_at }
}

pub(crate) fn snapshot_event(snapshot: &Snapshot) -> Event {
    let Snapshot { id, state, updated_at, .. } = snapshot;
    Event::Snapshot { snapshot_id: *id, state: *state, at: *updated_at }
}

pub(crate) fn template_event(template: &Template) -> Event {
    let Template { id, state, updated_at, .. } = template;
    Event::Template { template_id: *id, state: *state, at: *updated_at }
}
