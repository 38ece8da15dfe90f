//! Where the store and the queue are: nothing said, files in the data directory.

use std::{path::PathBuf, time::Duration};

use aether_postgres::{Config, ConfigError, Limits, Parts, TlsMode};
use aether_types::Password;
use clap::Subcommand;

use super::{ConfigOption, values::parse_duration};
use crate::failure::Failure;

/// Said by these alone: one that is there for something else must not move the store.
const MOVES: &str = "DATABASE_URL or POSTGRES_HOST";

#[derive(Clone, Default, clap::Args)]
#[command(next_help_heading = "PostgreSQL")]
pub(crate) struct DatabaseOptions {
    /// Keep the store and the queue in PostgreSQL: postgres://USER:PASSWORD@HOST:PORT/DATABASE.
    /// Best in the environment, since other users see command lines
    #[arg(long, env = "DATABASE_URL", value_name = "URL", hide_env_values = true)]
    database_url: Option<String>,
    /// Instead of a URL; a path is the folder of a Unix socket
    #[arg(long, env = "POSTGRES_HOST", value_name = "HOST")]
    postgres_host: Option<String>,
    /// [default: 5432]
    #[arg(long, env = "POSTGRES_PORT", value_name = "PORT")]
    postgres_port: Option<u16>,
    /// Its password is taken from POSTGRES_PASSWORD [default: aetherium]
    #[arg(long, env = "POSTGRES_USER", value_name = "NAME")]
    postgres_user: Option<String>,
    #[arg(long, env = "POSTGRES_PASSWORD", hide = true, hide_env_values = true)]
    postgres_password: Option<String>,
    /// [default: aetherium]
    #[arg(long, env = "POSTGRES_DB", value_name = "NAME")]
    postgres_db: Option<String>,
    /// disable, prefer, require or verify-full
    /// [default: verify-full; prefer on this machine]
    #[arg(long, env = "POSTGRES_SSLMODE", value_name = "MODE", value_parser = parse_tls)]
    postgres_sslmode: Option<TlsMode>,
    /// Trust the authorities in this file (PEM) besides those of this machine
    #[arg(long, env = "POSTGRES_CA_FILE", value_name = "FILE")]
    postgres_ca_file: Option<PathBuf>,
    /// Connections of this process at most; one more listens for new tasks [default: 16]
    #[arg(long, env = "POSTGRES_CONNECTIONS_MAX", value_name = "N")]
    postgres_connections_max: Option<u32>,
    /// Connections that are kept open [default: 1]
    #[arg(long, env = "POSTGRES_CONNECTIONS_MIN", value_name = "N")]
    postgres_connections_min: Option<u32>,
    /// Give up waiting for a connection after this long [default: 5s]
    #[arg(long, env = "POSTGRES_ACQUIRE_TIMEOUT", value_name = "TIME", value_parser = parse_duration)]
    postgres_acquire_timeout: Option<Duration>,
    /// Close a connection that was not used for this long [default: 10m]
    #[arg(long, env = "POSTGRES_IDLE_TIMEOUT", value_name = "TIME", value_parser = parse_duration)]
    postgres_idle_timeout: Option<Duration>,
    /// Replace a connection after this long [default: 30m]
    #[arg(long, env = "POSTGRES_LIFETIME_MAX", value_name = "TIME", value_parser = parse_duration)]
    postgres_lifetime_max: Option<Duration>,
    /// Let the server end a statement after this long [default: 15s]
    #[arg(long, env = "POSTGRES_STATEMENT_TIMEOUT", value_name = "TIME",
          value_parser = parse_duration)]
    postgres_statement_timeout: Option<Duration>,
}

/// Without passwords, of which the URL has one.
impl std::fmt::Debug for DatabaseOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DatabaseOptions")
            .field("url", &self.database_url.is_some())
            .field("host", &self.postgres_host)
            .field("user", &self.postgres_user)
            .finish_non_exhaustive()
    }
}

