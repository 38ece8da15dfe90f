use std::{sync::Arc, time::Duration};

use aether_api::{CloneAccepted, ForkAccepted, ForkVm, Forked};
use aether_store::{NewSnapshot, StoreError};
use aether_types::{ErrorCode, Snapshot, SnapshotId, SnapshotPurpose, Task, TaskKind, VmId};
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
    openapi::{JSON, Operation, of, operation},
    parts::App,
    problem::{ApiError, ApiResult},
    routes::{
        accepted_as,
        vms::{find, view},
    },
    submit::{Recorded, new_task, submit},
    wait::{TaskWatch, Together},
};

pub(super) async fn create(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
    once: Once,
    mut params: Params,
    JsonOrNothing(body): JsonOrNothing<ForkVm>,
) -> ApiResult<Response> {
    let wait = params.wait()?;
    params.finish()?;
    let source = find(&app, &caller, &vm).await?;
    let new = NewSnapshot { id: SnapshotId::new(), name: None, purpose: SnapshotPurpose::Fork };
    let clones = admission::admit_fork(body.value, &source, new.id, &*app.parts.catalogue)?;
    let clones = clones.into_iter().map(|vm| (vm, new_task(TaskKind::VmCreate, &caller))).collect();
    let (task, idempotency) =
        (new_task(TaskKind::VmSnapshot, &caller), once.idempotency(&body.bytes));
    let capacity = app.parts.config.capacity;
    let watch = wait.map(|_| TaskWatch::new(&app));
    let store = Arc::clone(&app.parts.store);
    let recorded = submit(&app, async move {
        match store.fork_vm(source.id, new, task, clones, capacity, idempotency).await {
            Ok(forked) => Ok(Recorded {
                accepted: forked.accepted,
                clones: forked.clones,
                made: forked.snapshot,
            }),
            Err(error @ StoreError::NameTaken { .. }) => {
                Err(ApiError::from(error).field("name_prefix"))
            }
            Err(error) => Err(error.into()),
        }
    })
    .await?;
    match watch.zip(wait) {
        Some((watch, limit)) => answer(&app, recorded, watch, limit).await,
        None => Ok(open(&recorded.accepted.task, &recorded)),
    }
}

fn open(task: &Task, recorded: &Recorded<Snapshot>) -> Response {
    let clone = |(vm, task): &(aether_types::Vm, Task)| CloneAccepted {
        vm_id: vm.id,
        name: vm.name.clone(),
        task_id: task.id,
    };
    let answer = ForkAccepted {
        task_id: task.id,
        vm_id: recorded.made.vm_id,
        status: task.state,
        snapshot_id: recorded.made.id,
        vms: recorded.clones.iter().map(clone).collect(),
    };
    accepted_as(task.id, answer)
}

/// 201 when all clones run; the first problem, with the ids of all of them; or 202 again.
async fn answer(
    app: &App,
    recorded: Recorded<Snapshot>,
    mut watch: TaskWatch,
    limit: Duration,
) -> ApiResult<Response> {
    // The snapshot's first: where it fails so do the clones, and it says why.
    let mut tasks = vec![recorded.accepted.task.clone()];
    tasks.extend(recorded.clones.iter().map(|(_, task)| task.clone()));
    let ids: Vec<VmId> = recorded.clones.iter().map(|(vm, _)| vm.id).collect();
    match watch.all_within(&tasks, limit).await? {
        Together::Completed => {}
        Together::Bad(task) => return Err(ApiError::from_task(&task).vm_ids(ids)),
        Together::Open => {
            let task = &recorded.accepted.task;
            let now = app.store().task(task.id).await?;
            return Ok(open(now.as_ref().unwrap_or(task), &recorded));
        }
    }
    let mut vms = Vec::with_capacity(ids.len());
    for id in ids {
        let vm = app.store().vm(id).await?;
        let vm = vm.ok_or_else(|| ApiError::new(ErrorCode::VmNotFound, "a clone is gone"))?;
        vms.push(view(app, vm, None).await?);
    }
    let snapshot = app.store().snapshot(recorded.made.id).await?;
    let paused_ms = snapshot.and_then(|s| aether_api::SnapshotView::from(s).paused_ms);
    Ok((StatusCode::CREATED, JsonAnswer(Forked { paused_ms, vms })).into_response())
}

pub(super) fn create_op() -> Operation {
    operation("forkVm", "Make clones of a VM")
        .about("With everything in it, processes too. All of it is recorded, or none.")
        .once()
        .wait("For all clones to run.")
        .body_or_nothing::<ForkVm>()
        .answers(StatusCode::CREATED, "All clones run.", Some(JSON), of::<Forked>, &[])
        .accepts::<ForkAccepted>()
        .refuses(&[
            ErrorCode::NameTaken,
            ErrorCode::VmStateConflict,
            ErrorCode::DriverUnavailable,
            ErrorCode::InsufficientCapacity,
            ErrorCode::ImageNotFound,
            ErrorCode::QuotaExceeded,
            ErrorCode::TooManyVms,
        ])
}
