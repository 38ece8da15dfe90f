//! One agent process for each test, ended with it.

use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::Duration;

use aether_protocol::host::{self, ClientError, RunEvent, RunSession};
use aether_protocol::{Exited, Run, Stream, Token};
use tempfile::TempDir;
use tokio::net::UnixStream;

/// No exchange of a test takes this long; a test that hangs fails by it.
pub(crate) const LIMIT: Duration = Duration::from_secs(20);

pub(crate) struct TestAgent {
    process: Child,
    pub(crate) token: Token,
    directory: TempDir,
}

/// What a command left.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    pub(crate) exited: Exited,
}

impl TestAgent {
    pub(crate) fn start() -> Self {
        Self::start_as(Command::new(env!("CARGO_BIN_EXE_aether-agent")))
    }

    /// In a network of its own, which a restored guest may change; without the rights for that,
    /// none.
    #[expect(clippy::print_stdout, reason = "how a test says that it was skipped")]
    pub(crate) fn start_apart() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: a network namespace of its own takes the rights of root");
            return None;
        }
        let mut command = Command::new("unshare");
        command.args(["--net", "--", env!("CARGO_BIN_EXE_aether-agent")]);
        Some(Self::start_as(command))
    }

    fn start_as(mut command: Command) -> Self {
        let directory = TempDir::new().unwrap();
        let token = Token::from_bytes([0xA5; 32]);
        let process = command
            .arg("--serve-unix")
            .arg(directory.path().join("agent.sock"))
            .args(["--token", &token.to_hex()])
            .spawn()
            .unwrap();
        Self { process, token, directory }
    }

    /// A new connection, once the agent listens.
    pub(crate) async fn connect(&self) -> UnixStream {
        let path = self.directory.path().join("agent.sock");
        loop {
            match UnixStream::connect(&path).await {
                Ok(stream) => return stream,
                // The process is on its way to its socket.
                Err(_) => tokio::task::yield_now().await,
            }
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn path_text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.id()
    }

    pub(crate) async fn begin(&self, run: Run) -> Result<RunSession, ClientError> {
        host::run(self.connect().await, &self.token, run, LIMIT).await
    }

    pub(crate) async fn run(&self, run: Run) -> Outcome {
        finish(&mut self.begin(run).await.unwrap()).await
    }

    pub(crate) async fn sh(&self, script: &str) -> Outcome {
        self.run(sh(script)).await
    }

    /// Resident memory of the agent, in KiB.
    pub(crate) fn resident_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}

impl Drop for TestAgent {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

pub(crate) fn sh(script: &str) -> Run {
    Run { command: "sh".into(), args: vec!["-c".into(), script.into()], ..Run::default() }
}

pub(crate) async fn finish(session: &mut RunSession) -> Outcome {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    loop {
        match next(session).await {
            RunEvent::Output { stream: Stream::Stderr, data, .. } => {
                stderr.extend_from_slice(&data);
            }
            RunEvent::Output { data, .. } => stdout.extend_from_slice(&data),
            RunEvent::Exited(exited) => return Outcome { stdout, stderr, exited },
        }
    }
}

pub(crate) async fn next(session: &mut RunSession) -> RunEvent {
    tokio::time::timeout(LIMIT, session.next()).await.unwrap().unwrap()
}

/// Reads until the command has said `text` on stdout.
pub(crate) async fn wait_for(session: &mut RunSession, text: &str) -> String {
    let mut said = String::new();
    while !said.contains(text) {
        match next(session).await {
            RunEvent::Output { data, .. } => said.push_str(&String::from_utf8_lossy(&data)),
            RunEvent::Exited(exited) => panic!("ended early: {exited:?} after {said:?}"),
        }
    }
    said
}

/// A process that is alive and not merely uncollected.
pub(crate) fn is_alive(pid: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
}

/// Waits until a process is gone.
pub(crate) async fn gone(pid: &str) {
    let wait = async {
        while is_alive(pid) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(LIMIT, wait).await.unwrap();
}
