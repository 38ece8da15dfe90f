//! A real server for tests, on a free port, in a temporary folder.
//!
//! It ends with its value, and with the thread that started it, however that went.

use std::{
    io::{BufRead as _, BufReader},
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use crate::{Config, VERSION_MIN};

/// `false`: this host has no server, or too old a one. The test says `skipped: ` and why.
pub fn available() -> bool {
    let there = program("redis-cli").is_some() && version().is_some_and(|v| v >= VERSION_MIN);
    if !there {
        #[expect(clippy::print_stdout, reason = "the line that `./dev test` collects")]
        {
            println!(
                "skipped: no Redis server of version {VERSION_MIN} or newer is installed here"
            );
        }
    }
    there
}

/// The number before the first dot of what the installed server says: `Redis server v=7.0.15 …`.
fn version() -> Option<u32> {
    let output = Command::new(program("redis-server")?).arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    text.split("v=").nth(1)?.split('.').next()?.parse().ok()
}

#[derive(Debug)]
pub struct Server {
    child: Option<Child>,
    folder: tempfile::TempDir,
    port: u16,
    options: Vec<String>,
}

impl Server {
    /// With these options of its command line besides our own.
    pub fn start(options: &[&str]) -> Self {
        let folder = tempfile::Builder::new().prefix("aether-test-redis-").tempdir();
        let options = options.iter().map(|&option| option.to_owned()).collect();
        let folder = folder.expect("a folder for a server");
        let mut server = Self { child: None, folder, port: free_port(), options };
        server.start_again();
        server
    }

    /// Nothing is kept when it stops.
    pub fn forgetful() -> Self {
        Self::start(&["--appendonly", "no"])
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn config(&self) -> Config {
        Config::from_address(&format!("127.0.0.1:{}", self.port)).expect("its address")
    }

    /// As a crash would; returns when it has ended.
    pub fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Returns when it answers.
    pub fn start_again(&mut self) {
        let mut child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL"])
            .arg(program("redis-server").expect("the server's program"))
            .args(["--port", &self.port.to_string(), "--bind", "127.0.0.1", "--save", ""])
            .args(["--daemonize", "no", "--dir"])
            .arg(self.folder.path())
            .args(&self.options)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("start Redis");
        let mut said = BufReader::new(child.stdout.take().expect("its words")).lines();
        let mut log = Vec::new();
        loop {
            let Some(Ok(line)) = said.next() else { panic!("Redis does not start: {log:?}") };
            let is_ready = line.contains("Ready to accept connections");
            log.push(line);
            if is_ready {
                break;
            }
        }
        // It stops where nobody reads what it says.
        std::thread::spawn(move || said.for_each(drop));
        self.child = Some(child);
    }

    /// What the server answers to a command.
    pub fn ask(&self, command: &[&str]) -> String {
        let output = Command::new(program("redis-cli").expect("its client"))
            .args(["-p", &self.port.to_string()])
            .args(command)
            .output()
            .expect("ask Redis");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    pub fn id(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.exists())
}

fn free_port() -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    listener.local_addr().expect("its number").port()
}
