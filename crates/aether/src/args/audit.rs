//! `aether audit`.

use aether_types::KeyId;
use clap::ValueEnum;

const EXAMPLES: &str = "\
Examples:
  aether audit
  aether audit --outcome refused --limit 20
  aether audit --key 0192f0c4-7b1e-7c3a-9d52-3f6a1b2c4d5e
  aether audit --all -o json";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct AuditArgs {
    /// Of this project: an id or a name; for admins of the platform
    #[arg(long, conflicts_with = "all")]
    pub(crate) project: Option<String>,
    /// Of every project, and what was tried without a key
    #[arg(long)]
    pub(crate) all: bool,
    /// Only what this key did
    #[arg(long, value_name = "ID")]
    pub(crate) key: Option<KeyId>,
    /// Only what ended so; may be given several times
    #[arg(long, value_enum)]
    pub(crate) outcome: Vec<AuditOutcome>,
    /// At most this many, the latest
    #[arg(long, short = 'n', value_name = "N", default_value_t = 100,
          value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) limit: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum AuditOutcome {
    Done,
    /// Who asked may not
    Refused,
    Failed,
    /// The client left before the answer
    Abandoned,
}

impl AuditOutcome {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Refused => "refused",
            Self::Failed => "failed",
            Self::Abandoned => "abandoned",
        }
    }
}
