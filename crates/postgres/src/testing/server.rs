//! A server and its keeper.

use std::{
    fmt::Write as _,
    fs,
    io::{BufRead, BufReader},
    net::TcpListener,
    os::unix::{
        fs::{PermissionsExt as _, chown},
        net::UnixStream,
        process::CommandExt as _,
    },
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
};

use rustix::process::{Pid, Signal, kill_process};

use crate::{Config, Parts};

const KEEPER: &str = include_str!("keeper.sh");

/// Nothing of it outlives the tests, so nothing waits for a disk; but a server that is stopped has
/// what it acknowledged when it is started again.
const SETTINGS: &str = "\
fsync = off
full_page_writes = off
autovacuum = off
shared_buffers = 16MB
unix_socket_permissions = 0777
log_min_messages = warning
";

/// Of a server that a test has for itself.
#[derive(Debug, Clone, Default)]
pub struct ServerOptions {
    pub connections_max: Option<u32>,
    /// Certificate and key, in PEM. It then takes connections over TCP by TLS only.
    pub tls: Option<(String, String)>,
    /// A password that every connection over TCP must give.
    pub password: Option<String>,
}

/// Of one test. It ends with this value.
#[derive(Debug)]
pub struct Server {
    keeper: Child,
    said: BufReader<ChildStdout>,
    folder: PathBuf,
    port: u16,
}

impl Server {
    /// The folder of its socket; made where this run has none yet. Called under the run's lock.
    pub(super) fn shared(folder: &Path) -> PathBuf {
        if UnixStream::connect(folder.join(".s.PGSQL.5432")).is_err() {
            let settings = format!(
                "{SETTINGS}listen_addresses = ''\nmax_connections = 300\nsynchronous_commit = off\n"
            );
            let (keeper, _) = start(super::runner(), folder, &settings, 5432, None);
            // It waits for the end of the run, not of this process.
            drop(keeper);
        }
        folder.to_owned()
    }

    pub fn start(options: &ServerOptions) -> Self {
        let name = format!("aether-test-server-{}", uuid::Uuid::new_v4().simple());
        let folder = std::env::temp_dir().join(name);
        fs::create_dir_all(&folder).expect("a folder for a server");
        let port = free_port();
        let max = options.connections_max.unwrap_or(50);
        let mut settings = format!(
            "{SETTINGS}listen_addresses = '127.0.0.1'\nport = {port}\nmax_connections = {max}\n\
             superuser_reserved_connections = 0\n"
        );
        let mut kind = "host";
        if let Some((certificate, key)) = &options.tls {
            kind = "hostssl";
            for (file, text) in [("server.crt", certificate), ("server.key", key)] {
                let path = folder.join(file);
                fs::write(&path, text).expect("a file of the server's");
                fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("its mode");
                give(&path);
            }
            settings.push_str("ssl = on\n");
            for (name, file) in [("ssl_cert_file", "server.crt"), ("ssl_key_file", "server.key")] {
                let _ = writeln!(settings, "{name} = '{}'", folder.join(file).display());
            }
        }
        let method = if options.password.is_some() { "scram-sha-256" } else { "trust" };
        let rules = format!("local all all trust\n{kind} all all 127.0.0.1/32 {method}\n");
        fs::write(folder.join("pg_hba.conf"), rules).expect("the server's rules");
        let password = options.password.as_deref();
        let (keeper, said) = start(std::process::id(), &folder, &settings, port, password);
        Self { keeper, said, folder, port }
    }

    /// Over its socket.
    pub fn config(&self) -> Config {
        self.parts(self.folder.display().to_string())
    }

