//! The table of routes. Nothing is served that is not in it, and a test walks it.

mod executions;
mod files;
mod forks;
mod logs;
mod snapshots;
mod tasks;
mod templates;
mod terminal;
mod tools;
mod vms;

use axum::{
    Json, Router,
    extract::State,
    handler::Handler,
    http::{Method, StatusCode},
    middleware::from_fn_with_state,
    response::{IntoResponse as _, Response},
    routing::{MethodFilter, MethodRouter, on},
};

use aether_api::{Accepted, HealthStatus, PREFIX};
use aether_types::{ErrorCode, TaskId};

use crate::{auth, edge, health, metrics, parts::App, problem::ApiError};

pub(crate) struct Route {
    pub(crate) method: Method,
    /// Below [`PREFIX`].
    pub(crate) path: &'static str,
    handler: MethodRouter<App>,
}

fn route<H, T>(filter: MethodFilter, method: Method, path: &'static str, handler: H) -> Route
where
    H: Handler<T, App>,
    T: 'static,
{
    Route { method, path, handler: on(filter, handler) }
}

fn get<H: Handler<T, App>, T: 'static>(path: &'static str, handler: H) -> Route {
    route(MethodFilter::GET, Method::GET, path, handler)
}

fn post<H: Handler<T, App>, T: 'static>(path: &'static str, handler: H) -> Route {
    route(MethodFilter::POST, Method::POST, path, handler)
}

fn put<H: Handler<T, App>, T: 'static>(path: &'static str, handler: H) -> Route {
    route(MethodFilter::PUT, Method::PUT, path, handler)
}

fn delete<H: Handler<T, App>, T: 'static>(path: &'static str, handler: H) -> Route {
    route(MethodFilter::DELETE, Method::DELETE, path, handler)
}

pub(crate) fn table() -> Vec<Route> {
    vec![
        get("/health", show_health),
        post("/vms", vms::create),
        get("/vms", vms::list),
        get("/vms/{vm}", vms::show),
        delete("/vms/{vm}", vms::delete),
        post("/vms/{vm}/start", vms::start),
        post("/vms/{vm}/stop", vms::stop),
        post("/vms/{vm}/pause", vms::pause),
        post("/vms/{vm}/resume", vms::resume),
        post("/vms/{vm}/snapshots", snapshots::create),
        get("/vms/{vm}/snapshots", snapshots::list_of_vm),
        get("/snapshots", snapshots::list),
        get("/snapshots/{snapshot}", snapshots::show),
        delete("/snapshots/{snapshot}", snapshots::delete),
        post("/vms/{vm}/fork", forks::create),
        post("/templates", templates::build),
        get("/templates", templates::list),
        get("/templates/{template}", templates::show),
        delete("/templates/{template}", templates::delete),
        get("/pools", templates::pools),
        get("/tools", tools::list),
        get("/tools/{tool}/versions", tools::versions),
        get("/tools/lock", tools::lock),
        post("/tools/builds", tools::build),
        post("/tools/refresh", tools::refresh),
        post("/tools/prune", tools::prune),
        post("/vms/{vm}/execute", executions::execute),
        get("/vms/{vm}/executions", executions::list),
        get("/vms/{vm}/executions/{execution}", executions::show_of_vm),
        get("/vms/{vm}/executions/{execution}/output", executions::output_of_vm),
        get("/executions/{execution}", executions::show),
        get("/executions/{execution}/output", executions::output),
        get("/vms/{vm}/terminal", terminal::open),
        get("/vms/{vm}/files", files::read),
        put("/vms/{vm}/files", files::write),
        delete("/vms/{vm}/files", files::remove),
        get("/vms/{vm}/files/stat", files::stat),
        get("/vms/{vm}/files/list", files::list),
        post("/vms/{vm}/files/mkdir", files::mkdir),
        post("/vms/{vm}/files/move", files::rename),
        post("/logs/query", logs::query),
        get("/logs/stream", logs::stream),
        get("/tasks", tasks::list),
        get("/tasks/{task}", tasks::show),
        post("/tasks/{task}/cancel", tasks::cancel),
    ]
}

/// Where others expect it, and so not below [`PREFIX`].
pub(crate) fn root_table() -> Vec<Route> {
    vec![get(metrics::PATH, metrics::show)]
}

pub(crate) fn router(app: App) -> Router {
    let all = |table: Vec<Route>| {
        table.into_iter().fold(Router::new(), |routes, Route { method: _, path, handler }| {
            routes.route(path, handler)
        })
    };
    all(root_table())
        .nest(PREFIX, all(table()))
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(from_fn_with_state(app.clone(), auth::authenticate))
        .layer(from_fn_with_state(app.clone(), edge::edge))
        .with_state(app)
}

async fn no_route() -> ApiError {
    ApiError::new(ErrorCode::RouteNotFound, format!("paths begin with {PREFIX}"))
}

async fn no_method(method: Method) -> ApiError {
    ApiError::new(ErrorCode::MethodNotAllowed, format!("the path does not take {method}"))
}

async fn show_health(State(app): State<App>) -> Response {
    let health = health::check(&app).await;
    let status = match health.status {
        HealthStatus::Ok | HealthStatus::Degraded => StatusCode::OK,
        HealthStatus::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
    };
    (status, Json(health)).into_response()
}

/// 202, and where the task can be asked for.
fn accepted(accepted: Accepted) -> Response {
    accepted_as(accepted.task_id, accepted)
}

fn accepted_as(task: TaskId, answer: impl serde::Serialize) -> Response {
    (StatusCode::ACCEPTED, [("location", task_path(task))], Json(answer)).into_response()
}

fn task_path(task: TaskId) -> String {
    format!("{PREFIX}/tasks/{task}")
}
