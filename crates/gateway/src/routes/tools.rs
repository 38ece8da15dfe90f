use std::{sync::Arc, time::Duration};

use aether_api::{
    BuildTools, LockedToolView, Page, PruneTools, TaskView, ToolBuildAccepted, ToolVersionsView,
    ToolView, ToolsPruned, ToolsRefreshed,
};
use aether_store::AcceptedBuild;
use aether_types::{ErrorCode, Task, TaskKind, TaskState, limits, tool::validate_tools};
use axum::{
    Json as JsonAnswer,
    extract::{Path, State},
    response::{IntoResponse as _, Response},
};

use crate::{
    admission::{AskedTools, admit_tools},
    auth::Caller,
    extract::{Json, JsonOrNothing, Once, Params},
    openapi::{Operation, operation},
    parts::App,
    problem::{ApiError, ApiResult},
    routes::{accepted_as, vms::ended_task},
    submit::{attend, new_task, publish_task},
    wait::TaskWatch,
};

pub(super) async fn list(
    State(app): State<App>,
    params: Params,
) -> ApiResult<JsonAnswer<Page<ToolView>>> {
    params.finish()?;
    let items = app.parts.tools.list().await?;
    Ok(JsonAnswer(Page { items, next_cursor: None }))
}

pub(super) async fn versions(
    State(app): State<App>,
    Path(tool): Path<String>,
    mut params: Params,
) -> ApiResult<JsonAnswer<ToolVersionsView>> {
    let limit = params.number::<u32>("limit")?.unwrap_or(limits::PAGE_LIMIT_DEFAULT);
    let cursor = params.one("cursor")?;
    params.finish()?;
    if !(1..=limits::PAGE_LIMIT_MAX).contains(&limit) {
        let text = format!("limit: {limit} is outside 1 to {}", limits::PAGE_LIMIT_MAX);
        return Err(ApiError::invalid(text));
    }
    let name = app.parts.tools.find(&tool)?;
    let all = app.parts.tools.versions(&name).await?;
    page(all, cursor.as_deref(), limit as usize).map(JsonAnswer)
}

/// A cursor is the last version of the page before.
fn page(
    mut all: ToolVersionsView,
    cursor: Option<&str>,
    limit: usize,
) -> ApiResult<ToolVersionsView> {
    if let Some(cursor) = cursor {
        let last = all.items.iter().position(|item| item.version == cursor);
        let last = last.ok_or_else(|| {
            ApiError::invalid("cursor: it is not one that a page of this list ended with".into())
        })?;
        all.items.drain(..=last);
    }
    let has_more = all.items.len() > limit;
    all.items.truncate(limit);
    let last = all.items.last().filter(|_| has_more);
    all.next_cursor = last.map(|item| item.version.clone());
    Ok(all)
}

pub(super) async fn lock(
    State(app): State<App>,
    params: Params,
) -> ApiResult<JsonAnswer<Page<LockedToolView>>> {
    params.finish()?;
    let items = app.parts.tools.locked().await?;
    Ok(JsonAnswer(Page { items, next_cursor: None }))
}

pub(super) async fn refresh(
    State(app): State<App>,
    params: Params,
) -> ApiResult<JsonAnswer<ToolsRefreshed>> {
    params.finish()?;
    let tools = Arc::clone(&app.parts.tools);
    attend(&app, "refreshing tools", async move { Ok(tools.refresh().await?) }).await?;
    Ok(JsonAnswer(ToolsRefreshed {}))
}

pub(super) async fn prune(
    State(app): State<App>,
    params: Params,
    JsonOrNothing(body): JsonOrNothing<PruneTools>,
) -> ApiResult<JsonAnswer<ToolsPruned>> {
    params.finish()?;
    let tools = Arc::clone(&app.parts.tools);
    let PruneTools { keep_bytes } = body.value;
    attend(&app, "pruning tools", async move { Ok(tools.prune(keep_bytes).await?) })
        .await
        .map(JsonAnswer)
}

/// 202 at once, or, where the client waits, the task when it has ended well.
pub(super) async fn build(
    State(app): State<App>,
    caller: Caller,
    once: Once,
    mut params: Params,
    body: Json<BuildTools>,
) -> ApiResult<Response> {
    let wait = params.wait()?;
    params.finish()?;
    let BuildTools { tools } = body.value;
    if tools.is_empty() {
        return Err(ApiError::invalid("tools: at least one is needed".into()));
    }
    let tools = admit_tools(AskedTools::of(&tools), &[], &*app.parts.tools)?;
    validate_tools("tools", &tools).map_err(ApiError::invalid)?;
    let (task, idempotency) =
        (new_task(TaskKind::ToolBuild, &caller), once.idempotency(&body.bytes));
    let watch = wait.map(|_| TaskWatch::new(&app));
    let shared = app.clone();
    let task = attend(&app, "recording a build of tools", async move {
        let AcceptedBuild { task, repeated } =
            shared.store().build_tools(tools, task, idempotency).await?;
        if !repeated {
            publish_task(&shared, &task).await;
            shared.dispatcher.dispatch(&task, None).await;
        }
        Ok(task)
    })
    .await?;
    answer(&app, task, watch.zip(wait)).await
}

async fn answer(
    app: &App,
    mut task: Task,
    wait: Option<(TaskWatch, Duration)>,
) -> ApiResult<Response> {
    if let Some((watch, limit)) = wait {
        task = ended_task(app, watch, task, limit).await?;
        match task.state {
            TaskState::Pending | TaskState::Running => {}
            TaskState::Completed => return Ok(JsonAnswer(TaskView::from(task)).into_response()),
            TaskState::Failed | TaskState::Cancelled => return Err(ApiError::from_task(&task)),
        }
    }
    Ok(accepted_as(task.id, ToolBuildAccepted { task_id: task.id, status: task.state }))
}

pub(super) fn list_op() -> Operation {
    operation("listTools", "List the catalogue of tools").gives::<Page<ToolView>>("All of it.")
}

pub(super) fn versions_op() -> Operation {
    operation("listToolVersions", "List versions of a tool")
        .page()
        .gives::<ToolVersionsView>("A page, newest first.")
}

pub(super) fn lock_op() -> Operation {
    operation("getToolLock", "Show what requests for tools came to")
        .gives::<Page<LockedToolView>>("All of the lock.")
}

pub(super) fn build_op() -> Operation {
    operation("buildTools", "Build layers of tools, for VMs to come")
        .once()
        .wait("For the end of the build.")
        .body::<BuildTools>()
        .gives::<TaskView>("They are built.")
        .accepts::<ToolBuildAccepted>()
        .refuses(&[ErrorCode::QuotaExceeded])
        .refuses_in_body(&[ErrorCode::ToolNotFound])
}

pub(super) fn refresh_op() -> Operation {
    operation("refreshTools", "Forget what is known of versions")
        .gives::<ToolsRefreshed>("It is forgotten.")
}

pub(super) fn prune_op() -> Operation {
    operation("pruneTools", "Remove layers of tools")
        .about("VMs keep what they have.")
        .body_or_nothing::<PruneTools>()
        .gives::<ToolsPruned>("What went.")
}
