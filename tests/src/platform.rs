//! A running `aether up` in a data directory of its own.

use std::{
    collections::BTreeSet,
    ffi::CString,
    fs,
    io::Write as _,
    net::IpAddr,
    os::{fd::AsFd as _, unix::net::UnixDatagram},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use aether_api::{
    BuildTemplate, CreateVm, ExecuteRequest, ExecutionView, StreamEvent, TemplateView, VmView,
    client::{CallOptions, Client, Waited, WriteOptions},
};
use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    mount::{MountFlags, UnmountFlags, mount, unmount},
    process::{Pid, PidfdFlags, Signal, pidfd_open},
};
use serde_json::Value;
use tempfile::TempDir;

use crate::wire;

/// A boot in software emulation on a busy machine; far from what is usual.
pub const LONG: Duration = Duration::from_mins(4);

/// Where the program has no event to wait for from outside.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Where the bare agent listens in the guest, and where it is.
pub const BARE_PORT: u16 = 2000;
pub const BARE_PATH: &str = "/usr/local/bin/bare-agent";

/// What a platform is started with.
#[derive(Debug, Clone)]
pub struct Setup {
    pub driver: &'static str,
    pub args: Vec<String>,
    pub env: Vec<(String, String)>,
    /// Address and port; the port is chosen anew at each start where it is 0.
    pub listen: String,
    /// Its folder is a disk of its own of so many MB, in memory. Needs root.
    pub disk_mb: Option<u32>,
}

impl Setup {
    /// With this driver, and nothing else said.
    #[must_use]
    pub fn of(driver: &'static str) -> Self {
        let listen = "127.0.0.1:0".to_owned();
        Self { driver, args: Vec::new(), env: Vec::new(), listen, disk_mb: None }
    }

    #[must_use]
    pub fn sim() -> Self {
        Self::of("sim")
    }

    /// VMs that ask for nothing special are restored from the default template, which all tests
    /// share where `AETHER_TEMPLATE_DIR` is set. No pool.
    #[must_use]
    pub fn qemu() -> Self {
        Self::of("qemu").with(&["--pool", "none"])
    }

    /// With the kernel that runs where KVM is emulated, and whatever version there is.
    #[must_use]
    pub fn firecracker() -> Self {
        let args = ["--image", "debian-fctest", "--allow-vulnerable-firecracker", "--pool", "none"];
        Self::of("firecracker").with(&args)
    }

    /// `TEMPLATE=MIN[..MAX]` in place of no pool.
    #[must_use]
    pub fn with_pool(mut self, pool: &str) -> Self {
        self.args.retain(|arg| arg != "--pool" && arg != "none");
        self.with(&["--pool", pool])
    }

    #[must_use]
    pub fn with(mut self, args: &[&str]) -> Self {
        self.args.extend(args.iter().map(|&arg| arg.to_owned()));
        self
    }

    /// What every VM has has to be fetched and built; only who asks for it waits for that.
    fn without_tools(&self) -> Option<&'static str> {
        let wants = self.args.iter().any(|arg| arg.starts_with("--default-tool"));
        (!wants).then_some("--no-default-tools")
    }
}

#[derive(Debug)]
pub struct Platform {
    dir: TempDir,
    setup: Setup,
    child: Option<Child>,
    client: Option<Client>,
    namespaces: BTreeSet<String>,
    ready: Value,
}

/// Where real guests can run: the program, the agent and an image are there, and this is root.
/// Prints why not.
pub fn can_run_guests() -> bool {
    let reason = if !rustix::process::geteuid().is_root() {
        "real guests need root for their network"
    } else if env_path("AETHER_AGENT").is_none_or(|path| !path.exists()) {
        "AETHER_AGENT names no guest agent; ./dev test builds one"
    } else {
        return true;
    };
    #[expect(clippy::print_stdout, reason = "how a test says that it skipped")]
    {
        println!("skipped: {reason}");
    }
    false
}

