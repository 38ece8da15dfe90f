//! `aether project`.

use aether_types::project::Quota;
use clap::{Args, Subcommand};

const EXAMPLES: &str = "\
Examples:
  aether project create build
  aether key create ci --project build --role operator
  aether project quota build --vms 20 --vcpus 32 --memory-mb 65536
  aether project list
  aether project delete build

What is of one project does not exist for another; a key is of one project. Projects are for admins of
the project `default`.";

#[derive(Debug, Subcommand)]
#[command(after_help = EXAMPLES)]
pub(crate) enum Project {
    /// Make a project; `aether key create --project` gives the first key to it
    Create {
        /// 1 to 63 of a-z 0-9 - _ . with a letter or a digit first
        name: String,
        #[command(flatten)]
        limits: QuotaLimits,
    },
    /// Show the quota of one's own project and what is used of it, or set a project's
    Quota {
        /// An id or a name; for admins of the platform
        project: Option<String>,
        #[command(flatten)]
        limits: QuotaLimits,
        /// Take all bounds away
        #[arg(long, requires = "project",
            conflicts_with_all = ["vms", "vcpus", "memory_mb", "waiting_tasks"])]
        none: bool,
    },
    /// List projects, newest first
    #[command(visible_alias = "ls")]
    List,
    Get {
        /// An id or a name
        project: String,
    },
    /// Delete a project that has nothing in it any more, and its keys
    #[command(visible_alias = "rm")]
    Delete {
        /// An id or a name
        project: String,
    },
}

/// What a project may have; what is not given is not bounded.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct QuotaLimits {
    /// VMs that are not deleted
    #[arg(long, value_name = "N")]
    pub(crate) vms: Option<u32>,
    /// Of VMs that are not stopped
    #[arg(long, value_name = "N")]
    pub(crate) vcpus: Option<u32>,
    /// Of VMs that are not stopped
    #[arg(long, value_name = "MB")]
    pub(crate) memory_mb: Option<u32>,
    /// Tasks that no worker has taken yet
    #[arg(long, value_name = "N")]
    pub(crate) waiting_tasks: Option<u32>,
}

impl From<QuotaLimits> for Quota {
    fn from(limits: QuotaLimits) -> Self {
        let QuotaLimits { vms, vcpus, memory_mb, waiting_tasks } = limits;
        Self { vms, vcpus, memory_mb, waiting_tasks }
    }
}
