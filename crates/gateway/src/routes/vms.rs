use std::{sync::Arc, time::Duration};

use aether_api::{Accepted, CreateVm, PREFIX, Page, VmView};
use aether_store::{NewSnapshot, NewVm, StoreError, VmFilter};
use aether_types::{
    DriverKind, ErrorCode, SnapshotId, SnapshotPurpose, StateChange, Task, TaskKind, TaskState, Vm,
    VmId, VmSpec, VmState, template::NO_TEMPLATE,
};
use axum::{
    Json as JsonAnswer,
    extract::{Path, State},
    http::StatusCode,
    response::{IntoResponse as _, Response},
};

use crate::{
    admission::{self, Source},
    auth::Caller,
    extract::{Json, Once, Params},
    openapi::{Operation, of, operation, several, text},
    parts::App,
    problem::{ApiError, ApiResult},
    routes::{accepted, snapshots, templates},
    submit::{Recorded, new_task, submit},
    wait::TaskWatch,
};

/// The id that a path names, by itself or by the name of a VM that is not deleted. An id is taken as
/// it is: only for what asks the store by id and project together, or finds nothing of another's.
pub(crate) async fn resolve(app: &App, caller: &Caller, vm: &str) -> ApiResult<VmId> {
    if let Ok(id) = vm.parse() {
        return Ok(id);
    }
    let found = app.store().vm_by_name(caller.project(), vm).await?;
    found.map(|vm| vm.id).ok_or_else(|| ApiError::vm_not_found(vm))
}

/// The VM of the caller's project that a path names. By its id also one that is deleted.
pub(crate) async fn find(app: &App, caller: &Caller, vm: &str) -> ApiResult<Vm> {
    let found = match vm.parse() {
        Ok(id) => app.store().vm(id).await?,
        Err(_) => app.store().vm_by_name(caller.project(), vm).await?,
    };
    let found = found.filter(|vm| vm.project_id == caller.project());
    found.ok_or_else(|| ApiError::vm_not_found(vm))
}

pub(super) async fn view(
    app: &App,
    vm: Vm,
    history: Option<Vec<StateChange>>,
) -> ApiResult<VmView> {
    let drivers = app.parts.catalogue.drivers();
    let isolation = drivers.into_iter().find(|d| d.kind == vm.spec.driver).map(|d| d.isolation);
    let template = app.templates.name(app.store(), vm.spec.origin).await?;
    Ok(VmView::new(vm, isolation, template, history))
}

async fn view_with_history(app: &App, id: VmId) -> ApiResult<VmView> {
    let store = app.store();
    let (vm, history) = tokio::try_join!(store.vm(id), store.vm_history(id))?;
    let vm = vm.ok_or_else(|| ApiError::vm_not_found(&id.to_string()))?;
    view(app, vm, Some(history)).await
}

pub(super) async fn create(
    State(app): State<App>,
    caller: Caller,
    once: Once,
    mut params: Params,
    body: Json<CreateVm>,
) -> ApiResult<Response> {
    let wait = params.wait()?;
    params.finish()?;
    let mut creation = Creation::admit(&app, &caller, body.value).await?;
    let (task, idempotency) =
        (new_task(TaskKind::VmCreate, &caller), once.idempotency(&body.bytes));
    let watch = wait.map(|_| TaskWatch::new(&app));
    let shared = app.clone();
    let recorded = submit(&app, async move {
        let (store, capacity) = (shared.store(), shared.parts.config.capacity);
        let mut answer =
            store.create_vm(creation.vm.clone(), task.clone(), capacity, idempotency.clone()).await;
        if let Err(StoreError::TemplateNotFound | StoreError::TemplateNotReady { .. }) = answer
            && let Some(without) = creation.without_default.take()
        {
            // The default template went in this moment; nobody asked for it by name.
            shared.templates.forget_default();
            let vm = NewVm { spec: without, ..creation.vm };
            answer = store.create_vm(vm, task, capacity, idempotency).await;
        }
        Ok(Recorded::new(answer?, ()))
    })
    .await?;
    answer(&app, recorded.accepted.task, watch.zip(wait), StatusCode::CREATED).await
}

/// A VM to record.
struct Creation {
    vm: NewVm,
    /// What it is if there is no default template after all.
    without_default: Option<VmSpec>,
}

