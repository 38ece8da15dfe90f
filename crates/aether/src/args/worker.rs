//! `aether worker`, and what a worker says of itself.

use std::{net::SocketAddr, time::Duration};

use aether_types::WorkerState;
use clap::{ArgAction, Subcommand};

use super::values::{parse_duration, parse_pair};

#[derive(Debug, Subcommand)]
pub(crate) enum Worker {
    /// List the workers, with what they have promised
    #[command(visible_alias = "ls")]
    List(WorkerList),
    /// Show workers
    #[command(visible_alias = "show")]
    Get(WorkerNames),
    /// Give workers no new VMs; they go on serving those that they have
    Drain(WorkerNames),
    /// Give workers new VMs again
    Activate(WorkerNames),
    /// List the VMs of a worker, newest first
    Vms {
        /// An id, or the name of a host
        worker: String,
    },
}

#[derive(Debug, clap::Args)]
pub(crate) struct WorkerList {
    /// Only workers in this state; may be given several times
    #[arg(long, value_name = "STATE", action = ArgAction::Append)]
    pub(crate) state: Vec<WorkerState>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct WorkerNames {
    /// Ids, or names of hosts
    #[arg(required = true, value_name = "WORKER")]
    pub(crate) workers: Vec<String>,
}

/// The worker of this process, as the others see it.
#[expect(clippy::struct_field_names, reason = "they are the names of the options of `up`")]
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Fleet")]
pub(crate) struct FleetOptions {
    /// What the worker is called [default: this host's name]
    #[arg(long, env = "AETHER_WORKER_HOST", value_name = "NAME")]
    pub(crate) worker_host: Option<String>,
    /// The failure domain that the worker is in: a rack, a room, a region
    #[arg(long, env = "AETHER_WORKER_ZONE", value_name = "ZONE")]
    pub(crate) worker_zone: Option<String>,
    /// What VMs can ask for; may be given several times
    #[arg(
        long = "worker-label",
        env = "AETHER_WORKER_LABELS",
        value_name = "K=V",
        action = ArgAction::Append,
        value_delimiter = ',',
        value_parser = parse_pair
    )]
    pub(crate) worker_labels: Vec<(String, String)>,
    /// Processors that the VMs here may be promised together [default: not bounded]
    #[arg(long, env = "AETHER_WORKER_VCPUS", value_name = "N")]
    pub(crate) worker_vcpus: Option<u32>,
    /// Memory that the VMs here may be promised together [default: not bounded]
    #[arg(long, env = "AETHER_WORKER_MEMORY", value_name = "MB")]
    pub(crate) worker_memory: Option<u64>,
    /// VMs that may run here at once [default: not bounded]
    #[arg(long, env = "AETHER_WORKER_VMS", value_name = "N")]
    pub(crate) worker_vms: Option<u32>,
    /// How often the worker says that it is there
    #[arg(long, env = "AETHER_WORKER_HEARTBEAT", value_name = "TIME", default_value = "5s",
          value_parser = parse_duration)]
    pub(crate) worker_heartbeat: Duration,
    /// Silent for so long, the worker is lost and its VMs have failed; at least three heartbeats
    #[arg(long, env = "AETHER_WORKER_LEASE", value_name = "TIME", default_value = "15s",
          value_parser = parse_duration)]
    pub(crate) worker_lease: Duration,
}

/// Streams with the other processes of the fleet.
#[expect(clippy::struct_field_names, reason = "they are the names of the options of `up`")]
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Fleet")]
pub(crate) struct StreamOptions {
    /// Where to take streams of the other processes of the fleet (TLS, with certificates of the
    /// platform's authority on both sides); with it this one reaches the VMs of the others
    #[arg(long, env = "AETHER_STREAM_LISTEN", value_name = "ADDR:PORT")]
    pub(crate) stream_listen: Option<SocketAddr>,
    /// Where the others find it [default: where it listens]
    #[arg(long, env = "AETHER_STREAM_ADVERTISE", value_name = "HOST:PORT")]
    pub(crate) stream_advertise: Option<String>,
    /// How long a certificate for streams is good; it is replaced at two thirds of that
    #[arg(long, env = "AETHER_STREAM_CERTIFICATE_LIFETIME", value_name = "TIME",
          default_value = "24h", value_parser = parse_duration)]
    pub(crate) stream_certificate_lifetime: Duration,
}
