//! Who is on the other end between processes of the fleet.
//!
//! A certificate of the authority names its process by the id of its worker, in a URI among its
//! names: `aetherium://worker/ID`. Where the process may also reach the VMs of other workers, it is
//! a gateway too: `aetherium://gateway/ID`.

use std::sync::Arc;

use aether_types::{Timestamp, WorkerId};
use rustls::{
    ClientConfig, RootCertStore, ServerConfig, pki_types::CertificateDer,
    server::WebPkiClientVerifier, version::TLS13,
};
use x509_parser::{certificate::X509Certificate, extensions::GeneralName, prelude::FromDer as _};

use crate::{Holder, TlsError, credentials::validity, provider};

const WORKER: &str = "aetherium://worker/";
const GATEWAY: &str = "aetherium://gateway/";

/// A process of the fleet, as its certificate says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    pub worker: WorkerId,
    /// It may reach the VMs of others.
    pub is_gateway: bool,
}

impl Peer {
    pub(crate) fn uris(self) -> Vec<String> {
        let mut uris = vec![format!("{WORKER}{}", self.worker)];
        uris.extend(self.is_gateway.then(|| format!("{GATEWAY}{}", self.worker)));
        uris
    }

    /// Of a certificate that was checked against the authority.
    pub fn of(certificate: &CertificateDer<'_>) -> Result<Self, TlsError> {
        let (_, parsed) = X509Certificate::from_der(certificate).map_err(|_| TlsError::NoPeer)?;
        let names = parsed.subject_alternative_name().map_err(|_| TlsError::NoPeer)?;
        let names = names.ok_or(TlsError::NoPeer)?;
        let uris = || {
            names.value.general_names.iter().filter_map(|name| match name {
                GeneralName::URI(uri) => Some(*uri),
                _ => None,
            })
        };
        let of = |kind: &'static str| {
            uris().find_map(|uri| uri.strip_prefix(kind)?.parse::<WorkerId>().ok())
        };
        let worker = of(WORKER).ok_or(TlsError::NoPeer)?;
        Ok(Self { worker, is_gateway: of(GATEWAY) == Some(worker) })
    }
}

/// When the certificate runs out.
pub fn valid_until(certificate: &CertificateDer<'_>) -> Result<Timestamp, TlsError> {
    Ok(validity(certificate).ok_or(TlsError::NoPeer)?.1)
}

/// The name that a worker's certificate has, whatever its address is.
#[must_use]
pub fn server_name(worker: WorkerId) -> String {
    format!("{worker}.worker.aetherium.internal")
}

fn roots(authority: &CertificateDer<'static>) -> Result<Arc<RootCertStore>, TlsError> {
    let mut roots = RootCertStore::empty();
    roots.add(authority.clone()).map_err(TlsError::Setup)?;
    Ok(Arc::new(roots))
}

/// Of a server that takes nobody without a certificate of this authority. TLS 1.3 and HTTP/2.
pub fn link_server_config(
    authority: &CertificateDer<'static>,
    shown: Arc<Holder>,
) -> Result<Arc<ServerConfig>, TlsError> {
    let verifier = WebPkiClientVerifier::builder_with_provider(roots(authority)?, provider());
    let verifier = verifier
        .build()
        .map_err(|error| TlsError::Setup(rustls::Error::General(error.to_string())))?;
    let builder = ServerConfig::builder_with_provider(provider());
    let builder = builder.with_protocol_versions(&[&TLS13]).map_err(TlsError::Setup)?;
    let mut config = builder.with_client_cert_verifier(verifier).with_cert_resolver(shown);
    config.alpn_protocols = vec![b"h2".to_vec()];
    // A connection is made anew with what its peer has now, never resumed with what it had.
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// Of a client that shows who it is, and trusts this authority alone.
pub fn link_client_config(
    authority: &CertificateDer<'static>,
    shown: Arc<Holder>,
) -> Result<Arc<ClientConfig>, TlsError> {
    let builder = ClientConfig::builder_with_provider(provider());
    let builder = builder.with_protocol_versions(&[&TLS13]).map_err(TlsError::Setup)?;
    let builder = builder.with_root_certificates(roots(authority)?);
    let mut config = builder.with_client_cert_resolver(shown);
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    Ok(Arc::new(config))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{Authority, Request};

    #[test]
    fn a_certificate_says_whose_it_is() {
        let authority = Authority::make().unwrap();
        for is_gateway in [false, true] {
            let peer = Peer { worker: WorkerId::new(), is_gateway };
            let request = Request::make().unwrap();
            let day = Duration::from_hours(24);
            let certificate = authority.issue_peer(request.der(), peer, day).unwrap();
            assert_eq!(Peer::of(&certificate).unwrap(), peer);
            let credentials =
                request.answered(certificate, authority.certificate().clone()).unwrap();
            let (from, to) = credentials.validity();
            assert!(from < credentials.renew_at() && credentials.renew_at() < to);
        }
        let server = authority.issue_server(&["localhost".into()], Duration::from_mins(1)).unwrap();
        assert!(matches!(Peer::of(server.leaf()), Err(TlsError::NoPeer)));
        assert!(matches!(Peer::of(authority.certificate()), Err(TlsError::NoPeer)));
    }

    #[test]
    fn an_authority_survives_its_files_and_signs_no_foreign_request() {
        let made = Authority::make().unwrap();
        let (certificate, key) = (made.certificate_pem(), made.key_pem());
        let read = Authority::from_pem(certificate.as_bytes(), key.as_bytes(), ["c", "k"]).unwrap();
        assert_eq!(read.fingerprint(), made.fingerprint());
        assert_eq!(read.fingerprint().to_string().parse(), Ok(made.fingerprint()));
        let other = Authority::make().unwrap();
        let mixed =
            Authority::from_pem(certificate.as_bytes(), other.key_pem().as_bytes(), ["c", "k"]);
        assert!(matches!(mixed, Err(TlsError::Mismatch { .. })), "{mixed:?}");
        let peer = Peer { worker: WorkerId::new(), is_gateway: true };
        let mut der = Request::make().unwrap().der().to_vec();
        let last = der.len() - 1;
        der[last] ^= 1;
        let refused = read.issue_peer(&der, peer, Duration::from_mins(1));
        assert!(matches!(refused, Err(TlsError::Request)), "{refused:?}");
        assert!(!format!("{read:?}").contains("PRIVATE"), "{read:?}");
    }
}
