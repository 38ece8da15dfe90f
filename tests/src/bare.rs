//! A bare QEMU with the platform's kernel, image and devices, driven as a script would: what the
//! benchmarks compare the platform with. Machines have slots, from 0.

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    net::{Ipv6Addr, SocketAddrV6, TcpStream, UdpSocket},
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc::{Sender, channel},
    thread,
    time::{Duration, Instant},
};

use aether_protocol::{AGENT_PORT, Configure, Run, Token, WriteFile, host};
use anyhow::{Context, Result, bail, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::{Value, json};

use crate::platform::{BARE_PATH, BARE_PORT, bare_agent, env_path, program};
pub use crate::qmp::{Qmp, connect_soon};

const READY_PORT: u16 = 1025;
const HOST: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
const GUEST: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);
const GUEST_MAC: &str = "02:ae:00:00:00:02";
/// Of the interface beside the private link.
pub const NETWORK_MAC: &str = "02:ae:01:00:00:01";
const HOST_MAC: &str = "02:ae:00:00:00:01";
/// Far from what is usual.
pub const LIMIT: Duration = Duration::from_mins(2);

/// As a template's builder does, so that the files are in memory.
const WARM_UP: &str =
    "for it in sh bash; do $it -c 'ls -l / | cat; env'; done >/dev/null 2>&1; sync";

/// How a bare machine begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum From {
    /// Its kernel, with memory of its own.
    Kernel,
    /// Its kernel, with memory in the file that clones will map.
    KernelForSnapshot,
    Snapshot,
}

type Job = Box<dyn FnOnce() + Send>;

/// A network namespace and a thread that lives in it.
pub struct Namespace {
    name: String,
    jobs: Sender<Job>,
}

impl std::fmt::Debug for Namespace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Namespace").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Namespace {
    /// Those of processes that are gone are removed first: a benchmark that was killed could not.
    pub fn new(prefix: &str) -> Result<Self> {
        remove_abandoned()?;
        let name = format!("{prefix}{}", std::process::id());
        run("ip", &["netns", "add", &name])?;
        let jobs = inside(&name)?;
        Ok(Self { name, jobs })
    }

    pub fn ip(&self, args: &[&str]) -> Result<()> {
        run("ip", &[&["-n", &self.name], args].concat())
    }

    /// Runs something on the thread that lives in the namespace.
    pub fn within<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (answer, answered) = channel();
        let job = Box::new(move || drop(answer.send(work())));
        self.jobs.send(job).map_err(|_| anyhow::anyhow!("the namespace's thread has ended"))?;
        answered.recv()?
    }
}

/// A name of ours ends with the id of the process that made it.
fn remove_abandoned() -> Result<()> {
    let Ok(names) = fs::read_dir("/run/netns") else { return Ok(()) };
    for name in names {
        let name = name?.file_name().to_string_lossy().into_owned();
        let digits = name.trim_start_matches(|c: char| !c.is_ascii_digit());
        let is_ours = matches!(name.strip_suffix(digits), Some("bare" | "baref"));
        if is_ours && !digits.is_empty() && !Path::new("/proc").join(digits).exists() {
            // Another benchmark may be faster.
            let _ = run("ip", &["netns", "delete", &name]);
        }
    }
    Ok(())
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = run("ip", &["netns", "delete", &self.name]);
    }
}

/// A namespace with a private link for each slot, and what a machine boots from.
#[derive(Debug)]
pub struct Bare {
    namespace: Namespace,
    folder: tempfile::TempDir,
    image: Value,
    memory_mb: u32,
    tsc_khz: u64,
    /// Of the private links, by slot.
    scopes: Vec<u32>,
    runtime: tokio::runtime::Runtime,
}

impl Bare {
    pub fn new(memory_mb: u32, slots: usize) -> Result<Self> {
        let folder = tempfile::TempDir::new()?;
        make_empty_disk(folder.path())?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let mut bare = Self {
            namespace: Namespace::new("bare")?,
            folder,
            image: inspect_image("debian")?,
            memory_mb,
            tsc_khz: tsc_khz()?,
            scopes: Vec::new(),
            runtime,
        };
        for slot in 0..slots {
            bare.make_links(slot)?;
        }
        Ok(bare)
    }

