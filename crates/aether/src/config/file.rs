//! One configuration file: read, and held against the keys.

use std::{
    collections::BTreeMap,
    error::Error as _,
    path::{Path, PathBuf},
};

use clap::{
    ArgAction, CommandFactory as _,
    error::{ContextKind, ContextValue, ErrorKind},
};
use config::{FileFormat, ValueKind};

use super::keys::{self, Key, Kind};
use crate::{args::Args, exit::Exit, failure::Failure};

/// A configuration is some kilobytes; this is a wrong file.
const FILE_BYTES_MAX: u64 = 1 << 20;
const SECRET_BYTES_MAX: u64 = 64 << 10;

/// What a file says: values by option.
#[derive(Debug, Default)]
pub(crate) struct ConfigFile {
    pub(super) path: PathBuf,
    pub(super) values: BTreeMap<&'static str, Given>,
}

/// Printed by nobody: it may be a secret.
pub(super) struct Given {
    pub(super) key: &'static Key,
    pub(super) values: Vec<String>,
}

impl std::fmt::Debug for Given {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.key.path)
    }
}

impl ConfigFile {
    pub(crate) fn read(path: &Path) -> Result<Self, Failure> {
        let text = read(path, FILE_BYTES_MAX)?;
        let mut file = Self { path: path.to_owned(), values: BTreeMap::new() };
        let source = config::File::from_str(&text, FileFormat::Yaml);
        let read = config::Config::builder().add_source(source).build();
        let table = read
            .and_then(|read| read.cache.into_table())
            .map_err(|error| file.wrong(&error.to_string()))?;
        for (name, value) in table {
            file.take(&name, value.kind)?;
        }
        file.check()?;
        Ok(file)
    }

    fn take(&mut self, path: &str, value: ValueKind) -> Result<(), Failure> {
        let Some(key) = keys::find(path) else {
            return match value {
                ValueKind::Table(table) if keys::is_section(path) => table
                    .into_iter()
                    .try_for_each(|(name, value)| self.take(&format!("{path}.{name}"), value.kind)),
                _ if keys::is_section(path) => {
                    Err(self.wrong(&format!("{path} is a section: keys stand below it")))
                }
                _ => Err(self.wrong(&format!("there is no key {path}")).hint(keys::advice(path))),
            };
        };
        let values = self.texts(key, value)?;
        let values = match key.kind {
            Kind::Plain => values,
            Kind::Url => values
                .into_iter()
                .map(|url| self.without_password(key, url))
                .collect::<Result<_, _>>()?,
            Kind::SecretFile => vec![secret(&values.concat())?],
        };
        if let Some(other) = self.values.insert(key.option, Given { key, values }) {
            let text = format!("{} and {} say the same", other.key.path, key.path);
            return Err(self.wrong(&text).hint("leave one of them out"));
        }
        Ok(())
    }

    fn texts(&self, key: &Key, value: ValueKind) -> Result<Vec<String>, Failure> {
        let one = |value: ValueKind| match value {
            ValueKind::Boolean(value) => Some(value.to_string()),
            ValueKind::I64(value) => Some(value.to_string()),
            ValueKind::I128(value) => Some(value.to_string()),
            ValueKind::U64(value) => Some(value.to_string()),
            ValueKind::U128(value) => Some(value.to_string()),
            ValueKind::Float(value) => Some(value.to_string()),
            ValueKind::String(value) => Some(value),
            ValueKind::Nil | ValueKind::Table(_) | ValueKind::Array(_) => None,
        };
        let values = match value {
            ValueKind::Array(list) if takes_list(key) => {
                list.into_iter().map(|value| one(value.kind)).collect()
            }
            ValueKind::Array(_) => None,
            value => one(value).map(|value| vec![value]),
        };
        values.ok_or_else(|| {
            let wanted = if takes_list(key) { "a value, or a list of them" } else { "one value" };
            self.wrong(&format!("{} takes {wanted}", key.path))
        })
    }

