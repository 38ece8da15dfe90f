//! `aether vm fork`.

use aether_api::{
    ForkAccepted, ForkVm, Forked,
    client::{Client, Waited},
};

use super::{
    progress::Progress,
    start, task_failure,
    vm::{made, network, options},
    wait_for_task,
};
use crate::{
    args::{Global, VmFork},
    exit::Exit,
    failure::Failure,
    output,
};

pub(super) async fn run(client: &Client, global: &Global, args: VmFork) -> Result<Exit, Failure> {
    let (vm, no_wait) = (args.vm.clone(), args.no_wait);
    let request = request(args);
    let progress = Progress::spinner("forking the VM", global.json || no_wait);
    let answer = client.fork_vm(&vm, &request, &options(no_wait)).await?;
    let forked = match answer {
        Waited::Done(forked) => forked,
        Waited::Accepted(accepted) if no_wait => {
            drop(progress);
            told(global, &accepted);
            return Ok(Exit::Success);
        }
        Waited::Accepted(accepted) => follow(client, &accepted).await?,
    };
    drop(progress);
    if global.json {
        output::json(&forked);
        return Ok(Exit::Success);
    }
    for vm in &forked.vms {
        output::line(&made(vm));
    }
    if let Some(paused) = forked.paused_ms {
        output::note(&format!("{vm} stood still for {}", start::ms(paused)));
    }
    Ok(Exit::Success)
}

fn request(args: VmFork) -> ForkVm {
    ForkVm {
        count: Some(args.count),
        name_prefix: args.name_prefix,
        env: (!args.env.is_empty()).then(|| args.env.into_iter().collect()),
        labels: (!args.label.is_empty()).then(|| args.label.into_iter().collect()),
        timeout_s: args.timeout.map(|t| t.as_secs()),
        network: network(args.no_network, args.allow),
    }
}

fn told(global: &Global, accepted: &ForkAccepted) {
    if global.json {
        output::json(accepted);
        return;
    }
    for vm in &accepted.vms {
        output::line(&vm.vm_id.to_string());
    }
}

/// Waits, without a limit of its own, until all clones run.
async fn follow(client: &Client, accepted: &ForkAccepted) -> Result<Forked, Failure> {
    let clones = accepted.vms.iter().map(|clone| clone.task_id);
    for id in std::iter::once(accepted.task_id).chain(clones) {
        let task = wait_for_task(client, id).await?;
        if let Some(failure) = task_failure(&task) {
            return Err(failure);
        }
    }
    let mut vms = Vec::with_capacity(accepted.vms.len());
    for clone in &accepted.vms {
        vms.push(client.vm(&clone.vm_id.to_string()).await?);
    }
    let snapshot = client.snapshot(&accepted.snapshot_id.to_string()).await?;
    Ok(Forked { paused_ms: snapshot.paused_ms, vms })
}
