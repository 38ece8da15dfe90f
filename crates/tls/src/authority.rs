//! The platform's own authority: one key that signs what servers, workers and gateways show.

use std::{
    fmt,
    net::IpAddr,
    path::Path,
    str::FromStr,
    time::{Duration, SystemTime},
};

use aether_types::Timestamp;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use ring::rand::SecureRandom as _;
use rustls::pki_types::{
    CertificateDer, CertificateSigningRequestDer, PrivateKeyDer, pem::PemObject as _,
};
use time::OffsetDateTime;

use crate::{Credentials, Peer, TlsError, credentials, server_name};

/// It signs for as long as an installation lives; to replace it is an operator's decision.
const AUTHORITY_LIFETIME: Duration = Duration::from_hours(24 * 3650);
/// Hosts whose clocks differ a little shall trust what was made a moment ago.
const BACKDATED: Duration = Duration::from_mins(5);

/// The SHA-256 of an authority's certificate: what somebody who has never seen it can hold it to.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Fingerprint([u8; 32]);

impl Fingerprint {
    #[must_use]
    pub fn of(certificate: &CertificateDer<'_>) -> Self {
        let digest = ring::digest::digest(&ring::digest::SHA256, certificate);
        let mut bytes = [0; 32];
        bytes.copy_from_slice(digest.as_ref());
        Self(bytes)
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Fingerprint {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut bytes = [0; 32];
        if text.len() != 64 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(());
        }
        for (n, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * n..2 * n + 2], 16).map_err(|_| ())?;
        }
        Ok(Self(bytes))
    }
}

/// Whoever has this can make certificates that all of the fleet trusts.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
}

// The key must not reach a log.
impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority")
            .field("fingerprint", &self.fingerprint())
            .finish_non_exhaustive()
    }
}

impl Authority {
    pub fn make() -> Result<Self, TlsError> {
        let key = KeyPair::generate().map_err(TlsError::Issue)?;
        let mut params = CertificateParams::default();
        // A name of its own, so that two of them are never taken for one another.
        let name = format!("Aetherium authority {}", hexadecimal(&random::<4>()?));
        params.distinguished_name = named(&name);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        limit(&mut params, AUTHORITY_LIFETIME)?;
        let certificate = params.self_signed(&key).map_err(TlsError::Issue)?.der().clone();
        Ok(Self { issuer: Issuer::new(params, key), certificate })
    }

    /// `names` of the texts are for errors.
    pub fn from_pem(certificate: &[u8], key: &[u8], names: [&str; 2]) -> Result<Self, TlsError> {
        let [certificate_name, key_name] = names.map(ToOwned::to_owned);
        let none = || TlsError::NoCertificate(certificate_name.clone());
        let der = CertificateDer::from_pem_slice(certificate).map_err(|_| none())?;
        let private = PrivateKeyDer::from_pem_slice(key);
        let private = private.map_err(|_| TlsError::NoKey(key_name.clone()))?;
        // Checks that they belong together.
        Credentials::new(vec![der.clone()], private.clone_key(), &certificate_name, &key_name)?;
        let key = KeyPair::try_from(&private).map_err(|_| TlsError::UnusableKey(key_name))?;
        let issuer = Issuer::from_ca_cert_der(&der, key);
        let issuer = issuer.map_err(|_| TlsError::Malformed(certificate_name))?;
        Ok(Self { issuer, certificate: der })
    }

    #[must_use]
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    #[must_use]
    pub fn certificate_pem(&self) -> String {
        credentials::pem("CERTIFICATE", &self.certificate)
    }

