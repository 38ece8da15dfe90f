//! The statements. Each is one transaction; what makes an entry ready tells so in it.

use std::time::Duration;

use aether_types::{TaskId, WorkerId};
use sqlx::{PgPool, Row as _, postgres::PgRow};

use super::listen::LATER;
use crate::{
    Depth, Entry, Lane, Lease, QueueError, error::Context, schedule::index, share::PRIORITIES,
};

/// Delays that end at once are made ready in portions, so that no transaction is long.
const PROMOTED_MAX: i64 = 1000;

/// The clock that counts: `$1` where it is given, else the server's.
macro_rules! now {
    () => {
        "coalesce($1::bigint, (extract(epoch from clock_timestamp()) * 1000)::bigint)"
    };
}

/// Tells the lanes of the rows that `changed` returned.
macro_rules! tell {
    () => {
        "select count(*), (select count(*) from (select pg_notify('aetherium_queue', word) \
         from (select distinct case when due_at is null then lane else 'later' end as word \
         from changed) as words) as told) from changed"
    };
}

/// Of the shared lane; a payload must not be empty, so neither is this.
const SHARED: &str = "shared";

fn lane_text(lane: Lane) -> String {
    match lane {
        Lane::Shared => SHARED.to_owned(),
        Lane::Worker(worker) => worker.to_string(),
    }
}

pub(super) fn lane(text: &str) -> Option<Lane> {
    if text == SHARED { Some(Lane::Shared) } else { text.parse().ok().map(Lane::Worker) }
}

/// No epoch that any queue has given is above the clock in microseconds by much: claims are not
/// that fast.
pub(super) async fn raise_epochs(pool: &PgPool) -> Result<(), QueueError> {
    const RAISE: &str = "select setval('queue_epochs', clock) from queue_epochs, \
         (select (extract(epoch from clock_timestamp()) * 1000000)::bigint as clock) as now \
         where last_value < clock";
    let context = "raise the epochs";
    let mut tx = pool.begin().await.context(context)?;
    // Two at once could set it back.
    sqlx::query("select pg_advisory_xact_lock(hashtext('queue_epochs'))")
        .execute(&mut *tx)
        .await
        .context(context)?;
    sqlx::query(RAISE).execute(&mut *tx).await.context(context)?;
    tx.commit().await.context(context)
}

pub(super) async fn insert(
    pool: &PgPool,
    entries: &[Entry],
    now_ms: Option<i64>,
) -> Result<(), QueueError> {
    const INSERT: &str = concat!(
        "with changed as (insert into queue_entries (task_id, lane, priority, due_at) \
         select task, lane, priority, case when delay > 0 then ",
        now!(),
        " + delay end from unnest($2::text[], $3::text[], $4::bigint[], $5::bigint[]) \
         with ordinality as given (task, lane, priority, delay, place) order by place \
         on conflict (task_id) do nothing returning lane, due_at) ",
        tell!()
    );
    debug_assert_eq!(LATER, "later");
    let column = |of: fn(&Entry) -> String| entries.iter().map(of).collect::<Vec<_>>();
    let number = |of: fn(&Entry) -> i64| entries.iter().map(of).collect::<Vec<_>>();
    sqlx::query(INSERT)
        .bind(now_ms)
        .bind(column(|entry| entry.task.to_string()))
        .bind(column(|entry| lane_text(entry.lane)))
        .bind(number(|entry| i64::try_from(index(entry.priority)).unwrap_or(i64::MAX)))
        .bind(number(|entry| millis(entry.delay)))
        .execute(pool)
        .await
        .context("write entries")?;
    Ok(())
}

/// What a worker may take from.
#[derive(Debug)]
pub(super) struct Ready {
    pub(super) own: [bool; PRIORITIES],
    pub(super) shared: [bool; PRIORITIES],
    /// A delay is over that nobody has ended yet.
    pub(super) due: bool,
}

