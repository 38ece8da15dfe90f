//! A VM made and ready through the API against a bare QEMU with the same kernel, image, memory and
//! devices, up to the guest's word that it is ready, by turns.

use std::{
    fs::{self, File},
    net::{Ipv6Addr, SocketAddrV6, UdpSocket},
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use aether_tests::{
    Platform, Setup,
    measure::{Comparison, samples},
    platform::{program, small_vm},
};
use anyhow::{Context, Result, bail, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::Value;

const READY_PORT: u16 = 1025;
const HOST: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
const GUEST_MAC: &str = "02:ae:00:00:00:02";
const HOST_MAC: &str = "02:ae:00:00:00:01";
const MEMORY_MB: u32 = 256;

fn main() -> Result<()> {
    // Before any thread is made: the bare machine's namespace is this thread's alone.
    let runtime = tokio::runtime::Runtime::new()?;
    let bare = Bare::new()?;
    let platform = Platform::start(Setup::qemu())?;
    let mut times = Comparison::new("boot", 1.1);
    for sample in 0..=samples(10) {
        let name = format!("boot-{sample}");
        let mut request = small_vm(&name);
        request.memory_mb = Some(MEMORY_MB);
        let start = Instant::now();
        runtime.block_on(platform.create(&request))?;
        let ours = start.elapsed();
        runtime.block_on(platform.delete(&name))?;
        let (took, _) = bare.boot()?;
        // The first of each reads the image from the disk.
        if sample > 0 {
            times.ours.push(ours);
            times.bare.push(took);
        }
    }
    platform.finish()?;
    drop(bare);
    times.report()
}

/// A namespace with one private link, and what a machine boots from.
struct Bare {
    namespace: String,
    folder: tempfile::TempDir,
    blobs: PathBuf,
    image: Value,
    tsc_khz: u64,
}

impl Bare {
    fn new() -> Result<Self> {
        let folder = tempfile::TempDir::new()?;
        let output = Command::new(program()?)
            .args(["--json", "image", "inspect", "debian"])
            .output()
            .context("inspect the image")?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let image = serde_json::from_slice(&output.stdout)?;
        let blobs = aether_tests::platform::env_path("AETHER_IMAGE_DIR")
            .context("AETHER_IMAGE_DIR is not set; ./dev bench")?
            .join("blobs");
        let namespace = format!("bare{}", std::process::id());
        run("ip", &["netns", "add", &namespace])?;
        let bare = Self { namespace, folder, blobs, image, tsc_khz: tsc_khz()? };
        let ns = bare.namespace.as_str();
        run("ip", &["-n", ns, "link", "set", "lo", "up"])?;
        run("ip", &["-n", ns, "tuntap", "add", "bare0", "mode", "tap", "vnet_hdr"])?;
        run("ip", &["-n", ns, "link", "set", "bare0", "address", HOST_MAC, "up"])?;
        run("ip", &["-n", ns, "address", "add", "fe80::1/64", "dev", "bare0", "nodad"])?;
        run("ip", &["-n", ns, "tuntap", "add", "bare1", "mode", "tap", "vnet_hdr"])?;
        run("ip", &["-n", ns, "link", "set", "bare1", "up"])?;
        bare.make_disk()?;
        Ok(bare)
    }

    /// An empty writable layer, as the platform's.
    fn make_disk(&self) -> Result<()> {
        let tree = self.folder.path().join("tree");
        fs::create_dir_all(tree.join("upper"))?;
        fs::create_dir_all(tree.join("work"))?;
        let disk = self.folder.path().join("empty.img");
        File::create(&disk)?.set_len(2048 * 1024 * 1024)?;
        run("mkfs.ext4", &["-q", "-d", text(&tree)?, text(&disk)?])
    }

    fn blob(&self, part: &str) -> Result<PathBuf> {
        let digest = self.image[part]["digest"].as_str().context("no digest")?;
        let (_, hex) = digest.split_once(':').context("not a digest")?;
        Ok(self.blobs.join(hex))
    }

    /// One boot up to the ready hint; the machine is ended after that.
    fn boot(&self) -> Result<(Duration, usize)> {
        let (empty, disk) =
            (self.folder.path().join("empty.img"), self.folder.path().join("disk.img"));
        run("cp", &["--sparse=always", text(&empty)?, text(&disk)?])?;
        let namespace = File::open(Path::new("/run/netns").join(&self.namespace))?;
        std::thread::scope(|scope| {
            let booted = scope.spawn(|| -> Result<(Duration, usize)> {
                move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
                let index = fs::read_to_string("/proc/thread-self/net/dev_snmp6/bare0")?;
                let index = index.split_whitespace().nth(1).context("no index")?.parse()?;
                let socket = UdpSocket::bind(SocketAddrV6::new(HOST, READY_PORT, 0, index))?;
                socket.set_read_timeout(Some(Duration::from_mins(2)))?;
                let start = Instant::now();
                let _machine = Machine(self.command(&disk)?.spawn().context("start QEMU")?);
                let mut hint = [0; 256];
                let count = socket.recv(&mut hint).context("wait for the guest")?;
                Ok((start.elapsed(), count))
            });
            booted.join().map_err(|_| anyhow::anyhow!("the booting thread panicked"))?
        })
    }

    fn command(&self, disk: &Path) -> Result<Command> {
        let append = format!(
            "quiet loglevel=1 console=ttyS0 8250.nr_uarts=1 panic=-1 reboot=t pci=off \
             random.trust_cpu=on cryptomgr.notests audit=0 nowatchdog nmi_watchdog=0 nokaslr \
             mitigations=off no_timer_check noreplace-smp lsm= ima_appraise=off \
             initcall_blacklist=init_kprobes,btf_vmlinux_init tsc=reliable tsc_early_khz={} \
             ae.channel=link:{GUEST_MAC} ae.hostmac={HOST_MAC} ae.token={}",
            self.tsc_khz,
            "00".repeat(32),
        );
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-M", "microvm,acpi=on,pit=off,pic=off,rtc=on,isa-serial=on", "-accel", "tcg"])
            .args(["-cpu", "Nehalem", "-smp", "1", "-m", &format!("{MEMORY_MB}M")])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .arg("-kernel")
            .arg(self.blob("kernel")?)
            .arg("-initrd")
            .arg(self.blob("initrd")?)
            .args(["-append", &append, "-serial", "null"])
            .arg("-drive")
            .arg(format!(
                "if=none,id=d0,format=raw,readonly=on,file.locking=off,file={}",
                self.blob("rootfs")?.display()
            ))
            .args(["-device", "virtio-blk-device,drive=d0", "-drive"])
            .arg(format!("if=none,id=d1,format=raw,file={}", disk.display()))
            .args(["-device", "virtio-blk-device,drive=d1"])
            .args(["-netdev", "tap,id=n1,ifname=bare1,script=no,downscript=no"])
            .args(["-device", "virtio-net-device,netdev=n1"])
            .args(["-netdev", "tap,id=n0,ifname=bare0,script=no,downscript=no", "-device"])
            .arg(format!("virtio-net-device,netdev=n0,mac={GUEST_MAC}"))
            .args(["-device", "virtio-rng-device"])
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        Ok(command)
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        let _ = run("ip", &["netns", "delete", &self.namespace]);
    }
}

/// Ended with its owner.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
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

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is no text")
}

fn run(program: &str, args: &[&str]) -> Result<()> {
    let output = Command::new(program).args(args).output().context(program.to_owned())?;
    if !output.status.success() {
        bail!("{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}
