//! Recording a request and setting it going.

use std::future::Future;

use aether_events::Event;
use aether_store::{Accepted, NewTask, StoreError};
use aether_types::{Execution, Priority, Task, TaskId, TaskKind, Timestamp, limits};

use crate::{
    parts::App,
    problem::{ApiError, ApiResult},
};

/// A request that is in the store.
pub(crate) struct Recorded {
    pub(crate) accepted: Accepted,
    pub(crate) execution: Option<Execution>,
}

pub(crate) fn new_task(kind: TaskKind) -> NewTask {
    let priority = match kind {
        // They give back what others wait for.
        TaskKind::VmStop | TaskKind::VmDelete => Priority::High,
        TaskKind::VmCreate
        | TaskKind::VmStart
        | TaskKind::VmPause
        | TaskKind::VmResume
        | TaskKind::VmExecute => Priority::Default,
    };
    NewTask { id: TaskId::new(), kind, priority, max_attempts: limits::TASK_ATTEMPTS_MAX }
}

/// Runs `record`, then tells the queue and the bus. Goes on where the client leaves, so that what
/// is recorded is also dispatched.
pub(crate) async fn submit(
    app: &App,
    record: impl Future<Output = Result<Recorded, StoreError>> + Send + 'static,
) -> ApiResult<Recorded> {
    let shared = app.clone();
    let work = app.tasks.spawn(async move {
        let recorded = record.await?;
        if !recorded.accepted.repeated {
            set_going(&shared, &recorded.accepted).await;
        }
        Ok::<_, StoreError>(recorded)
    });
    match work.await {
        Ok(result) => result.map_err(ApiError::from),
        Err(error) => {
            tracing::error!(%error, "recording a request was cut off");
            Err(ApiError::internal())
        }
    }
}

async fn set_going(app: &App, accepted: &Accepted) {
    let Accepted { vm, task, cancelled, repeated: _ } = accepted;
    // Told before the queue hands it to a worker, whose own events follow.
    publish_task(app, task).await;
    match task.kind {
        TaskKind::VmCreate | TaskKind::VmStart | TaskKind::VmStop | TaskKind::VmDelete => {
            app.publish(Event::Vm { vm_id: vm.id, state: vm.state, at: vm.updated_at }).await;
        }
        // They change no state yet.
        TaskKind::VmPause | TaskKind::VmResume | TaskKind::VmExecute => {}
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
