use aether_api::{Page, QueueView, Retried, TaskView};
use aether_store::{AcceptedBuild, Idempotency, QueueStatus};
use aether_types::{
    ErrorCode, ExecutionId, QueueName, Task, TaskId, TaskKind, TaskState, Timestamp, ToolRequest,
    VmId,
};
use axum::{
    Json as JsonAnswer,
    extract::{Path, State},
    response::Response,
};

use crate::{
    extract::Params,
    openapi::{Operation, operation},
    parts::App,
    problem::{ApiError, ApiResult},
    routes::{accepted_as, executions},
    submit::{Recorded, attend, new_task_of, publish_task, submit},
};

pub(super) async fn list(
    State(app): State<App>,
    params: Params,
) -> ApiResult<JsonAnswer<Page<QueueView>>> {
    params.finish()?;
    let now = Timestamp::now();
    let items = app.store().queues().await?.into_iter().map(|queue| view(queue, now)).collect();
    Ok(JsonAnswer(Page { items, next_cursor: None }))
}

fn view(queue: QueueStatus, now: Timestamp) -> QueueView {
    let QueueStatus { name, pending, running, waiting, again, dead, oldest_at } = queue;
    QueueView {
        name: name.to_string(),
        pending,
        running,
        waiting,
        delayed: again,
        dead,
        oldest_at,
        // Another host's clock may have made it.
        oldest_age_ms: oldest_at.map(|at| (now.unix_ms() - at.unix_ms()).max(0)),
    }
}

/// Every worker has one, whether it is there or not; that of one that nobody remembers is empty.
fn parse(text: &str) -> ApiResult<QueueName> {
    text.parse().map_err(|_| {
        let shown: String = text.chars().take(64).collect();
        let detail = format!("there is no queue `{shown}`; `shared`, or the id of a worker");
        ApiError::new(ErrorCode::QueueNotFound, detail)
    })
}

pub(super) async fn dead(
    State(app): State<App>,
    Path(queue): Path<String>,
    mut params: Params,
) -> ApiResult<JsonAnswer<Page<TaskView>>> {
    let page = params.page()?;
    params.finish()?;
    let name = parse(&queue)?;
    let found = app.store().dead_tasks(name, page).await?;
    let items = found.items.into_iter().map(TaskView::brief).collect();
    Ok(JsonAnswer(Page { items, next_cursor: found.next.map(|c| c.to_string()) }))
}

/// 202 with the task that does again what the dead one did not; a task itself has one end. Repeating
/// it gives the same answer for as long as idempotency keys are kept.
pub(super) async fn retry(
    State(app): State<App>,
    Path((queue, task)): Path<(String, String)>,
    params: Params,
) -> ApiResult<Response> {
    params.finish()?;
    let name = parse(&queue)?;
    let dead = find(&app, name, &task).await?;
    let again = ask_again(&app, &dead).await?;
    app.store().retried(dead.id, again.id).await?;
    let answer =
        Retried { task_id: again.id, vm_id: again.vm_id, status: again.state, retry_of: dead.id };
    Ok(accepted_as(again.id, answer))
}

async fn find(app: &App, queue: QueueName, text: &str) -> ApiResult<Task> {
    let not_found = || {
        let shown: String = text.chars().take(64).collect();
        let detail = format!("queue `{queue}` has no dead task `{shown}`");
        ApiError::new(ErrorCode::TaskNotFound, detail)
    };
    let id: TaskId = text.parse().map_err(|_| not_found())?;
    let task = app.store().task(id).await?.ok_or_else(not_found)?;
    let worker = match task.vm_id {
        Some(vm) => app.store().vm(vm).await?.and_then(|vm| vm.worker_id),
        None => None,
    };
    let is_dead = task.state == TaskState::Failed && task.attempts >= task.max_attempts;
    if is_dead && QueueName::of(worker) == queue { Ok(task) } else { Err(not_found()) }
}

/// Legal is what a client of the task's project could ask for now: the store says.
async fn ask_again(app: &App, dead: &Task) -> ApiResult<Task> {
    let kind = match dead.kind {
        TaskKind::VmExecute => return execute_again(app, dead).await,
        TaskKind::ToolBuild => return build_again(app, dead).await,
        // A VM that failed to be made is made by its start.
        TaskKind::VmCreate | TaskKind::VmStart => TaskKind::VmStart,
        TaskKind::VmStop | TaskKind::VmPause | TaskKind::VmResume | TaskKind::VmDelete => dead.kind,
        TaskKind::VmSuspend | TaskKind::VmSnapshot | TaskKind::TemplateBuild => {
            let detail = format!("what a {} was to make has failed; ask for a new one", dead.kind);
            return Err(ApiError::new(ErrorCode::TaskEnded, detail));
        }
    };
    let vm = vm_of(dead)?;
    let (store, task) =
        (std::sync::Arc::clone(&app.parts.store), new_task_of(kind, dead.project_id));
    let once = once(dead);
    let recorded = submit(app, async move {
        Ok(Recorded::new(store.request_on_vm(vm, task, Some(once)).await?, ()))
    })
    .await?;
    Ok(recorded.accepted.task)
}

async fn execute_again(app: &App, dead: &Task) -> ApiResult<Task> {
    let of_dead = match dead.execution_id {
        Some(id) => app.store().execution(id).await?,
        None => None,
    };
    let execution = of_dead.ok_or_else(ApiError::internal)?;
    if execution.spec.interactive {
        let detail = "an interactive command needs the client that it was for";
        return Err(ApiError::new(ErrorCode::TaskEnded, detail));
    }
    let (vm, id) = (vm_of(dead)?, ExecutionId::new());
    let recorded =
        executions::record(app, dead.project_id, vm, id, execution.spec, Some(once(dead))).await?;
    Ok(recorded.accepted.task)
}

async fn build_again(app: &App, dead: &Task) -> ApiResult<Task> {
    let tools = dead
        .tools
        .iter()
        .map(|tool| ToolRequest { name: tool.name.clone(), version: tool.asked.clone() });
    let (tools, task, once) =
        (tools.collect(), new_task_of(TaskKind::ToolBuild, dead.project_id), once(dead));
    let shared = app.clone();
    attend(app, "retrying a build of tools", async move {
        let AcceptedBuild { task, repeated } =
            shared.store().build_tools(tools, task, Some(once)).await?;
        if !repeated {
            publish_task(&shared, &task).await;
            shared.dispatcher.dispatch(&task, None).await;
        }
        Ok(task)
    })
    .await
}

fn vm_of(task: &Task) -> ApiResult<VmId> {
    task.vm_id.ok_or_else(ApiError::internal)
}

/// Two who retry the same one get the same task. No client's key has this form.
fn once(dead: &Task) -> Idempotency {
    Idempotency { key: format!("retry of {}", dead.id), request_digest: [0; 32] }
}

pub(super) fn list_op() -> Operation {
    operation("listQueues", "List queues").gives::<Page<QueueView>>("All of them.")
}

pub(super) fn dead_op() -> Operation {
    operation("listDeadTasks", "List tasks of a queue that used up their attempts")
        .page()
        .gives::<Page<TaskView>>("A page, newest first.")
}

pub(super) fn retry_op() -> Operation {
    operation("retryDeadTask", "Ask again for what a dead task did not do")
        .about("As a new task. Repeating it gives the same one.")
        .accepts::<Retried>()
        .refuses(&[
            ErrorCode::TaskEnded,
            ErrorCode::VmNotFound,
            ErrorCode::VmStateConflict,
            ErrorCode::QuotaExceeded,
            ErrorCode::TooManyVms,
            ErrorCode::IdempotencyConflict,
        ])
}
