//! A Docker engine of a test's own: its socket, its data and its processes go with the test.

use std::{
    fs::File,
    io::{Error, Read as _, Result, Write as _},
    os::unix::net::{UnixDatagram, UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use tempfile::TempDir;

/// From its start to its first word.
const START_LIMIT: Duration = Duration::from_mins(1);
const FOLDERS: [&str; 4] = ["/usr/sbin", "/usr/bin", "/usr/local/sbin", "/usr/local/bin"];

/// Dropping it ends it and removes all that it has.
#[derive(Debug)]
pub struct Engine {
    process: Child,
    folder: TempDir,
}

impl Engine {
    /// Else, in words, why this host can have none.
    pub fn start() -> std::result::Result<Self, String> {
        let mut programs = FOLDERS.map(|folder| Path::new(folder).join("dockerd")).into_iter();
        let Some(program) = programs.find(|program| program.is_file()) else {
            return Err("no dockerd; ./dev test installs docker.io".to_owned());
        };
        if !rustix::process::geteuid().is_root() {
            return Err("only root runs a Docker engine".to_owned());
        }
        let failed = |e: Error| format!("start dockerd: {e}");
        let (engine, ready) = Self::spawn(&program).map_err(failed)?;
        let mut word = [0; 64];
        if ready.recv(&mut word).is_ok_and(|n| word[..n].starts_with(b"READY=1")) {
            return Ok(engine);
        }
        let log = std::fs::read_to_string(engine.folder.path().join("log")).unwrap_or_default();
        let words: Vec<_> = log.lines().rev().take(3).collect();
        Err(format!("dockerd does not run here: {}", words.join("; ")))
    }

    /// With the socket on which it says that it is ready.
    fn spawn(program: &Path) -> Result<(Self, UnixDatagram)> {
        // Short, for the sockets in it.
        let folder = tempfile::Builder::new().prefix("aed").tempdir_in("/tmp")?;
        let path = |name: &str| folder.path().join(name);
        let ready = UnixDatagram::bind(path("ready"))?;
        ready.set_read_timeout(Some(START_LIMIT))?;
        // It ends with the test also where that is killed. No network: ours is not the engine's.
        let process = Command::new("setpriv")
            .args(["--pdeathsig", "TERM", "--"])
            .arg(program)
            .args(["--bridge=none", "--iptables=false", "--ip6tables=false"])
            .arg(format!("--host=unix://{}", path("sock").display()))
            .arg(format!("--data-root={}", path("data").display()))
            .arg(format!("--exec-root={}", path("exec").display()))
            .arg(format!("--pidfile={}", path("pid").display()))
            .env("NOTIFY_SOCKET", path("ready"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(path("log"))?)
            .spawn()?;
        Ok((Self { process, folder }, ready))
    }

    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("sock")
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.process);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = self.process.wait();
        // Some versions leave a mount of their own data behind.
        let mounts = std::fs::read_to_string("/proc/mounts").unwrap_or_default();
        for mount in mounts.lines().rev().filter_map(|line| line.split(' ').nth(1)) {
            if Path::new(mount).starts_with(self.folder.path()) {
                let _ = rustix::mount::unmount(mount, rustix::mount::UnmountFlags::DETACH);
            }
        }
    }
}

/// Every container of an engine, in whatever state.
pub fn containers(socket: &Path) -> Result<Vec<String>> {
    let mut stream = UnixStream::connect(socket)?;
    stream.write_all(b"GET /containers/json?all=1 HTTP/1.0\r\nHost: engine\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    let listed: Vec<serde_json::Value> = serde_json::from_str(body.trim()).map_err(Error::other)?;
    Ok(listed.iter().map(|container| format!("container {}", container["Names"])).collect())
}
