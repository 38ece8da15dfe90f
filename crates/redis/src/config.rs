//! Where Redis is, who asks, and how the way there is protected.
//!
//! Errors name the setting that is wrong and never its value: a URL has a password in it.

use std::{fmt, net::IpAddr, path::PathBuf};

use aether_types::Password;
use percent_encoding::percent_decode_str;
use redis::{
    Client, ConnectionAddr, IntoConnectionInfo as _, ProtocolVersion, RedisConnectionInfo,
    TlsCertificates,
};
use url::Url;

const PORT_DEFAULT: u16 = 6379;
const PREFIX_DEFAULT: &str = "aetherium";
const PREFIX_CHARS_MAX: usize = 64;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    #[error("the URL of Redis is not one such as redis://USER:PASSWORD@HOST:PORT/NUMBER")]
    MalformedUrl,
    #[error("the URL of Redis has the parameter `{0}`, which is not known")]
    UnknownParameter(String),
    #[error("`{0}` is not an address of Redis such as HOST:PORT")]
    MalformedAddress(String),
    #[error("the value of `{0}` cannot be used")]
    BadValue(&'static str),
    #[error("`{0}` is set, and the URL of Redis says it already")]
    SaidTwice(&'static str),
    #[error("a file of authorities is of use only with TLS: rediss://")]
    CaWithoutTls,
    #[error("the file of authorities for Redis cannot be read: {0}")]
    CaFile(String),
    /// What the library finds wrong.
    #[error("the settings of Redis: {0}")]
    Library(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    Tcp { host: String, port: u16, tls: bool },
    Socket(PathBuf),
}

impl Place {
    /// Whether nobody but this machine sees what goes there.
    fn is_here(&self) -> bool {
        match self {
            Self::Socket(_) => true,
            Self::Tcp { host, .. } => {
                host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
            }
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port, .. } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port, .. } => write!(f, "{host}:{port}"),
            Self::Socket(path) => write!(f, "{}", path.display()),
        }
    }
}

/// What is said beside the place; what is `None` has a default.
#[derive(Debug, Clone, Default)]
pub struct Parts {
    pub user: Option<String>,
    pub password: Option<Password>,
    /// Trusted instead of the authorities that this machine trusts.
    pub ca_file: Option<PathBuf>,
    /// The first word of every key and channel.
    pub prefix: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    place: Place,
    user: Option<String>,
    password: Option<Password>,
    number: i64,
    ca_file: Option<PathBuf>,
    prefix: String,
}

impl Config {
    /// `redis://USER:PASSWORD@HOST:PORT/NUMBER`, `rediss://` with TLS, `unix:///PATH`.
    pub fn from_url(text: &str) -> Result<Self, ConfigError> {
        let url = Url::parse(text).map_err(|_| ConfigError::MalformedUrl)?;
        if let Some((key, _)) = url.query_pairs().next() {
            return Err(ConfigError::UnknownParameter(key.into_owned()));
        }
        let given = |text: &str| Some(decoded(text)).filter(|text| !text.is_empty());
        let (user, password) = (given(url.username()), url.password().and_then(given));
        let mut config = match url.scheme() {
            "redis" | "rediss" => {
                let host = url.host_str().map(|host| host.trim_matches(['[', ']']));
                let host = host.and_then(given).ok_or(ConfigError::MalformedUrl)?;
                let port = url.port().unwrap_or(PORT_DEFAULT);
                Self::at(Place::Tcp { host, port, tls: url.scheme() == "rediss" })
            }
            "unix" if url.path().len() > 1 && url.host_str().is_none() => {
                Self::at(Place::Socket(decoded(url.path()).into()))
            }
            _ => return Err(ConfigError::MalformedUrl),
        };
        let number = url.path().trim_matches('/');
        if matches!(config.place, Place::Tcp { .. }) && !number.is_empty() {
            config.number = number.parse::<u16>().map_err(|_| ConfigError::MalformedUrl)?.into();
        }
        config.user = user;
        config.password = password.map(Password::from);
        Ok(config)
    }