#[expect(clippy::disallowed_methods, reason = "tests are configured by their environment")]
pub fn env_path(name: &str) -> Option<PathBuf> {
    std::env::var(name).ok().filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// The program under test: `AETHER_BIN`, or the one beside the tests.
pub fn program() -> Result<PathBuf> {
    if let Some(path) = env_path("AETHER_BIN") {
        return Ok(path);
    }
    let mut path = std::env::current_exe()?;
    while path.pop() {
        let candidate = path.join("aether");
        if candidate.is_file() {
            return Ok(candidate);
        }
    }
    bail!("no aether program: set AETHER_BIN or build it")
}

impl Platform {
    pub fn start(setup: Setup) -> Result<Self> {
        let dir = TempDir::with_prefix("aether-test-")?;
        if let Some(mb) = setup.disk_mb {
            let size = CString::new(format!("size={mb}m"))?;
            mount("aether-test", dir.path(), "tmpfs", MountFlags::empty(), Some(size.as_c_str()))?;
        }
        let mut platform = Self {
            dir,
            setup,
            child: None,
            client: None,
            namespaces: BTreeSet::new(),
            ready: Value::Null,
        };
        platform.restart()?;
        Ok(platform)
    }

    /// Starts the program on the data directory, new or left by an earlier one, and returns when
    /// it says that it is ready.
    pub fn restart(&mut self) -> Result<()> {
        ensure!(self.child.is_none(), "it runs already");
        let notify = self.dir.path().join("notify");
        let _ = fs::remove_file(&notify);
        let ready = UnixDatagram::bind(&notify)?;
        let log = fs::OpenOptions::new().create(true).append(true).open(self.log_path())?;
        let words = fs::File::create(self.words_path())?;
        let child = Command::new(program()?)
            .args(["--json", "up", "--data-dir"])
            .arg(self.data_dir())
            .args(["--listen", &self.setup.listen, "--driver", self.setup.driver])
            .args(&self.setup.args)
            .args(self.setup.without_tools())
            .envs(self.setup.env.iter().map(|(name, value)| (name, value)))
            .env("NOTIFY_SOCKET", &notify)
            .stdin(Stdio::null())
            .stdout(words)
            .stderr(log)
            .spawn()
            .context("start aether up")?;
        self.child = Some(child);
        self.await_ready(&ready)?;
        let key = fs::read_to_string(self.data_dir().join("admin-key"))?;
        self.ready = self.ready_word()?;
        self.client = Some(Client::new(self.url()?, Some(key.trim()))?);
        if let Some(instance) = self.ready["network_instance"].as_str() {
            self.namespaces.insert(format!("aether-{instance}"));
        }
        Ok(())
    }

    /// The line of JSON that says that it is ready, and where.
    fn ready_word(&self) -> Result<Value> {
        let words = fs::read_to_string(self.words_path())?;
        let mut lines = words.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        lines.find(|word| word["event"] == "ready").context("no ready word")
    }

    fn words_path(&self) -> PathBuf {
        self.dir.path().join("words")
    }

    /// Waits until VMs without a template of their own are restored: the first time the default
    /// template is built. The program says so in a line of its own.
    pub async fn await_default_template(&self) -> Result<()> {
        let deadline = Instant::now() + LONG;
        loop {
            let words = fs::read_to_string(self.words_path())?;
            let mut lines = words.lines().filter_map(|l| serde_json::from_str::<Value>(l).ok());
            if let Some(word) = lines.find(|word| word["event"] == "template") {
                ensure!(word["state"] == "ready", "the default template: {word}\n{}", self.log());
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "no default template: {words}\n{}", self.log());
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    pub async fn build_template(&self, request: &BuildTemplate) -> Result<TemplateView> {
        match self.client().build_template(request, &CallOptions::waiting(LONG)).await? {
            Waited::Done(template) => Ok(template),
            Waited::Accepted(accepted) => bail!("the build is not done in time: {accepted:?}"),
        }
    }

    /// Waits until every pool has what it shall have. There is no event to wait for from outside.
    pub async fn await_pools(&self) -> Result<()> {
        let deadline = Instant::now() + LONG;
        loop {
            let pools = self.client().pools().await?.items;
            if pools.iter().all(|pool| pool.ready >= pool.target && pool.target > 0) {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "the pools are not full: {pools:?}\n{}", self.log());
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// Where VMs find this host, if a rule lets them.
    pub fn host_address(&self) -> Result<IpAddr> {
        let address = self.ready["host_address"].as_str().context("this driver has no network")?;
        Ok(address.parse()?)
    }

    /// Waits for the word that it is ready, or for its end.
    fn await_ready(&mut self, ready: &UnixDatagram) -> Result<()> {
        let pid = self.pid().context("it does not run")?;
        let process = pidfd_open(pid, PidfdFlags::empty())?;
        let limit = Timespec::try_from(LONG)?;
        let mut buffer = [0; 256];
        loop {
            let mut watched = [
                PollFd::new(ready, PollFlags::IN),
                PollFd::from_borrowed_fd(process.as_fd(), PollFlags::IN),
            ];
            let events = poll(&mut watched, Some(&limit))?;
            if !watched[0].revents().contains(PollFlags::IN) {
                let words = fs::read_to_string(self.words_path()).unwrap_or_default();
                bail!("aether up is not ready ({events} events): {words}{}", self.log());
            }
            let count = ready.recv(&mut buffer)?;
            if buffer[..count].starts_with(b"READY=1") {
                return Ok(());
            }
        }
    }

    /// The network namespaces that it has had.
    pub fn namespaces(&self) -> &BTreeSet<String> {
        &self.namespaces
    }

    pub fn data_dir(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// Leaves no room on its disk until the guard goes.
    pub fn fill_disk(&self) -> Result<Full> {
        let path = self.dir.path().join("full");
        let mut file = fs::File::create(&path)?;
        let piece = vec![1; 1 << 20];
        while file.write_all(&piece).is_ok() {}
        Ok(Full(path))
    }

    pub fn log_path(&self) -> PathBuf {
        self.dir.path().join("log")
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// Where it listens.
    pub fn url(&self) -> Result<&str> {
        self.ready["url"].as_str().context("no url in the ready word")
    }

    pub fn client(&self) -> &Client {
        self.client.as_ref().expect("the platform runs")
    }

    pub fn pid(&self) -> Option<Pid> {
        self.child.as_ref().and_then(|child| Pid::from_raw(child.id().cast_signed()))
    }

    /// What a crash is.
    pub fn kill(&mut self) -> Result<()> {
        self.end(Signal::KILL)?;
        Ok(())
    }

    pub fn terminate(&mut self) -> Result<ExitStatus> {
        self.end(Signal::TERM)
    }

    fn end(&mut self, signal: Signal) -> Result<ExitStatus> {
        let pid = self.pid().context("it does not run")?;
        rustix::process::kill_process(pid, signal)?;
        let mut child = self.child.take().context("it does not run")?;
        self.client = None;
        Ok(child.wait()?)
    }

    /// Ends the platform and shows that nothing of it is left on the host.
    pub fn finish(mut self) -> Result<()> {
        let status = self.terminate()?;
        ensure!(status.success(), "aether up ended with {status}: {}", self.log());
        let left = self.leftovers()?;
        ensure!(left.is_empty(), "left over: {left:#?}\n{}", self.log());
        Ok(())
    }

    /// Processes, mounts, links and files of this platform's VMs.
    pub fn leftovers(&self) -> Result<Vec<String>> {
        let mut left = wire::host_leftovers(&self.data_dir(), &self.namespaces)?;
        let vms = self.data_dir().join("vms");
        if let Ok(entries) = fs::read_dir(&vms) {
            for entry in entries {
                let path = entry?.path();
                if path.is_dir() {
                    left.push(format!("directory {}", path.display()));
                }
            }
        }
        Ok(left)
    }

    pub async fn create(&self, request: &CreateVm) -> Result<VmView> {
        match self.client().create_vm(request, &CallOptions::waiting(LONG)).await? {
            Waited::Done(vm) => Ok(vm),
            Waited::Accepted(accepted) => bail!("the VM is not ready in time: {accepted:?}"),
        }
    }

    pub async fn delete(&self, vm: &str) -> Result<()> {
        match self.client().delete_vm(vm, &CallOptions::waiting(LONG)).await? {
            Waited::Done(_) => Ok(()),
            Waited::Accepted(accepted) => bail!("the VM is not deleted in time: {accepted:?}"),
        }
    }

    pub async fn execute(&self, vm: &str, command: &[&str]) -> Result<ExecutionView> {
        let (command, args) = command.split_first().context("a command")?;
        let request = ExecuteRequest {
            command: (*command).to_owned(),
            args: args.iter().map(|&arg| arg.to_owned()).collect(),
            ..ExecuteRequest::default()
        };
        self.execute_request(vm, &request).await
    }

    pub async fn execute_request(
        &self,
        vm: &str,
        request: &ExecuteRequest,
    ) -> Result<ExecutionView> {
        match self.client().execute(vm, request, &CallOptions::waiting(LONG)).await? {
            Waited::Done(execution) => Ok(execution),
            Waited::Accepted(accepted) => bail!("the command did not end in time: {accepted:?}"),
        }
    }
}

impl Platform {
    /// From the request for a VM to the first byte that its first command says, at the client. The
    /// VM, as it was then, is deleted.
    pub async fn first_output(
        &self,
        request: &CreateVm,
        command: &[&str],
    ) -> Result<(Duration, VmView)> {
        let (program, args) = command.split_first().context("a command")?;
        let command = ExecuteRequest {
            command: (*program).to_owned(),
            args: args.iter().map(|&arg| arg.to_owned()).collect(),
            ..ExecuteRequest::default()
        };
        let client = self.client();
        let start = Instant::now();
        let accepted = client.create_vm(request, &CallOptions::default()).await?;
        let vm = accepted.vm_id().to_string();
        let mut follow = client.execute_stream(&vm, &command, None).await?;
        loop {
            match follow.next().await?.context("the command ended without a word")? {
                StreamEvent::Stdout { .. } => break,
                StreamEvent::End(_) => bail!("the command said nothing"),
                _ => {}
            }
        }
        let took = start.elapsed();
        while follow.next().await?.is_some() {}
        let view = client.vm(&vm).await?;
        self.delete(&vm).await?;
        Ok((took, view))
    }

    /// Waits for a line of its log, of which there is no other sign from outside.
    pub async fn await_log(&self, text: &str) -> Result<()> {
        let deadline = Instant::now() + LONG;
        while !self.log().contains(text) {
            ensure!(Instant::now() < deadline, "the log does not say `{text}`:\n{}", self.log());
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        Ok(())
    }

    /// Its namespace, where it has had just one.
    pub fn namespace(&self) -> Result<String> {
        let names: Vec<&String> = self.namespaces.iter().collect();
        let [name] = names.as_slice() else { bail!("not one namespace: {names:?}") };
        Ok((*name).clone())
    }

    /// Brings the bare agent into a VM and starts it there.
    pub async fn run_bare_agent(&self, vm: &str) -> Result<()> {
        let program = fs::read(bare_agent()?)?;
        let options = WriteOptions { mode: Some(0o755), ..WriteOptions::default() };
        let body = futures::stream::iter([Ok::<_, std::io::Error>(Bytes::from(program))]);
        self.client().write_file(vm, BARE_PATH, &options, body).await?;
        // It runs until the VM ends; its first line of output says that it listens.
        let request = ExecuteRequest { command: BARE_PATH.into(), ..ExecuteRequest::default() };
        let mut follow = self.client().execute_stream(vm, &request, None).await?;
        while let Some(event) = follow.next().await? {
            if matches!(event, StreamEvent::Stdout { .. }) {
                return Ok(());
            }
        }
        bail!("the bare agent ended")
    }
}

/// A VM as small as tests need it.
#[must_use]
pub fn small_vm(name: &str) -> CreateVm {
    CreateVm { name: Some(name.to_owned()), memory_mb: Some(256), ..CreateVm::default() }
}

/// What fills a disk.
#[derive(Debug)]
pub struct Full(PathBuf);

impl Drop for Full {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

impl Drop for Platform {
    fn drop(&mut self) {
        // A failed test must not leave machines: a clean end removes them, a crash would not.
        if self.child.is_some() {
            let _ = self.terminate();
        }
        if self.setup.disk_mb.is_some() {
            let _ = unmount(self.dir.path(), UnmountFlags::DETACH);
        }
    }
}

/// The agent that the benchmarks compare with.
pub fn bare_agent() -> Result<PathBuf> {
    let path =
        env_path("AETHER_BARE_AGENT").context("AETHER_BARE_AGENT is not set; ./dev bench")?;
    ensure!(Path::new(&path).exists(), "{} is not there", path.display());
    Ok(path)
}
