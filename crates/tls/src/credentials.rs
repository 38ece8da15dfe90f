//! A certificate with its key, and the place where both are replaced while connections use them.

use std::{
    fmt, fs,
    path::Path,
    sync::{Arc, PoisonError, RwLock},
};

use aether_types::Timestamp;
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    client::ResolvesClientCert,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};

use crate::TlsError;

/// A chain is some kilobytes; what is longer is another file.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// The one implementation of cryptography in this program.
#[must_use]
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// A chain of certificates, and the private key of the first.
#[derive(Clone)]
pub struct Credentials(Arc<CertifiedKey>);

// The key must not reach a log.
impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").finish_non_exhaustive()
    }
}

impl Credentials {
    /// From an operator's files. They belong together, or it fails and says which do not.
    pub fn from_files(certificate: &Path, key: &Path) -> Result<Self, TlsError> {
        let (chain, private) = (read(certificate)?, read(key)?);
        let shown = |path: &Path| path.display().to_string();
        Self::from_pem(&chain, &private, &shown(certificate), &shown(key))
    }

    /// `certificate` and `key` are the names of the texts, for errors.
    pub fn from_pem(
        chain: &[u8],
        private: &[u8],
        certificate: &str,
        key: &str,
    ) -> Result<Self, TlsError> {
        let none = || TlsError::NoCertificate(certificate.to_owned());
        let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(chain).collect();
        let chain = chain.map_err(|_| none())?;
        if chain.is_empty() {
            return Err(none());
        }
        let private =
            PrivateKeyDer::from_pem_slice(private).map_err(|_| TlsError::NoKey(key.to_owned()))?;
        Self::new(chain, private, certificate, key)
    }

    pub(crate) fn new(
        chain: Vec<CertificateDer<'static>>,
        private: PrivateKeyDer<'static>,
        certificate: &str,
        key: &str,
    ) -> Result<Self, TlsError> {
        let unusable = || TlsError::UnusableKey(key.to_owned());
        let signing = provider().key_provider.load_private_key(private).map_err(|_| unusable())?;
        let certified = CertifiedKey::new(chain, signing);
        match certified.keys_match() {
            Ok(()) => {}
            Err(rustls::Error::InconsistentKeys(_)) => {
                let (certificate, key) = (certificate.to_owned(), key.to_owned());
                return Err(TlsError::Mismatch { certificate, key });
            }
            Err(_) => return Err(TlsError::Malformed(certificate.to_owned())),
        }
        let credentials = Self(Arc::new(certified));
        // Whoever asks for its times later gets an answer.
        validity(credentials.leaf()).ok_or_else(|| TlsError::Malformed(certificate.to_owned()))?;
        Ok(credentials)
    }

    /// The certificate that is shown, without those above it.
    #[must_use]
    pub fn leaf(&self) -> &CertificateDer<'static> {
        // There is one: it was made with one.
        &self.0.cert[0]
    }

    /// The chain as PEM, without the key.
    #[must_use]
    pub fn chain_pem(&self) -> String {
        self.0.cert.iter().map(|der| pem("CERTIFICATE", der)).collect()
    }

    /// From when to when it may be shown.
    #[must_use]
    pub fn validity(&self) -> (Timestamp, Timestamp) {
        let never = Timestamp::from_unix_ms(0);
        validity(self.leaf()).unwrap_or((never, never))
    }
}

pub(crate) fn pem(label: &str, der: &[u8]) -> String {
    let lines = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    pem::encode_config(&pem::Pem::new(label, der), lines)
}

pub(crate) fn validity(der: &CertificateDer<'_>) -> Option<(Timestamp, Timestamp)> {
    let (_, certificate) = x509_parser::parse_x509_certificate(der).ok()?;
    let at = |time: x509_parser::time::ASN1Time| {
        Timestamp::from_unix_ms(time.timestamp().saturating_mul(1000))
    };
    let validity = certificate.validity();
    Some((at(validity.not_before), at(validity.not_after)))
}

pub(crate) fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    let failed = |source| TlsError::Read { path: path.to_owned(), source };
    let size = fs::metadata(path).map_err(failed)?.len();
    if size > FILE_BYTES_MAX {
        return Err(TlsError::NoCertificate(path.display().to_string()));
    }
    fs::read(path).map_err(failed)
}

/// What is shown in handshakes, replaced without touching connections that stand.
#[derive(Debug)]
pub struct Holder(RwLock<Credentials>);

impl Holder {
    #[must_use]
    pub fn new(credentials: Credentials) -> Arc<Self> {
        Arc::new(Self(RwLock::new(credentials)))
    }

    pub fn replace(&self, credentials: Credentials) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = credentials;
    }

    #[must_use]
    pub fn current(&self) -> Credentials {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl ResolvesServerCert for Holder {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current().0)
    }
}

impl ResolvesClientCert for Holder {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.current().0)
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// Of a server that anyone may connect to: TLS 1.2 and 1.3, HTTP/1.1.
pub fn server_config(shown: Arc<Holder>) -> Result<Arc<ServerConfig>, TlsError> {
    let builder = ServerConfig::builder_with_provider(provider());
    let builder = builder.with_safe_default_protocol_versions().map_err(TlsError::Setup)?;
    let mut config = builder.with_no_client_auth().with_cert_resolver(shown);
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// Of a client that trusts these authorities and no others.
pub fn client_config(authorities: &[CertificateDer<'static>]) -> Result<ClientConfig, TlsError> {
    let mut roots = RootCertStore::empty();
    for authority in authorities {
        roots.add(authority.clone()).map_err(TlsError::Setup)?;
    }
    let builder = ClientConfig::builder_with_provider(provider());
    let builder = builder.with_safe_default_protocol_versions().map_err(TlsError::Setup)?;
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}
