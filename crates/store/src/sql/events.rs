//! What has happened. Triggers write the rows, in the transaction that it happens in.
//!
//! Followers go by `sequence`, not by `id`: of two transactions at once, the one with the higher id
//! may be committed first, and a reader that went on after it would never see the other. So events
//! that are committed get their numbers here, by one reader after another. Of one subject they are
//! in order: a transaction waits for the row that an earlier one has changed.

use aether_types::{Timestamp, limits};

use super::{
    Lock, Sql,
    query::{Builder, Row, query},
    rows,
};
use crate::{EventBatch, EventFilter, EventRecord, EventsFrom, StoreError, error::Context};

/// Numbered or taken away by one statement: some milliseconds.
const STEP: u32 = 1000;

/// The newest is never taken away, so that no number is given twice.
const NUMBER: &str = "update events set sequence = newest.sequence + fresh.place from \
     (select id, row_number() over (order by id) as place from \
     (select id from events where sequence is null order by id limit $1) as unnumbered) as fresh, \
     (select coalesce(max(sequence), 0) as sequence from events) as newest \
     where events.id = fresh.id";

const BOUNDS: &str = "select coalesce(min(sequence), 0), coalesce(max(sequence), 0) from events";

/// Gives every event that is committed its number.
async fn number(store: &Sql) -> Result<(), StoreError> {
    const WAITING: &str = "select 1 from events where sequence is null limit 1";
    loop {
        let waiting = query(WAITING).fetch_all(store).await.context("look for new events")?;
        if waiting.is_empty() {
            return Ok(());
        }
        let mut writer = store.writer().await;
        let mut tx = writer.begin(&[Lock::Events]).await?;
        let numbered = query(NUMBER).bind(STEP).execute(&mut tx).await;
        let numbered = numbered.context("number new events")?;
        tx.commit("number new events").await?;
        if numbered < u64::from(STEP) {
            return Ok(());
        }
    }
}

pub(super) async fn begin(store: &Sql, from: EventsFrom) -> Result<u64, StoreError> {
    // Times are taken before numbers are given: the first of that time, and not the last before it.
    const SINCE: &str = "select coalesce(min(sequence) - 1, \
         (select coalesce(max(sequence), 0) from events)) from events where at >= $1";
    number(store).await?;
    let found = match from {
        EventsFrom::After(sequence) => return Ok(sequence),
        EventsFrom::Now => query("select coalesce(max(sequence), 0) from events"),
        EventsFrom::Time(at) => query(SINCE).bind(at.unix_ms()),
    };
    let row = found.fetch_one(store).await.context("find where events begin")?;
    unsigned(&rows::Reader { row: &row, noun: "event" }, 0)
}

pub(super) async fn after(
    store: &Sql,
    after: u64,
    filter: &EventFilter,
) -> Result<EventBatch, StoreError> {
    number(store).await?;
    let bounds = query(BOUNDS).fetch_one(store).await.context("read the bounds of events")?;
    let bounds = rows::Reader { row: &bounds, noun: "event" };
    let (oldest, newest) = (unsigned(&bounds, 0)?, unsigned(&bounds, 1)?);
    if after >= newest {
        return Ok(EventBatch { events: Vec::new(), next: after, missed: false, more: false });
    }
    let missed = oldest > after + 1;
    let mut query = Builder::new(
        "select sequence, topic, at, project_id, subject, vm_id, task_id, detail, code \
         from events where sequence > ",
    );
    query.push_bind(i64::try_from(after).unwrap_or(i64::MAX));
    query.push(" and sequence <= ").push_bind(i64::try_from(newest).unwrap_or(i64::MAX));
    if let Some(project) = filter.project {
        query.push(" and project_id = ").push_bind(project.to_string());
    }
    if let Some(vm) = filter.vm {
        query.push(" and vm_id = ").push_bind(vm.to_string());
    }
    if let Some(task) = filter.task {
        query.push(" and task_id = ").push_bind(task.to_string());
    }
    if !filter.topics.is_empty() {
        query.push(" and (1 = 0");
        for pattern in &filter.topics {
            // A pattern has no wildcard but its last, and neither `%` nor `_`.
            query.push(" or topic like ").push_bind(pattern.as_str().replace('*', "%"));
        }
        query.push(")");
    }
    query.push(" order by sequence limit ").push_bind(i64::from(limits::EVENTS_MAX));
    let found = query.build().fetch_all(store).await.context("read events")?;
    let events = rows::all(&found, event)?;
    let more = events.len() >= limits::EVENTS_MAX as usize;
    let next = events.last().filter(|_| more).map_or(newest, |event| event.sequence);
    Ok(EventBatch { events, next, missed, more })
}

/// A step at a time, so that nobody waits for long. Gives how many went.
pub(super) async fn prune(store: &Sql, before: Timestamp) -> Result<u64, StoreError> {
    const OLD: &str = "delete from events where id in (select id from events where at < $1 \
         and id < (select max(id) from events where sequence is not null) order by id limit $2)";
    const TOO_MANY: &str = "delete from events where id in (select id from events \
         where id < (select max(id) from events where sequence is not null) \
         order by id desc limit $1 offset $2)";
    number(store).await?;
    let mut writer = store.writer().await;
    let old = query(OLD).bind(before.unix_ms()).bind(STEP).execute(&mut writer).await;
    let old = old.context("take old events away")?;
    let bound = query(TOO_MANY).bind(STEP).bind(limits::EVENT_ROWS_MAX).execute(&mut writer).await;
    Ok(old + bound.context("hold events to their bound")?)
}

fn unsigned(r: &rows::Reader<'_>, column: usize) -> Result<u64, StoreError> {
    u64::try_from(r.get::<i64>(column)?).map_err(|_| r.corrupt())
}

fn event(row: &Row) -> Result<EventRecord, StoreError> {
    let r = rows::Reader { row, noun: "event" };
    Ok(EventRecord {
        sequence: unsigned(&r, 0)?,
        topic: r.parsed(1)?,
        at: r.time(2)?,
        project_id: r.parsed_option(3)?,
        subject: r.get(4)?,
        vm_id: r.parsed_option(5)?,
        task_id: r.parsed_option(6)?,
        detail: r.get(7)?,
        // What a newer program wrote may be unknown here; the rest can be read all the same.
        code: r.get::<Option<&str>>(8)?.and_then(|code| code.parse().ok()),
    })
}
