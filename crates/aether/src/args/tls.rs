//! Whether requests come with TLS, and whose certificate is shown.

use std::path::PathBuf;

use clap::ArgAction;

use crate::{failure::Failure, tls::TlsPlan};

#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "TLS")]
pub(crate) struct TlsOptions {
    /// Answer with TLS and the certificates in this file (PEM), the server's own first; read again at
    /// SIGHUP
    #[arg(long, env = "AETHER_TLS_CERT", value_name = "FILE")]
    pub(crate) tls_cert: Option<PathBuf>,
    /// The private key of the certificate (PEM)
    #[arg(long, env = "AETHER_TLS_KEY", value_name = "FILE")]
    pub(crate) tls_key: Option<PathBuf>,
    /// Answer with TLS and a certificate of the platform's own authority, which clients are given
    /// with --ca
    #[arg(long, env = "AETHER_TLS_AUTO")]
    pub(crate) tls_auto: bool,
    /// A name or an address that clients know this server by, besides this host's own; with
    /// --tls-auto; may be given several times
    #[arg(long, env = "AETHER_TLS_NAMES", value_name = "NAME", action = ArgAction::Append,
          value_delimiter = ',')]
    pub(crate) tls_name: Vec<String>,
    /// Listen beyond this machine though nothing is encrypted: keys can be read on the way
    #[arg(long, env = "AETHER_INSECURE_HTTP")]
    pub(crate) insecure_http: bool,
    /// Where the certificate and the key of the platform's own authority are
    /// [default: DATA_DIR/authority]
    #[arg(long, env = "AETHER_AUTHORITY_DIR", value_name = "DIR")]
    pub(crate) authority_dir: Option<PathBuf>,
}

impl TlsOptions {
    /// Reads the files, so that what is wrong with them is found before anything is made.
    pub(crate) fn plan(&self) -> Result<TlsPlan, Failure> {
        let wrong =
            |text: &str| Failure { code: "tls_misconfigured".to_owned(), ..Failure::usage(text) };
        if !self.tls_name.is_empty() && !self.tls_auto {
            let text = "--tls-name is of use only with --tls-auto";
            return Err(wrong(text).hint("a certificate in a file has its names already"));
        }
        match (&self.tls_cert, &self.tls_key) {
            (Some(_), Some(_)) if self.tls_auto => {
                Err(wrong("--tls-auto and --tls-cert both say what certificate to show")
                    .hint("leave one of them out"))
            }
            (Some(cert), Some(key)) => TlsPlan::from_files(cert.clone(), key.clone()),
            (None, None) if self.tls_auto => Ok(TlsPlan::Auto { names: self.tls_name.clone() }),
            (None, None) => Ok(TlsPlan::Plain),
            (Some(_), None) => Err(wrong("--tls-cert is there without --tls-key")),
            (None, Some(_)) => Err(wrong("--tls-key is there without --tls-cert")),
        }
    }
}