    fn make_links(&mut self, slot: usize) -> Result<()> {
        let ip = |args: &[&str]| self.namespace.ip(args);
        let (channel, net) = (format!("channel{slot}"), format!("net{slot}"));
        ip(&["link", "set", "lo", "up"])?;
        ip(&["tuntap", "add", &channel, "mode", "tap", "vnet_hdr"])?;
        ip(&["link", "set", &channel, "address", HOST_MAC, "up"])?;
        ip(&["address", "add", "fe80::1/64", "dev", &channel, "nodad"])?;
        ip(&["-6", "neigh", "add", "fe80::2", "lladdr", GUEST_MAC, "dev", &channel])?;
        ip(&["tuntap", "add", &net, "mode", "tap", "vnet_hdr"])?;
        ip(&["link", "set", &net, "up"])?;
        let scope = self.namespace.within(move || {
            let text = fs::read_to_string(format!("/proc/thread-self/net/dev_snmp6/{channel}"))?;
            Ok(text.split_whitespace().nth(1).context("no index")?.parse()?)
        })?;
        self.scopes.push(scope);
        Ok(())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A disk for the next machine; not a part of what is measured.
    pub fn prepare(&self, from: From, slot: usize) -> Result<()> {
        let source = match from {
            From::Kernel | From::KernelForSnapshot => self.path("empty.img"),
            From::Snapshot => self.path("snapshot.img"),
        };
        let disk = self.path(&format!("disk{slot}.img"));
        run("cp", &["--sparse=always", text(&source)?, text(&disk)?])
    }

    /// Starts QEMU; call [`Bare::prepare`] first.
    pub fn spawn(&self, from: From, slot: usize) -> Result<Machine> {
        let mut command = self.command(from, slot)?;
        let qmp = self.path(&format!("qmp{slot}.sock"));
        let _ = fs::remove_file(&qmp);
        let child = self.namespace.within(move || command.spawn().context("start QEMU"))?;
        Ok(Machine { child, qmp })
    }

    /// Listens for the guest's word that it is ready; call it before the machine is spawned.
    pub fn hint(&self, slot: usize) -> Result<UdpSocket> {
        let address = SocketAddrV6::new(HOST, READY_PORT, 0, self.scopes[slot]);
        self.namespace.within(move || {
            let socket = UdpSocket::bind(address)?;
            socket.set_read_timeout(Some(LIMIT))?;
            Ok(socket)
        })
    }

    /// One boot in slot 0 up to the ready hint.
    pub fn boot(&self, from: From) -> Result<(Machine, Duration)> {
        self.prepare(from, 0)?;
        let hint = self.hint(0)?;
        let start = Instant::now();
        let machine = self.spawn(from, 0)?;
        hint.recv(&mut [0; 256]).context("wait for the guest")?;
        Ok((machine, start.elapsed()))
    }

    /// Boots a machine with the bare agent in it, and keeps its memory, devices and disk.
    pub fn make_snapshot(&self) -> Result<()> {
        let (machine, _) = self.boot(From::KernelForSnapshot)?;
        self.runtime.block_on(self.run_bare_agent())?;
        ensure!(
            self.command_output(0, &["/bin/sh", "-c", "sync; echo ok"])? == b"o"[0],
            "no agent"
        );
        self.keep(&machine)
    }

    /// Boots a machine with nothing in it but our agent, which does what a template's builder does,
    /// and keeps it.
    pub fn make_agent_snapshot(&self, words: Configure, last_words: Configure) -> Result<()> {
        let (machine, _) = self.boot(From::KernelForSnapshot)?;
        self.configure(words)?;
        self.agent_run(&["/bin/sh", "-c", WARM_UP])?;
        rest(Duration::from_secs(1));
        self.configure(last_words)?;
        rest(Duration::from_millis(200));
        self.keep(&machine)
    }

    fn keep(&self, machine: &Machine) -> Result<()> {
        let mut qmp = Qmp::connect(&machine.qmp)?;
        qmp.capabilities(&["x-ignore-shared", "events"])?;
        let state = self.path("snapshot.state");
        qmp.execute("migrate", &json!({ "uri": format!("exec:cat > {}", text(&state)?) }))?;
        qmp.event(|event, data| event == "MIGRATION" && data["status"] == "completed")?;
        let (disk, kept) = (self.path("disk0.img"), self.path("snapshot.img"));
        run("cp", &["--sparse=always", text(&disk)?, text(&kept)?])?;
        Ok(())
    }

    /// Restores the snapshot up to a running guest.
    pub fn restore(&self, slot: usize) -> Result<Machine> {
        let machine = self.spawn(From::Snapshot, slot)?;
        let mut qmp = Qmp::connect(&machine.qmp)?;
        qmp.capabilities(&["x-ignore-shared", "events"])?;
        let state = self.path("snapshot.state");
        qmp.execute("migrate-incoming", &json!({ "uri": format!("exec:cat {}", text(&state)?) }))?;
        qmp.event(|event, _| event == "RESUME")?;
        Ok(machine)
    }

    pub fn boot_to_first_byte(&self, command: &[&str]) -> Result<Duration> {
        self.prepare(From::Kernel, 0)?;
        let hint = self.hint(0)?;
        let start = Instant::now();
        let machine = self.spawn(From::Kernel, 0)?;
        hint.recv(&mut [0; 256]).context("wait for the guest")?;
        self.agent_first_byte(command)?;
        let took = start.elapsed();
        drop(machine);
        Ok(took)
    }

    pub fn restore_to_first_byte(&self, command: &[&str]) -> Result<Duration> {
        self.prepare(From::Snapshot, 0)?;
        let start = Instant::now();
        let machine = self.restore(0)?;
        let (_, stream) = self.first_byte(0, command)?;
        let took = start.elapsed();
        drop(stream);
        drop(machine);
        Ok(took)
    }

    /// A restored, warm and paused machine: how long its control takes to resume it, and how long
    /// it is to the command's first byte.
    pub fn resume_to_first_byte(
        &self,
        command: &[&str],
        warm_up: usize,
    ) -> Result<(Duration, Duration)> {
        self.prepare(From::Snapshot, 0)?;
        let machine = self.restore(0)?;
        for _ in 0..warm_up {
            self.command_output(0, command)?;
        }
        let mut control = machine.control()?;
        control.execute("stop", &json!({}))?;
        let start = Instant::now();
        control.execute("cont", &json!({}))?;
        let resume = start.elapsed();
        let (_, mut stream) = self.first_byte(0, command)?;
        let took = start.elapsed();
        let _ = stream.read_to_end(&mut Vec::new());
        Ok((resume, took))
    }

    /// Runs a command through the bare agent; the first byte that it says.
    pub fn command_output(&self, slot: usize, command: &[&str]) -> Result<u8> {
        let mut stream = self.dial(slot, BARE_PORT)?;
        stream.write_all(format!("x\t{}\n", command.join("\t")).as_bytes())?;
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        // To its end, so that nothing of it runs on.
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest)?;
        Ok(byte[0])
    }

