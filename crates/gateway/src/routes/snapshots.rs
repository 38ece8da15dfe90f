use std::sync::Arc;

use aether_api::{Accepted, CreateSnapshot, PREFIX, Page, SnapshotView};
use aether_store::{NewSnapshot, SnapshotFilter, StoreError};
use aether_types::{
    ErrorCode, Snapshot, SnapshotId, SnapshotPurpose, SnapshotState, TaskKind, VmId,
};
use axum::{
    Json as JsonAnswer,
    extract::{Path, State},
    http::StatusCode,
    response::{IntoResponse as _, Response},
};

use crate::{
    admission,
    auth::Caller,
    extract::{JsonOrNothing, Once, Params},
    openapi::{Operation, operation, several, text},
    parts::App,
    problem::{ApiError, ApiResult},
    routes::{
        accepted,
        vms::{self, Settled, settle},
    },
    submit::{Recorded, attend, new_task, snapshot_event, submit},
    wait::TaskWatch,
};

/// The snapshot of the caller's project that a path names: by its name, or by its id also one that is deleted, or that
/// exists for a fork or a template.
async fn find(app: &App, caller: &Caller, text: &str) -> ApiResult<Snapshot> {
    let found = match text.parse() {
        Ok(id) => app.store().snapshot(id).await?,
        Err(_) => app.store().snapshot_by_name(caller.project(), text).await?,
    };
    let found = found.filter(|snapshot| snapshot.project_id == caller.project());
    found.ok_or_else(|| not_found(text))
}

fn not_found(text: &str) -> ApiError {
    let shown: String = text.chars().take(64).collect();
    ApiError::new(ErrorCode::SnapshotNotFound, format!("there is no snapshot `{shown}`"))
}

/// The snapshot that a VM is to begin as. One that is being made is waited for by the VM.
pub(super) async fn find_usable(app: &App, caller: &Caller, text: &str) -> ApiResult<Snapshot> {
    let snapshot = find(app, caller, text).await.map_err(|error| error.in_body("snapshot"))?;
    check_purpose(&snapshot, "begun as").map_err(|error| error.in_body("snapshot"))?;
    match snapshot.state {
        SnapshotState::Creating | SnapshotState::Ready => Ok(snapshot),
        SnapshotState::Deleted => Err(not_found(text).in_body("snapshot")),
        SnapshotState::Failed => {
            let reason = snapshot.reason.map_or_else(String::new, |r| format!(": {r}"));
            let detail = format!("the snapshot could not be made{reason}");
            Err(conflict(detail).in_body("snapshot"))
        }
    }
}

fn conflict(detail: String) -> ApiError {
    ApiError::new(ErrorCode::SnapshotStateConflict, detail)
}

/// What the platform made for itself is not for clients.
fn check_purpose(snapshot: &Snapshot, action: &str) -> ApiResult<()> {
    let of = match snapshot.purpose {
        SnapshotPurpose::User => return Ok(()),
        SnapshotPurpose::Fork => "a fork's, and goes with it",
        SnapshotPurpose::Memory => "a stopped VM's memory; start or delete that VM",
        SnapshotPurpose::Template => "a template's; use or delete that template",
    };
    Err(conflict(format!("the snapshot {} cannot be {action}: it is {of}", snapshot.id)))
}

pub(super) async fn create(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
    once: Once,
    mut params: Params,
    JsonOrNothing(body): JsonOrNothing<CreateSnapshot>,
) -> ApiResult<Response> {
    let wait = params.wait()?;
    params.finish()?;
    let name = body.value.name.map(admission::snapshot_name).transpose()?;
    let vm = vms::find(&app, &caller, &vm).await?;
    admission::check_snapshots(vm.spec.driver, &*app.parts.catalogue)?;
    let new = NewSnapshot { id: SnapshotId::new(), name, purpose: SnapshotPurpose::User };
    let (task, idempotency) =
        (new_task(TaskKind::VmSnapshot, &caller), once.idempotency(&body.bytes));
    let watch = wait.map(|_| TaskWatch::new(&app));
    let store = Arc::clone(&app.parts.store);
    let recorded = submit(&app, async move {
        match store.request_snapshot(vm.id, new, task, idempotency).await {
            Ok((accepted, snapshot)) => Ok(Recorded::new(accepted, snapshot)),
            Err(StoreError::NameTaken { name }) => {
                let detail = format!("the name `{name}` belongs to another snapshot");
                Err(ApiError::new(ErrorCode::NameTaken, detail).field("name"))
            }
            Err(error) => Err(error.into()),
        }
    })
    .await?;
    let Recorded { accepted: recorded, made, .. } = recorded;
    match settle(&app, recorded.task, watch.zip(wait)).await? {
        Settled::Open(task) => Ok(accepted(Accepted::new(&task, made.vm_id))),
        Settled::Completed(_) => {
            let found = app.store().snapshot(made.id).await?.unwrap_or(made);
            let location = [("location", format!("{PREFIX}/snapshots/{}", found.id))];
            let view = JsonAnswer(SnapshotView::from(found));
            Ok((StatusCode::CREATED, location, view).into_response())
        }
    }
}

