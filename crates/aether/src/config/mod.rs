//! The configuration: the command line before the environment, the environment before one YAML
//! file, and that before what is built in.
//!
//! A key of the file is the default of an option. So a value is checked by its option, whoever
//! gives it, and there is one description of each.

mod file;
mod keys;
mod show;
#[cfg(test)]
mod tests;

use std::path::PathBuf;

use clap::{ArgMatches, Command, CommandFactory as _, FromArgMatches as _};

pub(crate) use file::ConfigFile;
pub(crate) use show::run;

use crate::{args::Args, failure::Failure, older};

/// Of the option that names the file.
pub(crate) const OPTION: &str = "config_file";

/// On a wrong command line clap prints what is wrong and ends with 2, as documented.
pub(crate) fn parse() -> Result<Args, Failure> {
    let line = older::line(std::env::args_os().collect())?;
    let matches = Args::command().get_matches_from(&line);
    let matches = match named(&matches) {
        Some(path) => ConfigFile::read(&path)?.over(Args::command()).get_matches_from(&line),
        None => matches,
    };
    Ok(Args::from_arg_matches(&matches).unwrap_or_else(|error| error.exit()))
}

/// The file that a command is told to take.
fn named(matches: &ArgMatches) -> Option<PathBuf> {
    let (_, command) = matches.subcommand()?;
    command.try_get_one::<PathBuf>(OPTION).ok().flatten().cloned()
}

impl ConfigFile {
    /// The command line with the file's values as defaults, of every command that has the option.
    fn over(&self, mut root: Command) -> Command {
        let names: Vec<_> = root.get_subcommands().map(|c| c.get_name().to_owned()).collect();
        for given in self.values.values() {
            let (option, values) = (given.key.option, &given.values);
            let has = |command: &Command| command.get_arguments().any(|a| a.get_id() == option);
            let set = |command: Command| {
                command.mut_arg(option, |arg| arg.default_values(values.clone()))
            };
            if has(&root) {
                root = set(root);
            }
            for name in &names {
                if root.find_subcommand(name).is_some_and(has) {
                    root = root.mut_subcommand(name, set);
                }
            }
        }
        root
    }
}
