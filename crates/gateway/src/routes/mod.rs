//! The table of routes, and of what each needs. Nothing is served that is not in it, and tests walk
//! it.

mod audit;
mod events;
mod executions;
mod files;
mod forks;
mod keys;
mod logs;
mod projects;
mod queues;
mod snapshots;
mod tasks;
mod templates;
mod terminal;
mod tools;
mod vms;
mod workers;

use axum::{
    Json, Router,
    extract::{Request, State},
    handler::Handler,
    http::{Method, StatusCode},
    middleware::{Next, from_fn, from_fn_with_state},
    response::{IntoResponse as _, Response},
    routing::{MethodFilter, MethodRouter, on},
};

use aether_api::{Accepted, HealthStatus, PREFIX};
use aether_types::{
    ErrorCode,
    Resource::{
        Audit, Events, Executions, Files, Keys, Platform, Projects, Snapshots, Tasks, Templates,
        Tools, Vms,
    },
    TaskId,
};

use crate::{
    auth::{self, Rule, read, write},
    edge, health, metrics,
    parts::App,
    problem::ApiError,
};

pub(crate) struct Route {
    pub(crate) method: Method,
    /// Below [`PREFIX`].
    pub(crate) path: &'static str,
    /// What the caller must be allowed.
    pub(crate) rule: Rule,
    handler: MethodRouter<App>,
}

fn route<H, T>(
    filter: MethodFilter,
    method: Method,
    path: &'static str,
    rule: Rule,
    handler: H,
) -> Route
where
    H: Handler<T, App>,
    T: 'static,
{
    let check = from_fn(move |request: Request, next: Next| auth::authorize(rule, request, next));
    Route { method, path, rule, handler: on(filter, handler).route_layer(check) }
}

fn get<H: Handler<T, App>, T: 'static>(path: &'static str, rule: Rule, handler: H) -> Route {
    route(MethodFilter::GET, Method::GET, path, rule, handler)
}

fn post<H: Handler<T, App>, T: 'static>(path: &'static str, rule: Rule, handler: H) -> Route {
    route(MethodFilter::POST, Method::POST, path, rule, handler)
}

fn put<H: Handler<T, App>, T: 'static>(path: &'static str, rule: Rule, handler: H) -> Route {
    route(MethodFilter::PUT, Method::PUT, path, rule, handler)
}

fn delete<H: Handler<T, App>, T: 'static>(path: &'static str, rule: Rule, handler: H) -> Route {
    route(MethodFilter::DELETE, Method::DELETE, path, rule, handler)
}

pub(crate) fn table() -> Vec<Route> {
    vec![
        get("/health", Rule::Open, show_health),
        post("/vms", write(Vms), vms::create),
        get("/vms", read(Vms), vms::list),
        get("/vms/{vm}", read(Vms), vms::show),
        delete("/vms/{vm}", write(Vms), vms::delete),
        post("/vms/{vm}/start", write(Vms), vms::start),
        post("/vms/{vm}/stop", write(Vms), vms::stop),
        post("/vms/{vm}/pause", write(Vms), vms::pause),
        post("/vms/{vm}/resume", write(Vms), vms::resume),
        post("/vms/{vm}/snapshots", write(Snapshots), snapshots::create),
        get("/vms/{vm}/snapshots", read(Snapshots), snapshots::list_of_vm),
        get("/snapshots", read(Snapshots), snapshots::list),
        get("/snapshots/{snapshot}", read(Snapshots), snapshots::show),
        delete("/snapshots/{snapshot}", write(Snapshots), snapshots::delete),
        post("/vms/{vm}/fork", write(Vms), forks::create),
        post("/templates", write(Templates), templates::build),
        get("/templates", read(Templates), templates::list),
        get("/templates/{template}", read(Templates), templates::show),
        delete("/templates/{template}", write(Templates), templates::delete),
        get("/pools", read(Templates), templates::pools),
        get("/tools", read(Tools), tools::list),
        get("/tools/{tool}/versions", read(Tools), tools::versions),
        get("/tools/lock", read(Tools), tools::lock),
        post("/tools/builds", write(Tools), tools::build),
        // They change what everybody has.
        post("/tools/refresh", write(Platform), tools::refresh),
        post("/tools/prune", write(Platform), tools::prune),
        post("/vms/{vm}/execute", write(Executions), executions::execute),
        get("/vms/{vm}/executions", read(Executions), executions::list),
        get("/vms/{vm}/executions/{execution}", read(Executions), executions::show_of_vm),
        get("/vms/{vm}/executions/{execution}/output", read(Executions), executions::output_of_vm),
        get("/executions/{execution}", read(Executions), executions::show),
        get("/executions/{execution}/output", read(Executions), executions::output),
        get("/vms/{vm}/terminal", write(Executions), terminal::open),
        get("/vms/{vm}/files", read(Files), files::read),
        put("/vms/{vm}/files", write(Files), files::write),
        delete("/vms/{vm}/files", write(Files), files::remove),
        get("/vms/{vm}/files/stat", read(Files), files::stat),
        get("/vms/{vm}/files/list", read(Files), files::list),
        post("/vms/{vm}/files/mkdir", write(Files), files::mkdir),
        post("/vms/{vm}/files/move", write(Files), files::rename),
        post("/logs/query", read(Executions), logs::query),
        get("/logs/stream", read(Executions), logs::stream),
        get("/events", read(Events), events::follow),
        get("/workers", read(Platform), workers::list),
        get("/workers/{worker}", read(Platform), workers::show),
        get("/workers/{worker}/vms", read(Platform), workers::vms),
        post("/workers/{worker}/drain", write(Platform), workers::drain),
        post("/workers/{worker}/activate", write(Platform), workers::activate),
        get("/cluster/stats", read(Platform), workers::stats),
        get("/cluster/distribution", read(Platform), workers::distribution),
        get("/queues", read(Platform), queues::list),
        get("/queues/{queue}/dead", read(Platform), queues::dead),
        post("/queues/{queue}/dead/{task}/retry", write(Platform), queues::retry),
        get("/tasks", read(Tasks), tasks::list),
        get("/tasks/{task}", read(Tasks), tasks::show),
        post("/tasks/{task}/cancel", write(Tasks), tasks::cancel),
        post("/keys", write(Keys), keys::create),
        get("/keys", read(Keys), keys::list),
        get("/keys/{key}", read(Keys), keys::show),
        delete("/keys/{key}", write(Keys), keys::revoke),
        get("/audit", read(Audit), audit::list),
        post("/projects", write(Projects), projects::create),
        get("/projects", read(Projects), projects::list),
        get("/projects/{project}", read(Projects), projects::show),
        delete("/projects/{project}", write(Projects), projects::delete),
        put("/projects/{project}/quota", write(Projects), projects::set_quota),
        get("/quota", read(Vms), projects::quota),
    ]
}

/// Where others expect it, and so not below [`PREFIX`].
pub(crate) fn root_table() -> Vec<Route> {
    vec![get(metrics::PATH, read(Platform), metrics::show)]
}

pub(crate) fn router(app: App) -> Router {
    let all = |table: Vec<Route>| {
        table
            .into_iter()
            .fold(Router::new(), |routes, Route { path, handler, .. }| routes.route(path, handler))
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