    /// `HOST`, `HOST:PORT`, or the path of a socket.
    pub fn from_address(text: &str) -> Result<Self, ConfigError> {
        let malformed = || ConfigError::MalformedAddress(text.to_owned());
        // Who puts a URL here has put a password here too, perhaps.
        if text.contains('@') || text.contains("//") {
            return Err(ConfigError::MalformedAddress("(not shown)".to_owned()));
        }
        if text.starts_with('/') {
            return Ok(Self::at(Place::Socket(text.into())));
        }
        let url = Url::parse(&format!("redis://{text}")).map_err(|_| malformed())?;
        let host = url.host_str().ok_or_else(malformed)?.trim_matches(['[', ']']).to_owned();
        if !url.path().is_empty() || url.query().is_some() {
            return Err(malformed());
        }
        Ok(Self::at(Place::Tcp { host, port: url.port().unwrap_or(PORT_DEFAULT), tls: false }))
    }

    fn at(place: Place) -> Self {
        let (user, password, number, ca_file) = (None, None, 0, None);
        Self { place, user, password, number, ca_file, prefix: PREFIX_DEFAULT.to_owned() }
    }

    /// Adds what was said beside the place. What both say is refused, so that no word is lost
    /// unseen.
    pub fn with(mut self, parts: Parts) -> Result<Self, ConfigError> {
        let Parts { user, password, ca_file, prefix } = parts;
        if user.is_some() && self.user.is_some() {
            return Err(ConfigError::SaidTwice("user"));
        }
        if password.is_some() && self.password.is_some() {
            return Err(ConfigError::SaidTwice("password"));
        }
        if ca_file.is_some() && !matches!(self.place, Place::Tcp { tls: true, .. }) {
            return Err(ConfigError::CaWithoutTls);
        }
        self.user = user.or(self.user);
        self.password = password.or(self.password);
        self.ca_file = ca_file;
        if let Some(prefix) = prefix {
            self.prefix = checked(prefix)?;
        }
        Ok(self)
    }

    pub fn place(&self) -> &Place {
        &self.place
    }

    /// The first word of every key and channel of ours, in braces: all keys are then in one slot.
    pub fn root(&self) -> String {
        format!("{{{}}}", self.prefix)
    }

    /// Words for a warning where what goes there can be read or answered by another.
    pub fn weakness(&self) -> Option<&'static str> {
        match &self.place {
            Place::Tcp { tls: false, .. } if !self.place.is_here() => {
                Some("passwords and tasks cross the network in clear text")
            }
            Place::Tcp { .. } | Place::Socket(_) => None,
        }
    }

    pub(crate) fn client(&self) -> Result<Client, ConfigError> {
        let library = |error: redis::RedisError| ConfigError::Library(error.to_string());
        let address = match &self.place {
            Place::Socket(path) => ConnectionAddr::Unix(path.clone()),
            Place::Tcp { host, port, tls: false } => ConnectionAddr::Tcp(host.clone(), *port),
            Place::Tcp { host, port, tls: true } => {
                let (host, port) = (host.clone(), *port);
                ConnectionAddr::TcpTls { host, port, insecure: false, tls_params: None }
            }
        };
        // Messages come on the same connection, which only the newer protocol can.
        let mut settings = RedisConnectionInfo::default()
            .set_db(self.number)
            .set_protocol(ProtocolVersion::RESP3)
            .set_skip_set_lib_name();
        if let Some(user) = &self.user {
            settings = settings.set_username(user);
        }
        if let Some(password) = self.password.as_ref().map(Password::expose) {
            settings = settings.set_password(password);
        }
        let info = address.into_connection_info().map_err(library)?.set_redis_settings(settings);
        let Some(file) = &self.ca_file else { return Client::open(info).map_err(library) };
        let pem = std::fs::read(file).map_err(|error| ConfigError::CaFile(error.to_string()))?;
        let trusted = TlsCertificates { client_tls: None, root_cert: Some(pem) };
        Client::build_with_tls(info, trusted).map_err(library)
    }
}