    pub fn config_tcp(&self, host: &str) -> Config {
        self.parts(host.to_owned())
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    fn parts(&self, host: String) -> Config {
        let parts = Parts {
            host: Some(host),
            port: Some(self.port),
            user: Some("postgres".to_owned()),
            database: Some("postgres".to_owned()),
            ..Parts::default()
        };
        Config::from_parts(parts).expect("a configuration for tests")
    }

    /// As a crash would; returns when it has ended.
    pub fn stop(&self) {
        let mut command = as_server(&programs().expect("the programs").join("pg_ctl"));
        command.args(["-s", "-w", "-m", "immediate", "stop", "-D"]).arg(self.folder.join("data"));
        assert!(command.status().expect("pg_ctl").success());
    }

    /// Returns when it answers.
    pub fn start_again(&mut self) {
        kill_process(Pid::from_child(&self.keeper), Signal::USR1).expect("tell the keeper");
        await_ready(&mut self.said, &self.folder);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = kill_process(Pid::from_child(&self.keeper), Signal::TERM);
        let _ = self.keeper.wait();
    }
}

fn start(
    runner: u32,
    folder: &Path,
    settings: &str,
    port: u16,
    password: Option<&str>,
) -> (Child, BufReader<ChildStdout>) {
    let settings = format!("{settings}unix_socket_directories = '{}'\n", folder.display());
    fs::write(folder.join("settings"), settings).expect("the server's settings");
    give(folder);
    let mut command = as_server(Path::new("/bin/sh"));
    command
        .args(["-c", KEEPER, "keeper", &runner.to_string()])
        .arg(folder)
        .arg(programs().expect("PostgreSQL's programs"))
        .args(["--no-sync", "--auth=trust", "--username=postgres", "--no-locale"])
        .arg("--encoding=UTF8")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        // A run that is interrupted must not interrupt it: it has to clean up.
        .process_group(0);
    let mut keeper = command.spawn().expect("the keeper");
    let mut said = BufReader::new(keeper.stdout.take().expect("its words"));
    await_ready(&mut said, folder);
    if let Some(password) = password {
        let sql = format!("alter role postgres password '{password}'");
        let status = Command::new(programs().expect("the programs").join("psql"))
            .args(["-X", "-q", "-U", "postgres", "-p", &port.to_string(), "-c", &sql, "-h"])
            .arg(folder)
            .status();
        assert!(status.expect("psql").success());
    }
    (keeper, said)
}

fn await_ready(said: &mut impl BufRead, folder: &Path) {
    let mut line = String::new();
    said.read_line(&mut line).expect("the keeper's words");
    let log = || fs::read_to_string(folder.join("log")).unwrap_or_default();
    assert_eq!(line.trim(), "ready", "the test server does not start: {}", log());
}

/// Debian keeps them by version, off the path.
pub(super) fn programs() -> Option<PathBuf> {
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let mut folders: Vec<PathBuf> = versions.map(|entry| entry.path().join("bin")).collect();
    folders.sort_by_key(|folder| {
        let version = folder.parent().and_then(Path::file_name).and_then(|name| name.to_str());
        version.and_then(|version| version.parse::<u32>().ok())
    });
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).find(|folder| folder.join("initdb").exists());
    folders.into_iter().rev().find(|folder| folder.join("initdb").exists()).or(found)
}

/// PostgreSQL refuses to be root.
fn as_server(program: &Path) -> Command {
    let mut command = Command::new(program);
    if let Some((user, group)) = unprivileged() {
        command.uid(user).gid(group);
    }
    command
}

fn give(path: &Path) {
    if let Some((user, group)) = unprivileged() {
        chown(path, Some(user), Some(group)).expect("give a file to the server");
    }
}

/// The user of the server; `None` where it is ours.
fn unprivileged() -> Option<(u32, u32)> {
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    let users = fs::read_to_string("/etc/passwd").expect("the users of this host");
    let of = |wanted: &str| {
        let line = users.lines().find(|line| line.split(':').next() == Some(wanted))?;
        let mut fields = line.split(':').skip(2);
        Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
    };
    of("postgres").or_else(|| of("nobody")).or(Some((65534, 65534)))
}

fn free_port() -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    listener.local_addr().expect("its number").port()
}