    /// Starts a command and returns at its first byte; the stream is read to its end later.
    pub fn first_byte(&self, slot: usize, command: &[&str]) -> Result<(u8, TcpStream)> {
        let mut stream = self.dial(slot, BARE_PORT)?;
        stream.write_all(format!("x\t{}\n", command.join("\t")).as_bytes())?;
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        Ok((byte[0], stream))
    }

    /// The first byte of a command that the own agent of the guest in slot 0 runs, for a guest
    /// without the bare one.
    pub fn agent_first_byte(&self, command: &[&str]) -> Result<()> {
        self.runtime.block_on(async {
            let run = Run {
                command: command[0].to_owned(),
                args: command[1..].iter().map(|&arg| arg.to_owned()).collect(),
                ..Run::default()
            };
            let mut run = host::run(self.agent()?, &Token::from_bytes([0; 32]), run, LIMIT).await?;
            match run.next().await? {
                host::RunEvent::Output { .. } => Ok(()),
                host::RunEvent::Exited(exited) => bail!("the command said nothing: {exited:?}"),
            }
        })
    }

    /// Has our agent run a command to its end.
    fn agent_run(&self, command: &[&str]) -> Result<()> {
        self.runtime.block_on(async {
            let run = Run {
                command: command[0].to_owned(),
                args: command[1..].iter().map(|&arg| arg.to_owned()).collect(),
                ..Run::default()
            };
            let mut run = host::run(self.agent()?, &Token::from_bytes([0; 32]), run, LIMIT).await?;
            while let host::RunEvent::Output { .. } = run.next().await? {}
            Ok(())
        })
    }

