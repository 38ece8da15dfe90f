//! Tasks as they are read, and the outbox.

use aether_types::{Task, TaskId, TaskProgress};
use sqlx::{Connection, QueryBuilder, Sqlite};

use super::{SqliteStore, rows, rows::task_columns};
use crate::{Page, PageRequest, StoreError, TaskFilter, error::Context};

const GET: &str = concat!("select ", task_columns!(), " from tasks where id = $1");

const OPEN: &str = concat!(
    "select ",
    task_columns!(),
    " from tasks where state in ('pending', 'running') order by created_at, id"
);

const UNDISPATCHED: &str = concat!(
    "select ",
    task_columns!(),
    " from tasks where id in (select task_id from outbox) and state = 'pending' \
     order by created_at, id limit $1"
);

pub(super) async fn get(store: &SqliteStore, id: TaskId) -> Result<Option<Task>, StoreError> {
    sqlx::query(GET)
        .bind(id.to_string())
        .fetch_optional(&store.readers)
        .await
        .context("read a task")?
        .as_ref()
        .map(rows::task)
        .transpose()
}

pub(super) async fn progress(
    store: &SqliteStore,
    id: TaskId,
    epoch: i64,
    now: String,
    log: String,
) -> Result<Task, StoreError> {
    const PROGRESS: &str = concat!(
        "update tasks set progress = json_set($3, '$.generation', \
         coalesce(json_extract(progress, '$.generation'), 0) + 1) \
         where id = $1 and epoch = $2 and state = 'running' returning ",
        task_columns!()
    );
    let progress = TaskProgress { now, log, generation: 0 };
    let progress = rows::json(&progress, "progress to record")?;
    let mut writer = store.writer.lock().await;
    let found = sqlx::query(PROGRESS)
        .bind(id.to_string())
        .bind(epoch)
        .bind(progress)
        .fetch_all(&mut *writer)
        .await
        .context("record the progress of a task")?;
    drop(writer);
    if let Some(row) = found.first() {
        return rows::task(row);
    }
    get(store, id).await?.ok_or(StoreError::TaskNotFound)?;
    Err(StoreError::Fenced)
}

pub(super) async fn list(
    store: &SqliteStore,
    filter: &TaskFilter,
    page: PageRequest,
) -> Result<Page<Task>, StoreError> {
    let limit = page.bounded_limit();
    let mut query: QueryBuilder<Sqlite> =
        QueryBuilder::new(concat!("select ", task_columns!(), " from tasks where 1 = 1"));
    if !filter.states.is_empty() {
        query.push(" and state in (");
        let mut states = query.separated(", ");
        for state in &filter.states {
            states.push_bind(state.as_str());
        }
        query.push(")");
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
    let found = query.build().fetch_all(&store.readers).await.context("list tasks")?;
    Ok(Page::cut(rows::all(&found, rows::task)?, limit, rows::task_position))
}

pub(super) async fn open(store: &SqliteStore) -> Result<Vec<Task>, StoreError> {
    let found = sqlx::query(OPEN).fetch_all(&store.readers).await.context("list the open tasks")?;
    rows::all(&found, rows::task)
}

pub(super) async fn undispatched(store: &SqliteStore, limit: u32) -> Result<Vec<Task>, StoreError> {
    let found = sqlx::query(UNDISPATCHED)
        .bind(limit)
        .fetch_all(&store.readers)
        .await
        .context("read the outbox")?;
    rows::all(&found, rows::task)
}

pub(super) async fn confirm_dispatched(
    store: &SqliteStore,
    ids: &[TaskId],
) -> Result<(), StoreError> {
    const CONFIRM: &str = "delete from outbox where task_id = $1";
    let mut writer = store.writer.lock().await;
    if let [id] = ids {
        sqlx::query(CONFIRM)
            .bind(id.to_string())
            .execute(&mut *writer)
            .await
            .context("confirm a dispatch")?;
        return Ok(());
    }
    let mut tx = writer.begin_with("begin immediate").await.context("begin a transaction")?;
    for id in ids {
        sqlx::query(CONFIRM)
            .bind(id.to_string())
            .execute(&mut *tx)
            .await
            .context("confirm dispatches")?;
    }
    tx.commit().await.context("commit the dispatches")
}