pub(super) async fn look(
    pool: &PgPool,
    worker: WorkerId,
    now_ms: Option<i64>,
) -> Result<Ready, QueueError> {
    const LOOK: &str = concat!(
        "select array(select exists (select 1 from queue_entries where lane = $2 \
         and priority = p and lease_worker is null and due_at is null) \
         from generate_series(0, 3) as p order by p), \
         array(select exists (select 1 from queue_entries where lane = 'shared' \
         and priority = p and lease_worker is null and due_at is null) \
         from generate_series(0, 3) as p order by p), \
         exists (select 1 from queue_entries where due_at <= ",
        now!(),
        ")"
    );
    const { assert!(PRIORITIES == 4) };
    let row = sqlx::query(LOOK)
        .bind(now_ms)
        .bind(worker.to_string())
        .fetch_one(pool)
        .await
        .context("look for an entry")?;
    let of = |column: usize| {
        let waiting: Vec<bool> = get(&row, column)?;
        waiting.try_into().map_err(|_| QueueError::Corrupt("entry"))
    };
    Ok(Ready { own: of(0)?, shared: of(1)?, due: get(&row, 2)? })
}

/// The first entry of the lane and priority that nobody else is taking.
pub(super) async fn take(
    pool: &PgPool,
    lane: Lane,
    priority: usize,
    worker: WorkerId,
    length: Duration,
    now_ms: Option<i64>,
) -> Result<Option<Lease>, QueueError> {
    const TAKE: &str = concat!(
        "update queue_entries set lease_worker = $4, lease_ms = $5, lease_until = ",
        now!(),
        " + $5, epoch = nextval('queue_epochs') where task_id = (select task_id \
         from queue_entries where lane = $2 and priority = $3 and lease_worker is null \
         and due_at is null order by seq limit 1 for update skip locked) returning task_id, epoch"
    );
    let taken = sqlx::query(TAKE)
        .bind(now_ms)
        .bind(lane_text(lane))
        .bind(i64::try_from(priority).unwrap_or(i64::MAX))
        .bind(worker.to_string())
        .bind(millis(length))
        .fetch_all(pool)
        .await
        .context("take an entry")?;
    let Some(row) = taken.first() else { return Ok(None) };
    let task = get::<&str>(row, 0)?.parse().map_err(|_| QueueError::Corrupt("entry"))?;
    Ok(Some(Lease { task, worker, epoch: get(row, 1)?, duration: length }))
}

/// Ends the delays that are over.
pub(super) async fn promote(pool: &PgPool, now_ms: Option<i64>) -> Result<(), QueueError> {
    const PROMOTE: &str = concat!(
        "with due as (select task_id from queue_entries where due_at <= ",
        now!(),
        " order by due_at limit $2 for update skip locked), \
         changed as (update queue_entries as e set due_at = null from due \
         where e.task_id = due.task_id returning e.lane, e.due_at) ",
        tell!()
    );
    loop {
        let row = sqlx::query(PROMOTE)
            .bind(now_ms)
            .bind(PROMOTED_MAX)
            .fetch_one(pool)
            .await
            .context("end delays")?;
        if get::<i64>(&row, 0)? < PROMOTED_MAX {
            return Ok(());
        }
    }
}

pub(super) async fn next_due(
    pool: &PgPool,
    now_ms: Option<i64>,
) -> Result<Option<Duration>, QueueError> {
    const NEXT: &str =
        concat!("select min(due_at) - ", now!(), " from queue_entries where due_at is not null");
    left(pool, NEXT, now_ms).await
}

pub(super) async fn next_lease_end(
    pool: &PgPool,
    now_ms: Option<i64>,
) -> Result<Option<Duration>, QueueError> {
    const NEXT: &str = concat!(
        "select min(lease_until) - ",
        now!(),
        " from queue_entries where lease_until is not null"
    );
    left(pool, NEXT, now_ms).await
}

async fn left(
    pool: &PgPool,
    sql: &'static str,
    now_ms: Option<i64>,
) -> Result<Option<Duration>, QueueError> {
    let row =
        sqlx::query(sql).bind(now_ms).fetch_one(pool).await.context("look for the next moment")?;
    Ok(get::<Option<i64>>(&row, 0)?.map(|ms| Duration::from_millis(ms.try_into().unwrap_or(0))))
}

pub(super) async fn renew(
    pool: &PgPool,
    lease: &Lease,
    now_ms: Option<i64>,
) -> Result<u64, QueueError> {
    const RENEW: &str = concat!(
        "update queue_entries set lease_until = ",
        now!(),
        " + lease_ms where task_id = $2 and epoch = $3 and lease_worker is not null"
    );
    let done = sqlx::query(RENEW)
        .bind(now_ms)
        .bind(lease.task.to_string())
        .bind(lease.epoch)
        .execute(pool)
        .await;
    Ok(done.context("renew a lease")?.rows_affected())
}

