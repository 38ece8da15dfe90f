//! `aether up`: the whole platform, from the first line to the last.

use std::{net::SocketAddr, time::Duration};

use aether_api::{
    HealthStatus,
    client::{Client, Trust},
};
use aether_logs::LogSink;
use aether_worker::ShutdownMode;
use serde::Serialize;
use tokio::{net::TcpListener, time::Instant};

use crate::{
    args::{Global, Up},
    cli::local_url,
    compose::{self, Plan, Platform},
    database::{StoreTarget, Target},
    datadir::DataDir,
    default_template::DefaultTemplate,
    exit::Exit,
    failure::Failure,
    links::StreamPlan,
    logging,
    logs::LogInputs,
    notify, output,
    signals::Signals,
};

/// From the signal to the end. Whoever stops services expects ten seconds and then kills; this
/// leaves some for the process itself to go.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(9);
/// From the last part's start to health.
const READY_LIMIT: Duration = Duration::from_secs(30);
const READY_INTERVAL: Duration = Duration::from_millis(50);

/// What a program that started us is told, one document a line.
#[derive(Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Word<'a> {
    /// The key is shown only here and in the file.
    Key {
        key: &'a str,
        file: String,
    },
    Ready {
        url: &'a str,
        pid: u32,
        drivers: &'a [aether_drivers::Capabilities],
        network_range: Option<String>,
        /// In the names of its links, namespace and rules.
        network_instance: Option<String>,
        /// Where VMs find this host, if their network allows it.
        host_address: Option<String>,
    },
    /// What came of the template that VMs get which ask for none.
    Template(&'a DefaultTemplate),
    Ended {
        vms_stopped: usize,
        vms_kept: usize,
        tasks_left: usize,
    },
}

pub(crate) async fn run(global: &Global, args: Up) -> Result<Exit, Failure> {
    let (sink, backlog) = LogSink::unconnected();
    logging::start(args.log_format, &args.log_level, Some(sink.clone()))?;
    let logs = LogInputs { plan: args.logging.plan()?, sink, backlog };
    let tls = args.tls.plan()?;
    let jwt = args.jwt.verifier()?;
    check_address(args.listen, args.tls.insecure_http || !tls.is_plain())?;
    let mode = if args.keep_vms { ShutdownMode::KeepVms } else { ShutdownMode::StopVms };
    let store = match args.database.config()? {
        Some(config) => StoreTarget::Postgres { config, migrate: args.migrate },
        None => StoreTarget::Files,
    };
    let target = Target { store, redis: args.redis.config()? };
    let dir = DataDir::choose(global.data_dir.as_deref()).lock()?;
    let listener = bind(args.listen).await?;
    let streams = StreamPlan::bind(args.streams).await?;
    let mut signals = Signals::take()?;

    let Up { backend, capacity, snapshots, tools, fleet, edge, tls: options, .. } = args;
    let authority_dir = options.authority_dir;
    let mut fleet = compose::fleet(fleet, snapshots.template_dir.as_deref())?;
    fleet.stream_address = streams.as_ref().map(|plan| plan.advertised(&fleet.host));
    let plan = Plan {
        dir,
        listener,
        target,
        backend,
        capacity,
        snapshots,
        tools,
        fleet,
        streams,
        logs,
        edge,
        tls,
        jwt,
        authority_dir,
    };
    let mut platform = tokio::select! {
        platform = Box::pin(Platform::start(plan)) => platform?,
        signal = next_end(&mut signals) => {
            // Nothing was promised to anybody yet, and the next start mends what is half made.
            return Ok(Exit::Command(128 + u8::try_from(signal).unwrap_or(0)));
        }
    };
    let url = local_url(platform.listen());
    await_health(&url, &platform.trust()).await?;
    platform.dir().write_listen(platform.listen())?;
    announce(global, &platform, &url);
    notify::send("READY=1");

    let told = |template: &DefaultTemplate| {
        if global.json {
            output::json_line(&Word::Template(template));
        }
    };
    let failure = tokio::select! {
        signal = next_end(&mut signals) => {
            tracing::info!(signal, "asked to end");
            None
        }
        failure = platform.run(told) => Some(failure),
    };
    notify::send("STOPPING=1");
    let report = tokio::select! {
        report = Box::pin(platform.shutdown(mode, SHUTDOWN_LIMIT)) => report,
        signal = next_end(&mut signals) => {
            output::note("aether: ended by force; the next start takes over what is left");
            return Ok(Exit::Command(128 + u8::try_from(signal).unwrap_or(0)));
        }
    };
    tracing::info!(
        vms_stopped = report.vms_stopped,
        vms_kept = report.vms_kept,
        tasks_left = report.tasks_left,
        "ended"
    );
    if global.json {
        let (vms_stopped, vms_kept, tasks_left) =
            (report.vms_stopped, report.vms_kept, report.tasks_left);
        output::json_line(&Word::Ended { vms_stopped, vms_kept, tasks_left });
    }
    failure.map_or(Ok(Exit::Success), Err)
}