#[derive(Debug, clap::Args)]
pub(crate) struct Migrate {
    #[command(flatten)]
    pub(crate) config: ConfigOption,
    #[command(flatten)]
    pub(crate) database: DatabaseOptions,
    #[command(subcommand)]
    pub(crate) command: MigrateCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum MigrateCommand {
    /// Bring the tables up to date; programs of the version before go on working
    Up {
        /// Also take away what only older programs need: none of them must be left
        #[arg(long)]
        contract: bool,
    },
    /// Show what was applied and what is pending
    Status,
}

impl DatabaseOptions {
    /// `None`: SQLite, in the data directory.
    pub(crate) fn config(&self) -> Result<Option<Config>, Failure> {
        let config = match (&self.database_url, &self.postgres_host) {
            (None, None) => {
                if let Some(name) = self.left_alone() {
                    tracing::warn!("{name} is set and does nothing without {MOVES}");
                }
                return Ok(None);
            }
            (Some(_), Some(_)) => {
                let text = "DATABASE_URL and POSTGRES_HOST both say where the database is";
                return Err(wrong(text.to_owned()).hint("unset one of them"));
            }
            (Some(url), None) => Config::from_url(url),
            (None, Some(_)) => Config::from_parts(Parts {
                host: self.postgres_host.clone(),
                port: self.postgres_port,
                user: self.postgres_user.clone(),
                password: self.postgres_password.clone().map(Password::from),
                database: self.postgres_db.clone(),
            }),
        };
        let config = config
            .and_then(|config| config.tls(self.postgres_sslmode, self.postgres_ca_file.clone()))
            .map(|config| config.limits(self.limits()));
        let config = config.map_err(|error| refused(&error))?;
        config.check().map_err(|error| refused(&error))?;
        Ok(Some(config))
    }

    fn limits(&self) -> Limits {
        let default = Limits::default();
        Limits {
            connections_max: self.postgres_connections_max.unwrap_or(default.connections_max),
            connections_min: self.postgres_connections_min.unwrap_or(default.connections_min),
            acquire_timeout: self.postgres_acquire_timeout.unwrap_or(default.acquire_timeout),
            idle_timeout: self.postgres_idle_timeout.unwrap_or(default.idle_timeout),
            lifetime_max: self.postgres_lifetime_max.unwrap_or(default.lifetime_max),
            statement_timeout: self.postgres_statement_timeout.unwrap_or(default.statement_timeout),
        }
    }

    /// One that was set, and names no place.
    fn left_alone(&self) -> Option<&'static str> {
        [
            ("POSTGRES_PORT", self.postgres_port.is_some()),
            ("POSTGRES_USER", self.postgres_user.is_some()),
            ("POSTGRES_PASSWORD", self.postgres_password.is_some()),
            ("POSTGRES_DB", self.postgres_db.is_some()),
        ]
        .into_iter()
        .find_map(|(name, is_set)| is_set.then_some(name))
    }
}

fn parse_tls(text: &str) -> Result<TlsMode, String> {
    text.parse().map_err(|error: ConfigError| error.to_string())
}

fn wrong(text: String) -> Failure {
    Failure { code: "database_misconfigured".to_owned(), ..Failure::usage(text) }
}

pub(crate) fn refused(error: &ConfigError) -> Failure {
    wrong(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(url: Option<&str>, host: Option<&str>) -> DatabaseOptions {
        DatabaseOptions {
            database_url: url.map(str::to_owned),
            postgres_host: host.map(str::to_owned),
            ..DatabaseOptions::default()
        }
    }

    #[test]
    fn the_database_is_where_it_is_said_to_be_once() {
        assert_eq!(options(None, None).config().unwrap(), None);
        let user = DatabaseOptions { postgres_user: Some("a".into()), ..options(None, None) };
        assert_eq!(user.config().unwrap(), None);
        let place = |options: DatabaseOptions| {
            options.config().unwrap().map(|config| config.place().to_string())
        };
        assert_eq!(place(options(Some("postgres://db/x"), None)).unwrap(), "db:5432");
        assert_eq!(place(options(None, Some("db"))).unwrap(), "db:5432");
        let both = options(Some("postgres://u:hunter2@db/x"), Some("db")).config().unwrap_err();
        assert_eq!((both.exit.status(), both.code.as_str()), (2, "database_misconfigured"));
        let url = options(Some("postgres://u:hunter2@db:x/x"), None);
        let text = format!("{url:?} {}", url.config().unwrap_err());
        assert!(!text.contains("hunter2"), "{text}");
    }

    #[test]
    fn prefer_is_refused_for_a_server_elsewhere() {
        let prefer = DatabaseOptions {
            postgres_sslmode: Some(TlsMode::Prefer),
            ..options(None, Some("db"))
        };
        assert!(prefer.config().unwrap_err().message.contains("verify-full"));
        let here = DatabaseOptions { postgres_host: Some("localhost".into()), ..prefer };
        assert!(here.config().is_ok());
    }
}
