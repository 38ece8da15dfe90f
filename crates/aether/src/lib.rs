//! The one program: `aether up` is the whole platform on one machine, and everything else is its
//! command line.
//!
//! ```text
//!   args ──► up ─────► compose: store, queue, bus, images, drivers, worker, gateway
//!     │      doctor ───────┘ (the same, in a temporary folder)
//!     └────► cli: find the server, call it, print
//! ```
//!
//! This is the composition root: only here are concrete back ends named, and only here are the
//! environment and the command line read. What this crate does not do: it decides nothing about
//! VMs or tasks; it wires up those who do.

mod args;
mod authority;
mod cli;
mod compose;
mod config;
mod database;
mod datadir;
mod default_template;
mod doctor;
mod exit;
mod failure;
mod gateway;
mod host;
mod images;
mod leftovers;
mod links;
mod logging;
mod logs;
mod metrics;
mod migrate;
mod notify;
mod older;
mod output;
mod rate_limiter;
mod signals;
mod tls;
mod tools;
mod up;

use std::process::ExitCode;

use crate::{
    args::{Args, Command},
    exit::Exit,
    failure::Failure,
};

/// Parses the command line, runs what it says, and answers with the exit status.
#[must_use]
pub fn main() -> ExitCode {
    let args = match config::parse() {
        Ok(mut args) => {
            args.global.settle();
            output::choose(args.global.output);
            args
        }
        Err(failure) => {
            output::failure(&failure, false);
            return failure.exit.into();
        }
    };
    let json = args.global.json;
    let outcome = runtime(&args.command).and_then(|runtime| {
        let outcome = runtime.block_on(Box::pin(run(args)));
        // A thread may sit in a read of standard input that never ends.
        runtime.shutdown_background();
        outcome
    });
    match outcome {
        Ok(exit) => exit.into(),
        Err(failure) => {
            output::failure(&failure, json);
            failure.exit.into()
        }
    }
}

/// Clients need one thread; the platform takes what the machine has.
fn runtime(command: &Command) -> Result<tokio::runtime::Runtime, Failure> {
    let mut builder = match command {
        Command::Up(_) | Command::Doctor(_) => tokio::runtime::Builder::new_multi_thread(),
        Command::Vm(_)
        | Command::Snapshot(_)
        | Command::Template(_)
        | Command::Pool(_)
        | Command::Tools(_)
        | Command::Exec(_)
        | Command::Shell(_)
        | Command::Cp(_)
        | Command::Logs(_)
        | Command::Events(_)
        | Command::Task(_)
        | Command::Worker(_)
        | Command::Queue(_)
        | Command::Key(_)
        | Command::Project(_)
        | Command::Audit(_)
        | Command::Man { .. }
        | Command::Image(_)
        | Command::Migrate(_)
        | Command::Config(_)
        | Command::Completion { .. } => tokio::runtime::Builder::new_current_thread(),
    };
    builder.enable_all().build().map_err(|e| Failure::io("start the runtime", &e))
}

async fn run(args: Args) -> Result<Exit, Failure> {
    let Args { global, command } = args;
    match command {
        Command::Up(up) => up::run(&global, up).await,
        Command::Migrate(migrate) => migrate::run(&global, migrate).await,
        Command::Config(args) => config::run(&global, &args),
        Command::Doctor(doctor) => doctor::run(&global, doctor).await,
        Command::Vm(vm) => cli::vm::run(&global, vm).await,
        Command::Snapshot(snapshot) => cli::snapshot::run(&global, snapshot).await,
        Command::Template(template) => cli::template::run(&global, template).await,
        Command::Pool(pool) => cli::pool::run(&global, pool).await,
        Command::Tools(tools) => cli::tools::run(&global, tools).await,
        Command::Exec(exec) => cli::exec::run(&global, exec).await,
        Command::Shell(shell) => cli::shell::run(&global, shell).await,
        Command::Cp(cp) => cli::cp::run(&global, cp).await,
        Command::Logs(logs) => cli::logs::run(&global, logs).await,
        Command::Events(events) => cli::events::run(&global, events).await,
        Command::Task(task) => cli::task::run(&global, task).await,
        Command::Queue(queue) => cli::queue::run(&global, queue).await,
        Command::Worker(worker) => cli::worker::run(&global, worker).await,
        Command::Key(key) => cli::key::run(&global, key).await,
        Command::Project(project) => cli::project::run(&global, project).await,
        Command::Audit(audit) => cli::audit::run(&global, audit).await,
        Command::Man { folder } => cli::man::run(&folder),
        Command::Image(image) => cli::image::run(&global, image),
        Command::Completion { shell } => {
            cli::completion(shell);
            Ok(Exit::Success)
        }
    }
}
