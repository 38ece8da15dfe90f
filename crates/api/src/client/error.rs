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
    /// What was given to trust has no certificate in it.
    #[error("the authorities to trust are not certificates as PEM")]
    Authority,
    /// Nothing answers there.
    #[error("connect to {url}")]
    Connect {
        url: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Something answers there that does not prove to be the server.
    #[error("the server at {url} shows a certificate that is not trusted")]
    Certificate {
        url: String,
        #[source]
        source: rustls::Error,
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
            | Self::Authority
            | Self::Connect { .. }
            | Self::Certificate { .. }
            | Self::Transport { .. }
            | Self::Unexpected { .. } => None,
        }
    }

    /// Why no connection came about.
    pub(super) fn connect(url: &str, source: Box<dyn std::error::Error + Send + Sync>) -> Self {
        let url = url.to_owned();
        match refused_certificate(&*source) {
            Some(source) => Self::Certificate { url, source },
            None => Self::Connect { url, source },
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

/// An I/O error hides what it was made of from the chain of sources.
fn refused_certificate(error: &(dyn std::error::Error + 'static)) -> Option<rustls::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        let inner = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        let tls = error
            .downcast_ref::<rustls::Error>()
            .or_else(|| inner.and_then(|inner| inner.downcast_ref::<rustls::Error>()));
        if let Some(refused @ rustls::Error::InvalidCertificate(_)) = tls {
            return Some(refused.clone());
        }
        next = match inner {
            Some(inner) if tls.is_none() => Some(inner as &(dyn std::error::Error + 'static)),
            Some(_) | None => error.source(),
        };
    }
    None
}
