use std::{io, path::PathBuf};

/// Why a certificate or a key is of no use. No variant carries key material.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("read {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{0} has no certificate in it, as PEM")]
    NoCertificate(String),
    #[error("{0} has no private key in it, as PEM")]
    NoKey(String),
    #[error("the private key in {0} is of a kind that cannot be used")]
    UnusableKey(String),
    #[error("the private key in {key} is not that of the certificate in {certificate}")]
    Mismatch { certificate: String, key: String },
    #[error("{0} is not a certificate that can be read")]
    Malformed(String),
    #[error("the request for a certificate cannot be read, or is not signed by its own key")]
    Request,
    #[error("{0:?} is no name that a certificate can have")]
    Name(String),
    #[error("issue a certificate")]
    Issue(#[source] rcgen::Error),
    #[error("set up TLS")]
    Setup(#[source] rustls::Error),
    #[error("the certificate is no worker's or gateway's of this fleet")]
    NoPeer,
    #[error("read the system's random source")]
    Random,
}

impl TlsError {
    /// Stable, for programs.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Read { .. } => "io",
            Self::NoCertificate(_)
            | Self::NoKey(_)
            | Self::UnusableKey(_)
            | Self::Mismatch { .. }
            | Self::Malformed(_)
            | Self::Name(_) => "tls_misconfigured",
            Self::Request | Self::NoPeer => "certificate_refused",
            Self::Issue(_) | Self::Setup(_) | Self::Random => "internal",
        }
    }
}
