use aether_api::{CreateProject, PREFIX, Page, ProjectView, QuotaView};
use aether_store::StoreError;
use aether_types::{ErrorCode, Project, ProjectId, Timestamp, project::Quota};
use axum::{
    Json as JsonAnswer,
    extract::{Path, State},
    http::StatusCode,
    response::{IntoResponse as _, Response},
};

use crate::{
    admission,
    auth::Caller,
    extract::{Json, Params},
    openapi::{Operation, operation},
    parts::App,
    problem::{ApiError, ApiResult},
    submit::attend,
};

/// By id or by name. For those alone who may see all of them.
pub(super) async fn find(app: &App, text: &str) -> ApiResult<Project> {
    let found = match text.parse() {
        Ok(id) => app.store().project(id).await?,
        Err(_) => app.store().project_by_name(text).await?,
    };
    let shown: String = text.chars().take(64).collect();
    found.ok_or_else(|| {
        ApiError::new(ErrorCode::ProjectNotFound, format!("there is no project `{shown}`"))
    })
}

pub(super) async fn create(
    State(app): State<App>,
    params: Params,
    body: Json<CreateProject>,
) -> ApiResult<Response> {
    params.finish()?;
    let CreateProject { name, quota } = body.value;
    let name = admission::project_name(name)?;
    let project = Project { id: ProjectId::new(), name, created_at: Timestamp::now(), quota };
    let shared = app.clone();
    let project = attend(&app, "making a project", async move {
        match shared.store().create_project(project.clone()).await {
            Ok(()) => Ok(project),
            Err(StoreError::NameTaken { name }) => {
                let detail = format!("the name `{name}` belongs to another project");
                Err(ApiError::new(ErrorCode::NameTaken, detail).field("name"))
            }
            Err(error) => Err(error.into()),
        }
    })
    .await?;
    let location = [("location", format!("{PREFIX}/projects/{}", project.id))];
    let view = JsonAnswer(ProjectView::from(project));
    Ok((StatusCode::CREATED, location, view).into_response())
}

pub(super) async fn list(
    State(app): State<App>,
    mut params: Params,
) -> ApiResult<JsonAnswer<Page<ProjectView>>> {
    let page = params.page()?;
    params.finish()?;
    let found = app.store().projects(page).await?;
    let items = found.items.into_iter().map(ProjectView::from).collect();
    Ok(JsonAnswer(Page { items, next_cursor: found.next.map(|c| c.to_string()) }))
}

pub(super) async fn show(
    State(app): State<App>,
    Path(project): Path<String>,
    params: Params,
) -> ApiResult<JsonAnswer<ProjectView>> {
    params.finish()?;
    with_usage(&app, find(&app, &project).await?).await
}

async fn with_usage(app: &App, project: Project) -> ApiResult<JsonAnswer<ProjectView>> {
    let used = app.store().project_usage(project.id).await?;
    Ok(JsonAnswer(ProjectView { used: Some(used), ..project.into() }))
}

pub(super) async fn set_quota(
    State(app): State<App>,
    Path(project): Path<String>,
    params: Params,
    body: Json<Quota>,
) -> ApiResult<JsonAnswer<ProjectView>> {
    params.finish()?;
    let found = find(&app, &project).await?;
    let (shared, id, quota) = (app.clone(), found.id, body.value);
    attend(&app, "setting a quota", async move { Ok(shared.store().set_quota(id, quota).await?) })
        .await?;
    with_usage(&app, Project { quota, ..found }).await
}

/// Of the caller's own project.
pub(super) async fn quota(
    State(app): State<App>,
    caller: Caller,
    params: Params,
) -> ApiResult<JsonAnswer<QuotaView>> {
    params.finish()?;
    let id = caller.project();
    let (project, used) = tokio::try_join!(app.store().project(id), app.store().project_usage(id))?;
    let quota = project.map(|project| project.quota).unwrap_or_default();
    Ok(JsonAnswer(QuotaView { quota, used }))
}

pub(super) async fn delete(
    State(app): State<App>,
    Path(project): Path<String>,
    params: Params,
) -> ApiResult<JsonAnswer<ProjectView>> {
    params.finish()?;
    let found = find(&app, &project).await?;
    let (shared, id) = (app.clone(), found.id);
    attend(&app, "deleting a project", async move { Ok(shared.store().delete_project(id).await?) })
        .await?;
    Ok(JsonAnswer(found.into()))
}

pub(super) fn create_op() -> Operation {
    operation("createProject", "Make a project")
        .body::<CreateProject>()
        .makes::<ProjectView>("The project.")
        .refuses(&[ErrorCode::NameTaken])
}

pub(super) fn list_op() -> Operation {
    operation("listProjects", "List projects")
        .page()
        .gives::<Page<ProjectView>>("A page, newest first.")
}

pub(super) fn show_op() -> Operation {
    operation("getProject", "Show a project and what it has").gives::<ProjectView>("The project.")
}

pub(super) fn set_quota_op() -> Operation {
    operation("setQuota", "Set a project's quota")
        .about("What is left out is not bounded. What there is stays.")
        .body::<Quota>()
        .gives::<ProjectView>("The project.")
}

pub(super) fn quota_op() -> Operation {
    operation("getQuota", "Show the quota of the key's project")
        .gives::<QuotaView>("The quota, and what is used of it.")
}

pub(super) fn delete_op() -> Operation {
    operation("deleteProject", "Delete a project")
        .about("Its keys go with it.")
        .gives::<ProjectView>("As it was.")
        .refuses(&[ErrorCode::ProjectInUse])
}
