//! `aether doctor`: looks at this host, then runs a VM on it through the whole platform, removes
//! it, and counts what is left. Every finding that is not well says what mends it.

use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

use aether_api::{
    CreateSnapshot, CreateVm, ExecuteRequest, VmView,
    client::{CallOptions, Client, Waited},
};
use aether_drivers::CgroupStatus;
use aether_logs::{EmbeddedConfig, LogSink};
use aether_postgres::{Database, Facts, OpenError};
use aether_redis::{Link, Listener};
use aether_types::{DriverKind, ErrorCode, VmState};
use aether_worker::{FleetConfig, ShutdownMode};
use serde::Serialize;
use tokio::{net::TcpListener, time::Instant};

use crate::{
    args::{
        Backend, Capacity, DatabaseOptions, Doctor, DriverChoice, Edge, Global, LogPlan,
        PoolChoice, RedisOptions, Snapshots, ToolOptions,
    },
    cli,
    compose::{self, Plan, Platform},
    database::{self, Target},
    datadir::DataDir,
    exit::Exit,
    failure::Failure,
    host::{self, Finding, Verdict},
    leftovers, logging,
    logs::LogInputs,
    output,
    tls::TlsPlan,
};

const WAIT: Duration = Duration::from_mins(4);
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(30);
const DATABASE: &str = "database";
const REDIS: &str = "redis";
/// What a VM can be tried without.
const BESIDE: [&str; 2] = [DATABASE, REDIS];
const HINT: &str = "`aether up --log-level debug` says more; see the findings above";

#[derive(Serialize)]
struct Report {
    healthy: bool,
    findings: Vec<Finding>,
}

pub(crate) async fn run(global: &Global, args: Doctor) -> Result<Exit, Failure> {
    logging::start(logging::LogFormat::Text, &args.log_level, None)?;
    let mut findings = Findings { json: global.json, all: Vec::new() };
    let dir = DataDir::choose(global.data_dir.as_deref());
    if args.server {
        let client = cli::connect(global)?;
        try_server(&client, &mut findings).await;
    } else {
        if args.backend.driver != DriverChoice::Sim {
            let machines = match args.backend.driver {
                DriverChoice::Docker => host::Machines::Containers,
                _ => host::Machines::Vms,
            };
            for finding in host::findings(dir.path(), machines) {
                findings.add(finding);
            }
            image(&args.backend, &mut findings);
        }
        // The VM below is on files of its own: what is wrong here does not keep it from running.
        database(&args.database, &mut findings).await;
        redis(&args.redis, &mut findings).await;
        // A host that lacks something cannot run a VM: that is said already.
        if findings
            .all
            .iter()
            .any(|found| found.verdict == Verdict::Failed && !BESIDE.contains(&found.check))
        {
            let found = "not tried, since the host lacks what is said above";
            findings.add(Finding::failed("vm", found, "mend that first"));
        } else {
            try_here(args.backend, &mut findings).await?;
        }
    }
    Ok(findings.finish())
}

struct Findings {
    json: bool,
    all: Vec<Finding>,
}

impl Findings {
    fn add(&mut self, finding: Finding) {
        if !self.json {
            let word = match finding.verdict {
                Verdict::Ok => "ok",
                Verdict::Warning => "warning",
                Verdict::Failed => "FAILED",
            };
            output::line(&format!("{word:>8}  {:<11} {}", finding.check, finding.found));
            if let Some(fix) = &finding.fix {
                output::line(&format!("{:>8}  {:<11} → {fix}", "", ""));
            }
        }
        self.all.push(finding);
    }

    fn failed(&mut self, check: &'static str, failure: &Failure) {
        let fix = failure.hint.clone().unwrap_or_else(|| HINT.to_owned());
        let found = format!("{} [{}]", failure.message, failure.code);
        self.add(Finding::failed(check, found, fix));
    }

    fn worst(&self) -> Verdict {
        let has = |verdict| self.all.iter().any(|finding| finding.verdict == verdict);
        if has(Verdict::Failed) {
            Verdict::Failed
        } else if has(Verdict::Warning) {
            Verdict::Warning
        } else {
            Verdict::Ok
        }
    }

    fn finish(self) -> Exit {
        let healthy = self.worst() != Verdict::Failed;
        if self.json {
            output::json(&Report { healthy, findings: self.all });
        } else {
            output::line(match self.worst() {
                Verdict::Ok => "this host is fit",
                Verdict::Warning => "this host works, with warnings",
                Verdict::Failed => "this host is not fit yet",
            });
        }
        if healthy { Exit::Success } else { Exit::Failure }
    }
}

