//! The queues as the store knows them: what waits, what runs, and what used up its attempts. What the
//! queue itself holds is a hint, and may be lost.

use std::collections::BTreeMap;

use super::{
    Lock, Sql,
    query::{Builder, query},
    rows::{self, task_columns},
    write,
};
use crate::{Page, PageRequest, QueueStatus, StoreError, error::Context};
use aether_types::{Priority, QueueName, Task, TaskId, TaskState};

pub(super) async fn list(store: &Sql) -> Result<Vec<QueueStatus>, StoreError> {
    let mut queues = BTreeMap::new();
    let shared = QueueName::Shared;
    queues.insert(shared, QueueStatus::new(shared));
    let workers = query("select id from workers").fetch_all(store).await;
    for row in workers.context("read the workers")? {
        let name = QueueName::Worker(rows::Reader { row: &row, noun: "worker" }.parsed(0)?);
        queues.insert(name, QueueStatus::new(name));
    }
    count_open(store, &mut queues).await?;
    count_dead(store, &mut queues).await?;
    Ok(queues.into_values().collect())
}

async fn count_open(
    store: &Sql,
    queues: &mut BTreeMap<QueueName, QueueStatus>,
) -> Result<(), StoreError> {
    let found = query(
        "select vms.worker_id, tasks.priority, tasks.state, coalesce(outbox.waits, 0), \
         cast(case when tasks.attempts > 0 then 1 else 0 end as bigint), count(*), min(tasks.created_at) \
         from tasks left join vms on vms.id = tasks.vm_id \
         left join outbox on outbox.task_id = tasks.id \
         where tasks.state in ('pending', 'running') group by 1, 2, 3, 4, 5",
    )
    .fetch_all(store)
    .await
    .context("count the tasks of the queues")?;
    for row in &found {
        let r = rows::Reader { row, noun: "queue" };
        let name = QueueName::of(r.parsed_option(0)?);
        let (priority, state): (Priority, TaskState) = (r.parsed(1)?, r.parsed(2)?);
        let (waits, again) = (r.number(3)? > 0, r.number(4)? > 0);
        let count = u64::from(r.unsigned(5)?);
        let queue = queues.entry(name).or_insert_with(|| QueueStatus::new(name));
        if state == TaskState::Running {
            queue.running += count;
            continue;
        }
        *queue.pending.entry(priority).or_default() += count;
        queue.waiting += if waits { count } else { 0 };
        queue.again += if again { count } else { 0 };
        let oldest = r.time(6)?;
        queue.oldest_at = Some(queue.oldest_at.map_or(oldest, |known| known.min(oldest)));
    }
    Ok(())
}

async fn count_dead(
    store: &Sql,
    queues: &mut BTreeMap<QueueName, QueueStatus>,
) -> Result<(), StoreError> {
    let found = query(
        "select vms.worker_id, count(*) from tasks left join vms on vms.id = tasks.vm_id \
         where tasks.state = 'failed' and tasks.attempts >= tasks.max_attempts \
         and tasks.retried_as is null group by 1",
    )
    .fetch_all(store)
    .await
    .context("count the dead letters")?;
    for row in &found {
        let r = rows::Reader { row, noun: "queue" };
        let name = QueueName::of(r.parsed_option(0)?);
        let queue = queues.entry(name).or_insert_with(|| QueueStatus::new(name));
        queue.dead = u64::from(r.unsigned(1)?);
    }
    Ok(())
}

pub(super) async fn dead(
    store: &Sql,
    queue: QueueName,
    page: PageRequest,
) -> Result<Page<Task>, StoreError> {
    let limit = page.bounded_limit();
    let mut query = Builder::new(concat!(
        "select ",
        task_columns!(),
        " from tasks where state = 'failed' and attempts >= max_attempts and retried_as is null and "
    ));
    match queue {
        QueueName::Worker(worker) => {
            query.push("vm_id in (select vms.id from vms where vms.worker_id = ");
            query.push_bind(worker.to_string()).push(")");
        }
        QueueName::Shared => {
            query.push(
                "not exists (select 1 from vms where vms.id = tasks.vm_id \
                 and vms.worker_id is not null)",
            );
        }
    }
    if let Some(cursor) = page.after {
        query.push(" and (created_at, id) < (").push_bind(cursor.created_at_ms());
        query.push(", ").push_bind(cursor.id()).push(")");
    }
    query.push(" order by created_at desc, id desc limit ").push_bind(limit + 1);
    let found = query.build().fetch_all(store).await.context("list the dead letters")?;
    Ok(Page::cut(rows::all(&found, rows::task)?, limit, rows::task_position))
}

pub(super) async fn retried(store: &Sql, id: TaskId, again: TaskId) -> Result<(), StoreError> {
    let mut writer = store.writer().await;
    let mut tx = writer.begin(&[Lock::Task(id)]).await?;
    let task = write::task(&mut tx, id).await?.ok_or(StoreError::TaskNotFound)?;
    if task.state != TaskState::Failed {
        return Err(StoreError::TaskNotFound);
    }
    query("update tasks set retried_as = $2 where id = $1 and retried_as is null")
        .bind(id.to_string())
        .bind(again.to_string())
        .execute(&mut tx)
        .await
        .context("mark a dead letter as retried")?;
    tx.commit("commit that a dead letter was retried").await
}
