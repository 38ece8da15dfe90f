//! Where the database is, who asks, how the way there is protected, and how much is asked at once.
//!
//! Errors name the setting that is wrong and never its value: a URL has a password in it.

use std::{fmt, net::IpAddr, path::PathBuf, str::FromStr, time::Duration};

use aether_types::Password;
use sqlx::postgres::{PgConnectOptions, PgSslMode};
use url::Url;

const PORT_DEFAULT: u16 = 5432;
const NAME_DEFAULT: &str = "aetherium";

/// Shown by `pg_stat_activity`.
const APPLICATION: &str = "aetherium";

/// More than there are statements: each is prepared once on a connection.
const STATEMENTS_CACHED: usize = 256;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    #[error("the database's URL is not one such as postgres://USER:PASSWORD@HOST:PORT/DATABASE")]
    MalformedUrl,
    #[error("the database's URL has the parameter `{0}`, which is not known")]
    UnknownParameter(String),
    #[error("the value of `{0}` cannot be used")]
    BadValue(&'static str),
    #[error("`{0}` is set, and the database's URL says it already")]
    SaidTwice(&'static str),
    #[error(
        "the TLS mode `prefer` would go on in clear text whenever the server, or somebody between, \
         says that it has no TLS; for a server beyond this machine say `verify-full`, or else \
         `require` or `disable`"
    )]
    PreferBeyondLoopback,
    #[error(
        "the TLS mode `verify-ca` is not offered: besides your own authority this machine's are \
         trusted, and without a look at the name any host with a certificate of theirs would pass \
         for the database; say `verify-full`, which checks the name too"
    )]
    VerifyCa,
    #[error("the database's certificate can be checked only on a connection over TCP")]
    TlsOnSocket,
    #[error("{0} must be at least {1}")]
    TooSmall(&'static str, u32),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    Tcp {
        host: String,
        port: u16,
    },
    /// The folder of the server's Unix socket.
    Socket {
        folder: PathBuf,
        port: u16,
    },
}

impl Place {
    /// Whether nobody but this machine sees what goes there.
    fn is_here(&self) -> bool {
        match self {
            Self::Socket { .. } => true,
            Self::Tcp { host, .. } => {
                host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
            }
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
            Self::Socket { folder, port } => write!(f, "{}/.s.PGSQL.{port}", folder.display()),
        }
    }
}

/// The words of `sslmode`, with libpq's meanings. `verify-ca` is refused, see
/// [`ConfigError::VerifyCa`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TlsMode {
    Disable,
    /// TLS where the server has it. Only to this machine.
    Prefer,
    /// Encrypted, to whoever answers.
    Require,
    VerifyFull,
}

impl TlsMode {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Disable => "disable",
            Self::Prefer => "prefer",
            Self::Require => "require",
            Self::VerifyFull => "verify-full",
        }
    }

    fn verifies(self) -> bool {
        match self {
            Self::VerifyFull => true,
            Self::Disable | Self::Prefer | Self::Require => false,
        }
    }
}

impl FromStr for TlsMode {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        if text == "verify-ca" {
            return Err(ConfigError::VerifyCa);
        }
        [Self::Disable, Self::Prefer, Self::Require, Self::VerifyFull]
            .into_iter()
            .find(|mode| mode.as_str() == text)
            .ok_or(ConfigError::BadValue("sslmode"))
    }
}

/// What one process asks of the server at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// A server has 100 by default, a few of them reserved: this leaves room for six processes. A
    /// statement takes well under a millisecond, so that more seldom carry more.
    pub connections_max: u32,
    /// Kept open, so that a request after a quiet time need not wait for a connection.
    pub connections_min: u32,
    /// From asking for a connection to giving up: as long as SQLite waits for its lock. A server
    /// that restarts is back within it.
    pub acquire_timeout: Duration,
    /// Connections beyond the minimum are closed after so long without use.
    pub idle_timeout: Duration,
    /// Each is replaced after so long: what a server keeps for one grows, and names that now
    /// resolve elsewhere are followed.
    pub lifetime_max: Duration,
    /// The server ends a statement that takes longer. Ours take milliseconds.
    pub statement_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections_max: 16,
            connections_min: 1,
            acquire_timeout: Duration::from_secs(5),
            idle_timeout: Duration::from_mins(10),
            lifetime_max: Duration::from_mins(30),
            statement_timeout: Duration::from_secs(15),
        }
    }
}

/// As they come from outside; what is `None` has a default.
#[derive(Debug, Clone, Default)]
pub struct Parts {
    pub host: Option<String>,
    pub port: Option<u16>,
    pub user: Option<String>,
    pub password: Option<Password>,
    pub database: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    place: Place,
    user: String,
    password: Option<Password>,
    database: String,
    tls: Option<TlsMode>,
    /// Trusted besides the authorities that this machine trusts.
    ca_file: Option<PathBuf>,
    limits: Limits,
}