    /// For a file of the mode 0600, and nowhere else.
    #[must_use]
    pub fn key_pem(&self) -> String {
        self.issuer.key().serialize_pem()
    }

    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.certificate)
    }

    /// For a server that clients know by these names and addresses.
    pub fn issue_server(
        &self,
        names: &[String],
        lifetime: Duration,
    ) -> Result<Credentials, TlsError> {
        let key = KeyPair::generate().map_err(TlsError::Issue)?;
        let mut params = CertificateParams::default();
        params.subject_alt_names =
            names.iter().map(|n| alternative(n)).collect::<Result<_, _>>()?;
        params.distinguished_name = named("Aetherium server");
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let certificate = self.sign(params, &key, lifetime)?;
        let private = PrivateKeyDer::try_from(key.serialize_der());
        let private = private.map_err(|_| TlsError::UnusableKey("memory".to_owned()))?;
        Credentials::new(vec![certificate, self.certificate.clone()], private, "memory", "memory")
    }

    /// For a process of the fleet that has made its key itself. Of the request only its key counts.
    pub fn issue_peer(
        &self,
        request: &[u8],
        peer: Peer,
        lifetime: Duration,
    ) -> Result<CertificateDer<'static>, TlsError> {
        let request = CertificateSigningRequestDer::from(request.to_vec());
        let asked = CertificateSigningRequestParams::from_der(&request);
        let key = asked.map_err(|_| TlsError::Request)?.public_key;
        let mut params = CertificateParams::default();
        params.distinguished_name = named("Aetherium worker");
        params.subject_alt_names =
            peer.uris().iter().map(|text| uri(text)).collect::<Result<_, _>>()?;
        params.subject_alt_names.push(alternative(&server_name(peer.worker))?);
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        self.sign(params, &key, lifetime)
    }

    fn sign(
        &self,
        mut params: CertificateParams,
        key: &impl rcgen::PublicKeyData,
        lifetime: Duration,
    ) -> Result<CertificateDer<'static>, TlsError> {
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        params.is_ca = IsCa::ExplicitNoCa;
        limit(&mut params, lifetime)?;
        let certificate = params.signed_by(key, &self.issuer).map_err(TlsError::Issue)?;
        Ok(certificate.der().clone())
    }
}

/// A key that was made here, and the request that proves to an authority that it was.
pub struct Request {
    key: KeyPair,
    der: Vec<u8>,
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request").finish_non_exhaustive()
    }
}

impl Request {
    pub fn make() -> Result<Self, TlsError> {
        let key = KeyPair::generate().map_err(TlsError::Issue)?;
        let request = CertificateParams::default().serialize_request(&key);
        let der = request.map_err(TlsError::Issue)?.der().to_vec();
        Ok(Self { key, der })
    }

    #[must_use]
    pub fn der(&self) -> &[u8] {
        &self.der
    }

    /// For a file of the mode 0600, and nowhere else.
    #[must_use]
    pub fn key_pem(&self) -> String {
        self.key.serialize_pem()
    }

    /// With what the authority answered.
    pub fn answered(
        &self,
        certificate: CertificateDer<'static>,
        authority: CertificateDer<'static>,
    ) -> Result<Credentials, TlsError> {
        let private = PrivateKeyDer::try_from(self.key.serialize_der());
        let private = private.map_err(|_| TlsError::UnusableKey("memory".to_owned()))?;
        Credentials::new(vec![certificate, authority], private, "the answer", "memory")
    }
}

/// The certificates of a file.
pub fn read_authorities(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let none = || TlsError::NoCertificate(path.display().to_string());
    let found: Result<Vec<_>, _> =
        CertificateDer::pem_slice_iter(&credentials::read(path)?).collect();
    found.ok().filter(|found| !found.is_empty()).ok_or_else(none)
}

fn named(name: &str) -> rcgen::DistinguishedName {
    let mut named = rcgen::DistinguishedName::new();
    named.push(DnType::CommonName, name);
    named
}

fn alternative(name: &str) -> Result<SanType, TlsError> {
    if let Ok(address) = name.parse::<IpAddr>() {
        return Ok(SanType::IpAddress(address));
    }
    let wrong = || TlsError::Name(name.to_owned());
    // What no client could ask for, a certificate shall not have.
    let checked = rustls::pki_types::DnsName::try_from(name.trim_start_matches("*."));
    checked.map_err(|_| wrong())?;
    Ok(SanType::DnsName(name.try_into().map_err(|_| wrong())?))
}

fn uri(text: &str) -> Result<SanType, TlsError> {
    Ok(SanType::URI(text.try_into().map_err(|_| TlsError::Name(text.to_owned()))?))
}

fn limit(params: &mut CertificateParams, lifetime: Duration) -> Result<(), TlsError> {
    let now = OffsetDateTime::from(SystemTime::now());
    params.not_before = now - BACKDATED;
    params.not_after = now + lifetime;
    // Nobody can tell the next one.
    let mut serial = random::<16>()?;
    serial[0] &= 0x7f;
    params.serial_number = Some(serial.to_vec().into());
    Ok(())
}

fn random<const N: usize>() -> Result<[u8; N], TlsError> {
    let mut bytes = [0; N];
    ring::rand::SystemRandom::new().fill(&mut bytes).map_err(|_| TlsError::Random)?;
    Ok(bytes)
}

fn hexadecimal(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        let _ = write!(text, "{byte:02x}");
    }
    text
}

impl Credentials {
    /// When two thirds of its time are over: then it is replaced.
    #[must_use]
    pub fn renew_at(&self) -> Timestamp {
        let (from, to) = self.validity();
        from.plus_ms(to.unix_ms().saturating_sub(from.unix_ms()) / 3 * 2)
    }
}