    fn without_password(&self, key: &Key, text: String) -> Result<String, Failure> {
        let has_password = url::Url::parse(&text).is_ok_and(|url| url.password().is_some());
        if has_password {
            let text = format!("{} has a password in it", key.path);
            let hint = format!(
                "put the whole URL into a file of its own, and name that with {}_file",
                key.path
            );
            return Err(self.wrong(&text).hint(hint));
        }
        Ok(text)
    }

    /// Each value is what its option takes.
    fn check(&self) -> Result<(), Failure> {
        let mut command = Args::command();
        command.build();
        let Some(up) = command.find_subcommand("up") else { return Ok(()) };
        for Given { key, values } in self.values.values() {
            let Some(option) = up.get_arguments().find(|arg| arg.get_id() == key.option) else {
                continue;
            };
            if matches!(option.get_action(), ArgAction::SetTrue) {
                if !values.iter().all(|value| value == "true" || value == "false") {
                    return Err(self.wrong(&format!("{} is true or false", key.path)));
                }
                continue;
            }
            let flag = format!("--{}", option.get_long().unwrap_or_default());
            let line = values.iter().map(|value| format!("{flag}={value}"));
            let tried = up.clone().no_binary_name(true).try_get_matches_from(line);
            if let Err(error) = tried
                && let Some(reason) = reason(&error, &flag)
            {
                return Err(self.wrong(&format!("{}: {}", key.path, told(key, &error, &reason))));
            }
        }
        Ok(())
    }

    fn wrong(&self, text: &str) -> Failure {
        let text = format!("{}: {text}", self.path.display());
        Failure { code: "misconfigured".to_owned(), ..Failure::usage(text) }
    }
}

/// Why clap refuses this option; `None` where it refuses another, which it says itself later.
fn reason(error: &clap::Error, flag: &str) -> Option<String> {
    let about = match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(about)) => about.clone(),
        _ => return None,
    };
    if about.split_whitespace().next() != Some(flag) {
        return None;
    }
    match (error.kind(), error.get(ContextKind::ValidValue)) {
        (ErrorKind::InvalidValue, Some(ContextValue::Strings(known))) => {
            Some(format!("one of {} is needed", known.join(", ")))
        }
        (ErrorKind::ValueValidation, _) => error.source().map(ToString::to_string),
        (kind, _) => Some(kind.to_string()),
    }
}

fn told(key: &Key, error: &clap::Error, reason: &str) -> String {
    match (key.kind, error.get(ContextKind::InvalidValue)) {
        (Kind::Plain, Some(ContextValue::String(value))) if !reason.contains(value.as_str()) => {
            format!("{value:?} does not fit: {reason}")
        }
        (Kind::Plain, _) => reason.to_owned(),
        (Kind::Url | Kind::SecretFile, _) => "the value is not of its form".to_owned(),
    }
}

fn takes_list(key: &Key) -> bool {
    matches!(key.option, "pool" | "default_tools" | "cors_origin" | "worker_labels" | "tls_name")
}

fn secret(path: &str) -> Result<String, Failure> {
    let path = Path::new(path);
    let text = read(path, SECRET_BYTES_MAX)?;
    let text = text.trim_end_matches(['\r', '\n']);
    if text.is_empty() {
        let text = format!("{} is empty, and shall have a secret", path.display());
        return Err(Failure { code: "misconfigured".to_owned(), ..Failure::usage(text) });
    }
    Ok(text.to_owned())
}

fn read(path: &Path, bytes_max: u64) -> Result<String, Failure> {
    let failed = |error| Failure::file("read", path, &error);
    let size = std::fs::metadata(path).map_err(failed)?.len();
    if size > bytes_max {
        let text = format!("{} has {size} bytes, and may have {bytes_max}", path.display());
        return Err(Failure::new("misconfigured", Exit::Usage, text));
    }
    std::fs::read_to_string(path).map_err(failed)
}
