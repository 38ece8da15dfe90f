//! A bare Firecracker with the test kernel and the platform's devices, driven as a script would.
//! Commands in it are run by the guest's own agent, over vsock.

use std::{
    cell::Cell,
    fs,
    io::{Read as _, Write as _},
    os::{
        fd::AsRawFd as _,
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use aether_protocol::{AGENT_PORT, Run, Token, host};
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::{
    bare::{Namespace, blob, connect_soon, inspect_image, make_empty_disk, run, text},
    platform::env_path,
};

const IMAGE: &str = "debian-fctest";
const LIMIT: Duration = Duration::from_mins(2);
/// The first connection after a load may hang; the next one does not. It is given up after so long,
/// or three times what a command in a warm guest takes, where that is longer.
const FIRST_LIMIT: Duration = Duration::from_millis(500);
const FIRST_FACTOR: u32 = 3;
const READY_PORT: u32 = 1025;
const MAC: &str = "02:ae:01:00:00:02";

/// What a machine boots from, and where its files are.
#[derive(Debug)]
pub struct BareFirecracker {
    namespace: Namespace,
    folder: tempfile::TempDir,
    program: PathBuf,
    image: Value,
    memory_mb: u32,
    /// For one exchange with the guest.
    exchange: Cell<Duration>,
    runtime: tokio::runtime::Runtime,
}

/// A Firecracker, ended with its owner.
#[derive(Debug)]
pub struct Machine {
    child: Child,
    api: UnixStream,
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl BareFirecracker {
    pub fn new(memory_mb: u32) -> Result<Self> {
        let folder = tempfile::TempDir::new()?;
        let program = env_path("AETHER_FIRECRACKER").context("AETHER_FIRECRACKER is not set")?;
        let namespace = Namespace::new("baref")?;
        namespace.ip(&["tuntap", "add", "net0", "mode", "tap", "vnet_hdr"])?;
        namespace.ip(&["link", "set", "net0", "up"])?;
        make_empty_disk(folder.path())?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (image, exchange) = (inspect_image(IMAGE)?, Cell::new(LIMIT / 4));
        Ok(Self { namespace, folder, program, image, memory_mb, exchange, runtime })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A disk for the next machine, and no sockets of the last; not a part of what is measured.
    fn prepare(&self, disk: &str) -> Result<()> {
        for socket in ["api.sock", "v.sock", &format!("v.sock_{READY_PORT}")] {
            let _ = fs::remove_file(self.path(socket));
        }
        run("cp", &["--sparse=always", text(&self.path(disk))?, text(&self.path("disk.img"))?])
    }

    fn spawn(&self) -> Result<Machine> {
        let mut command = Command::new(&self.program);
        command
            .args(["--api-sock", "api.sock", "--level", "Error"])
            .current_dir(self.folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let child = self.namespace.within(move || command.spawn().context("start Firecracker"))?;
        let api = connect_soon(&self.path("api.sock"))?;
        Ok(Machine { child, api })
    }

    fn boot(&self) -> Result<Machine> {
        let ready = UnixListener::bind(self.path(&format!("v.sock_{READY_PORT}")))?;
        let mut machine = self.spawn()?;
        let ecx = json!({ "register": "ecx", "bitmap": "0bxx0000xxxxxxxxxxxx00xxxxxxxxxxxx" });
        let leaf = json!({ "leaf": "0x1", "subleaf": "0x0", "flags": 0, "modifiers": [ecx] });
        let arguments = format!(
            "quiet loglevel=1 reboot=k panic=-1 console=ttyS0 8250.nr_uarts=1 nokaslr noxsave \
             lpj=4000000 tsc=reliable no_timer_check pty.legacy_count=0 clearcpuid=popcnt,cx16,\
             fsgsbase,erms,fsrm,invpcid,pcid,smap,umip,pku,rdpid,rdtscp,rep_good \
             ae.channel=vsock ae.token={}",
            "00".repeat(32),
        );
        let drive = |id: &str, path: &Path, read_only: bool| {
            json!({
                "drive_id": id, "path_on_host": path, "is_root_device": false,
                "is_read_only": read_only, "cache_type": "Writeback",
            })
        };
        let requests = [
            ("/cpu-config", json!({ "cpuid_modifiers": [leaf] })),
            ("/machine-config", json!({ "vcpu_count": 1, "mem_size_mib": self.memory_mb })),
            (
                "/boot-source",
                json!({
                    "kernel_image_path": blob(&self.image, "kernel")?,
                    "initrd_path": blob(&self.image, "initrd")?, "boot_args": arguments,
                }),
            ),
            ("/drives/rootfs", drive("rootfs", &blob(&self.image, "rootfs")?, true)),
            ("/drives/disk", drive("disk", Path::new("disk.img"), false)),
            (
                "/network-interfaces/net",
                json!({ "iface_id": "net", "host_dev_name": "net0", "guest_mac": MAC }),
            ),
            ("/vsock", json!({ "guest_cid": 3, "uds_path": "v.sock" })),
            ("/entropy", json!({})),
            ("/actions", json!({ "action_type": "InstanceStart" })),
        ];
        for (path, body) in &requests {
            machine.request("PUT", path, body)?;
        }
        wait_readable(&ready)?;
        Ok(machine)
    }

    /// Boots a machine, and keeps its memory, devices and disk.
    pub fn make_snapshot(&self) -> Result<()> {
        self.prepare("empty.img")?;
        let mut machine = self.boot()?;
        let command = ["/bin/sh", "-c", "sync; echo ok"];
        self.first_byte(&command)?;
        let warm = Instant::now();
        self.first_byte(&command)?;
        self.exchange.set(FIRST_LIMIT.max(warm.elapsed() * FIRST_FACTOR));
        machine.request("PATCH", "/vm", &json!({ "state": "Paused" }))?;
        let files = json!({
            "snapshot_type": "Full", "snapshot_path": "s.state", "mem_file_path": "s.mem",
        });
        machine.request("PUT", "/snapshot/create", &files)?;
        let (disk, kept) = (self.path("disk.img"), self.path("snapshot.img"));
        run("cp", &["--sparse=always", text(&disk)?, text(&kept)?])
    }

    fn restore(&self) -> Result<Machine> {
        let mut machine = self.spawn()?;
        let load = json!({
            "snapshot_path": "s.state", "resume_vm": true,
            "mem_backend": { "backend_type": "File", "backend_path": "s.mem" },
        });
        machine.request("PUT", "/snapshot/load", &load)?;
        Ok(machine)
    }

    pub fn boot_to_first_byte(&self, command: &[&str]) -> Result<Duration> {
        self.prepare("empty.img")?;
        let start = Instant::now();
        let machine = self.boot()?;
        self.first_byte(command)?;
        let took = start.elapsed();
        drop(machine);
        Ok(took)
    }

    pub fn restore_to_first_byte(&self, command: &[&str]) -> Result<Duration> {
        self.prepare("snapshot.img")?;
        let start = Instant::now();
        let machine = self.restore()?;
        self.first_byte(command)?;
        let took = start.elapsed();
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
        self.prepare("snapshot.img")?;
        let mut machine = self.restore()?;
        for _ in 0..warm_up {
            self.first_byte(command)?;
        }
        machine.request("PATCH", "/vm", &json!({ "state": "Paused" }))?;
        let start = Instant::now();
        machine.request("PATCH", "/vm", &json!({ "state": "Resumed" }))?;
        let resume = start.elapsed();
        self.first_byte(command)?;
        Ok((resume, start.elapsed()))
    }

    fn first_byte(&self, command: &[&str]) -> Result<()> {
        let deadline = Instant::now() + LIMIT;
        self.runtime.block_on(async {
            loop {
                match tokio::time::timeout(self.exchange.get(), self.try_run(command)).await {
                    Ok(Ok(())) => return Ok(()),
                    Ok(Err(error)) if Instant::now() > deadline => return Err(error),
                    Err(_) if Instant::now() > deadline => bail!("the guest does not answer"),
                    Ok(Err(_)) | Err(_) => {}
                }
            }
        })
    }

    async fn try_run(&self, command: &[&str]) -> Result<()> {
        let open = async {
            let mut stream = tokio::net::UnixStream::connect(self.path("v.sock")).await?;
            let hello = format!("CONNECT {AGENT_PORT}\n");
            tokio::io::AsyncWriteExt::write_all(&mut stream, hello.as_bytes()).await?;
            let mut byte = [0];
            while byte != *b"\n" {
                tokio::io::AsyncReadExt::read_exact(&mut stream, &mut byte).await?;
            }
            let run = Run {
                command: command[0].to_owned(),
                args: command[1..].iter().map(|&arg| arg.to_owned()).collect(),
                ..Run::default()
            };
            let token = Token::from_bytes([0; 32]);
            Ok::<_, anyhow::Error>(host::run(stream, &token, run, self.exchange.get()).await?)
        };
        match open.await?.next().await? {
            host::RunEvent::Output { .. } => Ok(()),
            host::RunEvent::Exited(exited) => bail!("the command said nothing: {exited:?}"),
        }
    }
}

impl Machine {
    fn request(&mut self, method: &str, path: &str, body: &Value) -> Result<()> {
        let body = body.to_string();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n",
            body.len()
        );
        self.api.write_all(format!("{head}{body}").as_bytes())?;
        let mut answer = Vec::new();
        let mut byte = [0];
        while !answer.ends_with(b"\r\n\r\n") {
            self.api.read_exact(&mut byte)?;
            answer.push(byte[0]);
        }
        let answer = String::from_utf8_lossy(&answer);
        ensure!(answer.starts_with("HTTP/1.1 20"), "{method} {path}: {answer}");
        Ok(())
    }
}

/// Waits for the guest's word.
fn wait_readable(listener: &UnixListener) -> Result<()> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let limit = Timespec::try_from(LIMIT)?;
    let events = poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&limit))?;
    ensure!(events == 1, "the guest is not ready (descriptor {})", listener.as_raw_fd());
    Ok(())
}