fn image(backend: &Backend, findings: &mut Findings) {
    let folder = backend.images.path();
    let checked =
        aether_images::ImageStore::open(&folder).and_then(|store| store.resolve(&backend.image));
    findings.add(match checked {
        Ok(set) => Finding::ok("image", format!("{} is whole ({})", set.image, set.digest)),
        Err(error) => Finding::failed(
            "image",
            crate::failure::chain(&error),
            format!("aether image build --image-dir {}", folder.display()),
        ),
    });
}

/// The one that is configured: is it there, new enough, and are its tables up to date?
async fn database(options: &DatabaseOptions, findings: &mut Findings) {
    let config = match options.config() {
        Ok(Some(config)) => config,
        Ok(None) => return,
        Err(failure) => return findings.failed(DATABASE, &failure),
    };
    let weakness = config.weakness();
    let database = match database::open(config).await {
        Ok(database) => database,
        Err(failure) => return findings.failed(DATABASE, &failure),
    };
    match server(&database).await {
        Ok(found) => findings.add(found),
        Err(error) => findings.failed(DATABASE, &database::unreachable(&error)),
    }
    if let Some(weakness) = weakness {
        findings.add(Finding::warning(DATABASE, weakness, "say sslmode=verify-full"));
    }
    findings.add(tables(&database).await);
    database.close().await;
}

async fn server(database: &Database) -> Result<Finding, OpenError> {
    let place = database.config().place();
    let Facts { version, major, connections_max: theirs } = database.facts().await?;
    let found = format!("PostgreSQL {version} answers at {place}");
    if major < aether_postgres::VERSION_MIN {
        let fix = format!("use PostgreSQL {} or newer", aether_postgres::VERSION_MIN);
        return Ok(Finding::failed(DATABASE, found, fix));
    }
    let ours = database.connections_of_ours();
    if ours > theirs {
        let found = format!("{found}, and takes {theirs} connections where we may ask for {ours}");
        return Ok(Finding::warning(DATABASE, found, "lower POSTGRES_CONNECTIONS_MAX"));
    }
    Ok(Finding::ok(DATABASE, found))
}

async fn tables(database: &Database) -> Finding {
    for schema in database::SCHEMAS {
        if let Err(error) = aether_postgres::check(database, *schema).await {
            let failure = database::migration(&error);
            let fix = failure.hint.unwrap_or_else(|| HINT.to_owned());
            return Finding::failed(
                DATABASE,
                format!("{} [{}]", failure.message, failure.code),
                fix,
            );
        }
    }
    Finding::ok(DATABASE, "its tables are those of this program")
}

/// The one that is configured: is it there, new enough, and does it keep what it is told?
async fn redis(options: &RedisOptions, findings: &mut Findings) {
    let config = match options.config() {
        Ok(Some(config)) => config,
        Ok(None) => return,
        Err(failure) => return findings.failed(REDIS, &failure),
    };
    let link = match Link::open(config, Arc::new(Deaf)).await {
        Ok(link) => link,
        Err(error) => return findings.failed(REDIS, &database::redis_unreachable(&error)),
    };
    let (info, place) = (link.info(), link.config().place());
    findings.add(Finding::ok(REDIS, format!("Redis {} answers at {place}", info.version)));
    if let Some(weakness) = link.config().weakness() {
        findings.add(Finding::warning(REDIS, weakness, "use rediss://"));
    }
    if info.evicts() {
        let found = format!("when it is full it throws tasks away ({})", info.eviction);
        findings.add(Finding::warning(REDIS, found, "set maxmemory-policy noeviction"));
    }
    if !info.has_append_only_file {
        let found = "a restart forgets the queue, which the store then fills again";
        findings.add(Finding::warning(REDIS, found, "set appendonly yes"));
    }
}

/// The doctor asks, and hears nothing.
struct Deaf;

impl Listener for Deaf {
    fn message(&self, _text: &str) {}

    fn connected(&self, _restarted: bool) {}
}

