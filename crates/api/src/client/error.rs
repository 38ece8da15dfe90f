use aether_types::ErrorCode;

use crate::Problem;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("`{url}` is not the URL of a server, such as http://127.0.0.1:8080")]
    Url { url: String },
    /// The key has characters that no key has.
    #[error("the API key is malformed")]
    Key,
    /// Nothing answers there.
    #[error("connect to {url}")]
    Connect {
        url: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The connection failed after it was made; the request may have been carried out.
    #[error("{context}")]
    Transport {
        context: &'static str,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The server refused, or could not do it.
    #[error("{0}")]
    Problem(Box<Problem>),
    /// Something else than this server answers there.
    #[error("an answer came that is not Aetherium's: {detail}")]
    Unexpected { detail: String },
}

impl ClientError {
    /// The server's own code, where it gave one.
    #[must_use]
    pub fn code(&self) -> Option<ErrorCode> {
        match self {
            Self::Problem(problem) => problem.error_code(),
            Self::Url { .. }
            | Self::Key
            | Self::Connect { .. }
            | Self::Transport { .. }
            | Self::Unexpected { .. } => None,
        }
    }

    pub(super) fn transport(
        context: &'static str,
    ) -> impl FnOnce(Box<dyn std::error::Error + Send + Sync>) -> Self {
        move |source| Self::Transport { context, source }
    }

    pub(super) fn unexpected(detail: impl Into<String>) -> Self {
        Self::Unexpected { detail: detail.into() }
    }
}
