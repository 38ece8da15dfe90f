//! A driver to try, with what a test needs beside the trait.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::Duration,
};

use aether_drivers::{
    BootSource, Driver, DriverError, Host, HostConfig, KernelFlavour, MachineSpec, Start,
    docker::DockerDriver,
    fault::FaultPoints,
    firecracker::FirecrackerDriver,
    network::leftovers,
    qemu::{QemuAcceleration, QemuConfig, QemuDriver},
    sim::{SimConfig, SimDriver, SimHost},
};
use aether_images::{DEFAULT_IMAGE, ImageStore, TEST_KERNEL_IMAGE};
use aether_protocol::{
    AGENT_PORT, Exited, Run, Token,
    host::{self, BoxStream, RunEvent},
};
use aether_types::{MachineId, NetworkPolicy};

use crate::booted;

/// A driver that can be tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Sim,
    /// Firecracker and the small test kernel, without a jailer and with one.
    Firecracker,
    FirecrackerJailed,
    /// QEMU and the small test kernel: boots fastest.
    Qemu,
    /// QEMU and the kernel that products use.
    QemuDebian,
    /// The same with KVM, if a probe boots.
    QemuAuto,
    /// Containers of an engine that the test runs.
    Docker,
}

pub(crate) struct Rig {
    kind: Kind,
    pub(crate) fault: FaultPoints,
    driver: Option<Arc<dyn Driver>>,
    real: Option<Real>,
    sim: Option<Arc<SimHost>>,
    /// Of a simulated host, which has no folder else.
    own_snapshots: Option<tempfile::TempDir>,
}

/// What a driver on this host needs.
struct Real {
    folder: Folder,
    images: Arc<ImageStore>,
    boot: BootSource,
}

enum Folder {
    /// Goes with the test.
    Own(tempfile::TempDir),
    /// Of the test that started this process.
    Given(PathBuf),
}

