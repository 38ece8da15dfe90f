//! `aether key`.

use std::time::Duration;

use aether_types::{KeyId, Role, Scope, limits};
use clap::{ArgAction, Subcommand};

use super::values::parse_duration;

const EXAMPLES: &str = "\
Examples:
  aether key create ci --role operator --expires 90d
  aether key create board --role viewer --scope vms:read --scope tasks:read
  aether key list
  aether key revoke 0192f0c4-7b1e-7c3a-9d52-3f6a1b2c4d5e

A viewer sees what the platform knows, an operator works with VMs, an admin gives keys too. Scopes
narrow that down: RESOURCE:read or RESOURCE:write.";

#[derive(Debug, Subcommand)]
#[command(after_help = EXAMPLES)]
pub(crate) enum Key {
    /// Make a key, which is shown this once
    Create(KeyCreate),
    /// List keys, newest first
    #[command(visible_alias = "ls")]
    List(KeyList),
    Get {
        #[arg(value_name = "ID")]
        id: KeyId,
    },
    /// Take keys back: they open nothing from now on
    #[command(visible_alias = "rm")]
    Revoke {
        #[arg(required = true, value_name = "ID")]
        ids: Vec<KeyId>,
    },
}

#[derive(Debug, clap::Args)]
pub(crate) struct KeyCreate {
    /// To know it by
    pub(crate) name: String,
    /// viewer, operator or admin
    #[arg(long)]
    pub(crate) role: Role,
    /// Only this of what the role may, such as vms:read; may be given several times
    #[arg(long, value_name = "RESOURCE:VERB", action = ArgAction::Append)]
    pub(crate) scope: Vec<Scope>,
    /// Of this project [default: the one that the key that makes it is of]
    #[arg(long, value_name = "PROJECT")]
    pub(crate) project: Option<String>,
    /// It is good for so long, such as 12h or 90d [default: until it is revoked]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub(crate) expires: Option<Duration>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct KeyList {
    /// Those that are revoked too
    #[arg(long, short)]
    pub(crate) all: bool,
    /// At most this many
    #[arg(long, value_name = "N", default_value_t = limits::PAGE_LIMIT_DEFAULT as usize)]
    pub(crate) limit: usize,
}
