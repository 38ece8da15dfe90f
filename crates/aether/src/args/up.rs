//! `aether up`.

use std::{net::SocketAddr, path::PathBuf, str::FromStr, time::Duration};

use clap::ArgAction;

use super::{
    Backend, ConfigOption, DatabaseOptions, Edge, FleetOptions, JwtOptions, Logging, RedisOptions,
    StreamOptions, TlsOptions, ToolOptions, values::parse_duration,
};
use crate::logging::LogFormat;

const EXAMPLES: &str = "\
Examples:
  aether up
  aether up --pool default=2..8 --pool web:v2=4
  aether up --pool none --max-vms 50 --snapshot-keep 5 --snapshot-max-age 30d
  DATABASE_URL=postgres://aetherium@localhost/aetherium aether up --migrate
  REDIS_ADDR=localhost:6379 aether up
  aether up --listen 0.0.0.0:8443 --tls-auto --tls-name api.example
  aether up --default-tool nodejs@22 --default-tool go --tools-budget-mb 20000";

#[derive(Debug, Clone, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Up {
    #[command(flatten)]
    pub(crate) config: ConfigOption,
    /// Where to answer requests; port 0 takes a free one
    #[arg(long, env = "AETHER_LISTEN", value_name = "ADDR:PORT", default_value = "127.0.0.1:8080")]
    pub(crate) listen: SocketAddr,
    /// Leave running VMs running at the end; the next `up` takes them over
    #[arg(long, env = "AETHER_KEEP_VMS")]
    pub(crate) keep_vms: bool,
    #[command(flatten)]
    pub(crate) database: DatabaseOptions,
    /// Bring the tables in PostgreSQL up to date first, as `aether migrate up` does
    #[arg(long, env = "AETHER_MIGRATE", help_heading = "PostgreSQL")]
    pub(crate) migrate: bool,
    #[command(flatten)]
    pub(crate) redis: RedisOptions,
    #[command(flatten)]
    pub(crate) backend: Backend,
    #[command(flatten)]
    pub(crate) capacity: Capacity,
    #[command(flatten)]
    pub(crate) snapshots: Snapshots,
    #[command(flatten)]
    pub(crate) tools: ToolOptions,
    #[command(flatten)]
    pub(crate) fleet: FleetOptions,
    #[command(flatten)]
    pub(crate) streams: StreamOptions,
    #[command(flatten)]
    pub(crate) logging: Logging,
    #[command(flatten)]
    pub(crate) edge: Edge,
    #[command(flatten)]
    pub(crate) tls: TlsOptions,
    #[command(flatten)]
    pub(crate) jwt: JwtOptions,
    #[arg(long, env = "AETHER_LOG_FORMAT", value_enum, default_value = "text")]
    pub(crate) log_format: LogFormat,
    /// What is logged, such as `info` or `warn,aether_worker=debug`
    #[arg(long, env = "AETHER_LOG", value_name = "FILTER", default_value = "info")]
    pub(crate) log_level: String,
}

/// How many VMs there may be.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Capacity {
    /// VMs that there may be, running or not; one more is refused at once
    #[arg(long, env = "AETHER_MAX_VMS", value_name = "N", default_value_t = 1000)]
    pub(crate) max_vms: u32,
    /// VMs that may be on their way to run at once; one more is refused at once
    #[arg(long, env = "AETHER_MAX_STARTING", value_name = "N", default_value_t = 128)]
    pub(crate) max_starting: u32,
    /// Keep MIN to MAX machines of a template ready to become VMs; may be given several times.
    /// `none` leaves out the pool of the default template
    #[arg(
        long,
        env = "AETHER_POOL",
        value_name = "TEMPLATE=MIN[..MAX]|none",
        action = ArgAction::Append,
        value_delimiter = ','
    )]
    pub(crate) pool: Vec<PoolChoice>,
}

/// Where templates and snapshots are, and how long.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct Snapshots {
    /// Where templates are kept; several data directories may share it
    /// [default: DATA_DIR/templates]
    #[arg(long, env = "AETHER_TEMPLATE_DIR", value_name = "DIR")]
    pub(crate) template_dir: Option<PathBuf>,
    /// Build no template from the default image: VMs that ask for none boot
    #[arg(long, env = "AETHER_NO_DEFAULT_TEMPLATE")]
    pub(crate) no_default_template: bool,
    /// Keep so many snapshots of each VM; older ones are removed
    #[arg(long, env = "AETHER_SNAPSHOT_KEEP", value_name = "N",
          value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) snapshot_keep: Option<u32>,
    /// Remove snapshots after this long, such as 12h or 30d
    #[arg(
        long,
        env = "AETHER_SNAPSHOT_MAX_AGE",
        value_name = "TIME",
        value_parser = parse_duration
    )]
    pub(crate) snapshot_max_age: Option<Duration>,
    /// Room for all snapshots together; the oldest are removed first
    #[arg(long, env = "AETHER_SNAPSHOT_DISK_MB", value_name = "MB")]
    pub(crate) snapshot_disk_mb: Option<u64>,
}

/// One value of `--pool`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum PoolChoice {
    /// No pool of the default template.
    None,
    Of(PoolSpec),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PoolSpec {
    /// `name` or `name:tag`.
    pub(crate) template: String,
    pub(crate) min: u32,
    pub(crate) max: u32,
}

/// More would be a defect of the command line: each machine has the memory of a guest.
const POOL_MAX: u32 = 1000;

impl FromStr for PoolChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "none" {
            return Ok(Self::None);
        }
        let wrong = || format!("{text:?} is not a pool such as default=2, web=1..8 or none");
        let (template, size) = text.split_once('=').ok_or_else(wrong)?;
        let (min, max) = size.split_once("..").unwrap_or((size, size));
        let number = |text: &str| text.parse::<u32>().map_err(|_| wrong());
        let (min, max) = (number(min)?, number(max)?);
        if template.is_empty() || min > max || !(1..=POOL_MAX).contains(&max) {
            return Err(format!("{}; MIN is at most MAX, and that 1 to {POOL_MAX}", wrong()));
        }
        Ok(Self::Of(PoolSpec { template: template.to_owned(), min, max }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pools_are_read() {
        let of = |template: &str, min, max| {
            Ok(PoolChoice::Of(PoolSpec { template: template.into(), min, max }))
        };
        for (text, pool) in [
            ("none", Ok(PoolChoice::None)),
            ("web=2", of("web", 2, 2)),
            ("web:v1=0..8", of("web:v1", 0, 8)),
        ] {
            assert_eq!(text.parse(), pool, "{text}");
        }
        for text in
            ["", "web", "=1", "web=", "web=3..2", "web=0", "web=1..", "web=x", "web=1..9999"]
        {
            assert!(text.parse::<PoolChoice>().is_err(), "{text}");
        }
    }
}
