//! Compares what clients were told with the truth, once everything is well again.

use std::{collections::BTreeMap, time::Duration};

use aether_types::TaskId;
use anyhow::{Context as _, Result, ensure};
use sqlx::{AssertSqlSafe, Row as _};
use tokio::time::{Instant, sleep};

use super::{
    cluster::Cluster,
    faults::{Fault, Faults},
    journal::Journal,
};

/// Once everything is well again, everything ends within this.
const CALM: Duration = Duration::from_mins(1);
const LOOK_AGAIN: Duration = Duration::from_millis(100);

const ENDED: &str = "topic in ('task.completed', 'task.failed', 'task.cancelled')";

#[derive(Debug)]
pub struct Verdict {
    pub acknowledged: usize,
    pub tries: u64,
    pub kills: usize,
    /// Attempts after a task's first.
    pub again: i64,
    /// From the kill of a worker until the next word of what it had to do, where it was started
    /// again at once: in the middle, at the 99th percentile, and at most.
    pub taken_up: Option<[Duration; 3]>,
    /// How tasks ended, by their codes.
    pub ends: BTreeMap<String, i64>,
    /// What must not be.
    pub wrong: Vec<String>,
}

pub(crate) async fn judge(
    cluster: &Cluster,
    journal: &Journal,
    faults: &Faults,
) -> Result<Verdict> {
    // The history is asked by task again and again, which no user does.
    let by_task = "create index if not exists events_of_task on events (task_id, id)";
    sqlx::query(by_task).execute(&cluster.database).await?;
    let mut wrong = journal.all_wrong();
    wrong.extend(settles(cluster).await?);
    wrong.extend(queue_empties(cluster).await);
    let acknowledged = journal.tasks();
    wrong.extend(each_ended_once(cluster, &acknowledged).await?);
    wrong.extend(no_start_without_reason(cluster, faults).await?);
    let kills = faults.inflicted.iter().filter(|i| matches!(i.fault, Fault::Kill | Fault::Lose));
    let again = "select coalesce(sum(attempts - 1), 0)::bigint from tasks where attempts > 0";
    Ok(Verdict {
        acknowledged: acknowledged.len(),
        tries: journal.tries(),
        kills: kills.count(),
        again: number(cluster, again).await?,
        taken_up: taken_up(cluster, faults).await?,
        ends: ends(cluster).await?,
        wrong,
    })
}

async fn number(cluster: &Cluster, sql: &str) -> Result<i64> {
    let row = sqlx::query(AssertSqlSafe(sql))
        .fetch_one(&cluster.database)
        .await
        .context(sql.to_owned())?;
    Ok(row.try_get(0)?)
}

/// Nothing is left open: rows, dispatches, VMs.
async fn settles(cluster: &Cluster) -> Result<Vec<String>> {
    let questions = [
        "tasks where state in ('pending', 'running')",
        "executions where state in ('pending', 'running')",
        "vms where state <> 'deleted'",
        "outbox",
        "workers where presence <> 'present'",
    ];
    let deadline = Instant::now() + CALM;
    let mut wrong = Vec::new();
    for what in questions {
        loop {
            let left = number(cluster, &format!("select count(*) from {what}")).await?;
            if left == 0 {
                break;
            }
            if Instant::now() > deadline {
                wrong.push(format!("{left} are left: {what}"));
                break;
            }
            sleep(LOOK_AGAIN).await;
        }
    }
    Ok(wrong)
}

/// No entry, no lease and no delay is left. What a queue forgot is dispatched again after a lease,
/// and found to have ended.
async fn queue_empties(cluster: &Cluster) -> Option<String> {
    let deadline = Instant::now() + CALM;
    loop {
        let left = cluster.entries();
        if left.iter().all(|(_, count)| count == "0") {
            return None;
        }
        if Instant::now() > deadline {
            return Some(format!("left in the queue: {left:?}"));
        }
        sleep(LOOK_AGAIN).await;
    }
}

