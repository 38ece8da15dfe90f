//! TLS as a server and its clients agree on it, with an authority made for the test.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{error::Error, path::PathBuf};

use aether_postgres::{
    Config, Database, OpenError, TlsMode,
    testing::{self, Server, ServerOptions},
};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// Its certificate.
    file: PathBuf,
}

impl Authority {
    fn new(folder: &tempfile::TempDir, name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let file = folder.path().join(format!("{name}.pem"));
        std::fs::write(&file, params.self_signed(&key).unwrap().pem()).unwrap();
        Self { issuer: Issuer::new(params, key), file }
    }

    /// Certificate and key of a server that is called so.
    fn certify(&self, name: &str) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }
}

/// How a connection is protected, as the server sees it.
async fn is_encrypted(config: Config) -> Result<bool, OpenError> {
    let database = Database::open(config).await?;
    let asked = sqlx::query_scalar("select ssl from pg_stat_ssl where pid = pg_backend_pid()");
    let encrypted = asked.fetch_one(database.pool()).await.unwrap();
    database.close().await;
    Ok(encrypted)
}

/// Which error of the certificate it is, without the words of a library's display.
fn why(error: &OpenError) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text += ": ";
        text += &source.to_string();
        next = source.source();
    }
    text
}

#[tokio::test]
async fn a_servers_certificate_is_checked_as_far_as_was_asked() {
    if !testing::available() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let ours = Authority::new(&folder, "ours");
    let other = Authority::new(&folder, "other");
    let tls = Some(ours.certify("localhost"));
    let server = Server::start(&ServerOptions { tls, ..ServerOptions::default() });
    let at = |host: &str, mode, ca: Option<&Authority>| {
        let file = ca.map(|authority| authority.file.clone());
        is_encrypted(server.config_tcp(host).tls(Some(mode), file).unwrap())
    };

    assert!(at("localhost", TlsMode::VerifyFull, Some(&ours)).await.unwrap());
    // The same server by a name that its certificate does not have.
    let refused = at("127.0.0.1", TlsMode::VerifyFull, Some(&ours)).await.unwrap_err();
    assert!(matches!(refused, OpenError::Connect { .. }), "{refused:?}");
    assert!(why(&refused).contains("not valid for name"), "{}", why(&refused));
    // An authority that this host does not trust.
    for ca in [None, Some(&other)] {
        let refused = at("localhost", TlsMode::VerifyFull, ca).await.unwrap_err();
        assert!(why(&refused).contains("UnknownIssuer"), "{}", why(&refused));
    }
    assert!(at("127.0.0.1", TlsMode::Require, None).await.unwrap());
    assert!(at("127.0.0.1", TlsMode::Prefer, None).await.unwrap());
    // It takes nobody in clear text.
    assert!(at("127.0.0.1", TlsMode::Disable, None).await.is_err());
}

#[tokio::test]
async fn without_tls_only_who_accepts_that_gets_in() {
    if !testing::available() {
        return;
    }
    let server = Server::start(&ServerOptions::default());
    let at = |mode| is_encrypted(server.config_tcp("localhost").tls(mode, None).unwrap());
    for mode in [TlsMode::Require, TlsMode::VerifyFull] {
        assert!(at(Some(mode)).await.is_err(), "{mode:?}");
    }
    for mode in [None, Some(TlsMode::Prefer), Some(TlsMode::Disable)] {
        assert!(!at(mode).await.unwrap(), "{mode:?}");
    }
}

#[tokio::test]
async fn a_wrong_password_is_said_and_not_told() {
    if !testing::available() {
        return;
    }
    let password = Some("correct horse".to_owned());
    let server = Server::start(&ServerOptions { password, ..ServerOptions::default() });
    let with = |password: &str| {
        let url = format!(
            "postgres://postgres:{password}@localhost:{}/postgres?sslmode=disable",
            server.port()
        );
        is_encrypted(Config::from_url(&url).unwrap())
    };
    with("correct%20horse").await.unwrap();
    let refused = with("battery%20staple").await.unwrap_err();
    let said = format!("{} {refused:?}", why(&refused));
    assert!(said.contains("password authentication failed"), "{said}");
    assert!(!said.contains("battery"), "{said}");
}