fn checked(prefix: String) -> Result<String, ConfigError> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | ':');
    if (1..=PREFIX_CHARS_MAX).contains(&prefix.len()) && prefix.chars().all(is_plain) {
        return Ok(prefix);
    }
    Err(ConfigError::BadValue("prefix"))
}

fn decoded(text: &str) -> String {
    percent_decode_str(text).decode_utf8_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(url: &str) -> Config {
        Config::from_url(url).unwrap()
    }

    fn tcp(host: &str, port: u16, tls: bool) -> Place {
        Place::Tcp { host: host.into(), port, tls }
    }

    #[test]
    fn a_url_is_read() {
        let read = config("redis://a%40b:s%2Fcret@cache.example:7000/3");
        assert_eq!(read.place, tcp("cache.example", 7000, false));
        assert_eq!((read.user.as_deref(), read.number), (Some("a@b"), 3));
        assert_eq!(read.password, Some(Password::from("s/cret".to_owned())));
        assert_eq!(config("redis://:word@h").password, Some(Password::from("word".to_owned())));
        let read = config("rediss://[::1]");
        assert_eq!(
            (read.place.to_string().as_str(), read.place),
            ("[::1]:6379", tcp("::1", 6379, true))
        );
        assert_eq!(config("unix:///run/redis.sock").place, Place::Socket("/run/redis.sock".into()));
        assert_eq!(config("redis://h").root(), "{aetherium}");
    }

    #[test]
    fn an_address_is_read() {
        let place = |text| Config::from_address(text).unwrap().place;
        assert_eq!(place("cache"), tcp("cache", 6379, false));
        assert_eq!(place("cache:7000"), tcp("cache", 7000, false));
        assert_eq!(place("[::1]:7000"), tcp("::1", 7000, false));
        assert_eq!(place("/run/redis.sock"), Place::Socket("/run/redis.sock".into()));
        for wrong in ["", "cache:x", "cache:70000", "cache/1", "redis://u:hunter2@h", "u:hunter2@h"]
        {
            let error = Config::from_address(wrong).unwrap_err();
            assert!(!error.to_string().contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn what_is_wrong_is_named_and_nothing_secret_is_told() {
        for url in [
            "",
            "http://u:hunter2@h",
            "redis:hunter2",
            "redis://u:hunter2@h:99999",
            "redis://u:hunter2@h/x",
            "redis://u:hunter2@h/0?protocol=resp2",
            "redis://",
            "unix://host/hunter2",
        ] {
            let error = Config::from_url(url).unwrap_err();
            assert!(!format!("{error} {error:?}").contains("hunter2"), "{error}");
        }
        assert!(!format!("{:?}", config("redis://u:hunter2@h")).contains("hunter2"));
        let twice = Parts { password: Some("b".to_owned().into()), ..Parts::default() };
        let said = config("redis://u:a@h").with(twice).unwrap_err();
        assert_eq!(said, ConfigError::SaidTwice("password"));
        let ca = Parts { ca_file: Some("/x".into()), ..Parts::default() };
        assert_eq!(config("redis://h").with(ca.clone()).unwrap_err(), ConfigError::CaWithoutTls);
        assert!(matches!(
            config("rediss://h").with(ca).unwrap().client().unwrap_err(),
            ConfigError::CaFile(_)
        ));
        for wrong in ["", "a b", "a{b", &"x".repeat(65)] {
            let parts = Parts { prefix: Some(wrong.to_owned()), ..Parts::default() };
            assert!(config("redis://h").with(parts).is_err(), "{wrong}");
        }
    }

    #[test]
    fn clear_text_beyond_this_machine_is_weak() {
        for (url, weak) in [
            ("redis://cache", true),
            ("rediss://cache", false),
            ("redis://localhost", false),
            ("redis://127.1.2.3", false),
            ("unix:///run/redis.sock", false),
        ] {
            assert_eq!(config(url).weakness().is_some(), weak, "{url}");
        }
    }
}