impl Folder {
    fn path(&self) -> &Path {
        match self {
            Self::Own(folder) => folder.path(),
            Self::Given(path) => path,
        }
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "tests are told by the environment what they may use"
)]
pub(crate) fn setting(name: &str) -> Option<PathBuf> {
    std::env::var(name).ok().filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// Writes what the host's drivers log where `RUST_LOG` asks for it.
pub(crate) fn log() {
    static ONCE: OnceLock<()> = OnceLock::new();
    ONCE.get_or_init(|| {
        let _ = tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
            .with_test_writer()
            .try_init();
    });
}

/// The images that `./dev` builds; else why there are none.
fn images() -> Result<Arc<ImageStore>, String> {
    let folder = setting("AETHER_IMAGE_DIR").or_else(|| {
        let cache = setting("AETHER_CACHE")
            .or_else(|| setting("HOME").map(|home| home.join(".cache/aetherium")))?;
        Some(cache.join("images"))
    });
    let folder = folder.filter(|folder| folder.join("images").is_dir());
    let folder = folder.ok_or("no images: ./dev test builds them and sets AETHER_IMAGE_DIR")?;
    ImageStore::open(folder).map(Arc::new).map_err(|e| e.to_string())
}

fn boot_source(images: &ImageStore, name: &str) -> Result<BootSource, String> {
    let set = images.resolve(name).map_err(|e| e.to_string())?;
    let kernel_flavour = match set.kernel_flavour {
        aether_images::KernelFlavour::Debian => KernelFlavour::Debian,
        aether_images::KernelFlavour::FirecrackerTest => KernelFlavour::FirecrackerTest,
    };
    Ok(BootSource { kernel: set.kernel, initrd: set.initrd, rootfs: set.rootfs, kernel_flavour })
}

impl Rig {
    /// `None` where this host cannot; says so.
    pub(crate) async fn open(kind: Kind) -> Option<Self> {
        Self::open_in(kind, None).await
    }

    /// A rig in a folder that another process has made.
    pub(crate) async fn open_in(kind: Kind, folder: Option<PathBuf>) -> Option<Self> {
        log();
        match Self::try_open(kind, folder).await {
            Ok(rig) => Some(rig),
            Err(reason) => {
                println!("skipped: {kind:?}: {reason}");
                None
            }
        }
    }

    async fn try_open(kind: Kind, given: Option<PathBuf>) -> Result<Self, String> {
        let fault = FaultPoints::recording();
        let own_snapshots = None;
        let mut rig = Self { kind, fault, driver: None, real: None, sim: None, own_snapshots };
        let image = match kind {
            Kind::Sim => {
                let config = SimConfig { fault: rig.fault.clone(), ..SimConfig::default() };
                rig.sim = Some(SimHost::new(config));
                rig.own_snapshots = Some(tempfile::tempdir().map_err(|e| e.to_string())?);
                rig.reopen().await;
                return Ok(rig);
            }
            Kind::QemuDebian | Kind::QemuAuto | Kind::Docker => DEFAULT_IMAGE,
            Kind::Qemu | Kind::Firecracker | Kind::FirecrackerJailed => TEST_KERNEL_IMAGE,
        };
        if !rustix::process::geteuid().is_root() {
            return Err("only root makes networks and starts VMMs".to_owned());
        }
        let images = images()?;
        let boot = boot_source(&images, image)?;
        // Deep on purpose: sockets in it must be reached all the same.
        let own = || {
            tempfile::Builder::new()
                .prefix("aether-contract-with-a-name-that-is-longer-than-most-")
                .tempdir()
                .map(Folder::Own)
                .map_err(|e| e.to_string())
        };
        let folder = given.map_or_else(own, |path| Ok(Folder::Given(path)))?;
        rig.real = Some(Real { folder, images, boot });
        match rig.connect_driver().await {
            Ok(driver) => rig.driver = Some(driver),
            Err(DriverError::Unavailable(reason)) => {
                // Nothing was made.
                rig.real = None;
                return Err(reason);
            }
            Err(error) => panic!("open {kind:?}: {error:?}"),
        }
        Ok(rig)
    }

    async fn connect_driver(&self) -> Result<Arc<dyn Driver>, DriverError> {
        if let Some(sim) = &self.sim {
            return Ok(Arc::new(SimDriver::new(Arc::clone(sim))));
        }
        let real = self.real.as_ref().expect("a real driver's things");
        let mut config =
            HostConfig { fault: self.fault.clone(), ..HostConfig::new(real.folder.path()) };
        if self.kind == Kind::Firecracker {
            // Without a jailer, where only root may open the devices.
            config.uid_base = None;
        }
        let host = Host::open(config, Arc::clone(&real.images)).await?;
        Ok(match self.kind {
            Kind::Sim => unreachable!("handled above"),
            Kind::Firecracker | Kind::FirecrackerJailed => {
                let config =
                    crate::firecracker::config(self.kind == Kind::FirecrackerJailed, &real.boot)
                        .map_err(DriverError::Unavailable)?;
                Arc::new(FirecrackerDriver::open(host, config).await?)
            }
            Kind::Docker => {
                let config =
                    crate::docker::config(real.folder.path()).map_err(DriverError::Unavailable)?;
                Arc::new(DockerDriver::open(host, config).await?)
            }
            Kind::Qemu | Kind::QemuDebian => {
                let acceleration = QemuAcceleration::Tcg;
                let config = QemuConfig { acceleration, ..QemuConfig::default() };
                Arc::new(QemuDriver::open(host, config).await?)
            }
            Kind::QemuAuto => {
                let config = QemuConfig { probe: Some(real.boot.clone()), ..QemuConfig::default() };
                Arc::new(QemuDriver::open(host, config).await?)
            }
        })
    }

    pub(crate) fn driver(&self) -> &dyn Driver {
        self.driver.as_deref().expect("the driver is open")
    }

    pub(crate) fn shared(&self) -> Arc<dyn Driver> {
        Arc::clone(self.driver.as_ref().expect("the driver is open"))
    }

    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    /// A worker that restarts: the old driver is gone, a new one finds what there is.
    pub(crate) async fn reopen(&mut self) {
        self.driver = None;
        let driver = self.connect_driver().await;
        self.driver = Some(driver.expect("the driver opens again"));
    }

    /// A worker that is down while `between` happens.
    pub(crate) async fn reopen_after(&mut self, between: impl AsyncFnOnce()) {
        self.driver = None;
        between().await;
        let driver = self.connect_driver().await;
        self.driver = Some(driver.expect("the driver opens again"));
    }

    /// Where the host's things are kept.
    pub(crate) fn folder(&self) -> &Path {
        self.real.as_ref().expect("a real driver's things").folder.path()
    }

    /// Where snapshots are kept.
    pub(crate) fn snapshots(&self) -> PathBuf {
        let real = self.real.as_ref().map(|real| real.folder.path());
        let own = self.own_snapshots.as_ref().map(tempfile::TempDir::path);
        real.or(own).expect("a folder").join("snapshots")
    }

    /// How long a boot may take on a busy host.
    pub(crate) fn boot_limit(&self) -> Duration {
        match self.kind {
            Kind::Sim => Duration::from_secs(5),
            Kind::Qemu | Kind::QemuDebian | Kind::QemuAuto | Kind::Docker => Duration::from_mins(1),
            Kind::Firecracker | Kind::FirecrackerJailed => Duration::from_mins(2),
        }
    }

    /// How long a guest may take over something small.
    pub(crate) fn guest_limit(&self) -> Duration {
        match self.kind {
            Kind::Sim => Duration::from_secs(5),
            Kind::Qemu | Kind::QemuDebian | Kind::QemuAuto | Kind::Docker => {
                Duration::from_secs(30)
            }
            Kind::Firecracker | Kind::FirecrackerJailed => Duration::from_mins(2),
        }
    }

    pub(crate) fn spec(&self) -> MachineSpec {
        let boot = self.real.as_ref().map_or_else(
            || BootSource {
                kernel: "/sim/kernel".into(),
                initrd: "/sim/initrd".into(),
                rootfs: "/sim/rootfs".into(),
                kernel_flavour: KernelFlavour::Debian,
            },
            |real| real.boot.clone(),
        );
        let id = MachineId::new();
        MachineSpec {
            id,
            vm: None,
            vcpus: 1,
            memory_mb: 128,
            disk_mb: 256,
            boot,
            network: NetworkPolicy::default(),
            token: id.to_string().replace('-', "").repeat(2),
            disk_from: None,
            layers: Vec::new(),
            output_mb: None,
        }
    }

    /// Creates and starts a VM. Behind an emulated KVM a boot takes some twenty seconds of a
    /// processor: there all guests but one go on from where that one had booted.
    pub(crate) async fn boot(&self) -> Vm {
        match self.kind {
            Kind::Firecracker | Kind::FirecrackerJailed => {
                let booted = booted::shot(self).await;
                self.restore(&booted).await
            }
            _ => self.boot_anew().await,
        }
    }

    pub(crate) async fn boot_anew(&self) -> Vm {
        let spec = self.spec();
        let vm = Vm { id: spec.id, token: Token::from_hex(&spec.token).unwrap() };
        self.driver().create(spec).await.expect("create");
        self.driver().start(vm.id, Start::Boot, self.boot_limit()).await.expect("start");
        vm
    }

    pub(crate) async fn connect(&self, vm: &Vm) -> BoxStream {
        self.driver().connect(vm.id, AGENT_PORT, self.guest_limit()).await.expect("connect")
    }

    /// Runs a shell script to its end; standard output and how it ended.
    pub(crate) async fn sh(&self, vm: &Vm, script: &str) -> (Vec<u8>, Exited) {
        let run = Run {
            command: "sh".to_owned(),
            args: vec!["-c".to_owned(), script.to_owned()],
            ..Run::default()
        };
        run_on(self.connect(vm).await, vm, run, self.guest_limit()).await
    }

    /// Starts a script that ends the guest.
    pub(crate) async fn sh_last(&self, vm: &Vm, script: &str) {
        let run = Run {
            command: "sh".to_owned(),
            args: vec!["-c".to_owned(), script.to_owned()],
            ..Run::default()
        };
        let stream = self.connect(vm).await;
        // The guest may be gone before it has answered.
        if let Ok(mut session) = host::run(stream, &vm.token, run, self.guest_limit()).await {
            while session.next().await.is_ok_and(|event| !matches!(event, RunEvent::Exited(_))) {}
        }
    }

    /// Ends the VMM with a signal, as the kernel does when memory is short.
    pub(crate) async fn kill_vmm(&self, vm: &Vm) {
        if let Some(sim) = &self.sim {
            sim.kill_vmm(vm.id);
            return;
        }
        let machine = self.driver().inspect(vm.id).await.unwrap().unwrap();
        kill_process(machine.pid.expect("a process"));
    }

    /// Everything of VMs that this host still has.
    pub(crate) fn leftovers(&self) -> Vec<String> {
        if let Some(sim) = &self.sim {
            return sim.leftovers();
        }
        let real = self.real.as_ref().expect("a real driver's things");
        let folder = real.folder.path();
        let mut found = Vec::new();
        for entry in std::fs::read_dir(folder.join("vms")).unwrap() {
            found.push(format!("folder {}", entry.unwrap().path().display()));
        }
        if self.kind == Kind::Docker {
            found.extend(crate::docker::containers(folder));
        }
        let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
        let own = folder.to_str().unwrap();
        found.extend(mounts.lines().filter(|l| l.contains(own)).map(|l| format!("mount {l}")));
        for entry in std::fs::read_dir("/proc").unwrap().filter_map(Result::ok) {
            let cwd = std::fs::read_link(entry.path().join("cwd"));
            if cwd.is_ok_and(|cwd| cwd.starts_with(folder)) {
                found.push(format!("process {}", entry.path().display()));
            }
        }
        found
    }

    /// Ends the test: nothing may be left of any VM, and nothing of the network.
    pub(crate) async fn close(mut self) {
        assert_eq!(self.leftovers(), Vec::<String>::new());
        assert!(self.driver().list().await.unwrap().is_empty());
        self.driver().release().await.expect("release");
        let driver = self.driver.take();
        drop(driver);
        if let Some(real) = &self.real {
            let journal = std::fs::read_to_string(real.folder.path().join("journal")).unwrap();
            let instance = journal.lines().find_map(|line| {
                line.split_once("\"instance\":\"")?.1.split('"').next().map(str::to_owned)
            });
            if let Some(instance) = instance {
                assert_eq!(leftovers(Some(&instance)), Vec::<String>::new());
            }
        }
        self.real = None;
    }
}

/// A test that fails leaves nothing either, so that the next one finds a clean host.
impl Drop for Rig {
    fn drop(&mut self) {
        self.driver = None;
        let Some(real) = self.real.take() else { return };
        let cleaning = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(clean(&real))
        });
        match cleaning.join() {
            Ok(Ok(())) => {}
            Ok(Err(error)) => println!("cannot clean up after a failure: {error}"),
            Err(_) => println!("cannot clean up after a failure"),
        }
    }
}

