//! Reading what is on the disk, in bounded time.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures::TryStreamExt as _;
use sqlx::{Sqlite, SqliteConnection, SqlitePool, query_builder::QueryBuilder};

use super::rows;
use crate::{LogAnswer, LogError, LogFilter, LogQuery, Logged, error::Context as _};
use aether_types::limits::LOG_QUERY_BYTES_MAX;

/// Numbers that one step of a follower walks through, whether they fit or not.
const WALK_ROWS: u64 = 20_000;
/// Steps of SQLite's machine between two looks at the clock.
const STEPS_BETWEEN_LOOKS: i32 = 20_000;

/// What one step of a follower found.
#[derive(Debug)]
pub(super) struct Walked {
    pub(super) entries: Vec<Arc<Logged>>,
    /// Entries that were removed before.
    pub(super) missed: u64,
    /// Where to go on.
    pub(super) next: u64,
}

/// The latest that fit, oldest first.
pub(super) async fn latest(
    pool: &SqlitePool,
    asked: &LogQuery,
    limit: Duration,
) -> Result<LogAnswer, LogError> {
    let mut query =
        QueryBuilder::<Sqlite>::new(format!("select {} from entries where true", rows::COLUMNS));
    rows::push_filter(&mut query, &asked.filter, false);
    if let Some(start) = asked.start_ns {
        query.push(" and time_ns >= ").push_bind(start);
    }
    if let Some(end) = asked.end_ns {
        query.push(" and time_ns < ").push_bind(end);
    }
    query.push(" order by time_ns desc, seq desc limit ").push_bind(i64::from(asked.limit) + 1);
    let mut db = pool.acquire().await.context("read log entries")?;
    stop_after(&mut db, limit).await?;
    let mut answer = LogAnswer::default();
    let mut bytes = 0;
    let mut found = query.build().fetch(&mut *db);
    while let Some(row) = found.try_next().await.map_err(|error| slow(error, limit))? {
        let logged = rows::read(&row)?;
        bytes += logged.entry.text().len();
        let is_full = answer.entries.len() == asked.limit as usize;
        if is_full || (bytes > LOG_QUERY_BYTES_MAX && !answer.entries.is_empty()) {
            answer.more = true;
            break;
        }
        answer.entries.push(Arc::new(logged));
    }
    answer.entries.reverse();
    Ok(answer)
}

/// From number `from` on, to `head` at most.
pub(super) async fn walk(
    pool: &SqlitePool,
    filter: &LogFilter,
    floor_ns: Option<i64>,
    from: u64,
    head: u64,
    max: usize,
) -> Result<Walked, LogError> {
    // One transaction: what is removed between two statements would be missed in silence.
    let mut db = pool.begin().await.context("read log entries")?;
    let first: Option<i64> = sqlx::query_scalar("select min(seq) from entries")
        .fetch_one(&mut *db)
        .await
        .context("read the oldest log entry")?;
    // An empty store has lost all that it once had.
    let first = first.map_or(head + 1, rows::unsigned);
    let start = from.max(first);
    let end = head.saturating_add(1).min(start.saturating_add(WALK_ROWS));
    let mut query =
        QueryBuilder::<Sqlite>::new(format!("select {} from entries where seq >= ", rows::COLUMNS));
    query.push_bind(rows::signed(start)).push(" and seq < ").push_bind(rows::signed(end));
    rows::push_filter(&mut query, filter, true);
    if let Some(floor) = floor_ns {
        query.push(" and +time_ns >= ").push_bind(floor);
    }
    query.push(" order by seq limit ").push_bind(rows::signed(max as u64));
    let found = query.build().fetch_all(&mut *db).await.context("read log entries")?;
    let entries: Vec<_> =
        found.iter().map(|row| rows::read(row).map(Arc::new)).collect::<Result<_, _>>()?;
    let next = match entries.last() {
        Some(last) if entries.len() == max => last.sequence + 1,
        _ => end.max(start),
    };
    Ok(Walked { entries, missed: start - from, next })
}

/// The lowest number of an entry of this time or later.
pub(super) async fn first_since(
    pool: &SqlitePool,
    time_ns: i64,
    limit: Duration,
) -> Result<Option<u64>, LogError> {
    let mut db = pool.acquire().await.context("find a point in time")?;
    stop_after(&mut db, limit).await?;
    let first: Option<i64> = sqlx::query_scalar("select min(seq) from entries where time_ns >= ?")
        .bind(time_ns)
        .fetch_one(&mut *db)
        .await
        .map_err(|error| slow(error, limit))?;
    Ok(first.map(rows::unsigned))
}

pub(super) async fn fact(pool: &SqlitePool, name: &str) -> Result<Option<String>, LogError> {
    sqlx::query_scalar("select value from facts where name = ?")
        .bind(name)
        .fetch_optional(pool)
        .await
        .context("read a fact")
}

/// From now on, what this connection does ends by then. Also where the future that asked was
/// dropped: the statement would else go on without anybody.
async fn stop_after(db: &mut SqliteConnection, limit: Duration) -> Result<(), LogError> {
    let deadline = Instant::now() + limit;
    db.lock_handle()
        .await
        .context("read log entries")?
        .set_progress_handler(STEPS_BETWEEN_LOOKS, move || Instant::now() < deadline);
    Ok(())
}

/// SQLITE_INTERRUPT is our own deadline.
fn slow(error: sqlx::Error, limit: Duration) -> LogError {
    let interrupted = match &error {
        sqlx::Error::Database(e) => e.code().as_deref() == Some("9"),
        _ => false,
    };
    if interrupted {
        return LogError::TooSlow { seconds: limit.as_secs() };
    }
    LogError::Database { context: "read log entries", source: error }
}
