//! The certificate that clients are shown: an operator's files, read again at SIGHUP, or one of the
//! platform's own authority, made anew before its time is over. Connections that stand go on.

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use aether_api::client::Trust;
use aether_tls::{Authority, Credentials, Holder, TlsError};
use aether_types::Timestamp;
use tokio::{
    signal::unix::{SignalKind, signal},
    time::sleep,
};
use tokio_util::sync::CancellationToken;

use crate::{
    authority::{self, Known},
    datadir::replace,
    exit::Exit,
    failure::{Failure, chain},
};

/// Of certificates that the authority makes for servers.
const LIFETIME: Duration = Duration::from_hours(24 * 90);
/// After a renewal that failed, and between two looks at a clock that may jump.
const LOOK_MAX: Duration = Duration::from_hours(1);

/// What was asked for.
#[derive(Debug)]
pub(crate) enum TlsPlan {
    Plain,
    Files(Box<Tls>),
    Auto { names: Vec<String> },
}

impl TlsPlan {
    pub(crate) fn from_files(certificate: PathBuf, key: PathBuf) -> Result<Self, Failure> {
        let source = Source::Files { certificate, key };
        Tls::new(source).map(|tls| Self::Files(Box::new(tls)))
    }

    pub(crate) fn is_plain(&self) -> bool {
        matches!(self, Self::Plain)
    }
}

#[derive(Debug)]
enum Source {
    Files { certificate: PathBuf, key: PathBuf },
    Authority { authority: Arc<Authority>, names: Vec<String> },
}

impl Source {
    fn get(&self) -> Result<Credentials, TlsError> {
        match self {
            Self::Files { certificate, key } => Credentials::from_files(certificate, key),
            Self::Authority { authority, names } => authority.issue_server(names, LIFETIME),
        }
    }
}

/// What is shown, and where the next one comes from.
#[derive(Debug)]
pub(crate) struct Tls {
    source: Source,
    holder: Arc<Holder>,
}

impl Tls {
    fn new(source: Source) -> Result<Self, Failure> {
        let credentials = source.get().map_err(|e| authority::failure(&e))?;
        warn_of_time(&credentials);
        Ok(Self { source, holder: Holder::new(credentials) })
    }

    /// For a server on this address, and by these names.
    pub(crate) fn auto(
        known: &Known,
        mut names: Vec<String>,
        address: SocketAddr,
    ) -> Result<Self, Failure> {
        let Known::Held(authority) = known else {
            let text = "the key of the platform's authority is on another host";
            return Err(Failure::new("authority_elsewhere", Exit::Failure, text)
                .hint("give this one --tls-cert and --tls-key, or --authority-dir with a copy"));
        };
        names.extend(own_names(address));
        names.dedup();
        Self::new(Source::Authority { authority: Arc::clone(authority), names })
    }

    pub(crate) fn server_config(&self) -> Result<Arc<rustls::ServerConfig>, Failure> {
        let config = aether_tls::server_config(Arc::clone(&self.holder));
        config.map_err(|e| authority::failure(&e))
    }

    /// For clients on this machine, which know the server by its data directory.
    pub(crate) fn trust(&self) -> Trust {
        Trust::Exactly(self.holder.current().chain_pem().into_bytes())
    }

    /// Where clients on this machine look for the certificate.
    pub(crate) fn write(&self, told: &std::path::Path) -> Result<(), Failure> {
        replace(told, self.holder.current().chain_pem().as_bytes(), 0o644)
    }

    /// Replaces the certificate when it is time, or when an operator says so, until `closing`.
    pub(crate) async fn keep(self, told: PathBuf, closing: CancellationToken) {
        let Ok(mut hangup) = signal(SignalKind::hangup()) else { return };
        loop {
            tokio::select! {
                () = closing.cancelled() => return,
                _ = hangup.recv() => self.renew(&told, "SIGHUP"),
                () = sleep(self.next_look()) => {
                    if self.is_due() {
                        self.renew(&told, "its time is near");
                    }
                }
            }
        }
    }

    fn next_look(&self) -> Duration {
        let left = self.holder.current().renew_at().unix_ms() - Timestamp::now().unix_ms();
        match (&self.source, u64::try_from(left)) {
            (Source::Authority { .. }, Ok(ms)) if ms > 0 => Duration::from_millis(ms).min(LOOK_MAX),
            _ => LOOK_MAX,
        }
    }

    fn is_due(&self) -> bool {
        match &self.source {
            // An operator's are an operator's business.
            Source::Files { .. } => false,
            Source::Authority { .. } => self.holder.current().renew_at() <= Timestamp::now(),
        }
    }

    /// What cannot be had leaves what there is.
    fn renew(&self, told: &std::path::Path, why: &str) {
        match self.source.get() {
            Ok(credentials) => {
                warn_of_time(&credentials);
                let until = credentials.validity().1;
                self.holder.replace(credentials);
                if let Err(failure) = self.write(told) {
                    tracing::error!(error = %failure, "tell this machine of a new certificate");
                }
                tracing::info!(why, %until, "a new certificate is shown");
            }
            Err(error) => {
                let (code, error) = (error.code(), chain(&error));
                tracing::error!(why, code, error, "the certificate is shown that was shown before");
            }
        }
    }
}

fn warn_of_time(credentials: &Credentials) {
    let (from, until) = credentials.validity();
    let now = Timestamp::now();
    if now < from || until < now {
        tracing::warn!(%from, %until, "clients refuse this certificate now, by its times");
    }
}

fn own_names(address: SocketAddr) -> Vec<String> {
    let mut names = vec!["localhost".to_owned(), "127.0.0.1".to_owned(), "::1".to_owned()];
    let host = rustix::system::uname().nodename().to_string_lossy().to_lowercase();
    // Not every host's name is one that can be asked for.
    let is_name = !host.is_empty()
        && host.len() < 64
        && host.split('.').all(|part| !part.is_empty() && !part.starts_with('-'))
        && host.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.'));
    if is_name && !names.contains(&host) {
        names.push(host);
    }
    let ip = address.ip();
    if !ip.is_unspecified() && !ip.is_loopback() {
        names.push(ip.to_string());
    }
    names
}
