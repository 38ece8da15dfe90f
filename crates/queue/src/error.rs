//! What goes wrong in the queue.

use std::sync::Arc;

use aether_postgres::Trouble;
use aether_types::ErrorCode;
use sqlx::{error::DatabaseError, sqlite::SqliteError};

#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The lease has run out and was taken back, or the entry is gone: another may have the task.
    #[error("the lease was lost")]
    Lost,
    #[error("the queue is busy")]
    Busy,
    /// What is stored cannot be read back.
    #[error("the stored {0} cannot be read")]
    Corrupt(&'static str),
    #[error("{context}")]
    Database {
        context: &'static str,
        #[source]
        source: sqlx::Error,
    },
    /// What the queue is on went away. A claim may have been made, and runs out; the rest can be
    /// repeated.
    #[error("{context}: the queue cannot be reached")]
    Unreachable {
        context: &'static str,
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// There is no room for more entries; nothing was taken in.
    #[error("{context}: the queue is full")]
    Full {
        context: &'static str,
        #[source]
        source: Arc<aether_redis::CallError>,
    },
    #[error("{context}")]
    Redis {
        context: &'static str,
        #[source]
        source: Arc<aether_redis::CallError>,
    },
    /// Others changed the same at the same time, again and again; this was undone.
    #[error("{context}: others changed the same at the same time")]
    Collided {
        context: &'static str,
        #[source]
        source: sqlx::Error,
    },
    #[error("open the queue")]
    Open(#[source] Box<aether_redis::OpenError>),
    /// Tasks of another store are in it, which this one knows nothing of.
    #[error("the queue in Redis at {place} under this prefix is another installation's")]
    Foreign { place: aether_redis::Place },
    #[error("bring the queue's tables up to date")]
    Migration(#[source] Box<sqlx::migrate::MigrateError>),
    /// The tables are not those that this program knows.
    #[error("the queue's tables are not fit for this program")]
    Schema(#[source] Box<aether_postgres::MigrateError>),
}

impl QueueError {
    /// The code that a client sees.
    #[must_use]
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Busy | Self::Unreachable { .. } | Self::Full { .. } | Self::Collided { .. } => {
                ErrorCode::Unavailable
            }
            Self::Lost
            | Self::Corrupt(_)
            | Self::Redis { .. }
            | Self::Database { .. }
            | Self::Open(_)
            | Self::Foreign { .. }
            | Self::Migration(_)
            | Self::Schema(_) => ErrorCode::Internal,
        }
    }

    /// The same call may succeed a moment later.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Busy
            | Self::Unreachable { .. }
            | Self::Full { .. }
            | Self::Redis { .. }
            | Self::Collided { .. }
            | Self::Database { .. } => true,
            Self::Lost
            | Self::Corrupt(_)
            | Self::Open(_)
            | Self::Foreign { .. }
            | Self::Migration(_)
            | Self::Schema(_) => false,
        }
    }
}

/// Adds what was being done to a database error.
pub(crate) trait Context<T> {
    fn context(self, context: &'static str) -> Result<T, QueueError>;
}

impl<T> Context<T> for Result<T, sqlx::Error> {
    fn context(self, context: &'static str) -> Result<T, QueueError> {
        self.map_err(|source| {
            if is_busy_sqlite(&source) {
                return QueueError::Busy;
            }
            match aether_postgres::trouble(&source) {
                Trouble::Busy => QueueError::Busy,
                Trouble::Lost => {
                    QueueError::Unreachable { context, source: Some(Box::new(source)) }
                }
                Trouble::Conflict => QueueError::Collided { context, source },
                Trouble::Other => QueueError::Database { context, source },
            }
        })
    }
}

/// SQLITE_BUSY (5) and SQLITE_LOCKED (6), with their extended forms.
fn is_busy_sqlite(error: &sqlx::Error) -> bool {
    let sqlx::Error::Database(e) = error else { return false };
    let code = e.try_downcast_ref::<SqliteError>().and_then(DatabaseError::code);
    code.and_then(|c| c.parse::<u32>().ok()).is_some_and(|c| matches!(c & 0xff, 5 | 6))
}