/// A platform of its own, in a temporary folder, on a free port.
async fn try_here(backend: Backend, findings: &mut Findings) -> Result<(), Failure> {
    let folder = tempfile::Builder::new()
        .prefix("aether-doctor-")
        .tempdir()
        .map_err(|e| Failure::io("make a temporary folder", &e))?;
    // The folder itself is the data directory's parent, so that the lock can go with it.
    let data = folder.path().join("data");
    let dir = DataDir::choose(Some(&data)).lock()?;
    let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0)))
        .await
        .map_err(|e| Failure::io("listen on a free port", &e))?;
    // One VM, and another from its snapshot; nothing else begins.
    let capacity = Capacity { max_vms: 2, max_starting: 2, pool: vec![PoolChoice::None] };
    let snapshots = Snapshots { no_default_template: true, ..Snapshots::default() };
    let tools = ToolOptions { no_default_tools: true, ..ToolOptions::default() };
    let (sink, backlog) = LogSink::unconnected();
    let logs = LogInputs { plan: LogPlan::Embedded(EmbeddedConfig::default()), sink, backlog };
    let (target, fleet, edge) = (Target::files(), FleetConfig::default(), Edge::open());
    let (tls, authority_dir) = (TlsPlan::Plain, None);
    let plan = Plan {
        dir,
        listener,
        target,
        backend,
        capacity,
        snapshots,
        tools,
        fleet,
        streams: None,
        logs,
        edge,
        tls,
        jwt: None,
        authority_dir,
    };
    let platform = match Box::pin(Platform::start(plan)).await {
        Ok(platform) => platform,
        Err(failure) => {
            findings.failed("platform", &failure);
            left(&data, None, findings);
            return Ok(());
        }
    };
    describe(&platform, findings);
    let instance = platform.network_instance();
    let url = cli::local_url(platform.listen());
    let client = Client::new(&url, Some(platform.key().text()))?;
    try_server(&client, findings).await;
    let start = Instant::now();
    let report = Box::pin(platform.shutdown(ShutdownMode::StopVms, SHUTDOWN_LIMIT)).await;
    if report.tasks_left > 0 {
        let found = format!("{} tasks had not ended", report.tasks_left);
        findings.add(Finding::failed("shutdown", found, HINT));
    } else {
        findings.add(Finding::ok("shutdown", format!("in {} ms", start.elapsed().as_millis())));
    }
    left(&data, instance.as_deref(), findings);
    Ok(())
}

fn describe(platform: &Platform, findings: &mut Findings) {
    for capabilities in platform.drivers() {
        let found = compose::describe(capabilities);
        findings.add(if compose::is_weak(capabilities) {
            Finding::warning("driver", found, "for hostile code use a host where KVM works")
        } else {
            Finding::ok("driver", found)
        });
        if capabilities.snapshot_format.is_none() {
            let found = format!("{} takes no snapshots here: its VMs boot", capabilities.kind);
            let fix = match capabilities.kind {
                DriverKind::Docker => "use another driver for snapshots and templates",
                _ => "use a newer version of it",
            };
            findings.add(Finding::warning("snapshots", found, fix));
        }
    }
    if let Some(range) = platform.network_range() {
        findings.add(Finding::ok("network", format!("VMs have addresses of {range}")));
    }
    match platform.cgroup() {
        None => {}
        Some(CgroupStatus::Enforced { parent }) => {
            findings.add(Finding::ok("cgroup", format!("limits hold, in {}", parent.display())));
        }
        Some(CgroupStatus::NotEnforced { reason }) => findings.add(Finding::warning(
            "cgroup",
            format!("limits on VMs do not hold: {reason}"),
            "use a host with cgroup v2 whose memory, cpu and pids controllers root may delegate",
        )),
    }
}

fn left(data: &Path, instance: Option<&str>, findings: &mut Findings) {
    let left = leftovers::of(data, instance);
    findings.add(if left.is_empty() {
        Finding::ok("leftovers", "none: no process, mount, link, rule or file")
    } else {
        Finding::failed("leftovers", left.join(", "), "remove them, and report this as a defect")
    });
}

