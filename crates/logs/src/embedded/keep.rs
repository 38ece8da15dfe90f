//! What is kept: the latest, by age and by size. Entries go from the beginning only, so that the
//! numbers of those that are left have no holes.

use sqlx::SqliteConnection;

use super::{EmbeddedConfig, rows};
use crate::now_ns;

/// Rows that one statement removes: appending waits no longer than it takes.
const ROWS_AT_ONCE: u64 = 2000;
/// Free pages beyond these go back to the file system.
const FREE_PAGES_MAX: i64 = 4096;

/// The numbers that are there: from `first`, to before `next`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Span {
    pub(super) first: u64,
    pub(super) next: u64,
}

/// Removes some of what is too much. `true`: there may be more of it.
pub(super) async fn trim(
    db: &mut SqliteConnection,
    span: &mut Span,
    config: &EmbeddedConfig,
) -> Result<bool, sqlx::Error> {
    // The last entry stays, however old: the next process goes on from its number.
    let count = (span.next - span.first).saturating_sub(1);
    if count == 0 {
        return Ok(false);
    }
    let old = too_old(db, span.first, config).await?;
    let size = used_bytes(db).await?;
    // A part of what is there, so that a small store is not emptied by one step.
    let big = if size > config.bytes_max { (count / 32).clamp(1, ROWS_AT_ONCE) } else { 0 };
    let remove = old.max(big);
    if remove == 0 {
        return Ok(false);
    }
    let first = span.first + remove.min(count);
    sqlx::query("delete from entries where seq < ?")
        .bind(rows::signed(first))
        .execute(&mut *db)
        .await?;
    span.first = first;
    let free: i64 = sqlx::query_scalar("pragma freelist_count").fetch_one(&mut *db).await?;
    if free > FREE_PAGES_MAX {
        sqlx::query("pragma incremental_vacuum(1024)").execute(&mut *db).await?;
    }
    Ok(true)
}

/// How many of the first entries are past their time, up to a bound.
async fn too_old(
    db: &mut SqliteConnection,
    first: u64,
    config: &EmbeddedConfig,
) -> Result<u64, sqlx::Error> {
    let Some(age) = config.age_max else { return Ok(0) };
    let oldest = now_ns().saturating_sub(i64::try_from(age.as_nanos()).unwrap_or(i64::MAX));
    let limit = first + ROWS_AT_ONCE;
    // The first that stays; where there is none below the limit, all of these go.
    let stays: Option<i64> = sqlx::query_scalar(
        "select seq from entries where seq < ? and +time_ns >= ? order by seq limit 1",
    )
    .bind(rows::signed(limit))
    .bind(oldest)
    .fetch_optional(&mut *db)
    .await?;
    Ok(stays.map_or(ROWS_AT_ONCE, |seq| rows::unsigned(seq).saturating_sub(first)))
}

async fn used_bytes(db: &mut SqliteConnection) -> Result<u64, sqlx::Error> {
    let pages: i64 = sqlx::query_scalar("pragma page_count").fetch_one(&mut *db).await?;
    let free: i64 = sqlx::query_scalar("pragma freelist_count").fetch_one(&mut *db).await?;
    let size: i64 = sqlx::query_scalar("pragma page_size").fetch_one(&mut *db).await?;
    Ok(rows::unsigned(pages - free) * rows::unsigned(size))
}
