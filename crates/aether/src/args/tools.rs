//! `aether tools`, and what `aether up` is told of tools.

use std::path::PathBuf;

use aether_types::ToolRequest;
use clap::{ArgAction, Subcommand};

use super::values::long;

const EXAMPLES: &str = "\
Examples:
  aether tools list
  aether tools versions go
  aether tools build go@1.23.1 rust
  aether vm create --tool go@1.23.1 --tool rust";

#[derive(Debug, Subcommand)]
#[command(after_help = EXAMPLES)]
pub(crate) enum Tools {
    /// List the tools that VMs can have
    #[command(visible_alias = "ls")]
    List,
    /// List the versions of a tool, newest first
    Versions(ToolVersions),
    /// Build layers of tools for VMs to come, and follow that
    Build(ToolsBuild),
    /// Show what was asked for, what it came to, and from what
    Lock,
    /// Remove the layers that were not used for longest; VMs keep what they have
    Prune(ToolsPrune),
}

#[derive(Debug, clap::Args)]
pub(crate) struct ToolVersions {
    /// A name or an alias
    #[arg(value_name = "TOOL")]
    pub(crate) tool: String,
    /// At most this many
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub(crate) limit: usize,
}

const BUILD_EXAMPLES: &str = "\
Examples:
  aether tools build go@1.23.1 rust nodejs@22
  aether tools build 'python@>=3.10, <3.12'
  aether tools build --refresh claude-code";

const BUILD_LIMITS: &str = "\
Limits:
  tools    32
  version  exact, a part (20, 20.x), a range (^1.2), or latest
  build    20 minutes for each layer";

#[derive(Debug, clap::Args)]
#[command(after_help = BUILD_EXAMPLES, after_long_help = long(BUILD_EXAMPLES, BUILD_LIMITS))]
pub(crate) struct ToolsBuild {
    /// NAME, NAME@VERSION or NAME=VERSION
    #[arg(required = true, value_name = "TOOL")]
    pub(crate) tools: Vec<ToolRequest>,
    /// Ask the sources anew what `latest` and ranges come to
    #[arg(long)]
    pub(crate) refresh: bool,
    /// Show nothing of the build but how it ended
    #[arg(long, short)]
    pub(crate) quiet: bool,
    /// Return as soon as the request is recorded
    #[arg(long)]
    pub(crate) no_wait: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct ToolsPrune {
    /// What the rest may take; 0 removes every layer [default: the server's --tools-budget-mb]
    #[arg(long, value_name = "MB")]
    pub(crate) keep_mb: Option<u64>,
}

/// What VMs have without asking, where tools are kept and where they come from.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct ToolOptions {
    /// A tool that every VM has, such as nodejs@20; may be given several times, in the environment
    /// parted by `;` (default: git, nodejs@20, bun, claude-code)
    #[arg(
        long = "default-tool",
        env = "AETHER_DEFAULT_TOOLS",
        value_name = "TOOL[@VERSION]",
        action = ArgAction::Append,
        value_delimiter = ';',
        conflicts_with = "no_default_tools"
    )]
    pub(crate) default_tools: Vec<ToolRequest>,
    /// VMs have the tools that they ask for, and no others
    #[arg(long, env = "AETHER_NO_DEFAULT_TOOLS")]
    pub(crate) no_default_tools: bool,
    /// Where layers of tools are kept; several data directories may share it
    /// [default: DATA_DIR/tools]
    #[arg(long, env = "AETHER_TOOLS_DIR", value_name = "DIR")]
    pub(crate) tools_dir: Option<PathBuf>,
    /// Recipes of your own, which add to the catalogue or replace what it has
    #[arg(long, env = "AETHER_TOOLS_CATALOGUE", value_name = "DIR")]
    pub(crate) tools_catalogue: Option<PathBuf>,
    /// An offline mirror: nothing is fetched from anywhere else
    #[arg(long, env = "AETHER_TOOLS_MIRROR", value_name = "DIR")]
    pub(crate) tools_mirror: Option<PathBuf>,
    /// Room for layers and what they are made from; what was not used for longest goes first
    /// [default: 20480]
    #[arg(long, env = "AETHER_TOOLS_BUDGET_MB", value_name = "MB")]
    pub(crate) tools_budget_mb: Option<u64>,
    /// [default: what npm is configured with]
    #[arg(long, env = "AETHER_NPM_REGISTRY", value_name = "URL")]
    pub(crate) npm_registry: Option<String>,
    /// [default: what pip is configured with]
    #[arg(long, env = "AETHER_PYPI_INDEX", value_name = "URL")]
    pub(crate) pypi_index: Option<String>,
    /// [default: what apt is configured with]
    #[arg(long, env = "AETHER_DEBIAN_MIRROR", value_name = "URL")]
    pub(crate) debian_mirror: Option<String>,
    /// [default: what apt is configured with]
    #[arg(long, env = "AETHER_DEBIAN_SECURITY_MIRROR", value_name = "URL")]
    pub(crate) debian_security_mirror: Option<String>,
}