/// SIGINT or SIGTERM. A terminal that closes takes its shell along and not a platform.
async fn next_end(signals: &mut Signals) -> i32 {
    loop {
        let signal = signals.next().await;
        let ends = [rustix::process::Signal::INT, rustix::process::Signal::TERM];
        if ends.iter().any(|end| end.as_raw() == signal) {
            return signal;
        }
        // SIGHUP also has the certificate's files read again.
        tracing::info!(signal, "not ended by this signal");
    }
}

/// `is_accepted`: there is TLS, or an operator knows what it means that there is none.
fn check_address(address: SocketAddr, is_accepted: bool) -> Result<(), Failure> {
    if address.ip().is_loopback() || is_accepted {
        return Ok(());
    }
    Err(Failure::usage(format!(
        "{address} can be reached from other machines, and keys would cross the network in clear"
    ))
    .hint(
        "give it a certificate with --tls-cert and --tls-key, let it make one with --tls-auto, or \
         accept it with --insecure-http",
    ))
}

async fn bind(address: SocketAddr) -> Result<TcpListener, Failure> {
    TcpListener::bind(address).await.map_err(|error| {
        Failure::new(
            "address_unavailable",
            Exit::Unavailable,
            format!("listen on {address}: {error}"),
        )
        .hint("choose another with --listen; port 0 takes a free one")
    })
}

/// As a client sees it.
async fn await_health(url: &str, trust: &Trust) -> Result<(), Failure> {
    let client = Client::trusting(url, None, trust)?;
    let deadline = Instant::now() + READY_LIMIT;
    loop {
        match client.health().await {
            Ok(health) if health.status != HealthStatus::Unavailable => return Ok(()),
            answer if Instant::now() > deadline => {
                let found = match answer {
                    Ok(health) => serde_json::to_string(&health.components).unwrap_or_default(),
                    Err(error) => crate::failure::chain(&error),
                };
                return Err(Failure::new(
                    "not_healthy",
                    Exit::Failure,
                    format!("not healthy within {} s: {found}", READY_LIMIT.as_secs()),
                ));
            }
            Ok(_) | Err(_) => tokio::time::sleep(READY_INTERVAL).await,
        }
    }
}

fn announce(global: &Global, platform: &Platform, url: &str) {
    let file = platform.dir().admin_key().display().to_string();
    let key = platform.key();
    if global.json {
        if let Some(key) = key.made() {
            output::json_line(&Word::Key { key, file });
        }
        output::json_line(&Word::Ready {
            url,
            pid: std::process::id(),
            drivers: platform.drivers(),
            network_range: platform.network_range(),
            network_instance: platform.network_instance(),
            host_address: platform.host_address().map(|address| address.to_string()),
        });
        return;
    }
    if let Some(key) = key.made() {
        output::line(&format!("API key, shown this once and kept in {file}:\n\n    {key}\n"));
    }
    for (index, capabilities) in platform.drivers().iter().enumerate() {
        let role = if index == 0 { "driver" } else { "also" };
        output::line(&format!("{role}: {}", compose::describe(capabilities)));
        if index == 0 && compose::is_weak(capabilities) {
            output::line("warning: VMs are NOT isolated from this host; run only what you trust");
        }
    }
    output::line(&format!("Aetherium is ready at {url}"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clear_text_stays_on_this_machine_unless_asked() {
        let address = |text: &str| text.parse::<SocketAddr>().unwrap();
        check_address(address("127.0.0.1:80"), false).unwrap();
        check_address(address("[::1]:80"), false).unwrap();
        check_address(address("0.0.0.0:80"), true).unwrap();
        assert_eq!(check_address(address("0.0.0.0:80"), false).unwrap_err().exit, Exit::Usage);
        assert_eq!(check_address(address("192.0.2.1:80"), false).unwrap_err().exit, Exit::Usage);
    }
}
