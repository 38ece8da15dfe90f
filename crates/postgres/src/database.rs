//! Connections to a server, as many as the limits allow, and a way to get them back when it was
//! away.

use std::time::Duration;

use sqlx::{ConnectOptions as _, Connection as _, PgConnection, PgPool, postgres::PgPoolOptions};

use crate::{Config, ConfigError, Place};

/// A transaction whose client says nothing for so long is ended by the server: its process may be
/// gone with the network, and its locks must not stay.
const SILENT_TRANSACTION: Duration = Duration::from_secs(30);

/// How soon the server finds out that a client's host is gone.
const DEAD_PEER: Duration = Duration::from_secs(30);

/// The server says something on a quiet connection after so long, so that no router forgets it.
const KEEPALIVE: Duration = Duration::from_mins(1);

#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("connect to the database at {place}")]
    Connect {
        place: Place,
        #[source]
        source: sqlx::Error,
    },
    #[error("the database at {place} did not answer within {} s", after.as_secs())]
    Silent { place: Place, after: Duration },
}

/// What a server says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// Such as `15.14`.
    pub version: String,
    /// The number before its first dot.
    pub major: u32,
    /// What the server takes from others than its owner.
    pub connections_max: u32,
}

/// A database, reached by a pool of connections. Clones share the pool.
#[derive(Debug, Clone)]
pub struct Database {
    pool: PgPool,
    config: Config,
}

impl Database {
    /// Connects once, so that what is wrong is found now, and said as it is.
    pub async fn open(config: Config) -> Result<Self, OpenError> {
        config.check()?;
        if let Some(weakness) = config.weakness() {
            tracing::warn!(
                place = %config.place(), tls = config.tls_mode().as_str(), weakness,
                "the way to the database is weaker than it could be"
            );
        }
        let connection = connect(&config, &session(&config)).await?;
        // That it says goodbye is a courtesy.
        let _ = connection.close().await;
        let limits = config.pool_limits();
        let pool = PgPoolOptions::new()
            .max_connections(limits.connections_max)
            .min_connections(limits.connections_min.min(limits.connections_max))
            .acquire_timeout(limits.acquire_timeout)
            .idle_timeout(limits.idle_timeout)
            .max_lifetime(limits.lifetime_max)
            // One round trip each time; without it the first requests after a restart of the
            // server would fail, one for each connection.
            .test_before_acquire(true)
            .connect_lazy_with(
                config.connect_options(&session(&config)).disable_statement_logging(),
            );
        Ok(Self { pool, config })
    }

    pub fn pool(&self) -> &PgPool {
        &self.pool
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Connections of this process at most, the two that listen included.
    pub fn connections_of_ours(&self) -> u32 {
        self.config.pool_limits().connections_max.saturating_add(2)
    }

    pub async fn facts(&self) -> Result<Facts, OpenError> {
        let asked: Result<(String, i32), _> = sqlx::query_as(
            "select current_setting('server_version'), current_setting('max_connections')::int \
             - current_setting('superuser_reserved_connections')::int",
        )
        .fetch_one(&self.pool)
        .await;
        let place = || self.config.place().clone();
        let (version, connections) =
            asked.map_err(|source| OpenError::Connect { place: place(), source })?;
        let major = version.split(|c: char| !c.is_ascii_digit()).next();
        let major = major.and_then(|digits| digits.parse().ok()).unwrap_or(0);
        Ok(Facts { version, major, connections_max: u32::try_from(connections).unwrap_or(0) })
    }

    /// A pool of one connection for notifications, which would otherwise hold one of the others
    /// for ever.
    pub(crate) fn listening_pool(&self) -> PgPool {
        let limits = self.config.pool_limits();
        PgPoolOptions::new()
            .max_connections(1)
            .acquire_timeout(limits.acquire_timeout)
            .idle_timeout(None)
            .max_lifetime(None)
            .connect_lazy_with(
                self.config.connect_options(&session(&self.config)).disable_statement_logging(),
            )
    }

    /// Waits for what is under way, and closes every connection.
    pub async fn close(&self) {
        self.pool.close().await;
    }
}

/// What every session is set to, whatever the server's own defaults are.
fn session(config: &Config) -> Vec<(&'static str, String)> {
    let ms = |time: Duration| time.as_millis().to_string();
    vec![
        ("default_transaction_isolation", "read committed".to_owned()),
        ("statement_timeout", ms(config.pool_limits().statement_timeout)),
        ("idle_in_transaction_session_timeout", ms(SILENT_TRANSACTION)),
        ("tcp_user_timeout", ms(DEAD_PEER)),
        ("tcp_keepalives_idle", KEEPALIVE.as_secs().to_string()),
    ]
}

/// One connection of its own, for as long as it may take to get one from the pool.
pub(crate) async fn connect(
    config: &Config,
    session: &[(&str, String)],
) -> Result<PgConnection, OpenError> {
    let options = config.connect_options(session).disable_statement_logging();
    let after = config.pool_limits().acquire_timeout;
    let place = || config.place().clone();
    match tokio::time::timeout(after, options.connect()).await {
        Ok(Ok(connection)) => Ok(connection),
        Ok(Err(source)) => Err(OpenError::Connect { place: place(), source }),
        Err(_) => Err(OpenError::Silent { place: place(), after }),
    }
}
