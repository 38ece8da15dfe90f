//! `aether queue`.

use aether_api::{
    Page, QueueView, TaskView,
    client::{Client, PageQuery},
};
use aether_types::{Timestamp, limits};

use super::{connect, table};
use crate::{
    args::{Global, Queue},
    exit::Exit,
    failure::Failure,
    output,
};

pub(crate) async fn run(global: &Global, command: Queue) -> Result<Exit, Failure> {
    let client = connect(global)?;
    match command {
        Queue::List => {
            let queues = client.queues().await?;
            if global.json {
                output::json(&queues);
            } else {
                print(queues.items);
            }
        }
        Queue::Dead { queue } => {
            let tasks = dead(&client, &queue).await?;
            if global.json {
                output::json(&Page { items: tasks, next_cursor: None });
            } else if tasks.is_empty() {
                output::note("no task has used up its attempts there");
            } else {
                print_dead(tasks);
            }
        }
        Queue::Retry { queue, task } => {
            let again = client.retry_dead(&queue, task).await?;
            if global.json {
                output::json(&again);
            } else {
                output::line(&again.task_id.to_string());
            }
        }
    }
    Ok(Exit::Success)
}

async fn dead(client: &Client, queue: &str) -> Result<Vec<TaskView>, Failure> {
    let mut page = PageQuery { limit: Some(limits::PAGE_LIMIT_MAX), cursor: None };
    let mut tasks = Vec::new();
    loop {
        let answer = client.dead_tasks(queue, &page).await?;
        tasks.extend(answer.items);
        match answer.next_cursor {
            Some(cursor) => page.cursor = Some(cursor),
            None => return Ok(tasks),
        }
    }
}

fn print(queues: Vec<QueueView>) {
    let now = Timestamp::now();
    let row = |queue: QueueView| {
        let by_priority: Vec<_> =
            queue.pending.iter().map(|(p, n)| format!("{}={n}", p.as_str())).collect();
        let counts = [queue.running, queue.waiting, queue.delayed, queue.dead];
        let pending = if by_priority.is_empty() { "-".to_owned() } else { by_priority.join(" ") };
        [queue.name, pending]
            .into_iter()
            .chain(counts.map(|n| n.to_string()))
            .chain([table::or_dash(queue.oldest_at.map(|at| table::age(at, now)))])
            .collect()
    };
    table::print(
        &["QUEUE", "PENDING", "RUNNING", "WAITING", "DELAYED", "DEAD", "OLDEST"],
        queues.into_iter().map(row).collect(),
    );
}

fn print_dead(tasks: Vec<TaskView>) {
    let now = Timestamp::now();
    let row = |task: TaskView| {
        let why = task.error.map(|fault| format!("{} [{}]", fault.message, fault.code));
        vec![
            task.id.to_string(),
            task.kind.to_string(),
            table::or_dash(task.vm_id),
            task.attempts.to_string(),
            table::age(task.finished_at.unwrap_or(task.created_at), now),
            table::or_dash(why),
        ]
    };
    table::print(
        &["TASK", "KIND", "VM", "ATTEMPTS", "AGE", "REASON"],
        tasks.into_iter().map(row).collect(),
    );
}
