//! `aether config`, and the option that names the file.

use std::path::PathBuf;

use clap::Subcommand;

const EXAMPLES: &str = "\
Examples:
  aether config check --config aetherium.yaml
  aether config show --config aetherium.yaml
  aether up --config aetherium.yaml";

/// The option alone; shared by the commands that are configured.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct ConfigOption {
    /// A YAML file with what the environment and the command line do not say
    #[arg(long = "config", id = "config_file", env = "AETHER_CONFIG", value_name = "FILE")]
    pub(crate) config_file: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct ConfigArgs {
    /// The file
    #[arg(long = "config", global = true, env = "AETHER_CONFIG", value_name = "FILE")]
    pub(crate) config_file: Option<PathBuf>,
    #[command(subcommand)]
    pub(crate) command: ConfigCommand,
}

#[derive(Debug, Clone, Copy, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Say whether the file and the environment make sense; nothing is connected to
    Check,
    /// Show what counts, and who said so; secrets are not shown
    Show,
}
