//! What goes wrong with logs.

use aether_types::{
    ErrorCode,
    limits::{LOG_QUERY_LIMIT_MAX, LOG_TEXT_BYTES_MAX},
};

/// Display texts say what to do, where a client can do something.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error("the text to search for has {bytes} bytes; {LOG_TEXT_BYTES_MAX} are the most")]
    TextTooLong { bytes: usize },
    #[error("the limit is {limit}; it is from 1 to {LOG_QUERY_LIMIT_MAX}")]
    BadLimit { limit: u32 },
    #[error("the query took longer than {seconds} s; ask for a shorter time or for one VM")]
    TooSlow { seconds: u64 },
    #[error("as many queries as are answered at once are being answered; try again later")]
    Busy,
    #[error("the log store has ended")]
    Closed,
    /// `reason` says which address, without a password, and what is wrong.
    #[error("Loki does not answer: {reason}; lines are kept here until it does")]
    LokiUnavailable { reason: String },
    #[error("Loki refuses: {reason}")]
    LokiRefuses { reason: String },
    #[error("`{shown}` is not the address of a Loki: {reason}")]
    LokiAddress { shown: String, reason: String },
    /// What is stored cannot be read back.
    #[error("the stored {0} cannot be read")]
    Corrupt(&'static str),
    #[error("write log entries")]
    Write(#[source] std::sync::Arc<sqlx::Error>),
    #[error("{context}")]
    Database {
        context: &'static str,
        #[source]
        source: sqlx::Error,
    },
    #[error("bring the log store's tables up to date")]
    Migration(#[source] Box<sqlx::migrate::MigrateError>),
}

impl LogError {
    /// The code that a client sees.
    #[must_use]
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::TextTooLong { .. } | Self::BadLimit { .. } => ErrorCode::InvalidRequest,
            Self::TooSlow { .. } | Self::Busy | Self::Closed | Self::LokiUnavailable { .. } => {
                ErrorCode::Unavailable
            }
            Self::LokiRefuses { .. }
            | Self::LokiAddress { .. }
            | Self::Corrupt(_)
            | Self::Write(_)
            | Self::Database { .. }
            | Self::Migration(_) => ErrorCode::Internal,
        }
    }

    /// The same call may succeed a moment later.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Busy | Self::LokiUnavailable { .. } | Self::Write(_) | Self::Database { .. } => {
                true
            }
            Self::TextTooLong { .. }
            | Self::BadLimit { .. }
            | Self::TooSlow { .. }
            | Self::Closed
            | Self::LokiRefuses { .. }
            | Self::LokiAddress { .. }
            | Self::Corrupt(_)
            | Self::Migration(_) => false,
        }
    }
}

/// Adds what was being done to a database error.
pub(crate) trait Context<T> {
    fn context(self, context: &'static str) -> Result<T, LogError>;
}

impl<T> Context<T> for Result<T, sqlx::Error> {
    fn context(self, context: &'static str) -> Result<T, LogError> {
        self.map_err(|source| match source {
            sqlx::Error::PoolTimedOut => LogError::Busy,
            sqlx::Error::PoolClosed => LogError::Closed,
            source => LogError::Database { context, source },
        })
    }
}
