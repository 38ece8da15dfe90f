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

use aether_api::{Accepted, Health, HealthStatus, PREFIX};
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
    openapi::{self, Operation, operation},
    parts::App,
    problem::ApiError,
};

pub(crate) struct Route {
    pub(crate) method: Method,
    /// Below [`PREFIX`].
    pub(crate) path: &'static str,
    /// What the caller must be allowed.
    pub(crate) rule: Rule,
    /// What it says of itself.
    operation: fn() -> Operation,
    handler: MethodRouter<App>,
}

fn route<H, T>(
    filter: MethodFilter,
    method: Method,
    path: &'static str,
    rule: Rule,
    handler: H,
    operation: fn() -> Operation,
) -> Route
where
    H: Handler<T, App>,
    T: 'static,
{
    let check = from_fn(move |request: Request, next: Next| auth::authorize(rule, request, next));
    Route { method, path, rule, operation, handler: on(filter, handler).route_layer(check) }
}

fn get<H: Handler<T, App>, T: 'static>(
    path: &'static str,
    rule: Rule,
    handler: H,
    operation: fn() -> Operation,
) -> Route {
    route(MethodFilter::GET, Method::GET, path, rule, handler, operation)
}

fn post<H: Handler<T, App>, T: 'static>(
    path: &'static str,
    rule: Rule,
    handler: H,
    operation: fn() -> Operation,
) -> Route {
    route(MethodFilter::POST, Method::POST, path, rule, handler, operation)
}

fn put<H: Handler<T, App>, T: 'static>(
    path: &'static str,
    rule: Rule,
    handler: H,
    operation: fn() -> Operation,
) -> Route {
    route(MethodFilter::PUT, Method::PUT, path, rule, handler, operation)
}

fn delete<H: Handler<T, App>, T: 'static>(
    path: &'static str,
    rule: Rule,
    handler: H,
    operation: fn() -> Operation,
) -> Route {
    route(MethodFilter::DELETE, Method::DELETE, path, rule, handler, operation)
}

