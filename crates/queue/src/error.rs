//! What goes wrong in the queue.

use aether_types::ErrorCode;

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
    #[error("bring the queue's tables up to date")]
    Migration(#[source] Box<sqlx::migrate::MigrateError>),
}

impl QueueError {
    /// The code that a client sees.
    #[must_use]
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Busy => ErrorCode::Unavailable,
            Self::Lost | Self::Corrupt(_) | Self::Database { .. } | Self::Migration(_) => {
                ErrorCode::Internal
            }
        }
    }

    /// The same call may succeed a moment later.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Busy | Self::Database { .. } => true,
            Self::Lost | Self::Corrupt(_) | Self::Migration(_) => false,
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
            let busy = match &source {
                sqlx::Error::Database(e) => is_busy(e.code().as_deref()),
                _ => false,
            };
            if busy { QueueError::Busy } else { QueueError::Database { context, source } }
        })
    }
}

/// SQLITE_BUSY (5) and SQLITE_LOCKED (6), with their extended forms.
fn is_busy(code: Option<&str>) -> bool {
    code.and_then(|c| c.parse::<u32>().ok()).is_some_and(|c| matches!(c & 0xff, 5 | 6))
}
