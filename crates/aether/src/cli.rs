//! The client side: each command finds the server, calls it, and prints for people or programs.

mod attach;
pub(crate) mod audit;
mod build;
pub(crate) mod cp;
mod cp_down;
mod cp_up;
pub(crate) mod events;
pub(crate) mod exec;
mod fork;
pub(crate) mod image;
pub(crate) mod key;
pub(crate) mod logs;
pub(crate) mod man;
mod outcome;
pub(crate) mod pool;
mod progress;
pub(crate) mod project;
pub(crate) mod queue;
pub(crate) mod shell;
pub(crate) mod snapshot;
mod start;
mod stdin;
pub(crate) mod table;
pub(crate) mod task;
pub(crate) mod template;
mod template_file;
mod terminal;
pub(crate) mod tools;
pub(crate) mod vm;
pub(crate) mod worker;

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Duration,
};

use aether_api::{
    TaskView,
    client::{Client, Trust},
};
use aether_types::{Fault, TaskId, TaskState};
use clap::CommandFactory as _;

use crate::{
    args::{Args, Global},
    datadir::{DataDir, Listen},
    exit::Exit,
    failure::Failure,
};

/// How long one request waits; it is asked again until the task has ended.
const WAIT: Duration = Duration::from_mins(1);

/// The server that the command line, the environment or a data directory names.
pub(crate) fn connect(global: &Global) -> Result<Client, Failure> {
    let local = || -> Result<Option<(DataDir, Listen)>, Failure> {
        for dir in DataDir::candidates(global.data_dir.as_deref()) {
            if let Some(listen) = dir.read_listen()? {
                return Ok(Some((dir, listen)));
            }
        }
        Ok(None)
    };
    let (url, key, trust) = match (&global.url, &global.key) {
        (Some(url), key) => {
            // A local key goes to the local server alone, and it alone is known by its certificate.
            let found = local().ok().flatten();
            let ours = found.filter(|(_, local)| local_url(*local) == url.trim_end_matches('/'));
            let key = match (key, &ours) {
                (Some(key), _) => Some(key.clone()),
                (None, Some((dir, _))) => dir.read_admin_key()?,
                (None, None) => None,
            };
            let trust = match (&global.ca, &ours) {
                (Some(file), _) => authorities(file)?,
                (None, Some((dir, listen))) => dir.trust(*listen)?,
                (None, None) => Trust::System,
            };
            (url.clone(), key, trust)
        }
        (None, key) => {
            let Some((dir, listen)) = local()? else {
                let dir = DataDir::choose(global.data_dir.as_deref());
                return Err(Failure::new(
                    "no_server",
                    Exit::Unavailable,
                    format!("no server is named, and none runs in {}", dir.path().display()),
                )
                .hint("start one with `aether up`, or give --url and --key"));
            };
            let key = match key {
                Some(key) => Some(key.clone()),
                None => dir.read_admin_key()?,
            };
            (local_url(listen), key, dir.trust(listen)?)
        }
    };
    Ok(Client::trusting(&url, key.as_deref(), &trust)?)
}

fn authorities(file: &std::path::Path) -> Result<Trust, Failure> {
    let read = std::fs::read(file).map_err(|e| Failure::file("read", file, &e))?;
    Ok(Trust::Authorities(read))
}

/// How to reach, on this machine, a server that listens there.
pub(crate) fn local_url(listen: Listen) -> String {
    let Listen { address, has_tls } = listen;
    let scheme = if has_tls { "https" } else { "http" };
    let ip = match address.ip() {
        ip if !ip.is_unspecified() => ip,
        IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
    };
    format!("{scheme}://{}", SocketAddr::new(ip, address.port()))
}

/// Waits, without a limit of its own, until the task has ended.
pub(crate) async fn wait_for_task(client: &Client, id: TaskId) -> Result<TaskView, Failure> {
    loop {
        let task = client.task(id, Some(WAIT)).await?;
        if task.status.is_end() {
            return Ok(task);
        }
    }
}

/// As [`wait_for_task`], and shows how far it is.
async fn follow_task(
    client: &Client,
    id: TaskId,
    progress: &mut build::BuildProgress,
) -> Result<TaskView, Failure> {
    let mut generation = 0;
    loop {
        let task = client.task_wait(id, generation, WAIT).await?;
        progress.show_task(&task);
        if task.status.is_end() {
            return Ok(task);
        }
        generation = task.progress.as_ref().map_or(generation, |progress| progress.generation);
    }
}

/// The failure of a task that did not do what was asked.
fn task_failure(task: &TaskView) -> Option<Failure> {
    let fallback = |text: &str| Failure::new("internal", Exit::Failure, text);
    match task.status {
        TaskState::Completed => None,
        TaskState::Cancelled => Some(Failure::new(
            "cancelled",
            Exit::Failure,
            format!("task {} was cancelled", task.id),
        )),
        TaskState::Failed => Some(fault_failure(task.error.as_ref(), "the task failed")),
        TaskState::Pending | TaskState::Running => Some(fallback("the task has not ended")),
    }
}

fn fault_failure(fault: Option<&Fault>, otherwise: &str) -> Failure {
    fault.map_or_else(|| Failure::new("internal", Exit::Failure, otherwise), Failure::fault)
}

pub(crate) fn completion(shell: clap_complete::Shell) {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Args::command(), "aether", &mut script);
    crate::output::line(String::from_utf8_lossy(&script).trim_end());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn global(url: Option<&str>, dir: &std::path::Path) -> Global {
        Global {
            output: crate::args::Form::Table,
            json: false,
            url: url.map(str::to_owned),
            key: None,
            ca: None,
            data_dir: Some(dir.to_owned()),
        }
    }

    #[test]
    fn the_server_of_a_data_directory_is_found() {
        let root = tempfile::tempdir().unwrap();
        let missing = connect(&global(None, root.path())).unwrap_err();
        assert_eq!((missing.exit, missing.code.as_str()), (Exit::Unavailable, "no_server"));

        let dir = DataDir::choose(Some(root.path())).lock().unwrap();
        let listen = Listen { address: "0.0.0.0:81".parse().unwrap(), has_tls: false };
        dir.write_listen(listen).unwrap();
        dir.write_admin_key("ae_x").unwrap();
        assert_eq!(connect(&global(None, root.path())).unwrap().base(), "http://127.0.0.1:81");
    }
}
