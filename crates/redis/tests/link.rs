//! The way to a real server: TLS, passwords, and a connection that comes back.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{error::Error, path::PathBuf, sync::Arc, time::Duration};

use aether_redis::{
    Config, Link, Listener, OpenError, Parts, Trouble, redis::cmd, testing, testing::Server,
};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tokio::sync::mpsc;

#[derive(Debug, PartialEq, Eq)]
enum Heard {
    Message(String),
    Connected { restarted: bool },
}

struct Ear(mpsc::Sender<Heard>);

impl Listener for Ear {
    fn message(&self, text: &str) {
        self.0.try_send(Heard::Message(text.to_owned())).unwrap();
    }

    fn connected(&self, restarted: bool) {
        self.0.try_send(Heard::Connected { restarted }).unwrap();
    }
}

async fn open(config: Config) -> Result<(Link, mpsc::Receiver<Heard>), OpenError> {
    let (sender, heard) = mpsc::channel(16);
    Ok((Link::open(config, Arc::new(Ear(sender))).await?, heard))
}

async fn ping(link: &Link) -> Result<String, aether_redis::CallError> {
    link.call(|mut connection| async move { cmd("PING").query_async(&mut connection).await }).await
}

fn why(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text += ": ";
        text += &source.to_string();
        next = source.source();
    }
    text
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_are_heard_and_the_connection_comes_back() {
    if !testing::available() {
        return;
    }
    let mut server = Server::forgetful();
    let (link, mut heard) = open(server.config()).await.unwrap();
    assert_eq!(server.ask(&["PUBLISH", link.channel(), "first"]), "1");
    assert_eq!(heard.recv().await.unwrap(), Heard::Message("first".to_owned()));
    let run_id = link.info().run_id;

    // Only the connection: it is the same server, with all it had.
    assert_eq!(server.ask(&["CLIENT", "KILL", "TYPE", "pubsub"]), "1");
    assert_eq!(heard.recv().await.unwrap(), Heard::Connected { restarted: false });
    assert_eq!(ping(&link).await.unwrap(), "PONG");

    server.stop();
    let gone = ping(&link).await.unwrap_err();
    assert_eq!(gone.trouble, Trouble::Away);
    server.start_again();
    assert_eq!(heard.recv().await.unwrap(), Heard::Connected { restarted: true });
    assert_ne!(link.info().run_id, run_id);
    assert_eq!(ping(&link).await.unwrap(), "PONG");
    assert_eq!(server.ask(&["PUBLISH", link.channel(), "second"]), "1");
    assert_eq!(heard.recv().await.unwrap(), Heard::Message("second".to_owned()));
}

/// A server that takes what is sent and says nothing, as one that was stopped does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_server_is_given_up_and_served_by_again() {
    if !testing::available() {
        return;
    }
    let server = Server::forgetful();
    let (link, mut heard) = open(server.config()).await.unwrap();
    let sent = |signal: &str| {
        let id = server.id().unwrap().to_string();
        assert!(std::process::Command::new("kill").args([signal, &id]).status().unwrap().success());
    };
    sent("-STOP");
    let silent = tokio::time::timeout(Duration::from_secs(5), ping(&link)).await.unwrap();
    assert_eq!(silent.unwrap_err().trouble, Trouble::Away);
    sent("-CONT");
    assert_eq!(heard.recv().await.unwrap(), Heard::Connected { restarted: false });
    assert_eq!(ping(&link).await.unwrap(), "PONG");
}

#[tokio::test]
async fn a_wrong_password_is_said_and_not_told() {
    if !testing::available() {
        return;
    }
    let server = Server::start(&["--requirepass", "correct horse"]);
    let at = |password: &str| {
        let url = format!("redis://:{password}@127.0.0.1:{}/1", server.port());
        open(Config::from_url(&url).unwrap())
    };
    let (link, _heard) = at("correct%20horse").await.unwrap();
    assert_eq!(ping(&link).await.unwrap(), "PONG");
    let OpenError::Connect(refused) = at("battery%20staple").await.unwrap_err() else { panic!() };
    assert_eq!(refused.trouble, Trouble::Refused, "{}", why(&refused));
    let said = format!("{} {refused:?} {link:?}", why(&refused));
    assert!(!said.contains("battery") && !said.contains("horse"), "{said}");
    let OpenError::Connect(without) = open(server.config()).await.unwrap_err() else { panic!() };
    assert_eq!(without.trouble, Trouble::Refused, "{}", why(&without));
}

struct Authority {
    issuer: Issuer<'static, KeyPair>,
    file: PathBuf,
}

impl Authority {
    fn new(folder: &std::path::Path, name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let file = folder.join(format!("{name}.pem"));
        std::fs::write(&file, params.self_signed(&key).unwrap().pem()).unwrap();
        Self { issuer: Issuer::new(params, key), file }
    }
}

#[tokio::test]
async fn a_servers_certificate_is_checked_in_full() {
    if !testing::available() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let ours = Authority::new(folder.path(), "ours");
    let other = Authority::new(folder.path(), "other");
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    let (certificate, private) =
        (folder.path().join("server.crt"), folder.path().join("server.key"));
    std::fs::write(&certificate, params.signed_by(&key, &ours.issuer).unwrap().pem()).unwrap();
    std::fs::write(&private, key.serialize_pem()).unwrap();
    let text = |path: &PathBuf| path.display().to_string();
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    drop(listener);
    let _server = Server::start(&[
        "--tls-port",
        &port.to_string(),
        "--tls-cert-file",
        &text(&certificate),
        "--tls-key-file",
        &text(&private),
        "--tls-ca-cert-file",
        &text(&ours.file),
        "--tls-auth-clients",
        "no",
    ]);
    let at = |host: &str, ca: Option<&Authority>| {
        let parts = Parts { ca_file: ca.map(|ca| ca.file.clone()), ..Parts::default() };
        let config = Config::from_url(&format!("rediss://{host}:{port}")).unwrap();
        open(config.with(parts).unwrap())
    };
    let (link, _heard) = at("localhost", Some(&ours)).await.unwrap();
    assert_eq!(ping(&link).await.unwrap(), "PONG");
    // The same server by a name that its certificate does not have.
    let refused = at("127.0.0.1", Some(&ours)).await.unwrap_err();
    assert!(why(&refused).contains("not valid for name"), "{}", why(&refused));
    for ca in [None, Some(&other)] {
        let refused = at("localhost", ca).await.unwrap_err();
        assert!(why(&refused).contains("UnknownIssuer"), "{}", why(&refused));
    }
}
