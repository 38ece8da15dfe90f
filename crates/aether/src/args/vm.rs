//! `aether vm`.

use std::time::Duration;

use aether_types::{AllowRule, DriverKind, ToolRequest};
use clap::{ArgAction, Subcommand};

use super::values::{long, parse_duration, parse_env, parse_pair};

#[derive(Debug, Subcommand)]
pub(crate) enum Vm {
    /// Make a VM and wait until it runs
    Create(VmCreate),
    /// List VMs, newest first
    #[command(visible_alias = "ls")]
    List(VmList),
    /// Show VMs with their history, and where the time of their start went
    #[command(visible_alias = "show")]
    Get(VmNames),
    /// Make clones of a running VM, with its memory, disk and processes; it goes on
    Fork(VmFork),
    /// Shut VMs down; their disks stay
    Stop(VmStop),
    /// Start stopped VMs: where they were, if their memory was kept, else from their kernel
    Start(VmAct),
    /// Make VMs stand still; their memory stays in use
    Pause(VmAct),
    /// Let paused VMs go on
    Resume(VmAct),
    /// Remove VMs, running or not; what ran in them stays on record
    #[command(visible_alias = "rm")]
    Delete(VmAct),
}

const CREATE_EXAMPLES: &str = "\
Examples:
  aether vm create --name web
  aether vm create --template python:3.12 --env TOKEN
  aether vm create --snapshot before-upgrade
  aether vm create --tool go@1.23.1 --tool rust
  aether vm create --vcpus 2 --memory 1024 --timeout 1h --no-network

What is not said is the default template's, which starts fastest; another image, size or driver is
booted.";

const CREATE_LIMITS: &str = "\
Limits:
  name      1 to 63 of a-z 0-9 -, no hyphen at either end, unique among VMs
  vcpus     1 to 32, and the host's
  memory    96 to 1048576 MB, and the host's
  disk      64 to 1048576 MB
  env       1024 variables, 128 KiB in all
  label     64
  timeout   1 s to 366 days
  allow     64 rules
  tool      32, the defaults included; `aether tools list` has them";

