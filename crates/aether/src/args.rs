//! The command line, and the environment: everything that is configured from outside.

mod audit;
mod config;
mod database;
mod edge;
mod events;
mod jwt;
mod key;
mod logs;
mod project;
mod redis;
mod template;
mod tls;
mod tools;
mod up;
mod values;
mod vm;
mod worker;

use std::{path::PathBuf, time::Duration};

use aether_drivers::network::Ipv4Range;
use aether_types::{DriverKind, TaskId, limits};
use clap::{ArgAction, Parser, Subcommand, ValueEnum};

pub(crate) use audit::AuditArgs;
pub(crate) use config::{ConfigArgs, ConfigCommand, ConfigOption};
pub(crate) use database::{DatabaseOptions, Migrate, MigrateCommand, refused};
pub(crate) use edge::Edge;
pub(crate) use events::Events;
pub(crate) use jwt::JwtOptions;
pub(crate) use key::{Key, KeyCreate, KeyList};
pub(crate) use logs::{LogPlan, Logging, Logs, Since};
pub(crate) use project::Project;
pub(crate) use redis::{RedisOptions, refused_redis};
pub(crate) use template::{
    Pool, Snapshot, SnapshotCreate, SnapshotList, Template, TemplateBuild, TemplateList,
};
pub(crate) use tls::TlsOptions;
pub(crate) use tools::{ToolOptions, ToolVersions, Tools, ToolsBuild, ToolsPrune};
pub(crate) use up::{Capacity, PoolChoice, PoolSpec, Snapshots, Up};
use values::{parse_duration, parse_env};
pub(crate) use vm::{Vm, VmAct, VmCreate, VmFork, VmList, VmNames, VmStop};
pub(crate) use worker::{FleetOptions, StreamOptions, Worker, WorkerList};

const EXIT_STATUSES: &str = "\
Exit status:
  0    done
  1    failed
  2    wrong use: the command line, or a value that the server refuses
  3    not found
  4    conflict: a name that is taken, a state that does not allow it
  5    the key is missing or wrong, or may not do this
  6    unavailable: the server does not answer, or lacks what was asked for
  exec and shell end as the command did (128 and the signal's number where one ended it; 126 and
  127 where it could not be run or was not found), and with
  124  the time limit ended it
  125  the platform could not run it to its end

The server is found by --url and --key, else AETHER_URL and AETHER_KEY, else in the data
directory of an `aether up` on this machine (--data-dir, AETHER_DATA_DIR).";

/// Runs commands in microVMs of your own.
#[derive(Debug, Parser)]
#[command(name = "aether", version, propagate_version = true, after_help = EXIT_STATUSES)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Global {
    /// How results are printed; the shapes for programs are the API's
    #[arg(long, short, global = true, value_name = "FORM", default_value = "table", value_enum)]
    pub(crate) output: Form,
    /// The same as `--output json`
    #[arg(long, global = true, conflicts_with = "output")]
    pub(crate) json: bool,
    /// URL of the server
    #[arg(long, global = true, env = "AETHER_URL", value_name = "URL")]
    pub(crate) url: Option<String>,
    /// API key
    #[arg(long, global = true, env = "AETHER_KEY", value_name = "KEY", hide_env_values = true)]
    pub(crate) key: Option<String>,
    /// Trust the authorities in this file (PEM) that the server at --url is who it is, and no others
    #[arg(long, global = true, env = "AETHER_CA", value_name = "FILE")]
    pub(crate) ca: Option<PathBuf>,
    /// Where the platform keeps everything [default: /var/lib/aetherium as root]
    #[arg(long, global = true, env = "AETHER_DATA_DIR", value_name = "DIR")]
    pub(crate) data_dir: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Form {
    /// For people
    Table,
    /// For programs
    Json,
    /// For programs and people; of a stream, one document after another
    Yaml,
}

impl Global {
    /// `json` says from here on that a program reads, in whichever form.
    pub(crate) fn settle(&mut self) {
        self.json |= self.output != Form::Table;
    }
}

