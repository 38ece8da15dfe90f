//! `aether vm`.

use std::time::Duration;

use aether_api::{
    CreateVm, VmView,
    client::{CallOptions, Client, ClientError, PageQuery, VmQuery, Waited},
};
use aether_types::{AllowRule, Egress, NetworkPolicy, Placement, Timestamp, VmState, limits};
use futures::{StreamExt as _, stream};

use super::{
    WAIT, build::BuildProgress, connect, fault_failure, follow_task, fork, outcome::Outcome,
    progress::Progress, start, table, task_failure, tools, wait_for_task,
};
use crate::{
    args::{Global, Vm, VmAct, VmCreate, VmList, VmNames, VmStop},
    exit::Exit,
    failure::Failure,
    output,
};

/// Requests in flight when several VMs are named.
const AT_ONCE: usize = 16;
/// A creation that takes longer says how far it is.
const AT_ONCE_WAIT: Duration = Duration::from_secs(1);

pub(crate) async fn run(global: &Global, command: Vm) -> Result<Exit, Failure> {
    let client = connect(global)?;
    match command {
        Vm::Create(args) => create(&client, global, args).await,
        Vm::List(args) => list(&client, global, args).await,
        Vm::Get(args) => get(&client, global, args).await,
        Vm::Fork(args) => fork::run(&client, global, args).await,
        Vm::Stop(VmStop { act: args, keep_memory: false }) => {
            act(&client, global, Verb::Stop, args).await
        }
        Vm::Stop(VmStop { act: args, keep_memory: true }) => {
            act(&client, global, Verb::Suspend, args).await
        }
        Vm::Start(args) => act(&client, global, Verb::Start, args).await,
        Vm::Pause(args) => act(&client, global, Verb::Pause, args).await,
        Vm::Resume(args) => act(&client, global, Verb::Resume, args).await,
        Vm::Delete(args) => act(&client, global, Verb::Delete, args).await,
    }
}

async fn create(client: &Client, global: &Global, args: VmCreate) -> Result<Exit, Failure> {
    let no_wait = args.no_wait;
    let request = create_request(args);
    let options = if no_wait { CallOptions::default() } else { CallOptions::waiting(AT_ONCE_WAIT) };
    let progress = Progress::spinner("creating the VM", global.json || no_wait);
    let answer = client.create_vm(&request, &options).await?;
    let vm = match answer {
        Waited::Accepted(accepted) if !no_wait => {
            drop(progress);
            follow(client, &accepted, global.json).await?
        }
        answer => settle(client, answer, no_wait).await?,
    };
    match vm {
        Settled::Accepted(accepted) if global.json => output::json(&accepted),
        Settled::Accepted(accepted) => {
            output::line(&accepted.vm_id.to_string());
        }
        Settled::Done(vm) if global.json => output::json(&*vm),
        Settled::Done(vm) => output::line(&made(&vm)),
    }
    Ok(Exit::Success)
}

/// It takes longer: says how far the tools are that it waits for.
async fn follow(
    client: &Client,
    accepted: &aether_api::Accepted,
    json: bool,
) -> Result<Settled, Failure> {
    let mut progress = BuildProgress::new(false, json);
    let task = follow_task(client, accepted.task_id, &mut progress).await?;
    drop(progress);
    if let Some(failure) = task_failure(&task) {
        return Err(failure);
    }
    let vm = client.vm(&accepted.vm_id.to_string()).await?;
    settle(client, Waited::Done(vm), false).await
}

/// `web is running (ID, ADDRESS), restored in 61 ms`.
pub(super) fn made(vm: &VmView) -> String {
    let VmView { name, state, id, address, start, .. } = vm;
    let address = address.map_or_else(String::new, |a| format!(", {a}"));
    let start = start.as_ref().map_or_else(String::new, |s| format!(", {}", start::brief(s)));
    format!("{name} is {state} ({id}{address}){start}")
}

fn create_request(args: VmCreate) -> CreateVm {
    let network = network(args.no_network, args.allow);
    CreateVm {
        name: args.name,
        template: args.template,
        snapshot: args.snapshot,
        vcpus: args.vcpus,
        memory_mb: args.memory,
        disk_mb: args.disk,
        image: args.image,
        driver: args.driver,
        env: args.env.into_iter().collect(),
        labels: args.label.into_iter().collect(),
        timeout_s: args.timeout.map(|t| t.as_secs()),
        network,
        tools: args.tools.iter().map(ToString::to_string).collect(),
        default_tools: args.no_default_tools.then_some(false),
        placement: Some(Placement {
            zone: args.zone,
            labels: args.worker_label.into_iter().collect(),
        })
        .filter(|placement| !placement.is_anywhere()),
        ..CreateVm::default()
    }
}

