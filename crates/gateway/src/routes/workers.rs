use aether_api::{ClusterStats, Page, VmView, WorkerShare, WorkerView};
use aether_store::VmFilter;
use aether_types::{ErrorCode, Presence, Worker, WorkerId, WorkerState};
use axum::{
    Json as JsonAnswer,
    extract::{Path, State},
};

use crate::{
    extract::Params,
    openapi::{Operation, operation, several},
    parts::App,
    problem::{ApiError, ApiResult},
    routes::vms::view,
};

/// All workers, by id: those that have been there longest first.
async fn all(app: &App) -> ApiResult<Vec<WorkerView>> {
    Ok(app.store().workers().await?.into_iter().map(WorkerView::from).collect())
}

fn one_page<T>(items: Vec<T>) -> JsonAnswer<Page<T>> {
    JsonAnswer(Page { items, next_cursor: None })
}

/// The id that a path names, by itself or by the name of its host.
async fn resolve(app: &App, text: &str) -> ApiResult<WorkerId> {
    if let Ok(id) = text.parse() {
        return Ok(id);
    }
    let workers = app.store().workers().await?;
    let of_host = || workers.iter().map(|(worker, _)| worker).filter(|worker| worker.host == text);
    let present = |worker: &&Worker| worker.standing.presence == Presence::Present;
    // One that went before on the same host is asked for by its id.
    let found: Vec<_> = match of_host().filter(present).count() {
        0 => of_host().collect(),
        _ => of_host().filter(present).collect(),
    };
    match found.as_slice() {
        [worker] => Ok(worker.id),
        [] => Err(not_found(text)),
        several => Err(ApiError::invalid(format!(
            "worker: {} workers are on that host; name one by its id",
            several.len()
        ))),
    }
}

fn not_found(text: &str) -> ApiError {
    let shown: String = text.chars().take(64).collect();
    ApiError::new(ErrorCode::WorkerNotFound, format!("there is no worker `{shown}`"))
}

async fn find(app: &App, text: &str) -> ApiResult<WorkerView> {
    let id = resolve(app, text).await?;
    let found = app.store().worker(id).await?;
    found.map(WorkerView::from).ok_or_else(|| not_found(text))
}

pub(super) async fn list(
    State(app): State<App>,
    mut params: Params,
) -> ApiResult<JsonAnswer<Page<WorkerView>>> {
    let states = params.list::<WorkerState>("state")?;
    params.finish()?;
    let mut workers = all(&app).await?;
    workers.retain(|worker| states.is_empty() || states.contains(&worker.state));
    Ok(one_page(workers))
}

pub(super) async fn show(
    State(app): State<App>,
    Path(worker): Path<String>,
    params: Params,
) -> ApiResult<JsonAnswer<WorkerView>> {
    params.finish()?;
    find(&app, &worker).await.map(JsonAnswer)
}

pub(super) async fn vms(
    State(app): State<App>,
    Path(worker): Path<String>,
    mut params: Params,
) -> ApiResult<JsonAnswer<Page<VmView>>> {
    let page = params.page()?;
    params.finish()?;
    let worker = find(&app, &worker).await?;
    let filter = VmFilter { worker_id: Some(worker.id), ..VmFilter::default() };
    let found = app.store().vms(filter, page).await?;
    let mut items = Vec::with_capacity(found.items.len());
    for vm in found.items {
        items.push(view(&app, vm, None).await?);
    }
    Ok(JsonAnswer(Page { items, next_cursor: found.next.map(|c| c.to_string()) }))
}

/// Goes on serving its VMs. Repeating it is harmless.
pub(super) async fn drain(
    State(app): State<App>,
    Path(worker): Path<String>,
    params: Params,
) -> ApiResult<JsonAnswer<WorkerView>> {
    params.finish()?;
    let id = resolve(&app, &worker).await?;
    let drained = app.store().drain_worker(id).await?;
    tracing::info!(worker.id = %id, host = drained.host, "drains");
    // What had not begun there goes elsewhere.
    app.dispatcher.look();
    find(&app, &id.to_string()).await.map(JsonAnswer)
}

pub(super) async fn activate(
    State(app): State<App>,
    Path(worker): Path<String>,
    params: Params,
) -> ApiResult<JsonAnswer<WorkerView>> {
    params.finish()?;
    let id = resolve(&app, &worker).await?;
    let active = app.store().activate_worker(id).await?;
    tracing::info!(worker.id = %id, host = active.host, "is active");
    // VMs may wait for it.
    app.dispatcher.look();
    find(&app, &id.to_string()).await.map(JsonAnswer)
}

pub(super) async fn stats(
    State(app): State<App>,
    params: Params,
) -> ApiResult<JsonAnswer<ClusterStats>> {
    params.finish()?;
    let (workers, waiting) = tokio::try_join!(all(&app), async {
        app.store().waiting_vms().await.map_err(ApiError::from)
    })?;
    Ok(JsonAnswer(ClusterStats::new(&workers, waiting)))
}

pub(super) async fn distribution(
    State(app): State<App>,
    params: Params,
) -> ApiResult<JsonAnswer<Page<WorkerShare>>> {
    params.finish()?;
    Ok(one_page(WorkerShare::of_all(&all(&app).await?)))
}

pub(super) fn list_op() -> Operation {
    operation("listWorkers", "List workers")
        .query("state", several::<WorkerState>, "In one of these states.")
        .gives::<Page<WorkerView>>("All of them, by id.")
}

pub(super) fn show_op() -> Operation {
    operation("getWorker", "Show a worker").gives::<WorkerView>("The worker.")
}

pub(super) fn vms_op() -> Operation {
    operation("listWorkerVms", "List VMs of a worker")
        .page()
        .gives::<Page<VmView>>("A page, newest first.")
}

pub(super) fn drain_op() -> Operation {
    operation("drainWorker", "Give a worker no new VMs")
        .about("Repeating it is harmless.")
        .gives::<WorkerView>("The worker.")
}

pub(super) fn activate_op() -> Operation {
    operation("activateWorker", "Give a worker new VMs again")
        .about("Repeating it is harmless.")
        .gives::<WorkerView>("The worker.")
}

pub(super) fn stats_op() -> Operation {
    operation("getClusterStats", "Sum up all workers").gives::<ClusterStats>("The sums.")
}

pub(super) fn distribution_op() -> Operation {
    operation("getClusterDistribution", "Show how much is where")
        .gives::<Page<WorkerShare>>("All workers.")
}
