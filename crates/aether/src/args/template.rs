//! `aether snapshot`, `aether template` and `aether pool`.

use std::path::PathBuf;

use aether_types::{DriverKind, SnapshotState, TemplateState, ToolRequest};
use clap::{ArgAction, Subcommand};

use super::values::{long, parse_env};

const SNAPSHOT_EXAMPLES: &str = "\
Examples:
  aether snapshot create web --name before-upgrade
  aether vm create --snapshot before-upgrade
  aether snapshot list --vm web
  aether snapshot delete before-upgrade";

#[derive(Debug, Subcommand)]
#[command(after_help = SNAPSHOT_EXAMPLES)]
pub(crate) enum Snapshot {
    /// Keep memory and disk of a running or paused VM, which goes on
    Create(SnapshotCreate),
    /// List snapshots, newest first
    #[command(visible_alias = "ls")]
    List(SnapshotList),
    #[command(visible_alias = "show")]
    Inspect {
        /// Ids or names
        #[arg(required = true, value_name = "SNAPSHOT")]
        snapshots: Vec<String>,
    },
    /// Remove snapshots; VMs that began as them are not touched
    #[command(visible_alias = "rm")]
    Delete {
        /// Ids or names
        #[arg(required = true, value_name = "SNAPSHOT")]
        snapshots: Vec<String>,
    },
}

#[derive(Debug, clap::Args)]
pub(crate) struct SnapshotCreate {
    /// An id or a name
    #[arg(value_name = "VM")]
    pub(crate) vm: String,
    /// 1 to 63 of a-z 0-9 - _ . with a letter or a digit first
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Return as soon as the request is recorded
    #[arg(long)]
    pub(crate) no_wait: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct SnapshotList {
    /// Only snapshots of this VM
    #[arg(long)]
    pub(crate) vm: Option<String>,
    /// Only snapshots in this state; may be given several times
    #[arg(long, value_name = "STATE", action = ArgAction::Append)]
    pub(crate) state: Vec<SnapshotState>,
    /// At most this many
    #[arg(long, value_name = "N")]
    pub(crate) limit: Option<usize>,
}

#[derive(Debug, Subcommand)]
#[expect(clippy::large_enum_variant, reason = "one exists in a program")]
pub(crate) enum Template {
    /// Build a template, and follow it until it is ready
    Build(TemplateBuild),
    /// List templates, newest first
    #[command(visible_alias = "ls")]
    List(TemplateList),
    #[command(visible_alias = "show")]
    Inspect {
        /// NAME, NAME:TAG or ids
        #[arg(required = true, value_name = "TEMPLATE")]
        templates: Vec<String>,
    },
    /// Remove templates; VMs that began as them are not touched
    #[command(visible_alias = "rm")]
    Delete {
        /// NAME, NAME:TAG or ids
        #[arg(required = true, value_name = "TEMPLATE")]
        templates: Vec<String>,
    },
}

const BUILD_EXAMPLES: &str = "\
Examples:
  aether template build -f web.toml
  aether template build -f web.toml --tag v2
  aether template build --name jq --run 'apt-get update' --run 'apt-get install -y jq'
  aether template build --name web --copy site.py:/srv/site.py --start 'python3 /srv/site.py' \\
      --ready 'curl -fs localhost:8000'

The form of a template file is in docs/templates.md.";

const BUILD_LIMITS: &str = "\
Limits:
  name, tag  1 to 63 of a-z 0-9 - _ . with a letter or a digit first
  run        100 steps of 128 KiB; each 600 s, in a file up to 3600 s
  copy       100 files of UTF-8 text, 1 MiB in all
  ready      60 s, in a file up to 3600 s
  tool       32, the defaults included
  the whole  2 hours";

#[derive(Debug, clap::Args)]
#[command(after_help = BUILD_EXAMPLES, after_long_help = long(BUILD_EXAMPLES, BUILD_LIMITS))]
pub(crate) struct TemplateBuild {
    /// A template file, TOML or JSON; what it says may not be said by options too, but for --name,
    /// --tag and --env
    #[arg(long, short, value_name = "FILE", conflicts_with_all = [
        "image", "driver", "vcpus", "memory", "disk", "run", "copy", "start", "ready",
        "tools", "no_default_tools",
    ])]
    pub(crate) file: Option<PathBuf>,
    #[arg(long, required_unless_present = "file")]
    pub(crate) name: Option<String>,
    /// [default: latest]
    #[arg(long)]
    pub(crate) tag: Option<String>,
    #[arg(long, value_name = "NAME")]
    pub(crate) image: Option<String>,
    #[arg(long)]
    pub(crate) driver: Option<DriverKind>,
    /// Processors
    #[arg(long, value_name = "N")]
    pub(crate) vcpus: Option<u32>,
    #[arg(long, value_name = "MB")]
    pub(crate) memory: Option<u32>,
    /// Size of the writable layer; takes room only as it fills
    #[arg(long, value_name = "MB")]
    pub(crate) disk: Option<u32>,
    /// Run this in a shell, as root; may be given several times, in this order
    #[arg(long, value_name = "COMMAND", action = ArgAction::Append)]
    pub(crate) run: Vec<String>,
    /// Write a file of this machine into the template, before the first step
    #[arg(long, value_name = "HERE:GUEST", action = ArgAction::Append)]
    pub(crate) copy: Vec<String>,
    /// Of the build, and of commands in VMs of the template; K alone takes the value from here
    #[arg(long, value_name = "K=V", action = ArgAction::Append, value_parser = parse_env)]
    pub(crate) env: Vec<(String, String)>,
    /// Run this last and leave it running: it is up in every VM of the template
    #[arg(long, value_name = "COMMAND")]
    pub(crate) start: Option<String>,
    /// The template is ready when this succeeds
    #[arg(long, value_name = "COMMAND")]
    pub(crate) ready: Option<String>,
    /// A tool besides the defaults, or another version of one: NAME, NAME@VERSION; may be given
    /// several times
    #[arg(long = "tool", value_name = "TOOL", action = ArgAction::Append)]
    pub(crate) tools: Vec<ToolRequest>,
    /// Only the tools that --tool names
    #[arg(long)]
    pub(crate) no_default_tools: bool,
    /// Show nothing of the build but how it ended
    #[arg(long, short)]
    pub(crate) quiet: bool,
    /// Return as soon as the request is recorded
    #[arg(long)]
    pub(crate) no_wait: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct TemplateList {
    /// Only templates of this name
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Only templates in this state; may be given several times
    #[arg(long, value_name = "STATE", action = ArgAction::Append)]
    pub(crate) state: Vec<TemplateState>,
    /// At most this many
    #[arg(long, value_name = "N")]
    pub(crate) limit: Option<usize>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Pool {
    #[command(visible_alias = "ls")]
    List,
}
