//! Tasks as they are read, and the outbox.

use super::{
    Lock, Sql, attempts,
    query::{Builder, query},
    rows,
    rows::task_columns,
};
use crate::{Page, PageRequest, StoreError, TaskFilter, error::Context};
use aether_types::{Task, TaskId, TaskProgress};

const GET: &str = concat!("select ", task_columns!(), " from tasks where id = $1");

const OPEN: &str = concat!(
    "select ",
    task_columns!(),
    " from tasks where state in ('pending', 'running') order by created_at, id"
);

const UNDISPATCHED: &str = concat!(
    "select ",
    task_columns!(),
    " from tasks where id in (select task_id from outbox where waits = 0) and state = 'pending' \
     order by created_at, id limit $1"
);

pub(super) async fn get(store: &Sql, id: TaskId) -> Result<Option<Task>, StoreError> {
    query(GET)
        .bind(id.to_string())
        .fetch_optional(store)
        .await
        .context("read a task")?
        .as_ref()
        .map(rows::task)
        .transpose()
}

pub(super) async fn progress(
    store: &Sql,
    id: TaskId,
    epoch: i64,
    now: String,
    log: String,
) -> Result<Task, StoreError> {
    let mut writer = store.writer().await;
    let mut tx = writer.begin(&[Lock::Task(id)]).await?;
    let mut task = attempts::spoken_of(&mut tx, id, epoch).await?;
    let generation = task.progress.map_or(0, |earlier| earlier.generation) + 1;
    let progress = TaskProgress { now, log, generation };
    query("update tasks set progress = $2 where id = $1")
        .bind(id.to_string())
        .bind(rows::json(&progress, "progress to record")?)
        .execute(&mut tx)
        .await
        .context("record the progress of a task")?;
    tx.commit("commit the progress of a task").await?;
    task.progress = Some(progress);
    Ok(task)
}

pub(super) async fn list(
    store: &Sql,
    filter: &TaskFilter,
    page: PageRequest,
) -> Result<Page<Task>, StoreError> {
    let limit = page.bounded_limit();
    let mut query = Builder::new(concat!("select ", task_columns!(), " from tasks where 1 = 1"));
    if let Some(project) = filter.project {
        query.push(" and project_id = ").push_bind(project.to_string());
    }
    if !filter.states.is_empty() {
        query.push(" and ").push_in("state", filter.states.iter().map(|s| s.as_str()));
    }
    if let Some(kind) = filter.kind {
        query.push(" and kind = ").push_bind(kind.as_str());
    }
    if let Some(vm) = filter.vm_id {
        query.push(" and vm_id = ").push_bind(vm.to_string());
    }
    if let Some(worker) = filter.worker_id {
        query.push(" and worker_id = ").push_bind(worker.to_string());
    }
    if let Some(cursor) = page.after {
        query.push(" and (created_at, id) < (").push_bind(cursor.created_at_ms());
        query.push(", ").push_bind(cursor.id()).push(")");
    }
    query.push(" order by created_at desc, id desc limit ").push_bind(limit + 1);
    let found = query.build().fetch_all(store).await.context("list tasks")?;
    Ok(Page::cut(rows::all(&found, rows::task)?, limit, rows::task_position))
}

pub(super) async fn open(store: &Sql) -> Result<Vec<Task>, StoreError> {
    let found = query(OPEN).fetch_all(store).await.context("list the open tasks")?;
    rows::all(&found, rows::task)
}

/// Written by who dispatched a task and died before it confirmed that.
async fn forget_ended(store: &Sql) -> Result<(), StoreError> {
    const ENDED: &str = "select outbox.task_id from outbox join tasks on tasks.id = outbox.task_id \
         where tasks.state in ('completed', 'failed', 'cancelled') limit 1";
    const FORGET: &str = "delete from outbox where exists (select 1 from tasks \
         where tasks.id = outbox.task_id and tasks.state in ('completed', 'failed', 'cancelled'))";
    let ended = query(ENDED).fetch_all(store).await.context("look for dispatches to forget")?;
    if ended.is_empty() {
        return Ok(());
    }
    let mut writer = store.writer().await;
    query(FORGET).execute(&mut writer).await.context("forget dispatches of ended tasks")?;
    Ok(())
}

pub(super) async fn undispatched(store: &Sql, limit: u32) -> Result<Vec<Task>, StoreError> {
    forget_ended(store).await?;
    let found =
        query(UNDISPATCHED).bind(limit).fetch_all(store).await.context("read the outbox")?;
    rows::all(&found, rows::task)
}

pub(super) async fn confirm_dispatched(store: &Sql, ids: &[TaskId]) -> Result<(), StoreError> {
    // What waits for a worker by now was not dispatched to where it will go.
    const CONFIRM: &str = "delete from outbox where task_id = $1 and waits = 0";
    let mut writer = store.writer().await;
    if let [id] = ids {
        query(CONFIRM)
            .bind(id.to_string())
            .execute(&mut writer)
            .await
            .context("confirm a dispatch")?;
        return Ok(());
    }
    let mut tx = writer.begin(&[]).await?;
    for id in ids {
        query(CONFIRM).bind(id.to_string()).execute(&mut tx).await.context("confirm dispatches")?;
    }
    tx.commit("commit the dispatches").await
}