#[derive(Debug, Subcommand)]
#[expect(clippy::large_enum_variant, reason = "one exists in a program")]
pub(crate) enum Command {
    /// Run the whole platform on this machine
    Up(Up),
    /// Make, see and end VMs
    #[command(subcommand)]
    Vm(Vm),
    /// Keep, see and remove snapshots of VMs
    #[command(subcommand)]
    Snapshot(Snapshot),
    /// Build, see and remove templates: what VMs begin as
    #[command(subcommand)]
    Template(Template),
    /// See the machines that wait to become VMs
    #[command(subcommand)]
    Pool(Pool),
    /// See, build and remove the tools that VMs can have
    #[command(subcommand, visible_alias = "tool")]
    Tools(Tools),
    /// Run a command in a VM
    Exec(Exec),
    /// Open a terminal in a VM
    Shell(Shell),
    /// Copy files to or from a VM
    Cp(Cp),
    /// See and follow what VMs and the platform say
    Logs(Logs),
    /// What has happened to VMs, tasks and the rest
    Events(Events),
    /// See and cancel tasks
    #[command(subcommand)]
    Task(Task),
    /// See workers, and take them out of use and into it
    #[command(subcommand)]
    Worker(Worker),
    /// See the queues, and tasks that used up their attempts
    #[command(subcommand)]
    Queue(Queue),
    /// Give, see and take API keys
    #[command(subcommand)]
    Key(Key),
    /// See who did what
    Audit(AuditArgs),
    /// Make, see and delete projects
    #[command(subcommand)]
    Project(Project),
    /// Build and see the images on this machine
    Image(ImageArgs),
    /// Bring the tables in PostgreSQL up to date, and see what is pending
    Migrate(Migrate),
    /// Check and show the configuration
    Config(ConfigArgs),
    /// Check this host by running a VM on it
    Doctor(Doctor),
    /// Print a script that completes commands in a shell
    Completion { shell: clap_complete::Shell },
    /// Write the manual pages
    Man {
        /// Such as /usr/local/share/man/man1
        folder: PathBuf,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum DriverChoice {
    /// Firecracker where it really works, else QEMU
    Auto,
    Qemu,
    Firecracker,
    /// Containers of a Docker engine: weaker isolation, never chosen by itself
    Docker,
    /// No machines at all: for tests
    Sim,
}

impl From<DriverKind> for DriverChoice {
    fn from(kind: DriverKind) -> Self {
        match kind {
            DriverKind::Firecracker => Self::Firecracker,
            DriverKind::Qemu => Self::Qemu,
            DriverKind::Docker => Self::Docker,
            DriverKind::Sim => Self::Sim,
        }
    }
}

/// What runs the VMs; shared by `up` and `doctor`.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Backend {
    /// What runs the VMs
    #[arg(long, env = "AETHER_DRIVER", value_enum, default_value = "auto")]
    pub(crate) driver: DriverChoice,
    /// The image of VMs that ask for none
    #[arg(long, env = "AETHER_IMAGE", value_name = "NAME", default_value = aether_images::DEFAULT_IMAGE)]
    pub(crate) image: String,
    #[command(flatten)]
    pub(crate) images: ImageDir,
    /// Addresses of the VMs, such as 10.213.0.0/16; must not overlap with anything on this host
    /// [default: 10.213.0.0/16 or the next free one]
    #[arg(long, env = "AETHER_NETWORK_RANGE", value_name = "CIDR")]
    pub(crate) network_range: Option<Ipv4Range>,
    /// The firecracker program [default: found on the PATH]
    #[arg(long, env = "AETHER_FIRECRACKER", value_name = "FILE")]
    pub(crate) firecracker: Option<PathBuf>,
    /// Firecracker's jailer; without one, Firecracker runs without
    #[arg(long, env = "AETHER_JAILER", value_name = "FILE")]
    pub(crate) jailer: Option<PathBuf>,
    /// Use a Firecracker that something is known against; for tests only
    #[arg(long, env = "AETHER_ALLOW_VULNERABLE_FIRECRACKER", hide = true)]
    pub(crate) allow_vulnerable_firecracker: bool,
    /// The Docker engine's Unix socket, for the driver of that name
    #[arg(long, env = "AETHER_DOCKER_SOCKET", value_name = "FILE",
        default_value = aether_drivers::docker::SOCKET_DEFAULT)]
    pub(crate) docker_socket: PathBuf,
}

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ImageDir {
    /// Where images are [default: $AETHER_CACHE/images, else ~/.cache/aetherium/images]
    #[arg(long, global = true, env = "AETHER_IMAGE_DIR", value_name = "DIR")]
    pub(crate) image_dir: Option<PathBuf>,
    #[arg(long, global = true, env = "AETHER_CACHE", value_name = "DIR", hide = true)]
    pub(crate) cache: Option<PathBuf>,
}

impl ImageDir {
    pub(crate) fn path(&self) -> PathBuf {
        if let Some(dir) = &self.image_dir {
            return dir.clone();
        }
        let cache = self.cache.clone().unwrap_or_else(|| {
            std::env::home_dir()
                .filter(|home| !home.as_os_str().is_empty() && home.as_os_str() != "/")
                .map_or_else(|| "/var/cache/aetherium".into(), |home| home.join(".cache/aetherium"))
        });
        cache.join("images")
    }
}

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Doctor {
    #[command(flatten)]
    pub(crate) config: ConfigOption,
    #[command(flatten)]
    pub(crate) backend: Backend,
    #[command(flatten)]
    pub(crate) database: DatabaseOptions,
    #[command(flatten)]
    pub(crate) redis: RedisOptions,
    /// Check the server that --url names, or that runs here, instead of a temporary one
    #[arg(long)]
    pub(crate) server: bool,
    #[arg(long, env = "AETHER_LOG", value_name = "FILTER", default_value = "error")]
    pub(crate) log_level: String,
}

