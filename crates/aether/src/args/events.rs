//! `aether events`.

use aether_types::{EventPattern, TaskId};

use super::logs::{Since, parse_since};

const EXAMPLES: &str = "\
Topics are vm.created, task.completed and so on: the noun, and the state that it has come to.
A pattern is a topic, all of a noun such as 'vm.*', or '*'.

Examples:
  aether events -f
  aether events -f 'vm.*' task.failed
  aether events --since 1h --vm web
  aether events -f --all 'worker.*' --json";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Events {
    /// Only events of these topics
    #[arg(value_name = "PATTERN")]
    pub(crate) topics: Vec<EventPattern>,
    /// Go on with events as they come
    #[arg(long, short)]
    pub(crate) follow: bool,
    /// Not before: so long ago, such as 90s, 10m, 1d, or a time such as 2026-01-31T09:30:00Z
    /// [default: 1h; with --follow, from now on]
    #[arg(long, value_name = "TIME", value_parser = parse_since, conflicts_with = "after")]
    pub(crate) since: Option<Since>,
    /// Only what came after the event of this number
    #[arg(long, value_name = "SEQUENCE")]
    pub(crate) after: Option<u64>,
    /// Only what happened to this VM: an id or a name
    #[arg(long)]
    pub(crate) vm: Option<String>,
    /// Only what happened to this task
    #[arg(long)]
    pub(crate) task: Option<TaskId>,
    /// Events of every project and of the platform, such as those of workers
    #[arg(long)]
    pub(crate) all: bool,
}
