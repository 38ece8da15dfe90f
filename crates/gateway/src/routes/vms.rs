use std::{sync::Arc, time::Duration};

use aether_api::{Accepted, CreateVm, PREFIX, Page, VmView};
use aether_store::{NewVm, VmFilter};
use aether_types::{DriverKind, StateChange, Task, TaskKind, TaskState, Vm, VmId, VmState};
use axum::{
    Json as JsonAnswer,
    extract::{Path, State},
    http::StatusCode,
    response::{IntoResponse as _, Response},
};

use crate::{
    admission,
    extract::{Json, Once, Params},
    parts::App,
    problem::{ApiError, ApiResult},
    routes::accepted,
    submit::{Recorded, new_task, submit},
    wait::TaskWatch,
};

/// The id that a path names, by itself or by the name of a VM that is not deleted.
pub(crate) async fn resolve(app: &App, vm: &str) -> ApiResult<VmId> {
    if let Ok(id) = vm.parse() {
        return Ok(id);
    }
    let found = app.store().vm_by_name(vm).await?;
    found.map(|vm| vm.id).ok_or_else(|| ApiError::vm_not_found(vm))
}

/// The VM that a path names. By its id also one that is deleted.
pub(crate) async fn find(app: &App, vm: &str) -> ApiResult<Vm> {
    let found = match vm.parse() {
        Ok(id) => app.store().vm(id).await?,
        Err(_) => app.store().vm_by_name(vm).await?,
    };
    found.ok_or_else(|| ApiError::vm_not_found(vm))
}

fn view(app: &App, vm: Vm, history: Option<Vec<StateChange>>) -> VmView {
    let drivers = app.parts.catalogue.drivers();
    let isolation = drivers.into_iter().find(|d| d.kind == vm.spec.driver).map(|d| d.isolation);
    VmView::new(vm, isolation, history)
}

async fn view_with_history(app: &App, id: VmId) -> ApiResult<VmView> {
    let store = app.store();
    let (vm, history) = tokio::try_join!(store.vm(id), store.vm_history(id))?;
    let vm = vm.ok_or_else(|| ApiError::vm_not_found(&id.to_string()))?;
    Ok(view(app, vm, Some(history)))
}

pub(super) async fn create(
    State(app): State<App>,
    once: Once,
    mut params: Params,
    body: Json<CreateVm>,
) -> ApiResult<Response> {
    let wait = params.wait()?;
    params.finish()?;
    let id = VmId::new();
    let (name, spec) = admission::admit(body.value, id, &*app.parts.catalogue)?;
    let new = NewVm { id, name, spec };
    let (task, idempotency) = (new_task(TaskKind::VmCreate), once.idempotency(&body.bytes));
    let watch = wait.map(|_| TaskWatch::new(&app));
    let store = Arc::clone(&app.parts.store);
    let recorded = submit(&app, async move {
        let accepted = store.create_vm(new, task, idempotency).await?;
        Ok(Recorded { accepted, execution: None })
    })
    .await?;
    answer(&app, recorded, watch.zip(wait), StatusCode::CREATED).await
}

pub(super) async fn list(
    State(app): State<App>,
    mut params: Params,
) -> ApiResult<JsonAnswer<Page<VmView>>> {
    let filter = VmFilter {
        states: params.list::<VmState>("state")?,
        driver: params.parsed::<DriverKind>("driver")?,
        name: params.one("name")?,
        labels: params.all("label").iter().map(|l| label(l)).collect::<ApiResult<_>>()?,
        worker_id: None,
    };
    let page = params.page()?;
    params.finish()?;
    let found = app.store().vms(filter, page).await?;
    let items = found.items.into_iter().map(|vm| view(&app, vm, None)).collect();
    Ok(JsonAnswer(Page { items, next_cursor: found.next.map(|c| c.to_string()) }))
}

fn label(text: &str) -> ApiResult<(String, String)> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        Some(_) | None => Err(ApiError::invalid("label: KEY=VALUE is needed".into())),
    }
}

pub(super) async fn show(
    State(app): State<App>,
    Path(vm): Path<String>,
    params: Params,
) -> ApiResult<JsonAnswer<VmView>> {
    params.finish()?;
    let id = resolve(&app, &vm).await?;
    view_with_history(&app, id).await.map(JsonAnswer)
}

pub(super) async fn delete(
    State(app): State<App>,
    Path(vm): Path<String>,
    once: Once,
    params: Params,
) -> ApiResult<Response> {
    request(app, &vm, TaskKind::VmDelete, once, params).await
}

pub(super) async fn start(
    State(app): State<App>,
    Path(vm): Path<String>,
    once: Once,
    params: Params,
) -> ApiResult<Response> {
    request(app, &vm, TaskKind::VmStart, once, params).await
}

pub(super) async fn stop(
    State(app): State<App>,
    Path(vm): Path<String>,
    once: Once,
    params: Params,
) -> ApiResult<Response> {
    request(app, &vm, TaskKind::VmStop, once, params).await
}

pub(super) async fn pause(
    State(app): State<App>,
    Path(vm): Path<String>,
    once: Once,
    params: Params,
) -> ApiResult<Response> {
    request(app, &vm, TaskKind::VmPause, once, params).await
}

pub(super) async fn resume(
    State(app): State<App>,
    Path(vm): Path<String>,
    once: Once,
    params: Params,
) -> ApiResult<Response> {
    request(app, &vm, TaskKind::VmResume, once, params).await
}

async fn request(
    app: App,
    vm: &str,
    kind: TaskKind,
    once: Once,
    mut params: Params,
) -> ApiResult<Response> {
    let wait = params.wait()?;
    params.finish()?;
    let id = resolve(&app, vm).await?;
    let (task, idempotency) = (new_task(kind), once.idempotency(&[]));
    let watch = wait.map(|_| TaskWatch::new(&app));
    let store = Arc::clone(&app.parts.store);
    let recorded = submit(&app, async move {
        let accepted = store.request_on_vm(id, task, idempotency).await?;
        Ok(Recorded { accepted, execution: None })
    })
    .await?;
    answer(&app, recorded, watch.zip(wait), StatusCode::OK).await
}

/// 202 at once, or, where the client waits, the VM when the task has ended: a problem where it
/// ended badly, and 202 again where the time is over first.
async fn answer(
    app: &App,
    recorded: Recorded,
    wait: Option<(TaskWatch, Duration)>,
    done: StatusCode,
) -> ApiResult<Response> {
    let task = recorded.accepted.task;
    let Some((watch, limit)) = wait else {
        return Ok(accepted(Accepted::new(&task)));
    };
    let ended = ended_task(app, watch, task, limit).await?;
    match ended.state {
        TaskState::Pending | TaskState::Running => Ok(accepted(Accepted::new(&ended))),
        TaskState::Completed => {
            let view = view_with_history(app, ended.vm_id).await?;
            let location = [("location", format!("{PREFIX}/vms/{}", view.id))];
            Ok((done, location, JsonAnswer(view)).into_response())
        }
        TaskState::Failed | TaskState::Cancelled => Err(ApiError::from_task(&ended)),
    }
}

/// The task at its end, or as it is when the time is over.
pub(super) async fn ended_task(
    app: &App,
    mut watch: TaskWatch,
    task: Task,
    limit: Duration,
) -> ApiResult<Task> {
    if task.state.is_end() {
        return Ok(task);
    }
    watch.ended_within(task.id, limit).await?;
    Ok(app.store().task(task.id).await?.unwrap_or(task))
}
