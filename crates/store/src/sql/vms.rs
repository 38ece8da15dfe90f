//! VMs as they are read, and changes that no task asked for.

use super::{
    Lock, Sql,
    query::{Builder, query},
    rows,
    rows::vm_columns,
    workers, write,
};
use crate::{
    Page, PageRequest, Registration, StoreError, VmChange, VmFilter, VmPatch, error::Context,
};
use aether_types::{ProjectId, StateChange, Timestamp, Vm, VmId};

const GET: &str = concat!("select ", vm_columns!(), " from vms where id = $1");

const BY_NAME: &str = concat!(
    "select ",
    vm_columns!(),
    " from vms where project_id = $1 and name = $2 and state <> 'deleted'"
);

pub(super) async fn change(
    store: &Sql,
    id: VmId,
    by: Option<Registration>,
    change: VmChange,
) -> Result<Vm, StoreError> {
    let mut writer = store.writer().await;
    let mut tx = writer.begin(&[Lock::Vm(id)]).await?;
    let mut vm = write::vm(&mut tx, id).await?.ok_or(StoreError::VmNotFound)?;
    if let Some(by) = by
        && (vm.worker_id.is_some_and(|worker| worker != by.worker)
            || !workers::is_current(&mut tx, by).await?)
    {
        return Err(StoreError::Fenced);
    }
    let Some(next) = vm.state.apply(change.event) else {
        return Err(write::wrong_state(vm, change.event));
    };
    let now = Timestamp::now();
    write::move_vm(&mut tx, &mut vm, next, change.reason, &change.patch, now).await?;
    tx.commit("commit a VM's change").await?;
    Ok(vm)
}

pub(super) async fn patch(store: &Sql, id: VmId, patch: VmPatch) -> Result<(), StoreError> {
    let start = patch.start.map(|start| rows::json(&start, "start to record")).transpose()?;
    let tools = patch.tools.map(|tools| rows::json(&tools, "tools to record")).transpose()?;
    let mut writer = store.writer().await;
    let done = query(
        "update vms set worker_id = coalesce($2, worker_id), address = coalesce($3, address), \
         start = coalesce($5, start), tools = coalesce($6, tools), updated_at = $4, \
         generation = generation + 1 where id = $1",
    )
    .bind(id.to_string())
    .bind(patch.worker_id.map(|w| w.to_string()))
    .bind(patch.address.map(|a| a.to_string()))
    .bind(Timestamp::now().unix_ms())
    .bind(start)
    .bind(tools)
    .execute(&mut writer)
    .await
    .context("patch a VM")?;
    if done == 0 { Err(StoreError::VmNotFound) } else { Ok(()) }
}

pub(super) async fn get(store: &Sql, id: VmId) -> Result<Option<Vm>, StoreError> {
    query(GET)
        .bind(id.to_string())
        .fetch_optional(store)
        .await
        .context("read a VM")?
        .as_ref()
        .map(rows::vm)
        .transpose()
}

pub(super) async fn by_name(
    store: &Sql,
    project: ProjectId,
    name: &str,
) -> Result<Option<Vm>, StoreError> {
    query(BY_NAME)
        .bind(project.to_string())
        .bind(name.to_owned())
        .fetch_optional(store)
        .await
        .context("read a VM by its name")?
        .as_ref()
        .map(rows::vm)
        .transpose()
}

pub(super) async fn list(
    store: &Sql,
    filter: &VmFilter,
    page: PageRequest,
) -> Result<Page<Vm>, StoreError> {
    let limit = page.bounded_limit();
    let mut query = Builder::new(concat!("select ", vm_columns!(), " from vms where "));
    if filter.states.is_empty() {
        query.push("state <> 'deleted'");
    } else {
        query.push_in("state", filter.states.iter().map(|s| s.as_str()));
    }
    if let Some(project) = filter.project {
        query.push(" and project_id = ").push_bind(project.to_string());
    }
    if !filter.builders {
        query.push(" and builder = 0");
    }
    if let Some(driver) = filter.driver {
        query.push(" and driver = ").push_bind(driver.as_str());
    }
    if let Some(name) = &filter.name {
        query.push(" and name = ").push_bind(name.clone());
    }
    if let Some(worker) = filter.worker_id {
        query.push(" and worker_id = ").push_bind(worker.to_string());
    }
    for (key, value) in &filter.labels {
        query.push(" and exists (select 1 from vm_labels where vm_id = vms.id and key = ");
        query.push_bind(key.clone()).push(" and value = ").push_bind(value.clone()).push(")");
    }
    if let Some(cursor) = page.after {
        query.push(" and (created_at, id) < (").push_bind(cursor.created_at_ms());
        query.push(", ").push_bind(cursor.id()).push(")");
    }
    query.push(" order by created_at desc, id desc limit ").push_bind(limit + 1);
    let found = query.build().fetch_all(store).await.context("list VMs")?;
    Ok(Page::cut(rows::all(&found, rows::vm)?, limit, rows::vm_position))
}

pub(super) async fn history(store: &Sql, id: VmId) -> Result<Vec<StateChange>, StoreError> {
    let found = query(
        "select state, at, reason_code, reason_message from vm_changes where vm_id = $1 \
         order by generation",
    )
    .bind(id.to_string())
    .fetch_all(store)
    .await
    .context("read a VM's history")?;
    rows::all(&found, rows::change)
}

pub(super) async fn expired(store: &Sql, now: Timestamp) -> Result<Vec<VmId>, StoreError> {
    let found = query(
        "select id from vms where expires_at is not null and expires_at <= $1 \
         and state <> 'deleting' and state <> 'deleted' order by expires_at, id",
    )
    .bind(now.unix_ms())
    .fetch_all(store)
    .await
    .context("look for expired VMs")?;
    rows::all(&found, |row| rows::Reader { row, noun: "VM" }.parsed(0))
}

pub(super) async fn next_expiry(store: &Sql) -> Result<Option<Timestamp>, StoreError> {
    let row = query(
        "select min(expires_at) from vms where expires_at is not null \
         and state <> 'deleting' and state <> 'deleted'",
    )
    .fetch_one(store)
    .await
    .context("look for the next VM to expire")?;
    rows::Reader { row: &row, noun: "VM" }.time_option(0)
}
