//! `aether logs`, and what `aether up` is told of logs.

use std::time::Duration;

use aether_logs::{EmbeddedConfig, LokiConfig};
use aether_types::{LogLevel, PreciseTime, TaskId, limits};
use clap::ValueEnum;

use super::values::parse_duration;
use crate::failure::Failure;

const EXAMPLES: &str = "\
Examples:
  aether logs web
  aether logs -f web --since 10m
  aether logs --level warn --text 'out of memory' --since 1d
  aether logs --task 0192f0c4-7b1e-7c3a-9d52-3f6a1b2c4d5e --json";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Logs {
    /// Only lines of this VM: an id or a name
    pub(crate) vm: Option<String>,
    /// Go on with lines as they come
    #[arg(long, short)]
    pub(crate) follow: bool,
    /// Not before: so long ago, such as 90s, 10m, 1d, or a time such as 2026-01-31T09:30:00Z
    #[arg(long, value_name = "TIME", value_parser = parse_since)]
    pub(crate) since: Option<Since>,
    /// Only lines of this level and above
    #[arg(long)]
    pub(crate) level: Option<LogLevel>,
    /// Only lines of this task
    #[arg(long)]
    pub(crate) task: Option<TaskId>,
    /// Only lines with this text in them, as it is written
    #[arg(long)]
    pub(crate) text: Option<String>,
    /// At most this many, the latest; while following, of those that are there already
    #[arg(long, short = 'n', value_name = "N", default_value_t = 1000,
          value_parser = clap::value_parser!(u32).range(1..=i64::from(limits::LOG_QUERY_LIMIT_MAX)))]
    pub(crate) limit: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Since {
    Ago(Duration),
    Time(PreciseTime),
}

pub(super) fn parse_since(text: &str) -> Result<Since, String> {
    match (parse_duration(text), text.parse()) {
        (Ok(ago), _) => Ok(Since::Ago(ago)),
        (Err(_), Ok(time)) => Ok(Since::Time(time)),
        (Err(error), Err(_)) => Err(format!("{error}, nor one such as 2026-01-31T09:30:00Z")),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LoggingProvider {
    /// In the data directory
    Embedded,
    /// In a Loki; the data directory keeps what it has not taken yet
    Loki,
}

/// Where log lines go.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Logging {
    /// Where log lines are kept [default: loki where --loki-url is given, else embedded]
    #[arg(
        long = "logging-provider",
        env = "AETHER_LOGGING_PROVIDER",
        value_enum,
        value_name = "PROVIDER"
    )]
    pub(crate) provider: Option<LoggingProvider>,
    /// Address of a Loki, such as <http://loki:3100>; may have a user and a password
    #[arg(long, env = "LOKI_URL", value_name = "URL", hide_env_values = true)]
    pub(crate) loki_url: Option<String>,
    /// Lines that go to Loki at once
    #[arg(long, env = "AETHER_LOKI_BATCH_SIZE", value_name = "N", default_value_t = 100,
          value_parser = clap::value_parser!(u32).range(1..=5000))]
    pub(crate) loki_batch_size: u32,
    /// Lines go to Loki after this long, however few
    #[arg(long, env = "AETHER_LOKI_BATCH_INTERVAL", value_name = "TIME", default_value = "5s",
          value_parser = parse_duration)]
    pub(crate) loki_batch_interval: Duration,
    /// Room for log lines in the data directory; the oldest are removed first
    #[arg(long, env = "AETHER_LOG_KEEP_MB", value_name = "MB", default_value_t = 1024,
          value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) log_keep_mb: u64,
    /// Remove log lines from the data directory after this long
    #[arg(long, env = "AETHER_LOG_KEEP_AGE", value_name = "TIME", default_value = "7d",
          value_parser = parse_duration)]
    pub(crate) log_keep_age: Duration,
}

/// Which store is opened.
#[derive(Debug, Clone)]
pub(crate) enum LogPlan {
    Embedded(EmbeddedConfig),
    Loki(LokiConfig),
}

impl Logging {
    pub(crate) fn plan(&self) -> Result<LogPlan, Failure> {
        let embedded = EmbeddedConfig {
            bytes_max: self.log_keep_mb.saturating_mul(1 << 20),
            age_max: Some(self.log_keep_age),
            ..EmbeddedConfig::default()
        };
        match (self.provider, &self.loki_url) {
            (Some(LoggingProvider::Embedded), _) | (None, None) => Ok(LogPlan::Embedded(embedded)),
            (Some(LoggingProvider::Loki), None) => {
                Err(Failure::usage("log lines shall go to a Loki, and none is named")
                    .hint("give --loki-url or LOKI_URL"))
            }
            (Some(LoggingProvider::Loki) | None, Some(url)) => Ok(LogPlan::Loki(LokiConfig {
                batch_entries: self.loki_batch_size as usize,
                batch_interval: self.loki_batch_interval,
                spool: embedded,
                ..LokiConfig::new(url)
            })),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        logging: Logging,
    }

    fn plan(line: &[&str]) -> Result<LogPlan, Failure> {
        Line::try_parse_from([&["up"], line].concat()).unwrap().logging.plan()
    }

    #[test]
    fn a_url_is_enough_for_loki_and_a_provider_decides() {
        let url = ["--loki-url", "http://loki:3100"];
        let Ok(LogPlan::Loki(loki)) = plan(&url) else { panic!("not Loki") };
        assert_eq!((loki.batch_entries, loki.batch_interval), (100, Duration::from_secs(5)));
        let embedded =
            [&url[..], &["--logging-provider", "embedded", "--log-keep-mb", "3"]].concat();
        let Ok(LogPlan::Embedded(kept)) = plan(&embedded) else { panic!("not embedded") };
        assert_eq!(kept.bytes_max, 3 << 20);
        assert!(matches!(plan(&[]), Ok(LogPlan::Embedded(_))));
        assert!(plan(&["--logging-provider", "loki"]).is_err());
    }

    #[test]
    fn points_in_time_are_read() {
        assert_eq!(parse_since("10m"), Ok(Since::Ago(Duration::from_mins(10))));
        assert!(matches!(parse_since("2026-01-31T09:30:00Z"), Ok(Since::Time(_))));
        assert!(parse_since("yesterday").unwrap_err().contains("2026-01-31"));
    }
}