    /// Configures the guest in slot 0.
    pub fn configure(&self, words: Configure) -> Result<()> {
        self.runtime.block_on(async {
            let token = Token::from_bytes([0; 32]);
            let answer = host::configure(self.agent()?, &token, words, LIMIT).await?;
            ensure!(answer.warnings.is_empty(), "{:?}", answer.warnings);
            Ok(())
        })
    }

    /// A stream to the agent of the guest in slot 0. Within the runtime.
    fn agent(&self) -> Result<host::BoxStream> {
        let stream = self.dial(0, u16::try_from(AGENT_PORT)?)?;
        stream.set_nonblocking(true)?;
        Ok(Box::new(tokio::net::TcpStream::from_std(stream)?))
    }

    pub fn dial(&self, slot: usize, port: u16) -> Result<TcpStream> {
        let address = SocketAddrV6::new(GUEST, port, 0, self.scopes[slot]);
        self.namespace.within(move || {
            let stream = TcpStream::connect(address)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(LIMIT))?;
            Ok(stream)
        })
    }

    async fn run_bare_agent(&self) -> Result<()> {
        let token = Token::from_bytes([0; 32]);
        let target =
            WriteFile { path: BARE_PATH.to_owned(), mode: Some(0o755), ..WriteFile::default() };
        let mut file = host::write_file(self.agent()?, &token, target, LIMIT).await?;
        file.write(fs::read(bare_agent()?)?.into()).await?;
        file.finish().await?;
        let command = Run {
            run_id: "bare".to_owned(),
            command: BARE_PATH.to_owned(),
            detached: true,
            ..Run::default()
        };
        let mut run = host::run(self.agent()?, &token, command, LIMIT).await?;
        // Its first line says that it listens.
        match run.next().await? {
            host::RunEvent::Output { .. } => Ok(()),
            host::RunEvent::Exited(exited) => bail!("the bare agent ended: {exited:?}"),
        }
    }

    fn command(&self, from: From, slot: usize) -> Result<Command> {
        let append = format!(
            "quiet loglevel=1 console=ttyS0 8250.nr_uarts=1 panic=-1 reboot=t pci=off \
             random.trust_cpu=on cryptomgr.notests audit=0 nowatchdog nmi_watchdog=0 nokaslr \
             mitigations=off no_timer_check noreplace-smp lsm= ima_appraise=off \
             initcall_blacklist=init_kprobes,btf_vmlinux_init tsc=reliable tsc_early_khz={} \
             ae.channel=link:{GUEST_MAC} ae.hostmac={HOST_MAC} ae.token={}",
            self.tsc_khz,
            "00".repeat(32),
        );
        let machine = "microvm,acpi=on,pit=off,pic=off,rtc=on,isa-serial=on";
        let memory = self.path("snapshot.mem");
        let mut command = Command::new("qemu-system-x86_64");
        match from {
            From::Kernel => command.args(["-M", machine]),
            From::KernelForSnapshot | From::Snapshot => {
                let share = if from == From::Snapshot { "off" } else { "on" };
                command.args(["-M", &format!("{machine},memory-backend=mem"), "-object"]).arg(
                    format!(
                        "memory-backend-file,id=mem,size={}M,mem-path={},share={share}",
                        self.memory_mb,
                        memory.display()
                    ),
                )
            }
        };
        if from == From::Snapshot {
            command.args(["-incoming", "defer"]);
        }
        command
            .args(["-accel", "tcg", "-cpu", "Nehalem", "-smp", "1"])
            .args(["-m", &format!("{}M", self.memory_mb)])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-qmp"])
            .arg(format!(
                "unix:{},server=on,wait=off",
                self.path(&format!("qmp{slot}.sock")).display()
            ))
            .arg("-kernel")
            .arg(blob(&self.image, "kernel")?)
            .arg("-initrd")
            .arg(blob(&self.image, "initrd")?)
            .args(["-append", &append, "-serial", "null"])
            .arg("-drive")
            .arg(format!(
                "if=none,id=d0,format=raw,readonly=on,file.locking=off,file={}",
                blob(&self.image, "rootfs")?.display()
            ))
            .args(["-device", "virtio-blk-device,drive=d0", "-drive"])
            .arg(format!(
                "if=none,id=d1,format=raw,file={}",
                self.path(&format!("disk{slot}.img")).display()
            ))
            .args(["-device", "virtio-blk-device,drive=d1"])
            .arg("-netdev")
            .arg(format!("tap,id=n1,ifname=net{slot},script=no,downscript=no"))
            .arg("-device")
            .arg(format!("virtio-net-device,netdev=n1,mac={NETWORK_MAC}"))
            .arg("-netdev")
            .arg(format!("tap,id=n0,ifname=channel{slot},script=no,downscript=no"))
            .arg("-device")
            .arg(format!("virtio-net-device,netdev=n0,mac={GUEST_MAC}"))
            .args(["-device", "virtio-rng-device"])
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        Ok(command)
    }
}