pub(super) async fn complete(pool: &PgPool, lease: &Lease) -> Result<u64, QueueError> {
    let done = sqlx::query(
        "delete from queue_entries where task_id = $1 and epoch = $2 and lease_worker is not null",
    )
    .bind(lease.task.to_string())
    .bind(lease.epoch)
    .execute(pool)
    .await;
    Ok(done.context("delete an entry")?.rows_affected())
}

pub(super) async fn release(
    pool: &PgPool,
    lease: &Lease,
    delay: Duration,
    now_ms: Option<i64>,
) -> Result<u64, QueueError> {
    const RELEASE: &str = concat!(
        "with changed as (update queue_entries set lease_worker = null, lease_until = null, \
         due_at = case when $4 > 0 then ",
        now!(),
        " + $4 end where task_id = $2 and epoch = $3 and lease_worker is not null \
         returning lane, due_at) ",
        tell!()
    );
    let row = sqlx::query(RELEASE)
        .bind(now_ms)
        .bind(lease.task.to_string())
        .bind(lease.epoch)
        .bind(millis(delay))
        .fetch_one(pool)
        .await
        .context("give an entry back")?;
    changed(&row)
}

pub(super) async fn remove(pool: &PgPool, task: TaskId) -> Result<u64, QueueError> {
    let done = sqlx::query("delete from queue_entries where task_id = $1 and lease_worker is null")
        .bind(task.to_string())
        .execute(pool)
        .await;
    Ok(done.context("remove an entry")?.rows_affected())
}

/// Locks in one order, and leaves out what another sweep has in hand.
pub(super) async fn sweep(pool: &PgPool, now_ms: Option<i64>) -> Result<u64, QueueError> {
    const SWEEP: &str = concat!(
        "with over as (select task_id from queue_entries where lease_until <= ",
        now!(),
        " for update skip locked), changed as (update queue_entries as e \
         set lease_worker = null, lease_until = null from over where e.task_id = over.task_id \
         returning e.lane, e.due_at) ",
        tell!()
    );
    let row = sqlx::query(SWEEP).bind(now_ms).fetch_one(pool).await;
    changed(&row.context("take back leases that ran out")?)
}

pub(super) async fn reclaim(pool: &PgPool, worker: WorkerId) -> Result<u64, QueueError> {
    const RECLAIM: &str = concat!(
        "with changed as (update queue_entries set lease_worker = null, lease_until = null \
         where lease_worker = $1 returning lane, due_at) ",
        tell!()
    );
    let row = sqlx::query(RECLAIM).bind(worker.to_string()).fetch_one(pool).await;
    changed(&row.context("take back a worker's leases")?)
}

pub(super) async fn contains(pool: &PgPool, task: TaskId) -> Result<bool, QueueError> {
    let row = sqlx::query("select exists (select 1 from queue_entries where task_id = $1)")
        .bind(task.to_string())
        .fetch_one(pool)
        .await
        .context("look for a task")?;
    get(&row, 0)
}

pub(super) async fn depth(pool: &PgPool, now_ms: Option<i64>) -> Result<Depth, QueueError> {
    const DEPTH: &str = concat!(
        "select count(*) filter (where lease_worker is null and (due_at is null or due_at <= ",
        now!(),
        ")), count(*) filter (where due_at > ",
        now!(),
        "), count(*) filter (where lease_worker is not null) from queue_entries"
    );
    let row = sqlx::query(DEPTH).bind(now_ms).fetch_one(pool).await.context("count the entries")?;
    let of = |column| Ok(u64::try_from(get::<i64>(&row, column)?).unwrap_or(0));
    Ok(Depth { ready: of(0)?, delayed: of(1)?, leased: of(2)? })
}

fn changed(row: &PgRow) -> Result<u64, QueueError> {
    Ok(u64::try_from(get::<i64>(row, 0)?).unwrap_or(0))
}

fn get<'r, T>(row: &'r PgRow, column: usize) -> Result<T, QueueError>
where
    T: sqlx::Decode<'r, sqlx::Postgres> + sqlx::Type<sqlx::Postgres>,
{
    row.try_get(column).map_err(|_| QueueError::Corrupt("entry"))
}

pub(super) fn millis(duration: Duration) -> i64 {
    // So that no sum with a time of day leaves the range.
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX).min(i64::MAX / 4)
}