impl Creation {
    async fn admit(app: &App, caller: &Caller, request: CreateVm) -> ApiResult<Self> {
        admission::check_origin(&request)?;
        let (id, offer) = (VmId::new(), app.offer());
        let origin = (request.template.clone(), request.snapshot.clone());
        let mut without_default = None;
        let (name, spec) = match origin {
            (Some(none), None) if none == NO_TEMPLATE => {
                admission::admit(request, id, Source::Image, offer)?
            }
            (Some(template), _) => {
                let template = templates::find_ready(app, caller, &template).await?;
                admission::admit(request, id, Source::Template(&template), offer)?
            }
            (None, Some(snapshot)) => {
                let snapshot = snapshots::find_usable(app, caller, &snapshot).await?;
                // Its record outlives the VM.
                let of = app.store().vm(snapshot.vm_id).await?;
                let tools = of.map(|vm| vm.spec.tools).unwrap_or_default();
                let source = Source::Snapshot { snapshot: &snapshot, tools: &tools };
                admission::admit(request, id, source, offer)?
            }
            (None, None) => {
                let (name, mut spec) = admission::admit(request, id, Source::Image, offer)?;
                if let Some(template) = app.templates.default(app.store(), caller.project()).await?
                    && let Some(begun) = admission::begin_as(&spec, &template)
                {
                    without_default = Some(std::mem::replace(&mut spec, begun));
                }
                (name, spec)
            }
        };
        Ok(Self { vm: NewVm { id, name, spec }, without_default })
    }
}

pub(super) async fn list(
    State(app): State<App>,
    caller: Caller,
    mut params: Params,
) -> ApiResult<JsonAnswer<Page<VmView>>> {
    let filter = VmFilter {
        project: Some(caller.project()),
        states: params.list::<VmState>("state")?,
        driver: params.parsed::<DriverKind>("driver")?,
        name: params.one("name")?,
        labels: params.all("label").iter().map(|l| label(l)).collect::<ApiResult<_>>()?,
        ..VmFilter::default()
    };
    let page = params.page()?;
    params.finish()?;
    let found = app.store().vms(filter, page).await?;
    let mut items = Vec::with_capacity(found.items.len());
    for vm in found.items {
        items.push(view(&app, vm, None).await?);
    }
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
    caller: Caller,
    Path(vm): Path<String>,
    params: Params,
) -> ApiResult<JsonAnswer<VmView>> {
    params.finish()?;
    let vm = find(&app, &caller, &vm).await?;
    let history = app.store().vm_history(vm.id).await?;
    view(&app, vm, Some(history)).await.map(JsonAnswer)
}

pub(super) async fn delete(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
    once: Once,
    params: Params,
) -> ApiResult<Response> {
    request(app, &caller, &vm, TaskKind::VmDelete, once, params).await
}

pub(super) async fn start(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
    once: Once,
    params: Params,
) -> ApiResult<Response> {
    request(app, &caller, &vm, TaskKind::VmStart, once, params).await
}

/// With `keep_memory` a start goes on where the VM was.
pub(super) async fn stop(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
    once: Once,
    mut params: Params,
) -> ApiResult<Response> {
    if params.flag("keep_memory")? {
        return suspend(app, &caller, &vm, once, params).await;
    }
    request(app, &caller, &vm, TaskKind::VmStop, once, params).await
}

async fn suspend(
    app: App,
    caller: &Caller,
    vm: &str,
    once: Once,
    mut params: Params,
) -> ApiResult<Response> {
    let wait = params.wait()?;
    params.finish()?;
    let vm = find(&app, caller, vm).await?;
    admission::check_snapshots(vm.spec.driver, &*app.parts.catalogue)?;
    let snapshot =
        NewSnapshot { id: SnapshotId::new(), name: None, purpose: SnapshotPurpose::Memory };
    // The parameter makes it another request than a stop, and is in no body.
    let (task, idempotency) =
        (new_task(TaskKind::VmSuspend, caller), once.idempotency(b"keep_memory"));
    let watch = wait.map(|_| TaskWatch::new(&app));
    let store = Arc::clone(&app.parts.store);
    let recorded = submit(&app, async move {
        let (accepted, snapshot) =
            store.request_snapshot(vm.id, snapshot, task, idempotency).await?;
        Ok(Recorded::new(accepted, snapshot))
    })
    .await?;
    answer(&app, recorded.accepted.task, watch.zip(wait), StatusCode::OK).await
}

pub(super) async fn pause(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
    once: Once,
    params: Params,
) -> ApiResult<Response> {
    request(app, &caller, &vm, TaskKind::VmPause, once, params).await
}

pub(super) async fn resume(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
    once: Once,
    params: Params,
) -> ApiResult<Response> {
    request(app, &caller, &vm, TaskKind::VmResume, once, params).await
}

async fn request(
    app: App,
    caller: &Caller,
    vm: &str,
    kind: TaskKind,
    once: Once,
    mut params: Params,
) -> ApiResult<Response> {
    let wait = params.wait()?;
    params.finish()?;
    let id = resolve(&app, caller, vm).await?;
    let (task, idempotency) = (new_task(kind, caller), once.idempotency(&[]));
    let watch = wait.map(|_| TaskWatch::new(&app));
    let store = Arc::clone(&app.parts.store);
    let recorded = submit(&app, async move {
        let accepted = store.request_on_vm(id, task, idempotency).await?;
        Ok(Recorded::new(accepted, ()))
    })
    .await?;
    answer(&app, recorded.accepted.task, watch.zip(wait), StatusCode::OK).await
}