/// The policy that options ask for; none where they ask for none.
pub(super) fn network(is_closed: bool, allow: Vec<AllowRule>) -> Option<NetworkPolicy> {
    (is_closed || !allow.is_empty()).then_some(NetworkPolicy {
        egress: if is_closed { Egress::None } else { Egress::Public },
        allow,
    })
}

pub(super) fn options(no_wait: bool) -> CallOptions {
    if no_wait { CallOptions::default() } else { CallOptions::waiting(WAIT) }
}

enum Settled {
    Done(Box<VmView>),
    Accepted(aether_api::Accepted),
}

/// Waits until what was asked of the VM is done; a VM that failed is a failure.
async fn settle(
    client: &Client,
    answer: Waited<VmView>,
    no_wait: bool,
) -> Result<Settled, Failure> {
    let vm = match answer {
        Waited::Done(vm) => vm,
        Waited::Accepted(accepted) if no_wait => return Ok(Settled::Accepted(accepted)),
        Waited::Accepted(accepted) => {
            let task = wait_for_task(client, accepted.task_id).await?;
            if let Some(failure) = task_failure(&task) {
                return Err(failure);
            }
            client.vm(&accepted.vm_id.to_string()).await?
        }
    };
    if vm.state == VmState::Failed {
        return Err(fault_failure(vm.reason.as_ref(), "the VM failed"));
    }
    Ok(Settled::Done(Box::new(vm)))
}

async fn list(client: &Client, global: &Global, args: VmList) -> Result<Exit, Failure> {
    let states = if args.all { VmState::ALL.to_vec() } else { args.state };
    let mut query = VmQuery {
        states: states.iter().map(ToString::to_string).collect(),
        labels: args.label,
        page: PageQuery { limit: Some(limits::PAGE_LIMIT_MAX), cursor: None },
        ..VmQuery::default()
    };
    let limit = args.limit.unwrap_or(usize::MAX);
    let mut vms = Vec::new();
    loop {
        let page = client.vms(&query).await?;
        vms.extend(page.items);
        match page.next_cursor {
            Some(cursor) if vms.len() < limit => query.page.cursor = Some(cursor),
            Some(_) | None => break,
        }
    }
    vms.truncate(limit);
    if global.json {
        output::json(&aether_api::Page { items: vms, next_cursor: None });
    } else if vms.is_empty() {
        output::note("there are no VMs; `aether vm create` makes one");
    } else {
        let now = Timestamp::now();
        let row = |vm: VmView| {
            let origin = start::origin(&vm.origin);
            let start = vm.start.as_ref();
            let more = args.verbose.then(|| [origin, table::or_dash(start.map(start::phases))]);
            let row = vec![
                vm.name,
                vm.id.to_string(),
                vm.state.to_string(),
                vm.driver.to_string(),
                vm.vcpus.to_string(),
                format!("{} MB", vm.memory_mb),
                table::or_dash(vm.address),
                table::age(vm.created_at, now),
                table::or_dash(start.map(start::brief)),
            ];
            row.into_iter().chain(more.into_iter().flatten()).collect()
        };
        let mut header =
            vec!["NAME", "ID", "STATE", "DRIVER", "CPUS", "MEMORY", "ADDRESS", "AGE", "START"];
        if args.verbose {
            header.extend(["ORIGIN", "PHASES"]);
        }
        table::print(&header, vms.into_iter().map(row).collect());
    }
    Ok(Exit::Success)
}

async fn get(client: &Client, global: &Global, args: VmNames) -> Result<Exit, Failure> {
    let several = args.vms.len() > 1;
    let calls = args.vms.into_iter().map(|name| async move {
        let answer = client.vm(&name).await;
        (name, answer)
    });
    let answers: Vec<_> = stream::iter(calls).buffered(AT_ONCE).collect().await;
    let mut outcome = Outcome::new(several, global.json);
    let mut first = true;
    for (name, answer) in answers {
        match answer {
            Ok(vm) if global.json => outcome.json(&vm),
            Ok(vm) => {
                if !std::mem::replace(&mut first, false) {
                    output::line("");
                }
                describe(&vm);
            }
            Err(error) => outcome.failed(&name, error.into()),
        }
    }
    outcome.finish()
}

