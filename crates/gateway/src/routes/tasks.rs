use aether_api::{Page, TaskView};
use aether_events::Event;
use aether_store::{CancelOutcome, TaskFilter};
use aether_types::{ErrorCode, Origin, Task, TaskId, TaskKind, TaskState};
use axum::{
    Json as JsonAnswer,
    extract::{Path, State},
    http::StatusCode,
    response::{IntoResponse as _, Response},
};

use crate::{
    extract::Params,
    parts::App,
    problem::{ApiError, ApiResult},
    routes::vms::{ended_task, resolve},
    submit::{attend, publish_task, snapshot_event, template_event, vm_event},
    wait::TaskWatch,
};

pub(super) async fn list(
    State(app): State<App>,
    mut params: Params,
) -> ApiResult<JsonAnswer<Page<TaskView>>> {
    let states = params.list::<TaskState>("status")?;
    let kind = params.parsed::<TaskKind>("kind")?;
    let vm = params.one("vm")?;
    let page = params.page()?;
    params.finish()?;
    let vm_id = match vm {
        Some(vm) => Some(resolve(&app, &vm).await?),
        None => None,
    };
    let filter = TaskFilter { states, kind, vm_id, worker_id: None };
    let found = app.store().tasks(filter, page).await?;
    let items = found.items.into_iter().map(TaskView::from).collect();
    Ok(JsonAnswer(Page { items, next_cursor: found.next.map(|c| c.to_string()) }))
}

async fn find(app: &App, text: &str) -> ApiResult<Task> {
    app.store().task(parse(text)?).await?.ok_or_else(|| not_found(text))
}

fn parse(text: &str) -> ApiResult<TaskId> {
    text.parse().map_err(|_| not_found(text))
}

fn not_found(text: &str) -> ApiError {
    let shown: String = text.chars().take(64).collect();
    ApiError::new(ErrorCode::TaskNotFound, format!("there is no task `{shown}`"))
}

pub(super) async fn show(
    State(app): State<App>,
    Path(task): Path<String>,
    mut params: Params,
) -> ApiResult<JsonAnswer<TaskView>> {
    let wait = params.wait()?;
    params.finish()?;
    let watch = wait.map(|_| TaskWatch::new(&app));
    let mut found = find(&app, &task).await?;
    if let Some((watch, limit)) = watch.zip(wait) {
        found = ended_task(&app, watch, found, limit).await?;
    }
    Ok(JsonAnswer(found.into()))
}

/// 200 with the task where it has ended, 202 where its worker was told.
pub(super) async fn cancel(
    State(app): State<App>,
    Path(task): Path<String>,
    mut params: Params,
) -> ApiResult<Response> {
    let wait = params.wait()?;
    params.finish()?;
    let id = parse(&task)?;
    let watch = wait.map(|_| TaskWatch::new(&app));
    let mut task = match cancel_and_tell(&app, id).await? {
        CancelOutcome::Cancelled(task) | CancelOutcome::Requested(task) => task,
        CancelOutcome::AlreadyEnded(task) => {
            let detail = format!("the task is {} already", task.state);
            return Err(ApiError::new(ErrorCode::TaskEnded, detail));
        }
    };
    if let Some((watch, limit)) = watch.zip(wait) {
        task = ended_task(&app, watch, task, limit).await?;
    }
    let status = if task.state.is_end() { StatusCode::OK } else { StatusCode::ACCEPTED };
    Ok((status, JsonAnswer(TaskView::from(task))).into_response())
}

/// Goes on where the client leaves: what is recorded is also told.
async fn cancel_and_tell(app: &App, id: TaskId) -> ApiResult<CancelOutcome> {
    let shared = app.clone();
    attend(app, "cancelling a task", async move {
        let outcome = shared.store().cancel_task(id).await?;
        match &outcome {
            CancelOutcome::Cancelled(task) => {
                publish_task(&shared, task).await;
                shared.dispatcher.withdraw(task.id).await;
                tell_what_went_with(&shared, task).await?;
            }
            CancelOutcome::Requested(task) => {
                let worker_id = task.worker_id;
                shared.publish(Event::CancelRequested { task_id: task.id, worker_id }).await;
            }
            CancelOutcome::AlreadyEnded(_) => {}
        }
        Ok(outcome)
    })
    .await
}

/// What the task was to make has failed with it.
async fn tell_what_went_with(app: &App, task: &Task) -> ApiResult<()> {
    let store = app.store();
    if matches!(task.kind, TaskKind::VmCreate | TaskKind::TemplateBuild)
        && let Some(vm) = store.vm(task.vm_id).await?
    {
        app.publish(vm_event(&vm)).await;
        if let Origin::Builder(template) = vm.spec.origin
            && let Some(template) = store.template(template).await?
        {
            app.publish(template_event(&template)).await;
        }
    }
    if let Some(snapshot) = task.snapshot_id
        && let Some(snapshot) = store.snapshot(snapshot).await?
    {
        app.publish(snapshot_event(&snapshot)).await;
    }
    Ok(())
}
