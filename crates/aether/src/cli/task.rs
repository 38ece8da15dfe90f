//! `aether task`.

use aether_api::{
    TaskView,
    client::{PageQuery, TaskQuery},
};
use aether_types::{Timestamp, limits};

use super::{WAIT, connect, table, tools};
use crate::{
    args::{Global, Task, TaskList},
    exit::Exit,
    failure::Failure,
    output,
};

pub(crate) async fn run(global: &Global, command: Task) -> Result<Exit, Failure> {
    let client = connect(global)?;
    match command {
        Task::List(args) => {
            let tasks = list(&client, args).await?;
            if global.json {
                output::json(&aether_api::Page { items: tasks, next_cursor: None });
            } else if tasks.is_empty() {
                output::note("there are no tasks");
            } else {
                print(tasks);
            }
        }
        Task::Get { task } => describe(&client.task(task, None).await?, global.json),
        Task::Cancel { task, no_wait } => {
            let wait = (!no_wait).then_some(WAIT);
            describe(&client.cancel_task(task, wait).await?, global.json);
        }
    }
    Ok(Exit::Success)
}

async fn list(
    client: &aether_api::client::Client,
    args: TaskList,
) -> Result<Vec<TaskView>, Failure> {
    let mut query = TaskQuery {
        states: args.state.iter().map(ToString::to_string).collect(),
        kind: args.kind.map(|kind| kind.to_string()),
        vm: args.vm,
        page: PageQuery::default(),
    };
    let mut tasks = Vec::new();
    while tasks.len() < args.limit {
        let wanted = u32::try_from(args.limit - tasks.len()).unwrap_or(u32::MAX);
        query.page.limit = Some(wanted.min(limits::PAGE_LIMIT_MAX));
        let page = client.tasks(&query).await?;
        tasks.extend(page.items);
        match page.next_cursor {
            Some(cursor) => query.page.cursor = Some(cursor),
            None => break,
        }
    }
    tasks.truncate(args.limit);
    Ok(tasks)
}

fn print(tasks: Vec<TaskView>) {
    let now = Timestamp::now();
    let row = |task: TaskView| {
        vec![
            task.id.to_string(),
            task.kind.to_string(),
            task.status.to_string(),
            table::or_dash(task.vm_id),
            task.attempts.to_string(),
            table::age(task.created_at, now),
            table::or_dash(task.error.map(|error| error.code)),
        ]
    };
    table::print(
        &["ID", "KIND", "STATE", "VM", "ATTEMPTS", "AGE", "ERROR"],
        tasks.into_iter().map(row).collect(),
    );
}

fn describe(task: &TaskView, json: bool) {
    if json {
        output::json(task);
        return;
    }
    let line = |name: &str, value: String| {
        output::line(&format!("{name:<10} {}", table::printable(&value)));
    };
    line("id", task.id.to_string());
    line("kind", task.kind.to_string());
    line("state", task.status.to_string());
    if let Some(vm) = task.vm_id {
        line("vm", vm.to_string());
    }
    if let Some(tools) = tools::of_task(task) {
        line("tools", tools);
    }
    if let Some(progress) = task.progress.as_ref().filter(|_| !task.status.is_end()) {
        line("now", progress.now.clone());
    }
    if let Some(id) = task.execution_id {
        line("execution", id.to_string());
    }
    if let Some(id) = task.snapshot_id {
        line("snapshot", id.to_string());
    }
    line("attempts", format!("{} of {}", task.attempts, task.max_attempts));
    line("created", task.created_at.to_string());
    line("started", table::or_dash(task.started_at));
    line("finished", table::or_dash(task.finished_at));
    if task.cancel_requested && !task.status.is_end() {
        line("cancel", "asked for".to_owned());
    }
    if let Some(error) = &task.error {
        line("error", format!("{} [{}]", error.message, error.code));
    }
}
