//! `aether worker`.

use aether_api::{
    Page, VmView, WorkerView,
    client::{Client, PageQuery},
};
use aether_types::{Timestamp, WorkerDriver, limits};

use super::{connect, outcome::Outcome, table};
use crate::{
    args::{Global, Worker, WorkerList},
    exit::Exit,
    failure::Failure,
    output,
};

pub(crate) async fn run(global: &Global, command: Worker) -> Result<Exit, Failure> {
    let client = connect(global)?;
    match command {
        Worker::List(args) => list(&client, global, args).await,
        Worker::Get(args) => each(&client, global, args.workers, Verb::Get).await,
        Worker::Drain(args) => each(&client, global, args.workers, Verb::Drain).await,
        Worker::Activate(args) => each(&client, global, args.workers, Verb::Activate).await,
        Worker::Vms { worker } => vms(&client, global, &worker).await,
    }
}

#[derive(Clone, Copy)]
enum Verb {
    Get,
    Drain,
    Activate,
}

async fn each(
    client: &Client,
    global: &Global,
    workers: Vec<String>,
    verb: Verb,
) -> Result<Exit, Failure> {
    let mut outcome = Outcome::new(workers.len() > 1, global.json);
    for name in workers {
        let answer = match verb {
            Verb::Get => client.worker(&name).await,
            Verb::Drain => client.drain_worker(&name).await,
            Verb::Activate => client.activate_worker(&name).await,
        };
        match answer {
            Ok(worker) if global.json => outcome.json(&worker),
            Ok(worker) => match verb {
                Verb::Get => describe(&worker),
                Verb::Drain | Verb::Activate => tell(&worker),
            },
            Err(error) => outcome.failed(&name, error.into()),
        }
    }
    outcome.finish()
}

/// What an operator who drains a host wants to know next.
fn tell(worker: &WorkerView) {
    let vms = match worker.promised.vms {
        0 => "no VM runs there".to_owned(),
        1 => "1 VM runs there".to_owned(),
        n => format!("{n} VMs run there"),
    };
    let line = format!("{} ({}) is {}; {vms}", worker.host, worker.id, worker.state);
    output::line(&table::printable(&line));
}

async fn list(client: &Client, global: &Global, args: WorkerList) -> Result<Exit, Failure> {
    let states: Vec<_> = args.state.iter().map(ToString::to_string).collect();
    let workers = client.workers(&states).await?;
    if global.json {
        output::json(&workers);
    } else if workers.items.is_empty() {
        output::note("there are no such workers; `aether up` runs one");
    } else {
        print(workers.items);
    }
    Ok(Exit::Success)
}

fn print(workers: Vec<WorkerView>) {
    let now = Timestamp::now();
    let row = |worker: WorkerView| {
        let drivers: Vec<_> = worker.drivers.iter().map(|d| d.kind.to_string()).collect();
        vec![
            worker.host,
            worker.id.to_string(),
            worker.state.to_string(),
            table::or_dash(worker.zone),
            drivers.join(","),
            of(worker.promised.vms, worker.capacity.vms_max),
            of(worker.promised.vcpus, worker.capacity.vcpus_max),
            format!("{} MB", of(worker.promised.memory_mb, worker.capacity.memory_mb_max)),
            table::age(worker.heartbeat_at, now),
        ]
    };
    table::print(
        &["HOST", "ID", "STATE", "ZONE", "DRIVERS", "VMS", "VCPUS", "MEMORY", "HEARD"],
        workers.into_iter().map(row).collect(),
    );
}

/// `3/8`, or `3` where there is no bound.
fn of<T: Copy + std::fmt::Display>(promised: T, max: Option<T>) -> String {
    max.map_or_else(|| promised.to_string(), |max| format!("{promised}/{max}"))
}

fn describe(worker: &WorkerView) {
    let line = |name: &str, value: String| {
        output::line(&format!("{name:<10} {}", table::printable(&value)));
    };
    line("host", worker.host.clone());
    line("id", worker.id.to_string());
    line("state", worker.state.to_string());
    if worker.draining {
        line("draining", "it takes no new VMs; `aether worker activate` changes that".to_owned());
    }
    line("zone", table::or_dash(worker.zone.as_ref()));
    for (key, value) in &worker.labels {
        line("label", format!("{key}={value}"));
    }
    for WorkerDriver { kind, version, isolation, .. } in &worker.drivers {
        line("driver", format!("{kind} {version}: {isolation}"));
    }
    let (capacity, promised) = (worker.capacity, worker.promised);
    let processors = capacity.processors;
    line("host has", format!("{processors} processors, {} MB memory", capacity.host_memory_mb));
    line("VMs", of(promised.vms, capacity.vms_max));
    line("vCPUs", of(promised.vcpus, capacity.vcpus_max));
    line("memory", format!("{} MB", of(promised.memory_mb, capacity.memory_mb_max)));
    line("version", worker.version.clone());
    line("registered", format!("{} (the {}. time)", worker.registered_at, worker.epoch));
    line("heard", worker.heartbeat_at.to_string());
    line("lost", format!("after {} ms of silence", worker.lease_ms));
}

async fn vms(client: &Client, global: &Global, worker: &str) -> Result<Exit, Failure> {
    let mut page = PageQuery { limit: Some(limits::PAGE_LIMIT_MAX), cursor: None };
    let mut vms: Vec<VmView> = Vec::new();
    loop {
        let answer = client.worker_vms(worker, &page).await?;
        vms.extend(answer.items);
        match answer.next_cursor {
            Some(cursor) => page.cursor = Some(cursor),
            None => break,
        }
    }
    if global.json {
        output::json(&Page { items: vms, next_cursor: None });
    } else if vms.is_empty() {
        output::note("the worker has no VMs");
    } else {
        let now = Timestamp::now();
        let row = |vm: VmView| {
            vec![
                vm.name,
                vm.id.to_string(),
                vm.state.to_string(),
                vm.vcpus.to_string(),
                format!("{} MB", vm.memory_mb),
                table::age(vm.created_at, now),
            ]
        };
        table::print(
            &["NAME", "ID", "STATE", "VCPUS", "MEMORY", "AGE"],
            vms.into_iter().map(row).collect(),
        );
    }
    Ok(Exit::Success)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_is_shown_where_there_is_one() {
        assert_eq!(of(3, Some(8)), "3/8");
        assert_eq!(of(3, None), "3");
    }
}