impl Config {
    /// `postgres://USER:PASSWORD@HOST:PORT/DATABASE?sslmode=…&sslrootcert=…`; `host` as a parameter
    /// may be the folder of a Unix socket.
    pub fn from_url(text: &str) -> Result<Self, ConfigError> {
        // `postgres://USER@/DATABASE` is a URL for libpq, and not for the standard.
        let url = Url::parse(text)
            .or_else(|_| Url::parse(&text.replacen("@/", "@localhost/", 1)))
            .map_err(|_| ConfigError::MalformedUrl)?;
        if !matches!(url.scheme(), "postgres" | "postgresql") || url.cannot_be_a_base() {
            return Err(ConfigError::MalformedUrl);
        }
        let given = |text: &str| Some(decoded(text)).filter(|text| !text.is_empty());
        let host = url.host_str().map(|host| host.trim_matches(['[', ']']));
        let mut parts = Parts {
            host: host.and_then(given),
            port: url.port(),
            user: given(url.username()),
            password: url.password().map(decoded).map(Password::from),
            database: given(url.path().trim_start_matches('/')),
        };
        let (mut tls, mut ca_file) = (None, None);
        for (key, value) in url.query_pairs() {
            match &*key {
                "sslmode" => tls = Some(value.parse()?),
                "sslrootcert" => ca_file = Some(PathBuf::from(&*value)),
                "host" => parts.host = Some(value.into_owned()),
                _ => return Err(ConfigError::UnknownParameter(key.into_owned())),
            }
        }
        let mut config = Self::from_parts(parts)?;
        config.tls = tls;
        config.ca_file = ca_file;
        Ok(config)
    }

    pub fn from_parts(parts: Parts) -> Result<Self, ConfigError> {
        let port = parts.port.unwrap_or(PORT_DEFAULT);
        let host = parts.host.unwrap_or_else(|| "localhost".to_owned());
        if host.is_empty() || host.contains('\0') {
            return Err(ConfigError::BadValue("host"));
        }
        let place = if host.starts_with('/') {
            Place::Socket { folder: host.into(), port }
        } else {
            Place::Tcp { host, port }
        };
        let user = parts.user.unwrap_or_else(|| NAME_DEFAULT.to_owned());
        Ok(Self {
            place,
            database: parts.database.unwrap_or_else(|| NAME_DEFAULT.to_owned()),
            user,
            password: parts.password,
            tls: None,
            ca_file: None,
            limits: Limits::default(),
        })
    }

    /// Adds what was said beside a URL. What both say is refused, so that no word is lost unseen.
    pub fn tls(
        mut self,
        mode: Option<TlsMode>,
        ca_file: Option<PathBuf>,
    ) -> Result<Self, ConfigError> {
        if mode.is_some() && self.tls.is_some() {
            return Err(ConfigError::SaidTwice("sslmode"));
        }
        if ca_file.is_some() && self.ca_file.is_some() {
            return Err(ConfigError::SaidTwice("sslrootcert"));
        }
        self.tls = mode.or(self.tls);
        self.ca_file = ca_file.or(self.ca_file);
        Ok(self)
    }

    #[must_use]
    pub fn limits(self, limits: Limits) -> Self {
        Self { limits, ..self }
    }

    #[must_use]
    pub fn database(self, name: &str) -> Self {
        Self { database: name.to_owned(), ..self }
    }

    pub fn place(&self) -> &Place {
        &self.place
    }

    pub(crate) fn pool_limits(&self) -> Limits {
        self.limits
    }

    /// What was asked for; else checked in full, but for a server on this machine.
    pub fn tls_mode(&self) -> TlsMode {
        self.tls.unwrap_or(match self.place {
            Place::Socket { .. } => TlsMode::Disable,
            Place::Tcp { .. } if self.place.is_here() => TlsMode::Prefer,
            Place::Tcp { .. } => TlsMode::VerifyFull,
        })
    }

    /// Words for a warning where what goes there can be read or answered by another.
    pub fn weakness(&self) -> Option<&'static str> {
        if self.place.is_here() {
            return None;
        }
        match self.tls_mode() {
            TlsMode::Disable => Some("passwords and data cross the network in clear text"),
            TlsMode::Require => Some("the server's certificate is not checked"),
            TlsMode::Prefer | TlsMode::VerifyFull => None,
        }
    }

    /// Refuses what cannot be meant.
    pub fn check(&self) -> Result<(), ConfigError> {
        let mode = self.tls_mode();
        if mode == TlsMode::Prefer && !self.place.is_here() {
            return Err(ConfigError::PreferBeyondLoopback);
        }
        if mode.verifies() && matches!(self.place, Place::Socket { .. }) {
            return Err(ConfigError::TlsOnSocket);
        }
        if self.limits.connections_max < 2 {
            // One may sit in a long transaction, and health must answer meanwhile.
            return Err(ConfigError::TooSmall("the greatest number of connections", 2));
        }
        for (name, time) in [
            ("the wait for a connection", self.limits.acquire_timeout),
            ("the time of a statement", self.limits.statement_timeout),
        ] {
            if time < Duration::from_secs(1) {
                return Err(ConfigError::TooSmall(name, 1));
            }
        }
        Ok(())
    }

    /// With these settings of the session: names and values are ours, never a user's.
    pub(crate) fn connect_options(&self, session: &[(&str, String)]) -> PgConnectOptions {
        let mut options = PgConnectOptions::new_without_pgpass()
            .username(&self.user)
            .database(&self.database)
            .application_name(APPLICATION)
            .statement_cache_capacity(STATEMENTS_CACHED)
            .ssl_mode(match self.tls_mode() {
                TlsMode::Disable => PgSslMode::Disable,
                TlsMode::Prefer => PgSslMode::Prefer,
                TlsMode::Require => PgSslMode::Require,
                TlsMode::VerifyFull => PgSslMode::VerifyFull,
            })
            .options(session.iter().map(|(name, value)| (*name, value.as_str())));
        options = match &self.place {
            Place::Tcp { host, port } => options.host(host).port(*port),
            Place::Socket { folder, port } => options.socket(folder).port(*port),
        };
        if let Some(password) = self.password.as_ref().map(Password::expose) {
            options = options.password(password);
        }
        if let Some(file) = &self.ca_file {
            options = options.ssl_root_cert(file);
        }
        options
    }
}

