use std::{collections::HashMap, sync::Arc, time::Duration};

use aether_api::{Accepted, BuildTemplate, PREFIX, Page, PoolView, TemplateView};
use aether_store::{NewSnapshot, TemplateFilter};
use aether_streams::PoolStatus;
use aether_types::{
    ErrorCode, ProjectId, SnapshotId, SnapshotPurpose, TaskKind, Template, TemplateId,
    TemplateState,
};
use axum::{
    Json as JsonAnswer,
    extract::{Path, State},
    http::StatusCode,
    response::{IntoResponse as _, Response},
};
use tokio::time::{Instant, sleep_until};

use crate::{
    admission::{self, TemplateName},
    auth::Caller,
    extract::{Json, Once, Params},
    openapi::{Operation, of, operation, several, text, wait},
    parts::App,
    problem::{ApiError, ApiResult},
    routes::{
        accepted,
        vms::{Settled, settle},
    },
    submit::{Recorded, attend, new_task, snapshot_event, submit, template_event},
    wait::{TaskWatch, TemplateWatch},
};

/// The template of the caller's project that a path names: by `name` or `name:tag`, or by its id also one that is deleted.
async fn find(app: &App, caller: &Caller, text: &str) -> ApiResult<Template> {
    let found = if let Ok(id) = text.parse() {
        app.store().template(id).await?
    } else {
        let TemplateName { name, tag } = TemplateName::parse(text);
        app.store().template_by_name(caller.project(), &name, &tag).await?
    };
    let found = found.filter(|template| template.project_id == caller.project());
    found.ok_or_else(|| not_found(text))
}

fn not_found(text: &str) -> ApiError {
    let shown: String = text.chars().take(128).collect();
    ApiError::new(ErrorCode::TemplateNotFound, format!("there is no template `{shown}`"))
}

/// The template that a VM is to begin as.
pub(super) async fn find_ready(app: &App, caller: &Caller, text: &str) -> ApiResult<Template> {
    let template = find(app, caller, text).await.map_err(|error| error.in_body("template"))?;
    let Template { id, name, tag, .. } = &template;
    let detail = match template.state {
        TemplateState::Ready => return Ok(template),
        TemplateState::Deleted => return Err(not_found(text).in_body("template")),
        TemplateState::Building => format!(
            "the template {name}:{tag} is being built; GET {PREFIX}/templates/{id}?wait=60s waits \
             for its end"
        ),
        TemplateState::Failed => {
            let reason = template.reason.as_ref().map_or_else(String::new, |r| format!(": {r}"));
            format!("the template {name}:{tag} could not be built{reason}")
        }
    };
    Err(ApiError::new(ErrorCode::SnapshotStateConflict, detail).in_body("template"))
}

fn pool_views(app: &App) -> HashMap<TemplateId, PoolView> {
    let pools = app.parts.pools.pools().into_iter();
    pools.map(|pool| (pool.template_id, pool_view(pool))).collect()
}

fn pool_view(pool: PoolStatus) -> PoolView {
    let PoolStatus { template_id, template, ready, target, min, max, hits, misses } = pool;
    PoolView { template_id, template, ready, target, min, max, hits, misses }
}

fn view(app: &App, template: Template) -> TemplateView {
    let pool = pool_views(app).remove(&template.id);
    TemplateView::new(template, pool)
}

/// Pools are of templates of the default project alone.
pub(super) async fn pools(
    State(app): State<App>,
    caller: Caller,
    params: Params,
) -> ApiResult<JsonAnswer<Page<PoolView>>> {
    params.finish()?;
    let pools = app.parts.pools.pools().into_iter();
    let ours = pools.filter(|_| caller.project() == ProjectId::DEFAULT);
    let mut items: Vec<_> = ours.map(pool_view).collect();
    items.sort_by(|a, b| a.template.cmp(&b.template));
    Ok(JsonAnswer(Page { items, next_cursor: None }))
}

pub(super) async fn build(
    State(app): State<App>,
    caller: Caller,
    once: Once,
    mut params: Params,
    body: Json<BuildTemplate>,
) -> ApiResult<Response> {
    let wait = params.wait()?;
    params.finish()?;
    let (new, builder) = admission::admit_template(body.value, app.offer())?;
    let snapshot =
        NewSnapshot { id: SnapshotId::new(), name: None, purpose: SnapshotPurpose::Template };
    let (task, idempotency) =
        (new_task(TaskKind::TemplateBuild, &caller), once.idempotency(&body.bytes));
    let watch = wait.map(|_| TaskWatch::new(&app));
    let store = Arc::clone(&app.parts.store);
    let recorded = submit(&app, async move {
        let (accepted, template) =
            store.build_template(new, snapshot, builder, task, idempotency).await?;
        Ok(Recorded::new(accepted, template))
    })
    .await?;
    let Recorded { accepted: recorded, made, .. } = recorded;
    match settle(&app, recorded.task, watch.zip(wait)).await? {
        Settled::Open(task) => Ok(accepted(Accepted {
            template_id: Some(made.id),
            ..Accepted::new(&task, made.builder_id)
        })),
        Settled::Completed(_) => {
            let found = app.store().template(made.id).await?.unwrap_or(made);
            let location = [("location", format!("{PREFIX}/templates/{}", found.id))];
            let view = JsonAnswer(view(&app, found));
            Ok((StatusCode::CREATED, location, view).into_response())
        }
    }
}