/// What a command in a VM is given; shared by `exec` and `shell`.
#[derive(Debug, clap::Args)]
pub(crate) struct CommandOptions {
    /// K alone takes the value from the environment
    #[arg(long, short, value_name = "K=V", action = ArgAction::Append, value_parser = parse_env)]
    pub(crate) env: Vec<(String, String)>,
    /// Directory to run in [default: the user's home]
    #[arg(long, value_name = "DIR")]
    pub(crate) cwd: Option<String>,
    /// A name, or UID or UID:GID [default: root]
    #[arg(long, short)]
    pub(crate) user: Option<String>,
    /// End the command after this long, such as 90s, 30m, 1h
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub(crate) timeout: Option<Duration>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Exec {
    #[command(flatten)]
    pub(crate) options: CommandOptions,
    /// Give the command an empty standard input
    #[arg(long, short = 'n')]
    pub(crate) no_stdin: bool,
    /// An id or a name
    pub(crate) vm: String,
    /// A program and its arguments; no shell reads them
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "COMMAND"
    )]
    pub(crate) command: Vec<String>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Shell {
    #[command(flatten)]
    pub(crate) options: CommandOptions,
    /// An id or a name
    pub(crate) vm: String,
    /// Run this on the terminal instead of a login shell
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    pub(crate) command: Vec<String>,
}

/// SRC and DST: one is `VM:PATH`, the other a local path; `-` is standard input or output.
#[derive(Debug, clap::Args)]
pub(crate) struct Cp {
    /// Copy folders with everything in them
    #[arg(long, short)]
    pub(crate) recursive: bool,
    /// Whose rights and files in the VM [default: root]
    #[arg(long, short)]
    pub(crate) user: Option<String>,
    #[arg(value_name = "SRC")]
    pub(crate) source: String,
    #[arg(value_name = "DST")]
    pub(crate) target: String,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Task {
    /// List tasks, newest first
    #[command(visible_alias = "ls")]
    List(TaskList),
    Get {
        task: TaskId,
    },
    /// Ask that a task end; a command is ended with all that it started
    Cancel {
        task: TaskId,
        /// Return at once
        #[arg(long)]
        no_wait: bool,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Queue {
    /// List the queues: the shared one, and each worker's own
    #[command(visible_alias = "ls")]
    List,
    /// List tasks that used up their attempts
    Dead {
        /// `shared`, or the id of a worker
        queue: String,
    },
    /// Ask again for what a task was to do that used up its attempts
    Retry {
        /// `shared`, or the id of a worker
        queue: String,
        task: TaskId,
    },
}

#[derive(Debug, clap::Args)]
pub(crate) struct TaskList {
    /// Only tasks of this VM
    #[arg(long)]
    pub(crate) vm: Option<String>,
    /// Only tasks in this state; may be given several times
    #[arg(long, value_name = "STATE", action = ArgAction::Append)]
    pub(crate) state: Vec<aether_types::TaskState>,
    /// Such as vm:execute
    #[arg(long)]
    pub(crate) kind: Option<aether_types::TaskKind>,
    /// At most this many
    #[arg(long, value_name = "N", default_value_t = limits::PAGE_LIMIT_DEFAULT as usize)]
    pub(crate) limit: usize,
}

#[derive(Debug, clap::Args)]
pub(crate) struct ImageArgs {
    #[command(flatten)]
    pub(crate) images: ImageDir,
    #[command(subcommand)]
    pub(crate) command: Image,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Image {
    #[command(visible_alias = "ls")]
    List,
    /// Show what an image is made of, and check its files
    Inspect { name: String },
    /// Build the images, or find that they are there; needs root
    Build(ImageBuild),
}

#[derive(Debug, clap::Args)]
pub(crate) struct ImageBuild {
    /// The guest's agent [default: aether-agent beside this program]
    #[arg(long, value_name = "FILE", env = "AETHER_AGENT")]
    pub(crate) agent: Option<PathBuf>,
    /// Also make the image for tests with an emulated Firecracker, with this kernel
    #[arg(long, value_name = "FILE")]
    pub(crate) test_kernel: Option<PathBuf>,
    /// Debian's suite
    #[arg(long, default_value = "bookworm")]
    pub(crate) suite: String,
    /// A package besides the usual; may be given several times
    #[arg(long = "package", value_name = "NAME", action = ArgAction::Append)]
    pub(crate) packages: Vec<String>,
    /// Fetch packages again, for their updates
    #[arg(long)]
    pub(crate) refresh: bool,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn a_command_keeps_its_own_options() {
        for line in [
            &["aether", "exec", "-n", "web", "--", "ls", "-l", "--json"][..],
            &["aether", "exec", "-n", "web", "ls", "-l", "--json"][..],
        ] {
            let args = Args::try_parse_from(line).unwrap();
            assert!(!args.global.json);
            let Command::Exec(exec) = args.command else { panic!("not exec") };
            assert_eq!((exec.vm.as_str(), exec.no_stdin), ("web", true));
            assert_eq!(exec.command, ["ls", "-l", "--json"]);
        }
    }
}