/// Makes a VM, runs a command in it, deletes it.
async fn try_server(client: &Client, findings: &mut Findings) {
    let name = format!("doctor-{}", std::process::id());
    let start = Instant::now();
    let made = match create(client, &name).await {
        Ok(vm) => {
            let found = format!("runs after {} ms ({})", start.elapsed().as_millis(), vm.driver);
            findings.add(Finding::ok("vm", found));
            true
        }
        Err(failure) => {
            findings.failed("vm", &failure);
            false
        }
    };
    if made {
        let start = Instant::now();
        match command(client, &name).await {
            Ok(()) => {
                let found = format!("ran in {} ms", start.elapsed().as_millis());
                findings.add(Finding::ok("command", found));
            }
            Err(failure) => findings.failed("command", &failure),
        }
        try_snapshot(client, &name, findings).await;
    }
    // Also one that failed: it is there until it is deleted.
    let start = Instant::now();
    match client.delete_vm(&name, &CallOptions::waiting(WAIT)).await.map_err(Failure::from) {
        Ok(_) => {
            let found = format!("gone after {} ms", start.elapsed().as_millis());
            findings.add(Finding::ok("deletion", found));
        }
        Err(failure) if !made && failure.exit == Exit::NotFound => {}
        Err(failure) => findings.failed("deletion", &failure),
    }
}

/// Takes a snapshot, begins a VM as it, runs a command in that, and removes both.
async fn try_snapshot(client: &Client, vm: &str, findings: &mut Findings) {
    let name = format!("{vm}-snapshot");
    match snapshot(client, vm, &name).await {
        Ok(found) => findings.add(Finding::ok("snapshots", found)),
        Err(failure) if failure.code == ErrorCode::DriverUnavailable.as_str() => {
            let fix = "VMs boot each time; use a driver that takes snapshots";
            findings.add(Finding::warning("snapshots", failure.message, fix));
        }
        Err(failure) => findings.failed("snapshots", &failure),
    }
    // What there is of them; the first may not have been made.
    for gone in [
        client.delete_vm(&name, &CallOptions::waiting(WAIT)).await.map(drop),
        client.delete_snapshot(&name).await.map(drop),
    ] {
        match gone.map_err(Failure::from) {
            Ok(()) => {}
            Err(failure) if failure.exit == Exit::NotFound => {}
            Err(failure) => findings.failed("deletion", &failure),
        }
    }
}

async fn snapshot(client: &Client, vm: &str, name: &str) -> Result<String, Failure> {
    let begun = Instant::now();
    let request = CreateSnapshot { name: Some(name.to_owned()) };
    let taken = client.create_snapshot(vm, &request, &CallOptions::waiting(WAIT)).await?;
    let Waited::Done(taken) = taken else { return Err(late("the snapshot is not taken")) };
    let took = begun.elapsed().as_millis();
    let request = CreateVm {
        name: Some(name.to_owned()),
        snapshot: Some(taken.id.to_string()),
        ..CreateVm::default()
    };
    let vm = create_as(client, &request).await?;
    command(client, name).await?;
    let start = vm.start.as_ref().map_or(0.0, |start| start.total_ms);
    let paused = taken.paused_ms.unwrap_or(0.0);
    Ok(format!(
        "taken in {took} ms, for which the VM stood still {paused:.0} ms; restored in {start:.0} ms"
    ))
}

async fn create(client: &Client, name: &str) -> Result<VmView, Failure> {
    let request = CreateVm { name: Some(name.to_owned()), ..CreateVm::default() };
    create_as(client, &request).await
}

async fn create_as(client: &Client, request: &CreateVm) -> Result<VmView, Failure> {
    match client.create_vm(request, &CallOptions::waiting(WAIT)).await? {
        Waited::Done(vm) if vm.state == VmState::Running => Ok(vm),
        Waited::Done(vm) => Err(vm.reason.as_ref().map_or_else(
            || Failure::new("internal", Exit::Failure, format!("the VM is {}", vm.state)),
            Failure::fault,
        )),
        Waited::Accepted(_) => Err(late("the VM does not run")),
    }
}

async fn command(client: &Client, vm: &str) -> Result<(), Failure> {
    let request = ExecuteRequest {
        command: "echo".to_owned(),
        args: vec!["well".to_owned()],
        ..ExecuteRequest::default()
    };
    match client.execute(vm, &request, &CallOptions::waiting(WAIT)).await? {
        Waited::Done(ended)
            if ended.exit_code == Some(0) && ended.stdout.as_deref() == Some("well\n") =>
        {
            Ok(())
        }
        Waited::Done(ended) => Err(ended.error.as_ref().map_or_else(
            || Failure::new("internal", Exit::Failure, "the command's output is not what it wrote"),
            Failure::fault,
        )),
        Waited::Accepted(_) => Err(late("the command has not ended")),
    }
}

fn late(what: &str) -> Failure {
    Failure::new("too_late", Exit::Failure, format!("{what} after {} s", WAIT.as_secs()))
}