pub(crate) fn table() -> Vec<Route> {
    vec![
        get("/health", Rule::Open, show_health, health_op),
        post("/vms", write(Vms), vms::create, vms::create_op),
        get("/vms", read(Vms), vms::list, vms::list_op),
        get("/vms/{vm}", read(Vms), vms::show, vms::show_op),
        delete("/vms/{vm}", write(Vms), vms::delete, vms::delete_op),
        post("/vms/{vm}/start", write(Vms), vms::start, vms::start_op),
        post("/vms/{vm}/stop", write(Vms), vms::stop, vms::stop_op),
        post("/vms/{vm}/pause", write(Vms), vms::pause, vms::pause_op),
        post("/vms/{vm}/resume", write(Vms), vms::resume, vms::resume_op),
        post("/vms/{vm}/snapshots", write(Snapshots), snapshots::create, snapshots::create_op),
        get(
            "/vms/{vm}/snapshots",
            read(Snapshots),
            snapshots::list_of_vm,
            snapshots::list_of_vm_op,
        ),
        get("/snapshots", read(Snapshots), snapshots::list, snapshots::list_op),
        get("/snapshots/{snapshot}", read(Snapshots), snapshots::show, snapshots::show_op),
        delete("/snapshots/{snapshot}", write(Snapshots), snapshots::delete, snapshots::delete_op),
        post("/vms/{vm}/fork", write(Vms), forks::create, forks::create_op),
        post("/templates", write(Templates), templates::build, templates::build_op),
        get("/templates", read(Templates), templates::list, templates::list_op),
        get("/templates/{template}", read(Templates), templates::show, templates::show_op),
        delete("/templates/{template}", write(Templates), templates::delete, templates::delete_op),
        get("/pools", read(Templates), templates::pools, templates::pools_op),
        get("/tools", read(Tools), tools::list, tools::list_op),
        get("/tools/{tool}/versions", read(Tools), tools::versions, tools::versions_op),
        get("/tools/lock", read(Tools), tools::lock, tools::lock_op),
        post("/tools/builds", write(Tools), tools::build, tools::build_op),
        // They change what everybody has.
        post("/tools/refresh", write(Platform), tools::refresh, tools::refresh_op),
        post("/tools/prune", write(Platform), tools::prune, tools::prune_op),
        post("/vms/{vm}/execute", write(Executions), executions::execute, executions::execute_op),
        get("/vms/{vm}/executions", read(Executions), executions::list, executions::list_op),
        get(
            "/vms/{vm}/executions/{execution}",
            read(Executions),
            executions::show_of_vm,
            executions::show_of_vm_op,
        ),
        get(
            "/vms/{vm}/executions/{execution}/output",
            read(Executions),
            executions::output_of_vm,
            executions::output_of_vm_op,
        ),
        get("/executions/{execution}", read(Executions), executions::show, executions::show_op),
        get(
            "/executions/{execution}/output",
            read(Executions),
            executions::output,
            executions::output_op,
        ),
        get("/vms/{vm}/terminal", write(Executions), terminal::open, terminal::open_op),
        get("/vms/{vm}/files", read(Files), files::read, files::read_op),
        put("/vms/{vm}/files", write(Files), files::write, files::write_op),
        delete("/vms/{vm}/files", write(Files), files::remove, files::remove_op),
        get("/vms/{vm}/files/stat", read(Files), files::stat, files::stat_op),
        get("/vms/{vm}/files/list", read(Files), files::list, files::list_op),
        post("/vms/{vm}/files/mkdir", write(Files), files::mkdir, files::mkdir_op),
        post("/vms/{vm}/files/move", write(Files), files::rename, files::rename_op),
        post("/logs/query", read(Executions), logs::query, logs::query_op),
        get("/logs/stream", read(Executions), logs::stream, logs::stream_op),
        get("/events", read(Events), events::follow, events::follow_op),
        get("/workers", read(Platform), workers::list, workers::list_op),
        get("/workers/{worker}", read(Platform), workers::show, workers::show_op),
        get("/workers/{worker}/vms", read(Platform), workers::vms, workers::vms_op),
        post("/workers/{worker}/drain", write(Platform), workers::drain, workers::drain_op),
        post(
            "/workers/{worker}/activate",
            write(Platform),
            workers::activate,
            workers::activate_op,
        ),
        get("/cluster/stats", read(Platform), workers::stats, workers::stats_op),
        get(
            "/cluster/distribution",
            read(Platform),
            workers::distribution,
            workers::distribution_op,
        ),
        get("/queues", read(Platform), queues::list, queues::list_op),
        get("/queues/{queue}/dead", read(Platform), queues::dead, queues::dead_op),
        post("/queues/{queue}/dead/{task}/retry", write(Platform), queues::retry, queues::retry_op),
        get("/tasks", read(Tasks), tasks::list, tasks::list_op),
        get("/tasks/{task}", read(Tasks), tasks::show, tasks::show_op),
        post("/tasks/{task}/cancel", write(Tasks), tasks::cancel, tasks::cancel_op),
        post("/keys", write(Keys), keys::create, keys::create_op),
        get("/keys", read(Keys), keys::list, keys::list_op),
        get("/keys/{key}", read(Keys), keys::show, keys::show_op),
        delete("/keys/{key}", write(Keys), keys::revoke, keys::revoke_op),
        get("/audit", read(Audit), audit::list, audit::list_op),
        post("/projects", write(Projects), projects::create, projects::create_op),
        get("/projects", read(Projects), projects::list, projects::list_op),
        get("/projects/{project}", read(Projects), projects::show, projects::show_op),
        delete("/projects/{project}", write(Projects), projects::delete, projects::delete_op),
        put(
            "/projects/{project}/quota",
            write(Projects),
            projects::set_quota,
            projects::set_quota_op,
        ),
        get("/quota", read(Vms), projects::quota, projects::quota_op),
    ]
}

/// Where others expect it, and so not below [`PREFIX`].
pub(crate) fn root_table() -> Vec<Route> {
    vec![
        get(metrics::PATH, read(Platform), metrics::show, metrics::show_op),
        get(openapi::PATH, Rule::Open, openapi::show, openapi::show_op),
    ]
}

/// What the document is made of.
pub(crate) fn entries() -> Vec<openapi::Entry> {
    let entry = |Route { method, path, rule, operation, .. }: Route, prefix: &str| openapi::Entry {
        method,
        path: format!("{prefix}{path}"),
        rule,
        operation: operation(),
    };
    let root = root_table().into_iter().map(|route| entry(route, ""));
    root.chain(table().into_iter().map(|route| entry(route, PREFIX))).collect()
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

fn health_op() -> Operation {
    operation("getHealth", "Show whether the platform works")
        .gives::<Health>("It does, perhaps with something missing.")
        .answers(
            StatusCode::SERVICE_UNAVAILABLE,
            "Something that is needed does not.",
            Some(openapi::JSON),
            openapi::of::<Health>,
            &[],
        )
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
