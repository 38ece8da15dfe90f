//! `aether migrate`: the tables in PostgreSQL, before programs of this version start.

use aether_postgres::{Config, Extent, Step};
use serde::Serialize;

use crate::{
    args::{Global, Migrate, MigrateCommand},
    database::{SCHEMAS, migration},
    exit::Exit,
    failure::Failure,
    output,
};

#[derive(Serialize)]
struct StepView {
    /// `store` or `queue`.
    part: &'static str,
    version: i64,
    name: String,
    /// It waits for `--contract`.
    contracts: bool,
}

impl From<Step> for StepView {
    fn from(Step { part, version, name, contracts }: Step) -> Self {
        Self { part, version, name, contracts }
    }
}

#[derive(Serialize)]
struct UpView {
    applied: Vec<StepView>,
}

#[derive(Serialize)]
struct StatusView {
    /// Whether a program of this version can start.
    ready: bool,
    applied: Vec<StepView>,
    pending: Vec<StepView>,
    /// Applied by a newer program.
    newer: Vec<StepView>,
}

pub(crate) async fn run(global: &Global, args: Migrate) -> Result<Exit, Failure> {
    let Some(config) = args.database.config()? else {
        return Err(Failure::usage("no PostgreSQL is configured").hint(
            "set DATABASE_URL or POSTGRES_HOST; SQLite is brought up to date by `aether up`",
        ));
    };
    match args.command {
        MigrateCommand::Up { contract } => up(global, &config, contract).await,
        MigrateCommand::Status => status(global, &config).await,
    }
}

async fn up(global: &Global, config: &Config, contract: bool) -> Result<Exit, Failure> {
    let extent = if contract { Extent::Contract } else { Extent::Expand };
    let applied =
        aether_postgres::up(config, SCHEMAS, extent).await.map_err(|error| migration(&error))?;
    let applied: Vec<StepView> = applied.into_iter().map(StepView::from).collect();
    if global.json {
        output::json(&UpView { applied });
    } else if applied.is_empty() {
        output::line("up to date");
    } else {
        show("applied", &applied);
    }
    Ok(Exit::Success)
}

async fn status(global: &Global, config: &Config) -> Result<Exit, Failure> {
    let found =
        aether_postgres::status(config, SCHEMAS).await.map_err(|error| migration(&error))?;
    let all = |steps: Vec<Step>| steps.into_iter().map(StepView::from).collect::<Vec<_>>();
    let (applied, pending, newer) = (all(found.applied), all(found.pending), all(found.newer));
    let ready =
        pending.iter().all(|step| step.contracts) && newer.iter().all(|step| !step.contracts);
    if global.json {
        output::json(&StatusView { ready, applied, pending, newer });
        return Ok(Exit::Success);
    }
    show("applied", &applied);
    show("pending", &pending);
    show("newer", &newer);
    output::line(if ready {
        "programs of this version can start"
    } else {
        "programs of this version cannot start yet; `aether migrate up`"
    });
    Ok(Exit::Success)
}

fn show(word: &str, steps: &[StepView]) {
    for StepView { part, version, name, contracts } in steps {
        let waits = if *contracts { " (waits for --contract)" } else { "" };
        let waits = if word == "pending" { waits } else { "" };
        output::line(&format!("{word:>8}  {part} {version:04} {name}{waits}"));
    }
}
