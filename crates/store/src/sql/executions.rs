//! Executions and what was kept of their output.

use aether_types::{Execution, ExecutionId, OutputStream, RetainedOutput, VmId};

use super::{Sql, query::query, rows, rows::execution_columns};
use crate::{Page, PageRequest, StoreError, error::Context};

const GET: &str = concat!("select ", execution_columns!(), " from executions where id = $1");

const NEWEST: &str = concat!(
    "select ",
    execution_columns!(),
    " from executions where vm_id = $1 order by created_at desc, id desc limit $2"
);

const NEXT: &str = concat!(
    "select ",
    execution_columns!(),
    " from executions where vm_id = $1 and (created_at, id) < ($3, $4) \
     order by created_at desc, id desc limit $2"
);

pub(super) async fn get(store: &Sql, id: ExecutionId) -> Result<Option<Execution>, StoreError> {
    query(GET)
        .bind(id.to_string())
        .fetch_optional(store)
        .await
        .context("read an execution")?
        .as_ref()
        .map(rows::execution)
        .transpose()
}

pub(super) async fn list(
    store: &Sql,
    vm: VmId,
    page: PageRequest,
) -> Result<Page<Execution>, StoreError> {
    let limit = page.bounded_limit();
    let asked = match page.after {
        None => query(NEWEST).bind(vm.to_string()).bind(limit + 1),
        Some(cursor) => query(NEXT)
            .bind(vm.to_string())
            .bind(limit + 1)
            .bind(cursor.created_at_ms())
            .bind(cursor.id()),
    };
    let found = asked.fetch_all(store).await.context("list executions")?;
    Ok(Page::cut(rows::all(&found, rows::execution)?, limit, rows::execution_position))
}

pub(super) async fn output(
    store: &Sql,
    id: ExecutionId,
    stream: OutputStream,
) -> Result<RetainedOutput, StoreError> {
    let row = query(
        "select head, tail, total_bytes from outputs where execution_id = $1 and stream = $2",
    )
    .bind(id.to_string())
    .bind(rows::stream_name(stream))
    .fetch_optional(store)
    .await
    .context("read an execution's output")?;
    let Some(row) = row else { return Ok(RetainedOutput::default()) };
    let r = rows::Reader { row: &row, noun: "output" };
    Ok(RetainedOutput {
        head: r.get(0)?,
        tail: r.get(1)?,
        total_bytes: u64::try_from(r.get::<i64>(2)?).map_err(|_| r.corrupt())?,
    })
}
