use std::time::Duration;

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
use tokio::time::{Instant, sleep_until};

use crate::{
    auth::Caller,
    extract::Params,
    openapi::{JSON, Operation, of, operation, several, text, wait},
    parts::App,
    problem::{ApiError, ApiResult},
    routes::vms::{ended_task, resolve},
    submit::{attend, publish_task, snapshot_event, template_event, vm_event},
    wait::TaskWatch,
};

pub(super) async fn list(
    State(app): State<App>,
    caller: Caller,
    mut params: Params,
) -> ApiResult<JsonAnswer<Page<TaskView>>> {
    let states = params.list::<TaskState>("status")?;
    let kind = params.parsed::<TaskKind>("kind")?;
    let vm = params.one("vm")?;
    let page = params.page()?;
    params.finish()?;
    let vm_id = match vm {
        Some(vm) => Some(resolve(&app, &caller, &vm).await?),
        None => None,
    };
    let filter =
        TaskFilter { project: Some(caller.project()), states, kind, vm_id, worker_id: None };
    let found = app.store().tasks(filter, page).await?;
    let items = found.items.into_iter().map(TaskView::brief).collect();
    Ok(JsonAnswer(Page { items, next_cursor: found.next.map(|c| c.to_string()) }))
}

/// A task of the caller's project.
async fn find(app: &App, caller: &Caller, text: &str) -> ApiResult<Task> {
    let found = app.store().task(parse(text)?).await?;
    found.filter(|task| task.project_id == caller.project()).ok_or_else(|| not_found(text))
}

fn parse(text: &str) -> ApiResult<TaskId> {
    text.parse().map_err(|_| not_found(text))
}

fn not_found(text: &str) -> ApiError {
    let shown: String = text.chars().take(64).collect();
    ApiError::new(ErrorCode::TaskNotFound, format!("there is no task `{shown}`"))
}

/// With `wait`, when it has ended, or its progress has passed `generation` where that is given, or
/// the time is over.
pub(super) async fn show(
    State(app): State<App>,
    caller: Caller,
    Path(task): Path<String>,
    mut params: Params,
) -> ApiResult<JsonAnswer<TaskView>> {
    let wait = params.wait()?;
    let since = params.number::<i64>("generation")?;
    params.finish()?;
    if since.is_some() && wait.is_none() {
        return Err(ApiError::invalid("generation: only together with wait".into()));
    }
    let watch = wait.map(|_| TaskWatch::new(&app));
    let mut found = find(&app, &caller, &task).await?;
    if let Some((watch, limit)) = watch.zip(wait) {
        found = match since {
            Some(generation) => await_news(&app, watch, found, generation, limit).await?,
            None => ended_task(&app, watch, found, limit).await?,
        };
    }
    Ok(JsonAnswer(found.into()))
}

/// The task when its progress has passed `generation`, or it has ended, or the time is over.
async fn await_news(
    app: &App,
    mut watch: TaskWatch,
    mut task: Task,
    generation: i64,
    limit: Duration,
) -> ApiResult<Task> {
    let deadline = Instant::now() + limit;
    loop {
        let has_news = task.progress.as_ref().is_some_and(|p| p.generation > generation);
        if has_news || task.state.is_end() {
            return Ok(task);
        }
        // Nothing is lost where an arm is dropped: what counts is read from the store.
        tokio::select! {
            () = watch.changed(task.id) => {}
            () = app.closing.cancelled() => return Ok(task),
            () = sleep_until(deadline) => return Ok(task),
        }
        task = app.store().task(task.id).await?.unwrap_or(task);
    }
}

/// 200 with the task where it has ended, 202 where its worker was told.
pub(super) async fn cancel(
    State(app): State<App>,
    caller: Caller,
    Path(task): Path<String>,
    mut params: Params,
) -> ApiResult<Response> {
    let wait = params.wait()?;
    params.finish()?;
    let id = find(&app, &caller, &task).await?.id;
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
        && let Some(vm) = task.vm_id
        && let Some(vm) = store.vm(vm).await?
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

pub(super) fn list_op() -> Operation {
    operation("listTasks", "List tasks")
        .query("status", several::<TaskState>, "In one of these states.")
        .query("kind", of::<TaskKind>, "Of this kind.")
        .query("vm", text, "Of this VM, by its name or its id.")
        .page()
        .gives::<Page<TaskView>>("A page, newest first, without the logs of progress.")
        .refuses(&[ErrorCode::VmNotFound])
}

pub(super) fn show_op() -> Operation {
    operation("getTask", "Show a task")
        .query("wait", wait, "For its end.")
        .query("generation", of::<i64>, "With `wait`: also for progress after this generation.")
        .gives::<TaskView>("The task.")
}

pub(super) fn cancel_op() -> Operation {
    operation("cancelTask", "Cancel a task")
        .query("wait", wait, "For its end.")
        .gives::<TaskView>("It has ended.")
        .answers(StatusCode::ACCEPTED, "Its worker was told.", Some(JSON), of::<TaskView>, &[])
        .refuses(&[ErrorCode::TaskEnded, ErrorCode::VmStateConflict])
}