/// 202 at once, or, where the client waits, the VM when the task has ended.
async fn answer(
    app: &App,
    task: Task,
    wait: Option<(TaskWatch, Duration)>,
    done: StatusCode,
) -> ApiResult<Response> {
    match settle(app, task, wait).await? {
        Settled::Open(task) => {
            let vm = task.vm_id.ok_or_else(ApiError::internal)?;
            Ok(accepted(Accepted::new(&task, vm)))
        }
        Settled::Completed(vm) => {
            let vm = vm.ok_or_else(ApiError::internal)?;
            let view = view_with_history(app, vm).await?;
            let location = [("location", format!("{PREFIX}/vms/{}", view.id))];
            Ok((done, location, JsonAnswer(view)).into_response())
        }
    }
}

/// What a request that made a task is answered with.
#[expect(clippy::large_enum_variant, reason = "one at a time exists")]
pub(super) enum Settled {
    /// Nobody waits, or the time is over first.
    Open(Task),
    /// With this VM, where the task is of one.
    Completed(Option<VmId>),
}

/// Waits as long as the client does; a task that ended badly is a problem.
pub(super) async fn settle(
    app: &App,
    task: Task,
    wait: Option<(TaskWatch, Duration)>,
) -> ApiResult<Settled> {
    let Some((mut watch, limit)) = wait else { return Ok(Settled::Open(task)) };
    if !task.state.is_end() {
        let heard = watch.ended_within(task.id, limit).await?;
        if heard == Some(TaskState::Completed) {
            // Nothing else of it is asked for: it need not be read.
            forget_what_was_built(app, &task);
            return Ok(Settled::Completed(task.vm_id));
        }
    }
    let ended = reread(app, task).await?;
    match ended.state {
        TaskState::Pending | TaskState::Running => Ok(Settled::Open(ended)),
        TaskState::Completed => Ok(Settled::Completed(ended.vm_id)),
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
    reread(app, task).await
}

async fn reread(app: &App, task: Task) -> ApiResult<Task> {
    let task = app.store().task(task.id).await?.unwrap_or(task);
    if task.state.is_end() {
        forget_what_was_built(app, &task);
    }
    Ok(task)
}

/// Whoever hears of the end of a build here may use the template at once; its own event may be
/// later.
fn forget_what_was_built(app: &App, task: &Task) {
    if task.kind == TaskKind::TemplateBuild {
        app.templates.forget_default();
    }
}

pub(super) fn create_op() -> Operation {
    operation("createVm", "Make a VM")
        .about("What it begins as is one of `template`, `snapshot` and `image`.")
        .once()
        .wait("For the VM to run.")
        .body::<CreateVm>()
        .makes::<VmView>("It runs.")
        .accepts::<Accepted>()
        .refuses(&[
            ErrorCode::NameTaken,
            ErrorCode::ImageNotFound,
            ErrorCode::DriverUnavailable,
            ErrorCode::InsufficientCapacity,
            ErrorCode::SnapshotStateConflict,
            ErrorCode::QuotaExceeded,
            ErrorCode::TooManyVms,
        ])
        .refuses_in_body(&[
            ErrorCode::TemplateNotFound,
            ErrorCode::SnapshotNotFound,
            ErrorCode::ToolNotFound,
        ])
}

pub(super) fn list_op() -> Operation {
    operation("listVms", "List VMs")
        .about("Newest first. Deleted ones only where `state` asks for them.")
        .query("state", several::<VmState>, "In one of these states.")
        .query("driver", of::<DriverKind>, "Of this driver.")
        .query("name", text, "Of this name.")
        .query("label", labels, "With all of these labels: `KEY=VALUE`.")
        .page()
        .gives::<Page<VmView>>("A page.")
}

fn labels(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
    schemars::json_schema!({
        "type": "array", "items": { "type": "string", "pattern": "^[^=]+=" },
    })
}

pub(super) fn show_op() -> Operation {
    operation("getVm", "Show a VM with its history")
        .about("By its id also one that is deleted.")
        .gives::<VmView>("The VM.")
}

pub(super) fn delete_op() -> Operation {
    on_vm("deleteVm", "Delete a VM").about("From every state; history and executions stay.")
}

pub(super) fn start_op() -> Operation {
    on_vm("startVm", "Start a VM that is stopped or failed")
        .refuses(&[ErrorCode::QuotaExceeded, ErrorCode::TooManyVms])
}

pub(super) fn stop_op() -> Operation {
    on_vm("stopVm", "Stop a VM")
        .flag("keep_memory", "On disk: a start goes on where the VM was.")
        .refuses(&[ErrorCode::DriverUnavailable])
}

pub(super) fn pause_op() -> Operation {
    on_vm("pauseVm", "Pause a VM")
}

pub(super) fn resume_op() -> Operation {
    on_vm("resumeVm", "Let a paused VM go on")
}

fn on_vm(id: &'static str, summary: &'static str) -> Operation {
    operation(id, summary)
        .once()
        .wait("For the end of the task.")
        .settles::<VmView>("It is done.")
        .accepts::<Accepted>()
        .refuses(&[ErrorCode::VmStateConflict, ErrorCode::QuotaExceeded])
}
