//! The audit log. Rows are added and read; only retention takes them away, the oldest first.

use aether_types::{Timestamp, limits};

use super::{
    Sql,
    query::{Builder, Row, query},
    rows,
};
use crate::{AuditEntry, AuditFilter, Cursor, Page, PageRequest, StoreError, error::Context};

macro_rules! audit_columns {
    () => {
        "id, at, project_id, key_id, key_prefix, action, method, path, made, outcome, status, \
         code, request_id, address"
    };
}

/// Taken away by one statement: so many rows are gone in some milliseconds.
const PRUNE_ROWS: u32 = 1000;

/// The same entry twice, as a repetition after a lost answer writes it, is one.
pub(super) async fn insert(store: &Sql, entry: AuditEntry) -> Result<(), StoreError> {
    const INSERT: &str = concat!(
        "insert into audit (",
        audit_columns!(),
        ") values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14) \
         on conflict (id) do nothing"
    );
    let mut writer = store.writer().await;
    query(INSERT)
        .bind(entry.id.to_string())
        .bind(entry.at.unix_ms())
        .bind(entry.project_id.map(|id| id.to_string()))
        .bind(entry.key_id.map(|id| id.to_string()))
        .bind(entry.key_prefix)
        .bind(entry.action.map(|scope| scope.to_string()))
        .bind(entry.method)
        .bind(entry.path)
        .bind(entry.made)
        .bind(entry.outcome.as_str())
        .bind(i64::from(entry.status))
        .bind(entry.code.map(aether_types::ErrorCode::as_str))
        .bind(entry.request_id)
        .bind(entry.address.map(|address| address.to_string()))
        .execute(&mut writer)
        .await
        .context("write to the audit log")?;
    Ok(())
}

pub(super) async fn list(
    store: &Sql,
    filter: &AuditFilter,
    page: PageRequest,
) -> Result<Page<AuditEntry>, StoreError> {
    let limit = page.bounded_limit();
    let mut query = Builder::new(concat!("select ", audit_columns!(), " from audit where 1 = 1"));
    if let Some(project) = filter.project {
        query.push(" and project_id = ").push_bind(project.to_string());
    }
    if let Some(key) = filter.key {
        query.push(" and key_id = ").push_bind(key.to_string());
    }
    if !filter.outcomes.is_empty() {
        query.push(" and ").push_in("outcome", filter.outcomes.iter().map(|o| o.as_str()));
    }
    if let Some(since) = filter.since {
        query.push(" and at >= ").push_bind(since.unix_ms());
    }
    if let Some(until) = filter.until {
        query.push(" and at < ").push_bind(until.unix_ms());
    }
    if let Some(cursor) = page.after {
        query.push(" and (at, id) < (").push_bind(cursor.created_at_ms());
        query.push(", ").push_bind(cursor.id()).push(")");
    }
    query.push(" order by at desc, id desc limit ").push_bind(limit + 1);
    let found = query.build().fetch_all(store).await.context("read the audit log")?;
    let position = |entry: &AuditEntry| Cursor::new(entry.at.unix_ms(), &entry.id.to_string());
    Ok(Page::cut(rows::all(&found, entry)?, limit, position))
}

/// A step at a time, so that nobody waits for long. Gives how many went.
pub(super) async fn prune(store: &Sql, before: Timestamp) -> Result<u64, StoreError> {
    let mut writer = store.writer().await;
    let old = query(
        "delete from audit where id in (select id from audit where at < $1 \
         order by at, id limit $2)",
    )
    .bind(before.unix_ms())
    .bind(PRUNE_ROWS)
    .execute(&mut writer)
    .await
    .context("take old entries from the audit log")?;
    let too_many = query(
        "delete from audit where id in (select id from audit order by at desc, id desc \
         limit $1 offset $2)",
    )
    .bind(PRUNE_ROWS)
    .bind(limits::AUDIT_ROWS_MAX)
    .execute(&mut writer)
    .await
    .context("hold the audit log to its size")?;
    Ok(old + too_many)
}

fn entry(row: &Row) -> Result<AuditEntry, StoreError> {
    let r = rows::Reader { row, noun: "audit entry" };
    Ok(AuditEntry {
        id: r.parsed(0)?,
        at: r.time(1)?,
        project_id: r.parsed_option(2)?,
        key_id: r.parsed_option(3)?,
        key_prefix: r.get(4)?,
        // What a newer program wrote may be unknown here; the rest can be read all the same.
        action: r.get::<Option<&str>>(5)?.and_then(|scope| scope.parse().ok()),
        method: r.get(6)?,
        path: r.get(7)?,
        made: r.get(8)?,
        outcome: r.parsed(9)?,
        status: u16::try_from(r.get::<i64>(10)?).map_err(|_| r.corrupt())?,
        code: r.get::<Option<&str>>(11)?.and_then(|code| code.parse().ok()),
        request_id: r.get(12)?,
        address: r.parsed_option(13)?,
    })
}