pub(super) async fn list(
    State(app): State<App>,
    caller: Caller,
    mut params: Params,
) -> ApiResult<JsonAnswer<Page<SnapshotView>>> {
    let vm = match params.one("vm")? {
        Some(vm) => Some(vms::resolve(&app, &caller, &vm).await?),
        None => None,
    };
    page(&app, &caller, vm, params).await
}

pub(super) async fn list_of_vm(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
    params: Params,
) -> ApiResult<JsonAnswer<Page<SnapshotView>>> {
    let vm = vms::find(&app, &caller, &vm).await?;
    page(&app, &caller, Some(vm.id), params).await
}

async fn page(
    app: &App,
    caller: &Caller,
    vm_id: Option<VmId>,
    mut params: Params,
) -> ApiResult<JsonAnswer<Page<SnapshotView>>> {
    let states = params.list::<SnapshotState>("state")?;
    let page = params.page()?;
    params.finish()?;
    let purposes = vec![SnapshotPurpose::User];
    let project = Some(caller.project());
    let filter = SnapshotFilter { project, states, purposes, vm_id, worker_id: None };
    let found = app.store().snapshots(filter, page).await?;
    let items = found.items.into_iter().map(SnapshotView::from).collect();
    Ok(JsonAnswer(Page { items, next_cursor: found.next.map(|c| c.to_string()) }))
}

pub(super) async fn show(
    State(app): State<App>,
    caller: Caller,
    Path(snapshot): Path<String>,
    params: Params,
) -> ApiResult<JsonAnswer<SnapshotView>> {
    params.finish()?;
    Ok(JsonAnswer(find(&app, &caller, &snapshot).await?.into()))
}

pub(super) async fn delete(
    State(app): State<App>,
    caller: Caller,
    Path(snapshot): Path<String>,
    params: Params,
) -> ApiResult<JsonAnswer<SnapshotView>> {
    params.finish()?;
    let found = find(&app, &caller, &snapshot).await?;
    check_purpose(&found, "deleted")?;
    let shared = app.clone();
    let deleted = attend(&app, "deleting a snapshot", async move {
        let deleted = shared.store().delete_snapshot(found.id).await?;
        shared.publish(snapshot_event(&deleted)).await;
        Ok(deleted)
    })
    .await?;
    Ok(JsonAnswer(deleted.into()))
}

pub(super) fn create_op() -> Operation {
    operation("createSnapshot", "Take a snapshot of a VM")
        .about("Of one that runs or is paused, and goes on afterwards.")
        .once()
        .wait("For the snapshot to be on disk.")
        .body_or_nothing::<CreateSnapshot>()
        .makes::<SnapshotView>("It is on disk.")
        .accepts::<Accepted>()
        .refuses(&[
            ErrorCode::NameTaken,
            ErrorCode::VmStateConflict,
            ErrorCode::DriverUnavailable,
            ErrorCode::QuotaExceeded,
        ])
}

pub(super) fn list_op() -> Operation {
    page_op("listSnapshots", "List snapshots")
        .query("vm", text, "Of this VM, by its name or its id.")
        .refuses(&[ErrorCode::VmNotFound])
}

pub(super) fn list_of_vm_op() -> Operation {
    page_op("listVmSnapshots", "List snapshots of a VM")
}

fn page_op(id: &'static str, summary: &'static str) -> Operation {
    operation(id, summary)
        .query("state", several::<SnapshotState>, "In one of these states.")
        .page()
        .gives::<Page<SnapshotView>>("A page, newest first.")
}

pub(super) fn show_op() -> Operation {
    operation("getSnapshot", "Show a snapshot")
        .about("By its id also one that is deleted.")
        .gives::<SnapshotView>("The snapshot.")
}

pub(super) fn delete_op() -> Operation {
    operation("deleteSnapshot", "Delete a snapshot")
        .about("VMs that began as it keep what they need.")
        .gives::<SnapshotView>("It is deleted.")
        .refuses(&[ErrorCode::SnapshotStateConflict])
}