/// Every acknowledged task is there, and has exactly one end, after which nothing more happens.
async fn each_ended_once(cluster: &Cluster, acknowledged: &[TaskId]) -> Result<Vec<String>> {
    let sql = format!(
        "select tasks.id, (select count(*) from events where task_id = tasks.id and {ENDED}) \
         from tasks"
    );
    let rows = sqlx::query(AssertSqlSafe(sql)).fetch_all(&cluster.database).await?;
    let mut ends: BTreeMap<TaskId, i64> = BTreeMap::new();
    for row in rows {
        ends.insert(row.try_get::<String, _>(0)?.parse()?, row.try_get(1)?);
    }
    let lost = acknowledged.iter().filter(|id| !ends.contains_key(id));
    let mut wrong: Vec<_> =
        lost.map(|id| format!("{id} was acknowledged and is nowhere")).collect();
    let other = ends.iter().filter(|(_, count)| **count != 1);
    wrong.extend(other.map(|(id, count)| format!("{id} has ended {count} times")));
    let sql = format!(
        "select count(*) from events as late join events as ended on ended.task_id = late.task_id \
         and ended.id < late.id where late.topic like 'task.%' and ended.{ENDED}"
    );
    let late = number(cluster, &sql).await?;
    if late > 0 {
        wrong.push(format!("{late} things happened to tasks after their end"));
    }
    Ok(wrong)
}

/// At most one more start for each fault while the task was open, by the database's clock: that of a
/// member may have jumped. A fault may begin a moment before what it hits is recorded.
async fn no_start_without_reason(cluster: &Cluster, faults: &Faults) -> Result<Vec<String>> {
    let times: Vec<i64> = faults.inflicted.iter().map(|inflicted| inflicted.at_ms).collect();
    let rows = sqlx::query(
        "select id, attempts, (select count(*) from unnest($1::bigint[]) as fault (at) \
         where fault.at between (select min(at) from events where task_id = tasks.id) - 10000 \
         and (select max(at) from events where task_id = tasks.id)) \
         from tasks where attempts > 1",
    )
    .bind(times)
    .fetch_all(&cluster.database)
    .await?;
    let mut wrong = Vec::new();
    for row in rows {
        let (id, attempts): (String, i64) = (row.try_get(0)?, row.try_get(1)?);
        let reasons: i64 = row.try_get(2)?;
        if attempts > 1 + reasons {
            wrong.push(format!("{id} was started {attempts} times, for {reasons} faults"));
        }
    }
    Ok(wrong)
}

async fn ends(cluster: &Cluster) -> Result<BTreeMap<String, i64>> {
    let rows = sqlx::query(
        "select state || coalesce(' ' || error_code, ''), count(*) from tasks group by 1",
    )
    .fetch_all(&cluster.database)
    .await?;
    rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect()
}

/// What was open at the moment of a kill on the worker that was killed, until its next word.
async fn taken_up(cluster: &Cluster, faults: &Faults) -> Result<Option<[Duration; 3]>> {
    let mut times = Vec::new();
    for kill in faults.inflicted.iter().filter(|inflicted| inflicted.fault == Fault::Kill) {
        let sql = format!(
            "select (select min(at) from events where task_id = tasks.id and at > $1) - $1 from tasks \
             where worker_id = $2 and created_at <= $1 and finished_at > $1 \
             and exists (select 1 from events where task_id = tasks.id and at <= $1) \
             and not exists (select 1 from events where task_id = tasks.id and at <= $1 and {ENDED})"
        );
        let rows = sqlx::query(AssertSqlSafe(sql))
            .bind(kill.at_ms)
            .bind(kill.worker.to_string())
            .fetch_all(&cluster.database)
            .await?;
        for row in rows {
            if let Some(ms) = row.try_get::<Option<i64>, _>(0)? {
                times.push(Duration::from_millis(u64::try_from(ms)?));
            }
        }
    }
    times.sort_unstable();
    let Some(most) = times.last().copied() else { return Ok(None) };
    let at = |per_cent: usize| times[(times.len() - 1) * per_cent / 100];
    Ok(Some([at(50), at(99), most]))
}

impl Verdict {
    /// Fails where anything is wrong, and says all of it.
    pub fn ensure(&self) -> Result<()> {
        ensure!(self.wrong.is_empty(), "{self:#?}");
        Ok(())
    }
}
