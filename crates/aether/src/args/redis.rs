//! Where the queue is, if it is in Redis.

use std::path::PathBuf;

use aether_redis::{Config, ConfigError, Parts};
use aether_types::Password;

use crate::failure::Failure;

/// Said by these alone: one that is there for something else must not move the queue.
const MOVES: &str = "REDIS_URL or REDIS_ADDR";

#[expect(clippy::struct_field_names, reason = "they are the names of the options")]
#[derive(Clone, Default, clap::Args)]
#[command(next_help_heading = "Redis")]
pub(crate) struct RedisOptions {
    /// Keep the queue in Redis: redis://USER:PASSWORD@HOST:PORT/NUMBER, or rediss:// with TLS. Best
    /// in the environment, since other users see command lines
    #[arg(long, env = "REDIS_URL", value_name = "URL", hide_env_values = true)]
    redis_url: Option<String>,
    /// Instead of a URL: HOST:PORT, or the path of a socket
    #[arg(long, env = "REDIS_ADDR", value_name = "ADDRESS")]
    redis_addr: Option<String>,
    /// Its password is taken from REDIS_PASSWORD
    #[arg(long, env = "REDIS_USER", value_name = "NAME")]
    redis_user: Option<String>,
    #[arg(long, env = "REDIS_PASSWORD", hide = true, hide_env_values = true)]
    redis_password: Option<String>,
    /// Trust the authorities in this file (PEM) instead of those of this machine; with rediss://
    #[arg(long, env = "REDIS_CA_FILE", value_name = "FILE")]
    redis_ca_file: Option<PathBuf>,
    /// The first word of all keys, for several installations on one server [default: aetherium]
    #[arg(long, env = "REDIS_PREFIX", value_name = "WORD")]
    redis_prefix: Option<String>,
}

/// Without passwords, of which the URL has one.
impl std::fmt::Debug for RedisOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RedisOptions")
            .field("url", &self.redis_url.is_some())
            .field("user", &self.redis_user)
            .finish_non_exhaustive()
    }
}

impl RedisOptions {
    /// `None`: the queue is where the store is.
    pub(crate) fn config(&self) -> Result<Option<Config>, Failure> {
        let config = match (&self.redis_url, &self.redis_addr) {
            (None, None) => {
                if let Some(name) = self.left_alone() {
                    tracing::warn!("{name} is set and does nothing without {MOVES}");
                }
                return Ok(None);
            }
            (Some(_), Some(_)) => {
                let text = "REDIS_URL and REDIS_ADDR both say where Redis is";
                return Err(wrong(text.to_owned()).hint("unset one of them"));
            }
            (Some(url), None) => Config::from_url(url),
            (None, Some(address)) => Config::from_address(address),
        };
        let parts = Parts {
            user: self.redis_user.clone(),
            password: self.redis_password.clone().map(Password::from),
            ca_file: self.redis_ca_file.clone(),
            prefix: self.redis_prefix.clone(),
        };
        config
            .and_then(|config| config.with(parts))
            .map(Some)
            .map_err(|error| refused_redis(&error))
    }

    /// One that was set, and names no place.
    fn left_alone(&self) -> Option<&'static str> {
        [
            ("REDIS_USER", self.redis_user.is_some()),
            ("REDIS_PASSWORD", self.redis_password.is_some()),
            ("REDIS_CA_FILE", self.redis_ca_file.is_some()),
            ("REDIS_PREFIX", self.redis_prefix.is_some()),
        ]
        .into_iter()
        .find_map(|(name, is_set)| is_set.then_some(name))
    }
}

fn wrong(text: String) -> Failure {
    Failure { code: "redis_misconfigured".to_owned(), ..Failure::usage(text) }
}

pub(crate) fn refused_redis(error: &ConfigError) -> Failure {
    wrong(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(url: Option<&str>, address: Option<&str>) -> RedisOptions {
        RedisOptions {
            redis_url: url.map(str::to_owned),
            redis_addr: address.map(str::to_owned),
            ..RedisOptions::default()
        }
    }

    #[test]
    fn redis_is_where_it_is_said_to_be_once() {
        assert_eq!(options(None, None).config().unwrap(), None);
        let word = RedisOptions { redis_prefix: Some("a".into()), ..options(None, None) };
        assert_eq!(word.config().unwrap(), None);
        let place = |options: RedisOptions| {
            options.config().unwrap().map(|config| config.place().to_string())
        };
        assert_eq!(place(options(Some("rediss://cache/1"), None)).unwrap(), "cache:6379");
        assert_eq!(place(options(None, Some("cache:7000"))).unwrap(), "cache:7000");
        let both = options(Some("redis://u:hunter2@cache"), Some("cache")).config().unwrap_err();
        assert_eq!((both.exit.status(), both.code.as_str()), (2, "redis_misconfigured"));
        let url = options(Some("redis://u:hunter2@cache:x"), None);
        let text = format!("{url:?} {}", url.config().unwrap_err());
        assert!(!text.contains("hunter2"), "{text}");
    }
}