async fn clean(real: &Real) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    // The failed test's runtime may still hold the journal for a moment.
    let host = loop {
        match Host::open(HostConfig::new(real.folder.path()), Arc::clone(&real.images)).await {
            Err(DriverError::Unavailable(_)) => tokio::task::yield_now().await,
            opened => break opened?,
        }
    };
    host.remove_all().await?;
    Ok(())
}

/// A VM that was started.
#[derive(Clone)]
pub(crate) struct Vm {
    pub(crate) id: MachineId,
    pub(crate) token: Token,
}

pub(crate) async fn run_on(
    stream: BoxStream,
    vm: &Vm,
    run: Run,
    limit: Duration,
) -> (Vec<u8>, Exited) {
    let mut session = host::run(stream, &vm.token, run, limit).await.expect("run");
    let mut stdout = Vec::new();
    let all = async {
        loop {
            match session.next().await.expect("an event of the run") {
                RunEvent::Output { data, .. } => stdout.extend_from_slice(&data),
                RunEvent::Exited(exited) => return exited,
            }
        }
    };
    let exited = tokio::time::timeout(limit, all).await.expect("the run ends in time");
    (stdout, exited)
}

pub(crate) fn kill_process(pid: u32) {
    let pid = rustix::process::Pid::from_raw(pid.try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}
