//! A platform in a temporary folder, and the command line that finds it there.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

pub(crate) struct Up {
    child: Child,
    /// What it printed until it was ready.
    pub(crate) said: Vec<String>,
}

pub(crate) struct Rig {
    pub(crate) folder: tempfile::TempDir,
    /// Options of `up`.
    options: Vec<&'static str>,
    /// Of `up`.
    env: Vec<(String, String)>,
    /// What it says when it is ready.
    ready: &'static str,
    up: Option<Up>,
}

impl Rig {
    /// Its VMs boot.
    pub(crate) fn start() -> Self {
        Self::with(&["--no-default-template", "--pool", "none"], "Aetherium is ready")
    }

    pub(crate) fn with(options: &[&'static str], ready: &'static str) -> Self {
        Self::with_env(options, &[], ready)
    }

    pub(crate) fn with_env(
        options: &[&'static str],
        env: &[(&str, &str)],
        ready: &'static str,
    ) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let env = env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        let env = env.collect();
        let mut rig = Self { folder, options: options.to_vec(), env, ready, up: None };
        rig.restart();
        rig
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    pub(crate) fn said(&self) -> &[String] {
        &self.up.as_ref().unwrap().said
    }

    pub(crate) fn restart(&mut self) {
        let mut child = command(&self.data())
            .args(["up", "--driver", "sim", "--listen", "127.0.0.1:0", "--log-level", "warn"])
            .args((!self.options.contains(&"--default-tool")).then_some("--no-default-tools"))
            .args(&self.options)
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = child.stdout.take().unwrap();
        let mut said = Vec::new();
        for line in BufReader::new(stdout).lines() {
            let line = line.unwrap();
            let ready = line.contains(self.ready);
            said.push(line);
            if ready {
                self.up = Some(Up { child, said });
                return;
            }
        }
        let status = child.wait().unwrap();
        panic!("it ended with {status} before it was ready: {said:?}");
    }

    pub(crate) fn pid(&self) -> Pid {
        pid(&self.up.as_ref().unwrap().child)
    }

    /// Ends the platform with a signal; how, and how long it took.
    pub(crate) fn end(&mut self, signal: Signal) -> (ExitStatus, Duration) {
        let start = Instant::now();
        let mut up = self.up.take().unwrap();
        kill_process(pid(&up.child), signal).unwrap();
        (up.child.wait().unwrap(), start.elapsed())
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = command(&self.data());
        command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    pub(crate) fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// With this standard input.
    pub(crate) fn feed(&self, args: &[&str], input: &[u8]) -> Output {
        let mut child = self.command(args).stdin(Stdio::piped()).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let input = input.to_vec();
        let writer = std::thread::spawn(move || {
            // A command that does not read all of it is no failure.
            let _ = stdin.write_all(&input);
        });
        let output = child.wait_with_output().unwrap();
        writer.join().unwrap();
        output
    }

    /// Standard output of a command that must do well.
    pub(crate) fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Exit status and the last line of standard error.
    pub(crate) fn fails(&self, args: &[&str]) -> (i32, String) {
        let output = self.run(args);
        let text = String::from_utf8(output.stderr).unwrap();
        (output.status.code().unwrap(), text.lines().last().unwrap_or_default().to_owned())
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if self.up.is_some() {
            self.end(Signal::TERM);
        }
    }
}

pub(crate) fn pid(child: &Child) -> Pid {
    Pid::from_child(child)
}

pub(crate) fn command(data: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_aether"));
    for name in [
        "AETHER_URL",
        "AETHER_KEY",
        "AETHER_DRIVER",
        "AETHER_LISTEN",
        "AETHER_TEMPLATE_DIR",
        "AETHER_POOL",
        "AETHER_LOGGING_PROVIDER",
        "LOKI_URL",
        "AETHER_DEFAULT_TOOLS",
        "AETHER_NO_DEFAULT_TOOLS",
        "AETHER_TOOLS_DIR",
        "AETHER_MIGRATE",
        "AETHER_WORKER_HOST",
        "AETHER_WORKER_ZONE",
        "AETHER_WORKER_LABELS",
        "AETHER_WORKER_VCPUS",
        "AETHER_WORKER_MEMORY",
        "AETHER_WORKER_VMS",
        "AETHER_WORKER_HEARTBEAT",
        "AETHER_WORKER_LEASE",
        "AETHER_STREAM_LISTEN",
        "AETHER_STREAM_ADVERTISE",
        "AETHER_STREAM_CERTIFICATE_LIFETIME",
        "DATABASE_URL",
        "POSTGRES_HOST",
        "POSTGRES_PORT",
        "POSTGRES_USER",
        "POSTGRES_PASSWORD",
        "POSTGRES_DB",
        "POSTGRES_SSLMODE",
        "REDIS_URL",
        "REDIS_ADDR",
        "REDIS_USER",
        "REDIS_PASSWORD",
        "REDIS_CA_FILE",
        "REDIS_PREFIX",
        "AETHER_CA",
        "AETHER_TLS_CERT",
        "AETHER_TLS_KEY",
        "AETHER_TLS_AUTO",
        "AETHER_TLS_NAMES",
        "AETHER_INSECURE_HTTP",
        "AETHER_AUTHORITY_DIR",
        "NOTIFY_SOCKET",
    ] {
        command.env_remove(name);
    }
    command.env("AETHER_DATA_DIR", data);
    command
}
