//! `aether config`.

use std::path::Path;

use clap::{ArgMatches, CommandFactory as _, FromArgMatches as _, parser::ValueSource};
use serde::Serialize;

use super::{ConfigFile, keys, keys::Kind};
use crate::{
    args::{Args, Command, ConfigArgs, ConfigCommand, Global, Up},
    cli::table::{self, or_dash},
    compose,
    exit::Exit,
    failure::Failure,
    output,
};

/// One setting as it counts.
#[derive(Debug, Serialize, PartialEq, Eq)]
pub(super) struct Setting {
    pub(super) key: &'static str,
    /// Never a secret: `(set)` stands for one.
    pub(super) value: Option<String>,
    /// `file`, `environment` or `default`.
    pub(super) source: &'static str,
    pub(super) environment: Option<String>,
}

pub(crate) fn run(global: &Global, args: &ConfigArgs) -> Result<Exit, Failure> {
    let file = match &args.config_file {
        Some(path) => ConfigFile::read(path)?,
        None => ConfigFile::default(),
    };
    let matches = matches(&file)?;
    let up = up(&matches)?;
    match args.command {
        ConfigCommand::Check => {
            // What single values do not show: that they fit together.
            up.database.config()?;
            up.redis.config()?;
            up.logging.plan()?;
            up.tls.plan()?;
            up.jwt.verifier()?;
            compose::fleet(up.fleet, up.snapshots.template_dir.as_deref())?;
            told(global, &file);
        }
        ConfigCommand::Show => {
            let settings = settings(&file, &matches);
            if global.json {
                output::json(&settings);
            } else {
                print(&settings);
            }
        }
    }
    Ok(Exit::Success)
}

fn told(global: &Global, file: &ConfigFile) {
    #[derive(Serialize)]
    struct Checked<'a> {
        file: Option<&'a Path>,
        keys: usize,
    }
    let path = Some(file.path.as_path()).filter(|path| !path.as_os_str().is_empty());
    if global.json {
        return output::json(&Checked { file: path, keys: file.values.len() });
    }
    match path {
        Some(path) => output::line(&format!(
            "{}: {} keys, and they fit together",
            path.display(),
            file.values.len()
        )),
        None => output::line("the environment is well; no file is named (--config)"),
    }
}

/// As `aether up` would see it now, without options of its own.
pub(super) fn matches(file: &ConfigFile) -> Result<ArgMatches, Failure> {
    file.over(Args::command()).try_get_matches_from(["aether", "up"]).map_err(|error| {
        let text = error.to_string();
        let text = text.lines().next().unwrap_or_default().trim_start_matches("error: ");
        Failure { code: "misconfigured".to_owned(), ..Failure::usage(text) }
    })
}

fn up(matches: &ArgMatches) -> Result<Up, Failure> {
    match Args::from_arg_matches(matches) {
        Ok(Args { command: Command::Up(up), .. }) => Ok(up),
        Ok(_) => Err(Failure::usage("this is not `up`")),
        Err(error) => Err(Failure::usage(error.to_string())),
    }
}

pub(super) fn settings(file: &ConfigFile, matches: &ArgMatches) -> Vec<Setting> {
    let mut root = Args::command();
    root.build();
    let Some((up, (_, matches))) = root.find_subcommand("up").zip(matches.subcommand()) else {
        return Vec::new();
    };
    let mut settings: Vec<Setting> = Vec::new();
    for key in keys::KEYS {
        let Some(option) = up.get_arguments().find(|arg| arg.get_id() == key.option) else {
            continue;
        };
        let given = file.values.get(key.option);
        // Two keys of one option: the one that is used, else the plain one.
        let twin = keys::KEYS.iter().find(|other| other.option == key.option && *other != key);
        let shown = given.map_or_else(
            || if twin.is_some() && key.kind == Kind::SecretFile { None } else { Some(key) },
            |given| Some(given.key),
        );
        if shown != Some(key) {
            continue;
        }
        let source = match matches.value_source(key.option) {
            Some(ValueSource::EnvVariable) => "environment",
            _ if given.is_some() => "file",
            _ => "default",
        };
        let raw = matches.get_raw(key.option);
        let value = raw.map(|values| {
            let values: Vec<_> = values.map(|value| value.to_string_lossy()).collect();
            values.join(", ")
        });
        let is_secret = key.kind == Kind::SecretFile || option.is_hide_env_values_set();
        let value = if is_secret { value.map(|_| "(set)".to_owned()) } else { value };
        let environment = option.get_env().map(|name| name.to_string_lossy().into_owned());
        settings.push(Setting { key: key.path, value, source, environment });
    }
    settings
}

fn print(settings: &[Setting]) {
    let row = |setting: &Setting| {
        let source = match (setting.source, &setting.environment) {
            ("environment", Some(name)) => name.clone(),
            (source, _) => source.to_owned(),
        };
        vec![setting.key.to_owned(), or_dash(setting.value.as_deref()), source]
    };
    table::print(&["KEY", "VALUE", "FROM"], settings.iter().map(row).collect());
}