/// A QEMU, ended with its owner.
#[derive(Debug)]
pub struct Machine {
    child: Child,
    qmp: PathBuf,
}

impl Machine {
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn control(&self) -> Result<Qmp> {
        Qmp::connect(&self.qmp)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// As long as the builder of a template.
#[expect(clippy::disallowed_methods, reason = "nothing tells when a kernel has no more to do")]
fn rest(time: Duration) {
    thread::sleep(time);
}

/// What `aether image inspect` says.
pub fn inspect_image(name: &str) -> Result<Value> {
    let output = Command::new(program()?)
        .args(["--json", "image", "inspect", name])
        .output()
        .context("inspect the image")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// The file of a part of an image.
pub fn blob(image: &Value, part: &str) -> Result<PathBuf> {
    let digest = image[part]["digest"].as_str().context("no digest")?;
    let (_, hex) = digest.split_once(':').context("not a digest")?;
    let images =
        env_path("AETHER_IMAGE_DIR").context("AETHER_IMAGE_DIR is not set; ./dev bench")?;
    Ok(images.join("blobs").join(hex))
}

/// `empty.img`: an empty writable layer, as the platform's.
pub fn make_empty_disk(folder: &Path) -> Result<()> {
    let tree = folder.join("tree");
    fs::create_dir_all(tree.join("upper"))?;
    fs::create_dir_all(tree.join("work"))?;
    let disk = folder.join("empty.img");
    File::create(&disk)?.set_len(2048 * 1024 * 1024)?;
    run("mkfs.ext4", &["-q", "-d", text(&tree)?, text(&disk)?])
}

/// A thread in a namespace that does what it is given.
fn inside(namespace: &str) -> Result<Sender<Job>> {
    let file = File::open(Path::new("/run/netns").join(namespace))?;
    let (jobs, given) = channel::<Job>();
    let (ready, is_ready) = channel();
    thread::spawn(move || {
        let moved = move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network));
        if ready.send(moved).is_ok() {
            for job in given {
                job();
            }
        }
    });
    is_ready.recv()?.context("enter the namespace")?;
    Ok(jobs)
}

/// The guest's calibration fails on a busy host, so it is told.
fn tsc_khz() -> Result<u64> {
    let text = fs::read_to_string("/proc/cpuinfo")?;
    let line = text.lines().find(|line| line.starts_with("cpu MHz")).context("no cpu MHz")?;
    let mhz: f64 = line.split(':').nth(1).context("no value")?.trim().parse()?;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a frequency of some gigahertz"
    )]
    Ok((mhz * 1000.0) as u64)
}

pub fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is no text")
}

pub fn run(program: &str, args: &[&str]) -> Result<()> {
    let output = Command::new(program).args(args).output().context(program.to_owned())?;
    if !output.status.success() {
        bail!("{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn real_guest_namespaces_of_processes_that_are_gone_are_removed() -> Result<()> {
        if !crate::platform::can_run_guests() {
            return Ok(());
        }
        // Beyond every id of a process.
        let left = "baref4194305";
        run("ip", &["netns", "add", left])?;
        let ours = Namespace::new("bare")?;
        ensure!(!Path::new("/run/netns").join(left).exists(), "{left} is there");
        ensure!(Path::new("/run/netns").join(&ours.name).exists(), "it removed a living one");
        Ok(())
    }
}