pub(super) async fn list(
    State(app): State<App>,
    caller: Caller,
    mut params: Params,
) -> ApiResult<JsonAnswer<Page<TemplateView>>> {
    let states = params.list::<TemplateState>("state")?;
    let name = params.one("name")?;
    let page = params.page()?;
    params.finish()?;
    let filter = TemplateFilter { project: Some(caller.project()), states, name };
    let found = app.store().templates(filter, page).await?;
    let mut pools = pool_views(&app);
    let brief = |template: Template| {
        let pool = pools.remove(&template.id);
        TemplateView::brief(template, pool)
    };
    let items = found.items.into_iter().map(brief).collect();
    Ok(JsonAnswer(Page { items, next_cursor: found.next.map(|c| c.to_string()) }))
}

/// With `wait`, when the build has ended, or `generation` is passed where it is given, or the time
/// is over.
pub(super) async fn show(
    State(app): State<App>,
    caller: Caller,
    Path(template): Path<String>,
    mut params: Params,
) -> ApiResult<JsonAnswer<TemplateView>> {
    let wait = params.wait()?;
    let since = params.number::<i64>("generation")?;
    params.finish()?;
    if since.is_some() && wait.is_none() {
        return Err(ApiError::invalid("generation: only together with wait".into()));
    }
    let watch = wait.map(|_| TemplateWatch::new(&app));
    let mut found = find(&app, &caller, &template).await?;
    if let Some((watch, limit)) = watch.zip(wait) {
        found = await_news(&app, watch, found, since, limit).await?;
    }
    Ok(JsonAnswer(view(&app, found)))
}

async fn await_news(
    app: &App,
    mut watch: TemplateWatch,
    mut template: Template,
    since: Option<i64>,
    limit: Duration,
) -> ApiResult<Template> {
    let deadline = Instant::now() + limit;
    loop {
        let has_ended = template.state != TemplateState::Building;
        if has_ended || since.is_some_and(|generation| template.generation > generation) {
            return Ok(template);
        }
        // Nothing is lost where an arm is dropped: what counts is read from the store.
        tokio::select! {
            () = watch.changed(template.id) => {}
            () = app.closing.cancelled() => return Ok(template),
            () = sleep_until(deadline) => return Ok(template),
        }
        template = app.store().template(template.id).await?.unwrap_or(template);
    }
}

pub(super) async fn delete(
    State(app): State<App>,
    caller: Caller,
    Path(template): Path<String>,
    params: Params,
) -> ApiResult<JsonAnswer<TemplateView>> {
    params.finish()?;
    let id = find(&app, &caller, &template).await?.id;
    let shared = app.clone();
    let deleted = attend(&app, "deleting a template", async move {
        let deleted = shared.store().delete_template(id).await?;
        shared.publish(template_event(&deleted)).await;
        // It went with the template.
        if let Some(snapshot) = shared.store().snapshot(deleted.snapshot_id).await? {
            shared.publish(snapshot_event(&snapshot)).await;
        }
        Ok(deleted)
    })
    .await?;
    Ok(JsonAnswer(view(&app, deleted)))
}

pub(super) fn build_op() -> Operation {
    operation("buildTemplate", "Build a template")
        .once()
        .wait("For the end of the build.")
        .body::<BuildTemplate>()
        .makes::<TemplateView>("It is ready.")
        .accepts::<Accepted>()
        .refuses(&[
            ErrorCode::ImageNotFound,
            ErrorCode::DriverUnavailable,
            ErrorCode::InsufficientCapacity,
            ErrorCode::SnapshotStateConflict,
            ErrorCode::QuotaExceeded,
            ErrorCode::TooManyVms,
        ])
        .refuses_in_body(&[ErrorCode::ToolNotFound])
}

pub(super) fn list_op() -> Operation {
    operation("listTemplates", "List templates")
        .query("state", several::<TemplateState>, "In one of these states.")
        .query("name", text, "Of this name.")
        .page()
        .gives::<Page<TemplateView>>("A page, newest first, without steps, files and log.")
}

pub(super) fn show_op() -> Operation {
    operation("getTemplate", "Show a template")
        .query("wait", wait, "For the end of the build.")
        .query("generation", of::<i64>, "With `wait`: also for news after this generation.")
        .gives::<TemplateView>("The template.")
}

pub(super) fn delete_op() -> Operation {
    operation("deleteTemplate", "Delete a template")
        .about("VMs that began as it keep what they need.")
        .gives::<TemplateView>("It is deleted.")
        .refuses(&[ErrorCode::SnapshotStateConflict])
}

pub(super) fn pools_op() -> Operation {
    operation("listPools", "List machines that wait to become VMs, by template")
        .gives::<Page<PoolView>>("All of them.")
}