#[derive(Debug, clap::Args)]
#[command(after_help = CREATE_EXAMPLES, after_long_help = long(CREATE_EXAMPLES, CREATE_LIMITS))]
pub(crate) struct VmCreate {
    /// Lower-case letters, digits and hyphens; made up where it is not given
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Begin as this template: NAME, NAME:TAG or an id
    #[arg(long, value_name = "TEMPLATE", conflicts_with_all = ["snapshot", "image"])]
    pub(crate) template: Option<String>,
    /// Begin as this snapshot, a name or an id; it decides the size too
    #[arg(long, value_name = "SNAPSHOT", conflicts_with = "image")]
    pub(crate) snapshot: Option<String>,
    /// Processors
    #[arg(long, value_name = "N")]
    pub(crate) vcpus: Option<u32>,
    #[arg(long, value_name = "MB")]
    pub(crate) memory: Option<u32>,
    /// Size of the writable layer; takes room only as it fills
    #[arg(long, value_name = "MB")]
    pub(crate) disk: Option<u32>,
    #[arg(long, value_name = "NAME")]
    pub(crate) image: Option<String>,
    #[arg(long)]
    pub(crate) driver: Option<DriverKind>,
    /// Given to every command in the VM; K alone takes the value from the environment
    #[arg(long, value_name = "K=V", action = ArgAction::Append, value_parser = parse_env)]
    pub(crate) env: Vec<(String, String)>,
    #[arg(long, value_name = "K=V", action = ArgAction::Append, value_parser = parse_pair)]
    pub(crate) label: Vec<(String, String)>,
    /// Delete the VM after this long, such as 90s, 30m, 1h, 2d
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub(crate) timeout: Option<Duration>,
    /// Let the VM reach this too, such as 10.0.0.5:443 or 192.168.0.0/16
    #[arg(long, value_name = "RULE", action = ArgAction::Append)]
    pub(crate) allow: Vec<AllowRule>,
    /// Close the network, but for what --allow names
    #[arg(long)]
    pub(crate) no_network: bool,
    /// A tool besides the defaults, or another version of one: NAME, NAME@VERSION; may be given
    /// several times
    #[arg(long = "tool", value_name = "TOOL", action = ArgAction::Append)]
    pub(crate) tools: Vec<ToolRequest>,
    /// Only the tools that --tool names
    #[arg(long, conflicts_with_all = ["template", "snapshot"])]
    pub(crate) no_default_tools: bool,
    /// Only on workers of this zone
    #[arg(long, value_name = "ZONE")]
    pub(crate) zone: Option<String>,
    /// Only on workers with this label; may be given several times, all must fit
    #[arg(long, value_name = "K=V", action = ArgAction::Append, value_parser = parse_pair)]
    pub(crate) worker_label: Vec<(String, String)>,
    /// Return as soon as the request is recorded
    #[arg(long)]
    pub(crate) no_wait: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct VmList {
    /// Only VMs in this state; may be given several times
    #[arg(long, value_name = "STATE", action = ArgAction::Append)]
    pub(crate) state: Vec<aether_types::VmState>,
    /// Only VMs with this label; may be given several times, all must fit
    #[arg(long, value_name = "K=V", action = ArgAction::Append, value_parser = parse_pair)]
    pub(crate) label: Vec<(String, String)>,
    /// Deleted VMs too
    #[arg(long, short)]
    pub(crate) all: bool,
    /// At most this many
    #[arg(long, value_name = "N")]
    pub(crate) limit: Option<usize>,
    /// Also each step of their starts, and what they began as
    #[arg(long, short)]
    pub(crate) verbose: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct VmNames {
    /// Ids or names
    #[arg(required = true, value_name = "VM")]
    pub(crate) vms: Vec<String>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct VmAct {
    /// Ids or names
    #[arg(required = true, value_name = "VM")]
    pub(crate) vms: Vec<String>,
    /// Return as soon as the request is recorded
    #[arg(long)]
    pub(crate) no_wait: bool,
}

const FORK_EXAMPLES: &str = "\
Examples:
  aether vm fork web
  aether vm fork web --count 8 --name-prefix try --timeout 10m
  aether vm fork web --env SEED=7 --no-network";

const FORK_LIMITS: &str = "\
Limits:
  count        1 to 64
  name-prefix  with its number, a name of a VM: 1 to 63 of a-z 0-9 -";

#[derive(Debug, clap::Args)]
#[command(after_help = FORK_EXAMPLES, after_long_help = long(FORK_EXAMPLES, FORK_LIMITS))]
pub(crate) struct VmFork {
    /// An id or a name; running or paused
    #[arg(value_name = "VM")]
    pub(crate) vm: String,
    /// Clones
    #[arg(long, short, value_name = "N", default_value_t = 1)]
    pub(crate) count: u32,
    /// Call the clones PREFIX-1, PREFIX-2, ...; made up where it is not given
    #[arg(long, value_name = "PREFIX")]
    pub(crate) name_prefix: Option<String>,
    /// Instead of the VM's own environment; K alone takes the value from here
    #[arg(long, value_name = "K=V", action = ArgAction::Append, value_parser = parse_env)]
    pub(crate) env: Vec<(String, String)>,
    /// Instead of the VM's own labels
    #[arg(long, value_name = "K=V", action = ArgAction::Append, value_parser = parse_pair)]
    pub(crate) label: Vec<(String, String)>,
    /// Delete the clones after this long, such as 90s, 30m, 1h, 2d
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub(crate) timeout: Option<Duration>,
    /// Instead of the VM's own network: let the clones reach this too
    #[arg(long, value_name = "RULE", action = ArgAction::Append)]
    pub(crate) allow: Vec<AllowRule>,
    /// Close the clones' network, but for what --allow names
    #[arg(long)]
    pub(crate) no_network: bool,
    /// Return as soon as the request is recorded
    #[arg(long)]
    pub(crate) no_wait: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct VmStop {
    #[command(flatten)]
    pub(crate) act: VmAct,
    /// Keep the memory on disk: a start goes on where the VM was
    #[arg(long)]
    pub(crate) keep_memory: bool,
}
