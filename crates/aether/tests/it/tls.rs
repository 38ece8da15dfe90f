//! TLS at the API, to real clients: our own, curl and openssl.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::Arc,
};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustix::process::{Signal, kill_process};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, StreamOwned,
    pki_types::{CertificateDer, ServerName, pem::PemObject as _},
};

use crate::{
    postgres::Server,
    rig::{Rig, command},
};

const QUIET: [&str; 3] = ["--no-default-template", "--pool", "none"];

fn address(rig: &Rig) -> SocketAddr {
    let text = std::fs::read_to_string(rig.data().join("listen")).unwrap();
    text.trim().strip_prefix("https://").expect("a server with TLS").parse().unwrap()
}

fn key(rig: &Rig) -> String {
    std::fs::read_to_string(rig.data().join("admin-key")).unwrap().trim().to_owned()
}

fn with_files(cert: &Path, key: &Path) -> Rig {
    let (cert, key) = (cert.to_str().unwrap(), key.to_str().unwrap());
    let env = [("AETHER_TLS_CERT", cert), ("AETHER_TLS_KEY", key)];
    Rig::with_env(&QUIET, &env, "Aetherium is ready")
}

/// An operator's own.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    folder: PathBuf,
    file: PathBuf,
}

impl Authority {
    fn new(folder: &Path, name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let file = folder.join(format!("{name}.pem"));
        std::fs::write(&file, params.self_signed(&key).unwrap().pem()).unwrap();
        Self { issuer: Issuer::new(params, key), folder: folder.to_owned(), file }
    }

    /// Into the same two files each time.
    fn certify(&self, name: &str, until_year: i32) -> (PathBuf, PathBuf) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new([name.to_owned()]).unwrap();
        params.not_after = rcgen::date_time_ymd(until_year, 1, 1);
        let files = (self.folder.join("cert.pem"), self.folder.join("key.pem"));
        std::fs::write(&files.0, params.signed_by(&key, &self.issuer).unwrap().pem()).unwrap();
        std::fs::write(&files.1, key.serialize_pem()).unwrap();
        files
    }
}

/// The program as a client on another machine, which knows the server by a URL.
fn abroad(rig: &Rig, host: &str, ca: Option<&Path>, args: &[&str]) -> Output {
    let elsewhere = tempfile::tempdir().unwrap();
    let url = format!("https://{host}:{}", address(rig).port());
    let mut command = command(elsewhere.path());
    command.args(["--url", &url, "--key", &key(rig)]).stdin(Stdio::null());
    if let Some(ca) = ca {
        command.env("AETHER_CA", ca);
    }
    command.args(args).output().unwrap()
}

fn refused(output: &Output) {
    refused_with(output, 5);
}

fn refused_with(output: &Output, status: i32) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{said}");
    assert!(said.contains("[certificate_not_trusted]"), "{said}");
}

#[test]
fn the_platforms_own_certificate_is_known_here_and_with_its_authority_elsewhere() {
    let rig = Rig::with(&[&QUIET[..], &["--tls-auto"]].concat(), "Aetherium is ready");
    // Requests, WebSockets and files on this machine, without a word about certificates.
    rig.ok(&["vm", "create", "--name", "web"]);
    assert_eq!(rig.ok(&["exec", "-n", "web", "--", "echo", "here"]), "here\n");
    let ca = rig.data().join("authority/certificate.pem");
    for host in ["localhost", "127.0.0.1"] {
        let args = ["exec", "-n", "web", "--", "echo", "there"];
        let output = abroad(&rig, host, Some(&ca), &args);
        assert_eq!(String::from_utf8_lossy(&output.stdout), "there\n", "{output:?}");
    }
    refused(&abroad(&rig, "localhost", None, &["vm", "list"]));
    // A WebSocket; `exec` says by its status that it was not the command's.
    refused_with(&abroad(&rig, "localhost", None, &["exec", "-n", "web", "--", "echo"]), 125);
    let folder = tempfile::tempdir().unwrap();
    let other = Authority::new(folder.path(), "other");
    refused(&abroad(&rig, "localhost", Some(&other.file), &["vm", "list"]));
    let wrong = abroad(&rig, "localhost", Some(&rig.data().join("admin-key")), &["vm", "list"]);
    assert_eq!(wrong.status.code(), Some(2), "{wrong:?}");

    use std::os::unix::fs::PermissionsExt as _;
    let mode =
        |name: &str| std::fs::metadata(rig.data().join(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode("authority"), mode("authority/key.pem")), (0o700, 0o600));
    let said = rig.said().join("\n");
    assert!(!said.contains("PRIVATE") && said.contains("https://127.0.0.1"), "{said}");
}

