//! `aether snapshot`.

use aether_api::{
    CreateSnapshot, Page, SnapshotView,
    client::{Client, PageQuery, SnapshotQuery, Waited},
};
use aether_types::{Timestamp, limits};

use super::{
    connect, outcome::Outcome, progress::Progress, start, table, task_failure, vm::options,
    wait_for_task,
};
use crate::{
    args::{Global, Snapshot, SnapshotCreate, SnapshotList},
    exit::Exit,
    failure::Failure,
    output,
};

pub(crate) async fn run(global: &Global, command: Snapshot) -> Result<Exit, Failure> {
    let client = connect(global)?;
    match command {
        Snapshot::Create(args) => create(&client, global, args).await,
        Snapshot::List(args) => list(&client, global, args).await,
        Snapshot::Inspect { snapshots } => {
            let mut outcome = Outcome::new(snapshots.len() > 1, global.json);
            for name in snapshots {
                match client.snapshot(&name).await {
                    Ok(snapshot) if global.json => outcome.json(&snapshot),
                    Ok(snapshot) => describe(&snapshot),
                    Err(error) => outcome.failed(&name, error.into()),
                }
            }
            outcome.finish()
        }
        Snapshot::Delete { snapshots } => {
            let mut outcome = Outcome::new(snapshots.len() > 1, global.json);
            for name in snapshots {
                match client.delete_snapshot(&name).await {
                    Ok(snapshot) if global.json => outcome.json(&snapshot),
                    Ok(snapshot) => output::line(&format!("{} is deleted", called(&snapshot))),
                    Err(error) => outcome.failed(&name, error.into()),
                }
            }
            outcome.finish()
        }
    }
}

fn called(snapshot: &SnapshotView) -> String {
    snapshot.name.clone().unwrap_or_else(|| snapshot.id.to_string())
}

async fn create(client: &Client, global: &Global, args: SnapshotCreate) -> Result<Exit, Failure> {
    let SnapshotCreate { vm, name, no_wait } = args;
    let progress = Progress::spinner("taking the snapshot", global.json || no_wait);
    let answer = client.create_snapshot(&vm, &CreateSnapshot { name }, &options(no_wait)).await?;
    let snapshot = match answer {
        Waited::Done(snapshot) => snapshot,
        Waited::Accepted(accepted) => {
            let id = accepted.snapshot_id.map(|id| id.to_string()).unwrap_or_default();
            if no_wait {
                drop(progress);
                if global.json {
                    output::json(&accepted);
                } else {
                    output::line(&id);
                }
                return Ok(Exit::Success);
            }
            let task = wait_for_task(client, accepted.task_id).await?;
            if let Some(failure) = task_failure(&task) {
                return Err(failure);
            }
            client.snapshot(&id).await?
        }
    };
    drop(progress);
    if global.json {
        output::json(&snapshot);
        return Ok(Exit::Success);
    }
    let paused = snapshot.paused_ms.map(|ms| format!("; {vm} stood still for {}", start::ms(ms)));
    output::line(&format!(
        "{} is {} ({}, {}){}",
        called(&snapshot),
        snapshot.state,
        snapshot.id,
        table::or_dash(snapshot.size_bytes.map(table::size)),
        paused.unwrap_or_default(),
    ));
    Ok(Exit::Success)
}

async fn list(client: &Client, global: &Global, args: SnapshotList) -> Result<Exit, Failure> {
    let mut query = SnapshotQuery {
        states: args.state.iter().map(ToString::to_string).collect(),
        vm: args.vm,
        page: PageQuery { limit: Some(limits::PAGE_LIMIT_MAX), cursor: None },
    };
    let limit = args.limit.unwrap_or(usize::MAX);
    let mut snapshots = Vec::new();
    loop {
        let page = client.snapshots(&query).await?;
        snapshots.extend(page.items);
        match page.next_cursor {
            Some(cursor) if snapshots.len() < limit => query.page.cursor = Some(cursor),
            Some(_) | None => break,
        }
    }
    snapshots.truncate(limit);
    if global.json {
        output::json(&Page { items: snapshots, next_cursor: None });
    } else if snapshots.is_empty() {
        output::note("there are no snapshots; `aether snapshot create VM` takes one");
    } else {
        print(snapshots);
    }
    Ok(Exit::Success)
}

fn print(snapshots: Vec<SnapshotView>) {
    let now = Timestamp::now();
    let row = |snapshot: SnapshotView| {
        vec![
            table::or_dash(snapshot.name),
            snapshot.id.to_string(),
            snapshot.state.to_string(),
            snapshot.vm_id.to_string(),
            format!("{} MB", snapshot.memory_mb),
            table::or_dash(snapshot.size_bytes.map(table::size)),
            table::age(snapshot.created_at, now),
        ]
    };
    table::print(
        &["NAME", "ID", "STATE", "VM", "MEMORY", "ON DISK", "AGE"],
        snapshots.into_iter().map(row).collect(),
    );
}

fn describe(snapshot: &SnapshotView) {
    let line = |name: &str, value: String| {
        output::line(&format!("{name:<10} {}", table::printable(&value)));
    };
    line("name", table::or_dash(snapshot.name.as_ref()));
    line("id", snapshot.id.to_string());
    line("state", snapshot.state.to_string());
    if let Some(reason) = &snapshot.reason {
        line("reason", format!("{} [{}]", reason.message, reason.code));
    }
    line("vm", snapshot.vm_id.to_string());
    line("driver", snapshot.driver.to_string());
    line("image", snapshot.image.clone());
    let SnapshotView { vcpus, memory_mb, disk_mb, .. } = snapshot;
    line("size", format!("{vcpus} vCPU, {memory_mb} MB memory, {disk_mb} MB disk"));
    line("on disk", table::or_dash(snapshot.size_bytes.map(table::size)));
    line("digest", table::or_dash(snapshot.digest.as_ref()));
    line("paused", table::or_dash(snapshot.paused_ms.map(start::ms)));
    line("created", snapshot.created_at.to_string());
}
