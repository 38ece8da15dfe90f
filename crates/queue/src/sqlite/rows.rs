//! What is written down, and what a restart makes of it.

use std::{str::FromStr, time::Duration};

use aether_types::{Priority, TaskId, WorkerId};
use sqlx::{Connection, Row, SqliteConnection, sqlite::SqliteRow};

use crate::{
    Entry, Lane, QueueError,
    error::Context,
    schedule::{Place, Schedule},
};

const INSERT: &str = "insert into entries (task_id, lane_worker, priority, seq, ready_at, \
     delay_ms, epoch, lease_worker, lease_ms) values ($1, $2, $3, $4, $5, $6, 0, null, 0) \
     on conflict (task_id) do update set lane_worker = excluded.lane_worker, \
     priority = excluded.priority, seq = excluded.seq, ready_at = excluded.ready_at, \
     delay_ms = excluded.delay_ms, lease_worker = null, lease_ms = 0";

pub(super) async fn insert(
    db: &mut SqliteConnection,
    entries: &[(Entry, i64)],
    now_ms: i64,
) -> Result<(), QueueError> {
    if let [(entry, seq)] = entries {
        return insert_one(db, entry, *seq, now_ms).await;
    }
    let mut tx = db.begin_with("begin immediate").await.context("begin a transaction")?;
    for (entry, seq) in entries {
        insert_one(&mut tx, entry, *seq, now_ms).await?;
    }
    tx.commit().await.context("commit entries")
}

async fn insert_one(
    db: &mut SqliteConnection,
    entry: &Entry,
    seq: i64,
    now_ms: i64,
) -> Result<(), QueueError> {
    let lane_worker = match entry.lane {
        Lane::Shared => None,
        Lane::Worker(worker) => Some(worker.to_string()),
    };
    let delay_ms = millis(entry.delay);
    sqlx::query(INSERT)
        .bind(entry.task.to_string())
        .bind(lane_worker)
        .bind(entry.priority.as_str())
        .bind(seq)
        .bind(now_ms.saturating_add(delay_ms))
        .bind(delay_ms)
        .execute(db)
        .await
        .context("write an entry")?;
    Ok(())
}

pub(super) async fn lease(
    db: &mut SqliteConnection,
    task: TaskId,
    worker: WorkerId,
    epoch: i64,
    length: Duration,
) -> Result<(), QueueError> {
    sqlx::query(
        "update entries set lease_worker = $2, epoch = $3, lease_ms = $4 where task_id = $1",
    )
    .bind(task.to_string())
    .bind(worker.to_string())
    .bind(epoch)
    .bind(millis(length))
    .execute(db)
    .await
    .context("write a lease")?;
    Ok(())
}

pub(super) async fn give_back(
    db: &mut SqliteConnection,
    task: TaskId,
    delay: Duration,
    now_ms: i64,
) -> Result<(), QueueError> {
    let delay_ms = millis(delay);
    sqlx::query(
        "update entries set lease_worker = null, ready_at = $2, delay_ms = $3 where task_id = $1",
    )
    .bind(task.to_string())
    .bind(now_ms.saturating_add(delay_ms))
    .bind(delay_ms)
    .execute(db)
    .await
    .context("give an entry back")?;
    Ok(())
}

pub(super) async fn give_all_back(
    db: &mut SqliteConnection,
    tasks: &[TaskId],
    now_ms: i64,
) -> Result<(), QueueError> {
    let mut tx = db.begin_with("begin immediate").await.context("begin a transaction")?;
    for task in tasks {
        give_back(&mut tx, *task, Duration::ZERO, now_ms).await?;
    }
    tx.commit().await.context("commit entries given back")
}

pub(super) async fn delete(db: &mut SqliteConnection, task: TaskId) -> Result<(), QueueError> {
    sqlx::query("delete from entries where task_id = $1")
        .bind(task.to_string())
        .execute(db)
        .await
        .context("delete an entry")?;
    Ok(())
}

/// Every epoch up to this one may be in use.
pub(super) async fn reserved_epoch(db: &mut SqliteConnection) -> Result<i64, QueueError> {
    let row = sqlx::query("select value from counters where name = 'epoch'")
        .fetch_optional(db)
        .await
        .context("read the epoch")?;
    row.map_or(Ok(0), |row| row.try_get(0).map_err(|_| QueueError::Corrupt("epoch")))
}

pub(super) async fn reserve_epochs(
    db: &mut SqliteConnection,
    up_to: i64,
) -> Result<(), QueueError> {
    sqlx::query(
        "insert into counters (name, value) values ('epoch', $1) \
         on conflict (name) do update set value = excluded.value",
    )
    .bind(up_to)
    .execute(db)
    .await
    .context("reserve epochs")?;
    Ok(())
}

/// The entries as they were, and the last of their numbers. A lease starts anew: its worker may be
/// alive, and if it is not, it runs out or is reclaimed. A delay goes on, never for longer than it
/// was, however the wall clock was moved.
pub(super) async fn load(
    db: &mut SqliteConnection,
    now: Duration,
    now_ms: i64,
) -> Result<(Schedule, i64), QueueError> {
    let rows = sqlx::query(
        "select task_id, lane_worker, priority, seq, ready_at, delay_ms, epoch, lease_worker, \
         lease_ms from entries",
    )
    .fetch_all(db)
    .await
    .context("read the entries")?;
    let mut schedule = Schedule::default();
    let mut last = 0;
    for row in &rows {
        let corrupt = || QueueError::Corrupt("entry");
        let number = |column: usize| row.try_get::<i64, _>(column).map_err(|_| corrupt());
        let task: TaskId = parsed(row, 0)?.ok_or_else(corrupt)?;
        let lane = parsed::<WorkerId>(row, 1)?.map_or(Lane::Shared, Lane::Worker);
        let priority: Priority = parsed(row, 2)?.ok_or_else(corrupt)?;
        let seq = number(3)?;
        let place = if let Some(worker) = parsed::<WorkerId>(row, 7)? {
            let length = duration(number(8)?);
            Place::Leased { worker, epoch: number(6)?, length, until: now.saturating_add(length) }
        } else {
            match number(4)?.saturating_sub(now_ms).min(number(5)?) {
                left if left > 0 => Place::Delayed { due: now.saturating_add(duration(left)) },
                _ => Place::Ready,
            }
        };
        last = last.max(seq);
        schedule.insert(task, lane, priority, seq, place);
    }
    Ok((schedule, last))
}

fn parsed<T: FromStr>(row: &SqliteRow, column: usize) -> Result<Option<T>, QueueError> {
    let text = row.try_get::<Option<&str>, _>(column).map_err(|_| QueueError::Corrupt("entry"))?;
    text.map(str::parse).transpose().map_err(|_| QueueError::Corrupt("entry"))
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

fn duration(ms: i64) -> Duration {
    Duration::from_millis(u64::try_from(ms).unwrap_or(0))
}