#[test]
fn an_authority_is_the_same_after_a_restart_and_its_key_is_for_nobody_else() {
    use std::os::unix::fs::PermissionsExt as _;
    let mut rig = Rig::with(&[&QUIET[..], &["--tls-auto"]].concat(), "Aetherium is ready");
    let file = rig.data().join("authority/certificate.pem");
    let before = std::fs::read(&file).unwrap();
    assert!(rig.end(Signal::TERM).0.success());
    assert!(!rig.data().join("server.pem").exists());
    rig.restart();
    assert_eq!(std::fs::read(&file).unwrap(), before);
    assert!(abroad(&rig, "localhost", Some(&file), &["vm", "list"]).status.success());
    rig.end(Signal::TERM);
    let key = rig.data().join("authority/key.pem");
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
    let up = ["up", "--driver", "sim", "--listen", "127.0.0.1:0", "--tls-auto"];
    let (status, said) = rig.fails(&up);
    assert_eq!(status, 1, "{said}");
    assert!(said.contains("[key_exposed]") && said.contains("chmod 600"), "{said}");
}

#[test]
fn curl_and_openssl_agree() {
    let rig = Rig::with(&[&QUIET[..], &["--tls-auto"]].concat(), "Aetherium is ready");
    let (ca, port) = (rig.data().join("authority/certificate.pem"), address(&rig).port());
    let curl = |args: &[&str]| {
        let output =
            Command::new("curl").args(["-sS", "-i", "--max-time", "20"]).args(args).output();
        output.map(|o| (o.status.code(), String::from_utf8_lossy(&o.stdout).into_owned()))
    };
    let health = format!("https://localhost:{port}/api/v1/health");
    let Ok((status, answer)) = curl(&["--cacert", ca.to_str().unwrap(), &health]) else {
        println!("skipped: there is no curl");
        return;
    };
    assert_eq!(status, Some(0), "{answer}");
    let answer = answer.to_lowercase();
    assert!(answer.starts_with("http/1.1 200"), "{answer}");
    assert!(answer.contains("strict-transport-security: max-age=31536000"), "{answer}");
    // 60: the certificate is not trusted.
    assert_eq!(curl(&[&health]).unwrap().0, Some(60));
    // Plain HTTP gets one answer, and nothing else.
    let (status, answer) = curl(&[&format!("http://localhost:{port}/api/v1/vms")]).unwrap();
    assert_eq!(status, Some(0));
    assert!(answer.starts_with("HTTP/1.1 400") && answer.contains("use https://"), "{answer}");

    let connect = format!("localhost:{port}");
    let openssl = |args: &[&str]| {
        let output = Command::new("openssl")
            .args(["s_client", "-connect", &connect, "-verify_return_error"])
            .args(args)
            .stdin(Stdio::null())
            .output();
        output.map(|output| (output.status.success(), format!("{output:?}")))
    };
    let ours = ["-CAfile", ca.to_str().unwrap(), "-verify_hostname", "localhost"];
    let Ok((is_good, said)) = openssl(&ours) else {
        println!("skipped: there is no openssl");
        return;
    };
    assert!(is_good && said.contains("Verify return code: 0"), "{said}");
    assert!(!openssl(&[&ours[..2], &["-verify_hostname", "api.example"]].concat()).unwrap().0);
    assert!(!openssl(&["-tls1_1"]).unwrap().0, "too old");
}

#[test]
fn a_name_that_is_another_and_a_time_that_is_over_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new(folder.path(), "ours");
    let (cert, private) = authority.certify("api.example", 2100);
    let rig = with_files(&cert, &private);
    // Here the certificate itself is known.
    rig.ok(&["vm", "list"]);
    refused(&abroad(&rig, "localhost", Some(&authority.file), &["vm", "list"]));
    drop(rig);
    let (cert, private) = authority.certify("localhost", 2020);
    let rig = with_files(&cert, &private);
    rig.ok(&["vm", "list"]);
    refused(&abroad(&rig, "localhost", Some(&authority.file), &["vm", "list"]));
}

#[test]
fn files_that_do_not_belong_together_stop_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new(folder.path(), "ours");
    let (cert, private) = authority.certify("localhost", 2100);
    let (cert, private) = (cert.to_str().unwrap(), private.to_str().unwrap());
    let mixed = folder.path().join("mixed.pem");
    std::fs::write(&mixed, KeyPair::generate().unwrap().serialize_pem()).unwrap();
    let mixed = mixed.to_str().unwrap();
    let none = folder.path().join("none.pem");
    let none = none.to_str().unwrap();
    for (args, code, words) in [
        (&["--tls-cert", cert][..], 2, "without --tls-key"),
        (&["--tls-key", private], 2, "without --tls-cert"),
        (&["--tls-cert", cert, "--tls-key", private, "--tls-auto"], 2, "both say"),
        (&["--tls-cert", cert, "--tls-key", mixed], 2, "is not that of the certificate"),
        (&["--tls-cert", private, "--tls-key", private], 2, "has no certificate in it"),
        (&["--tls-cert", cert, "--tls-key", cert], 2, "has no private key in it"),
        (&["--tls-cert", none, "--tls-key", private], 1, "none.pem"),
        (&["--tls-name", "a.example"], 2, "only with --tls-auto"),
        (&["--tls-auto", "--tls-name", "not a name"], 2, "no name that a certificate can have"),
    ] {
        let output = command(&folder.path().join("data"))
            .args(["up", "--driver", "sim", "--listen", "127.0.0.1:0"])
            .args(args)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {said}");
        assert!(said.contains(words) && !said.contains("PRIVATE"), "{args:?}: {said}");
    }
}