fn describe(vm: &VmView) {
    let line = |name: &str, value: String| {
        output::line(&format!("{name:<10} {}", table::printable(&value)));
    };
    line("name", vm.name.clone());
    line("id", vm.id.to_string());
    line("state", vm.state.to_string());
    if let Some(reason) = &vm.reason {
        line("reason", format!("{} [{}]", reason.message, reason.code));
    }
    line(
        "driver",
        match &vm.isolation {
            Some(isolation) => format!("{} ({isolation})", vm.driver),
            None => vm.driver.to_string(),
        },
    );
    line("size", format!("{} vCPU, {} MB memory, {} MB disk", vm.vcpus, vm.memory_mb, vm.disk_mb));
    line("image", vm.image.clone());
    line("origin", start::origin(&vm.origin));
    if let Some(start) = &vm.start {
        line("start", start::brief(start));
        for phase in &start.phases {
            line("", format!("{:<18} {}", phase.name, start::ms(phase.ms)));
        }
        if let Some(fallback) = &start.fallback {
            line("", format!("not faster: {fallback}"));
        }
    }
    if vm.memory_kept {
        line("memory", "kept; a start goes on where it was".to_owned());
    }
    line("address", table::or_dash(vm.address));
    let egress = match vm.network.egress {
        Egress::Public => "the public internet",
        Egress::None => "nothing",
    };
    let mut reach = vec![egress.to_owned()];
    reach.extend(vm.network.allow.iter().map(ToString::to_string));
    line("reaches", reach.join(", "));
    for tool in &vm.tools {
        let verified = tool.verified_at.map_or_else(String::new, |at| format!(", verified {at}"));
        line("tool", format!("{}{verified}", tools::in_words(tool)));
    }
    for (key, value) in &vm.labels {
        line("label", format!("{key}={value}"));
    }
    if !vm.env.is_empty() {
        line("env", vm.env.join(", "));
    }
    line("created", vm.created_at.to_string());
    if let Some(at) = vm.expires_at {
        line("expires", at.to_string());
    }
    for change in vm.history.iter().flatten() {
        let reason = change.reason.as_ref();
        let reason = reason.map_or_else(String::new, |r| format!(": {} [{}]", r.message, r.code));
        line("history", format!("{} {}{reason}", change.at, change.state));
    }
}

#[derive(Debug, Clone, Copy)]
enum Verb {
    Stop,
    /// Stop, with the memory kept.
    Suspend,
    Start,
    Pause,
    Resume,
    Delete,
}

impl Verb {
    fn doing(self) -> &'static str {
        match self {
            Self::Stop | Self::Suspend => "stopping",
            Self::Start => "starting",
            Self::Pause => "pausing",
            Self::Resume => "resuming",
            Self::Delete => "deleting",
        }
    }

    async fn call(
        self,
        client: &Client,
        vm: &str,
        options: &CallOptions,
    ) -> Result<Waited<VmView>, ClientError> {
        match self {
            Self::Stop => client.stop_vm(vm, options).await,
            Self::Suspend => client.suspend_vm(vm, options).await,
            Self::Start => client.start_vm(vm, options).await,
            Self::Pause => client.pause_vm(vm, options).await,
            Self::Resume => client.resume_vm(vm, options).await,
            Self::Delete => client.delete_vm(vm, options).await,
        }
    }
}

fn acted(verb: Verb, vm: &VmView) -> String {
    let more = match (verb, &vm.start) {
        (Verb::Start, Some(start)) => format!(", {}", start::brief(start)),
        (Verb::Suspend, _) if vm.memory_kept => ", its memory is kept".to_owned(),
        _ => String::new(),
    };
    format!("{} is {}{more}", vm.name, vm.state)
}

async fn act(client: &Client, global: &Global, verb: Verb, args: VmAct) -> Result<Exit, Failure> {
    let several = args.vms.len() > 1;
    let progress = Progress::spinner(verb.doing(), global.json || args.no_wait);
    let options = &options(args.no_wait);
    let calls = args.vms.into_iter().map(|name| async move {
        let answer = match verb.call(client, &name, options).await {
            Ok(answer) => settle(client, answer, args.no_wait).await,
            Err(error) => Err(error.into()),
        };
        (name, answer)
    });
    let answers: Vec<_> = stream::iter(calls).buffered(AT_ONCE).collect().await;
    drop(progress);
    let mut outcome = Outcome::new(several, global.json);
    for (name, answer) in answers {
        match answer {
            Ok(Settled::Done(vm)) if global.json => outcome.json(&vm),
            Ok(Settled::Accepted(accepted)) if global.json => outcome.json(&accepted),
            Ok(Settled::Done(vm)) => output::line(&acted(verb, &vm)),
            Ok(Settled::Accepted(accepted)) => {
                output::line(&format!("{name}: task {} is recorded", accepted.task_id));
            }
            Err(failure) => outcome.failed(&name, failure),
        }
    }
    outcome.finish()
}