fn decoded(text: &str) -> String {
    // `url` keeps these parts percent-encoded.
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, after @ ..] = rest {
        let hex = |b: &u8| char::from(*b).to_digit(16).and_then(|d| u8::try_from(d).ok());
        match after {
            [high, low, after @ ..] if *first == b'%' => {
                if let (Some(high), Some(low)) = (hex(high), hex(low)) {
                    bytes.push(high << 4 | low);
                    rest = after;
                    continue;
                }
            }
            _ => {}
        }
        bytes.push(*first);
        rest = after;
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(url: &str) -> Config {
        Config::from_url(url).unwrap()
    }

    #[test]
    fn a_url_is_read() {
        let read = config("postgres://a%40b:s%2Fcret@db.example:6000/own?sslmode=require");
        assert_eq!(read.place, Place::Tcp { host: "db.example".into(), port: 6000 });
        assert_eq!((read.user.as_str(), read.database.as_str()), ("a@b", "own"));
        assert_eq!(read.password, Some(Password::from("s/cret".to_owned())));
        assert_eq!(read.tls_mode(), TlsMode::Require);
        let read = config("postgresql://[::1]");
        assert_eq!(read.place, Place::Tcp { host: "::1".into(), port: 5432 });
        assert_eq!(read.place.to_string(), "[::1]:5432");
        assert_eq!(read.database, "aetherium");
        let read = config("postgres://me:p@/own?host=/run/postgresql");
        assert_eq!(read.user, "me");
        assert_eq!(read.place.to_string(), "/run/postgresql/.s.PGSQL.5432");
        assert_eq!(read.tls_mode(), TlsMode::Disable);
        let read = config("postgres:///own?host=/run/postgresql");
        assert_eq!(read.place.to_string(), "/run/postgresql/.s.PGSQL.5432");
    }

    #[test]
    fn what_is_wrong_is_named_and_nothing_secret_is_told() {
        for url in [
            "",
            "mysql://u:hunter2@h/d",
            "postgres:hunter2",
            "postgres://u:hunter2@h:99999/d",
            "postgres://u:p@h/d?sslmode=hunter2",
            "postgres://u:p@h/d?passfile=hunter2",
        ] {
            let error = Config::from_url(url).unwrap_err();
            assert!(!format!("{error} {error:?}").contains("hunter2"), "{error}");
        }
        let read = config("postgres://u:hunter2@h/d");
        assert!(!format!("{read:?}").contains("hunter2"));
    }

    #[test]
    fn a_server_elsewhere_is_checked_in_full_unless_told_otherwise() {
        for here in ["localhost", "127.0.0.1", "127.1.2.3", "[::1]"] {
            let read = config(&format!("postgres://{here}/d"));
            assert_eq!(read.tls_mode(), TlsMode::Prefer, "{here}");
            assert_eq!((read.check(), read.weakness()), (Ok(()), None));
        }
        let far = config("postgres://db/d");
        assert_eq!((far.tls_mode(), far.weakness()), (TlsMode::VerifyFull, None));
        let prefer = far.clone().tls(Some(TlsMode::Prefer), None).unwrap();
        assert_eq!(prefer.check(), Err(ConfigError::PreferBeyondLoopback));
        for mode in [TlsMode::Disable, TlsMode::Require] {
            let chosen = far.clone().tls(Some(mode), None).unwrap();
            assert_eq!((chosen.check(), chosen.weakness().is_some()), (Ok(()), true));
        }
        let weak = Config::from_url("postgres://db/d?sslmode=verify-ca").unwrap_err();
        assert_eq!(weak, ConfigError::VerifyCa);
        assert!(weak.to_string().contains("verify-full"));
        let twice = config("postgres://db/d?sslmode=require").tls(Some(TlsMode::Disable), None);
        assert_eq!(twice, Err(ConfigError::SaidTwice("sslmode")));
    }

    #[test]
    fn a_pool_of_one_is_refused() {
        let limits = Limits { connections_max: 1, ..Limits::default() };
        assert!(config("postgres://localhost").limits(limits).check().is_err());
    }
}