/// One connection, and the certificate that it was shown.
struct Connection {
    reader: BufReader<StreamOwned<ClientConnection, TcpStream>>,
    shown: CertificateDer<'static>,
}

impl Connection {
    fn open(to: SocketAddr, ca: &Path) -> Self {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(ca).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = ServerName::try_from("localhost").unwrap();
        let client = ClientConnection::new(Arc::new(config), name).unwrap();
        let mut stream = StreamOwned::new(client, TcpStream::connect(to).unwrap());
        stream.flush().unwrap();
        while stream.conn.is_handshaking() {
            stream.conn.complete_io(&mut stream.sock).unwrap();
        }
        let shown = stream.conn.peer_certificates().unwrap()[0].clone().into_owned();
        Self { reader: BufReader::new(stream), shown }
    }

    fn is_served(&mut self) -> bool {
        let stream = self.reader.get_mut();
        stream.write_all(b"GET /api/v1/health HTTP/1.1\r\nhost: localhost\r\n\r\n").unwrap();
        stream.flush().unwrap();
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if self.reader.read_line(&mut head).unwrap() == 0 {
                return false;
            }
        }
        let head = head.to_lowercase();
        let length = head.split("content-length: ").nth(1).unwrap();
        let length: usize = length.split("\r\n").next().unwrap().parse().unwrap();
        let mut body = vec![0; length];
        self.reader.read_exact(&mut body).unwrap();
        head.starts_with("http/1.1 200")
    }
}

#[test]
fn a_new_certificate_is_shown_at_sighup_and_what_stands_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new(folder.path(), "ours");
    let (cert, private) = authority.certify("localhost", 2100);
    let rig = with_files(&cert, &private);
    let mut first = Connection::open(address(&rig), &authority.file);
    assert!(first.is_served());

    // One that is of no use changes nothing.
    std::fs::write(&cert, "none").unwrap();
    kill_process(rig.pid(), Signal::HUP).unwrap();
    assert_eq!(Connection::open(address(&rig), &authority.file).shown, first.shown);

    authority.certify("localhost", 2101);
    kill_process(rig.pid(), Signal::HUP).unwrap();
    let mut second = Connection::open(address(&rig), &authority.file);
    while second.shown == first.shown {
        second = Connection::open(address(&rig), &authority.file);
    }
    assert!(second.is_served() && first.is_served());
    assert_eq!(second.shown, CertificateDer::from_pem_file(&cert).unwrap());
    // What clients here know is the new one.
    rig.ok(&["vm", "list"]);
}

#[test]
fn of_several_processes_one_has_the_authority() {
    let Some(server) = Server::start() else { return };
    let options = [&QUIET[..], &["--migrate", "--tls-auto"]].concat();
    let env = [("DATABASE_URL", server.url.as_str())];
    let one = Rig::with_env(&options, &env, "Aetherium is ready");
    let secrets = server.test.execute("select encode(value, 'escape') from secrets");
    assert!(!secrets.contains("PRIVATE"), "no key is in the store");
    let folder = tempfile::tempdir().unwrap();
    let up = |more: &[&str]| {
        let output = command(&folder.path().join("data"))
            .args(["up", "--driver", "sim", "--listen", "127.0.0.1:0", "--tls-auto"])
            .args(more)
            .env("DATABASE_URL", &server.url)
            .output()
            .unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (status, said) = up(&[]);
    assert_eq!(status, Some(1), "{said}");
    assert!(said.contains("[authority_elsewhere]") && said.contains("--authority-dir"), "{said}");
    assert!(!folder.path().join("data/authority/key.pem").exists());
    // An authority of its own is no good either.
    let other = Rig::with(&[&QUIET[..], &["--tls-auto"]].concat(), "Aetherium is ready");
    let theirs = other.data().join("authority");
    let (status, said) = up(&["--authority-dir", theirs.to_str().unwrap()]);
    assert_eq!(status, Some(4), "{said}");
    assert!(said.contains("[authority_differs]"), "{said}");
    // With a copy of the right one it shows certificates that the same clients trust.
    let shared = one.data().join("authority");
    let env = [env[0], ("AETHER_AUTHORITY_DIR", shared.to_str().unwrap())];
    let two = Rig::with_env(&options, &env, "Aetherium is ready");
    let ca = shared.join("certificate.pem");
    assert!(abroad(&two, "localhost", Some(&ca), &["vm", "list"]).status.success());
}
