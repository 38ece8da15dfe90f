//! QEMU's own part of snapshots, on real guests: what the contract of all drivers does not look at.
//! Skipped where this host has no images or is not root's.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use aether_images::{ImageStore, TEST_KERNEL_IMAGE};
use aether_protocol::{
    AGENT_PORT, Run, Token,
    host::{self, RunEvent},
};
use aether_types::{MachineId, NetworkPolicy};

use super::*;
use crate::{
    AfterSnapshot, HostConfig, KernelFlavour, MachineState, SnapshotDisk, SnapshotFiles, Start,
    fault::FaultPoints,
};

const LIMIT: Duration = Duration::from_mins(1);
/// Makes the guest write memory and disk all the time.
const BUSY: &str = "(while echo x >>/root/log; do sync; done) >/dev/null 2>&1 &";

struct Rig {
    folder: tempfile::TempDir,
    images: Arc<ImageStore>,
    boot: BootSource,
    fault: FaultPoints,
    driver: Option<QemuDriver>,
}

fn image_folder() -> Option<PathBuf> {
    std::env::var_os("AETHER_IMAGE_DIR").map(PathBuf::from)
}

impl Rig {
    async fn open() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: only root makes networks");
            return None;
        }
        let images = image_folder().and_then(|folder| ImageStore::open(folder).ok());
        let set = images.as_ref().and_then(|images| images.resolve(TEST_KERNEL_IMAGE).ok());
        let (Some(images), Some(set)) = (images.map(Arc::new), set) else {
            println!("skipped: no images: ./dev test builds them and sets AETHER_IMAGE_DIR");
            return None;
        };
        let boot = BootSource {
            kernel: set.kernel,
            initrd: set.initrd,
            rootfs: set.rootfs,
            kernel_flavour: KernelFlavour::FirecrackerTest,
        };
        let (folder, fault) = (tempfile::tempdir().unwrap(), FaultPoints::recording());
        let mut rig = Self { folder, images, boot, fault, driver: None };
        rig.reopen().await;
        Some(rig)
    }

    async fn reopen(&mut self) {
        self.driver = None;
        let config = HostConfig {
            fault: self.fault.clone(),
            ..HostConfig::new(self.folder.path().join("data"))
        };
        let host = loop {
            match Host::open(config.clone(), Arc::clone(&self.images)).await {
                // The driver before it may hold the journal for a moment.
                Err(DriverError::Unavailable(_)) => tokio::task::yield_now().await,
                opened => break opened.unwrap(),
            }
        };
        let config = QemuConfig { acceleration: QemuAcceleration::Tcg, ..QemuConfig::default() };
        self.driver = Some(QemuDriver::open(host, config).await.unwrap());
    }

    fn driver(&self) -> &QemuDriver {
        self.driver.as_ref().unwrap()
    }

    fn spec(&self, from: Option<&SnapshotFiles>) -> MachineSpec {
        let id = MachineId::new();
        MachineSpec {
            id,
            vm: None,
            vcpus: 1,
            memory_mb: 128,
            disk_mb: 256,
            boot: self.boot.clone(),
            network: NetworkPolicy::default(),
            token: id.to_string().replace('-', "").repeat(2),
            disk_from: from.cloned(),
            layers: Vec::new(),
            output_mb: None,
        }
    }

    async fn boot(&self) -> Guest {
        let spec = self.spec(None);
        let guest = Guest::new(&spec, &spec.token);
        self.driver().create(spec).await.unwrap();
        self.driver().start(guest.id, Start::Boot, LIMIT).await.unwrap();
        guest
    }

    async fn clone_of(&self, from: &SnapshotFiles, of: &Guest) -> Guest {
        let spec = self.spec(Some(from));
        let guest = Guest { id: spec.id, token: of.token.clone() };
        self.driver().create(spec).await.unwrap();
        self.driver().start(guest.id, Start::Restore(from.clone()), LIMIT).await.unwrap();
        guest
    }

    async fn snapshot(&self, guest: &Guest, name: &str) -> (SnapshotFiles, Duration) {
        let directory = self.folder.path().join(name);
        std::fs::create_dir(&directory).unwrap();
        let driver = self.driver();
        let after = AfterSnapshot::GoOn;
        let taken =
            driver.snapshot(guest.id, &directory, SnapshotDisk::Include, after).await.unwrap();
        (SnapshotFiles { directory, machine: taken.machine }, taken.paused)
    }

    /// Keeps the memory and ends the VM, or keeps it for a VM that goes on.
    async fn suspend(&self, guest: &Guest, name: &str) -> SnapshotFiles {
        let directory = self.folder.path().join(name);
        std::fs::create_dir(&directory).unwrap();
        let (disk, after) = (SnapshotDisk::Leave, AfterSnapshot::End);
        let taken = self.driver().snapshot(guest.id, &directory, disk, after).await.unwrap();
        SnapshotFiles { directory, machine: taken.machine }
    }

    async fn sh(&self, guest: &Guest, script: &str) -> String {
        let stream = self.driver().connect(guest.id, AGENT_PORT, LIMIT).await.unwrap();
        let args = vec!["-c".to_owned(), script.to_owned()];
        let run = Run { command: "sh".to_owned(), args, ..Run::default() };
        let mut session = host::run(stream, &guest.token, run, LIMIT).await.unwrap();
        let mut out = Vec::new();
        loop {
            match session.next().await.unwrap() {
                RunEvent::Output { data, .. } => out.extend_from_slice(&data),
                RunEvent::Exited(_) => return String::from_utf8(out).unwrap().trim().to_owned(),
            }
        }
    }

    async fn close(mut self) {
        for machine in self.driver().list().await.unwrap() {
            self.driver().delete(machine.id).await.unwrap();
        }
        let data = self.folder.path().join("data");
        for folder in ["vms", "layers"] {
            assert_eq!(std::fs::read_dir(data.join(folder)).unwrap().count(), 0, "{folder}");
        }
        self.driver().release().await.unwrap();
        self.driver = None;
    }

    fn layers_of(&self, guest: &Guest) -> usize {
        layers::of(&self.driver().0.host, guest.id).unwrap().len()
    }
}

/// A test that fails leaves nothing either.
impl Drop for Rig {
    fn drop(&mut self) {
        if self.driver.take().is_none() {
            return;
        }
        let (data, images) = (self.folder.path().join("data"), Arc::clone(&self.images));
        let cleaning = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.unwrap().block_on(async {
                let host = loop {
                    match Host::open(HostConfig::new(&data), Arc::clone(&images)).await {
                        // The failed test's tasks may hold the journal for a moment.
                        Err(DriverError::Unavailable(_)) => tokio::task::yield_now().await,
                        opened => break opened.unwrap(),
                    }
                };
                host.remove_all().await.unwrap();
            });
        });
        if cleaning.join().is_err() {
            println!("cannot clean up after a failure");
        }
    }
}

struct Guest {
    id: MachineId,
    token: Token,
}

impl Guest {
    fn new(spec: &MachineSpec, token: &str) -> Self {
        Self { id: spec.id, token: Token::from_hex(token).unwrap() }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn real_guest_clones_share_what_was_and_nothing_that_comes() {
    let Some(rig) = Rig::open().await else { return };
    let source = rig.boot().await;
    rig.sh(&source, "echo before >/root/file; sync; echo memory >/dev/shm/file").await;
    let (first, paused) = rig.snapshot(&source, "first").await;
    assert!(paused > Duration::ZERO && paused < LIMIT, "{paused:?}");
    rig.sh(&source, "echo after >/root/file; echo after >/dev/shm/file").await;
    let read = "cat /root/file /dev/shm/file | tr '\\n' ' '";
    let one = rig.clone_of(&first, &source).await;
    assert_eq!(rig.sh(&one, read).await, "before memory");
    rig.sh(&one, "echo one >/root/file; echo one >/dev/shm/file; sync").await;
    let other = rig.clone_of(&first, &source).await;
    assert_eq!(rig.sh(&other, read).await, "before memory");
    assert_eq!(rig.sh(&source, read).await, "after after");
    // A clone's own snapshot, after the one that it was made of has gone.
    std::fs::remove_dir_all(&first.directory).unwrap();
    let (second, _) = rig.snapshot(&one, "second").await;
    let grandchild = rig.clone_of(&second, &source).await;
    assert_eq!(rig.sh(&grandchild, read).await, "one one");
    // The disk alone, booted.
    let driver = rig.driver();
    driver.kill(grandchild.id).await.unwrap();
    driver.start(grandchild.id, Start::Boot, LIMIT).await.unwrap();
    let spec = driver.inspect(grandchild.id).await.unwrap().unwrap().spec.unwrap();
    let booted = Guest::new(&spec, &spec.token);
    assert_eq!(rig.sh(&booted, "cat /root/file").await, "one");
    rig.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn real_guest_layers_are_merged_before_there_are_too_many() {
    let Some(rig) = Rig::open().await else { return };
    let source = rig.boot().await;
    let mut last = None;
    for round in 0..layers::LAYERS_MAX + 2 {
        rig.sh(&source, &format!("echo {round} >/root/round-{round}; sync")).await;
        last = Some(rig.snapshot(&source, &format!("round-{round}")).await.0);
        assert!(rig.layers_of(&source) <= layers::LAYERS_MAX, "{}", rig.layers_of(&source));
    }
    let clone = rig.clone_of(&last.unwrap(), &source).await;
    let all = rig.sh(&clone, "cat /root/round-* | sort -n | tr '\\n' ' '").await;
    assert_eq!(all, "0 1 2 3 4 5 6 7 8 9");
    assert_eq!(rig.sh(&source, "cat /root/round-* | wc -l").await, "10");
    rig.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn real_guest_goes_on_where_a_snapshot_fails_at_any_step() {
    let Some(mut rig) = Rig::open().await else { return };
    let source = rig.boot().await;
    rig.snapshot(&source, "whole").await;
    let points: Vec<_> =
        rig.fault.seen().into_iter().filter(|point| point.starts_with("snapshot")).collect();
    assert!(points.len() > 6, "{points:?}");
    for (number, point) in points.into_iter().enumerate() {
        let directory = rig.folder.path().join(format!("fails-{number}"));
        std::fs::create_dir(&directory).unwrap();
        rig.fault.arm(point);
        let driver = rig.driver();
        let after = AfterSnapshot::GoOn;
        let taken = driver.snapshot(source.id, &directory, SnapshotDisk::Include, after).await;
        assert!(taken.is_err(), "{point}");
        let state = driver.inspect(source.id).await.unwrap().unwrap().state;
        assert_eq!(state, MachineState::Running, "{point}");
        assert_eq!(rig.sh(&source, "echo goes on").await, "goes on", "{point}");
        if number % 3 == 0 {
            rig.reopen().await;
        }
    }
    // Paused, it stays so.
    rig.driver().pause(source.id).await.unwrap();
    rig.fault.arm("snapshot: sent");
    let directory = rig.folder.path().join("paused");
    std::fs::create_dir(&directory).unwrap();
    let (disk, after) = (SnapshotDisk::Include, AfterSnapshot::GoOn);
    assert!(rig.driver().snapshot(source.id, &directory, disk, after).await.is_err());
    let state = rig.driver().inspect(source.id).await.unwrap().unwrap().state;
    assert_eq!(state, MachineState::Paused);
    rig.driver().resume(source.id).await.unwrap();
    let (last, _) = rig.snapshot(&source, "last").await;
    let clone = rig.clone_of(&last, &source).await;
    assert_eq!(rig.sh(&clone, "echo runs").await, "runs");
    rig.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn real_guest_that_is_paused_can_be_snapshot_again_and_again() {
    let Some(mut rig) = Rig::open().await else { return };
    let source = rig.boot().await;
    rig.sh(&source, "echo before >/root/file; sync; echo memory >/dev/shm/file").await;
    rig.driver().pause(source.id).await.unwrap();
    let mut last = None;
    for round in 0..3 {
        let (files, paused) = rig.snapshot(&source, &format!("paused-{round}")).await;
        assert_eq!(paused, Duration::ZERO);
        last = Some(files);
        rig.reopen().await;
    }
    let state = rig.driver().inspect(source.id).await.unwrap().unwrap().state;
    assert_eq!(state, MachineState::Paused);
    let clone = rig.clone_of(&last.unwrap(), &source).await;
    let read = "cat /root/file /dev/shm/file | tr '\\n' ' '";
    assert_eq!(rig.sh(&clone, read).await, "before memory");
    rig.driver().resume(source.id).await.unwrap();
    rig.sh(&source, "echo after >/root/file; sync").await;
    assert_eq!(rig.sh(&source, read).await, "after memory");
    rig.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn real_guest_goes_on_on_its_own_disk_and_only_from_its_last_memory() {
    let Some(mut rig) = Rig::open().await else { return };
    let source = rig.boot().await;
    // What it writes after its memory was taken would be lost to it.
    rig.sh(&source, BUSY).await;
    let mut older = None;
    for round in 0..3 {
        let memory = rig.suspend(&source, &format!("memory-{round}")).await;
        if round == 1 {
            rig.reopen().await;
        }
        if let Some(older) = older.replace(memory.clone()) {
            let again = rig.driver().start(source.id, Start::Restore(older), LIMIT).await;
            assert!(matches!(again, Err(DriverError::WrongState { .. })), "{again:?}");
        }
        rig.driver().start(source.id, Start::Restore(memory), LIMIT).await.unwrap();
        rig.sh(&source, "true").await;
    }
    // A file system that found itself changed says so.
    let errors = "dmesg | grep -ci 'ext4.*error'; e=$(tail -c 2 /root/log); echo $e";
    assert_eq!(rig.sh(&source, errors).await, "0\nx");
    rig.close().await;
}

/// Pages of the guest's memory in which a snapshot differs from what QEMU has.
async fn torn_pages(rig: &Rig, guest: &Guest, directory: &Path) -> Vec<usize> {
    /// Firmware, which is not in the guest's own memory.
    const FIRMWARE: std::ops::Range<usize> = 0xa0..0x100;
    let machines = &rig.driver().0;
    let (place, live) = machines.at_work(guest.id);
    let qmp = &live.control.qmp;
    let wish = SnapshotWish { disk: SnapshotDisk::Leave, after: AfterSnapshot::End };
    machines.vmm.take_snapshot(&place, &live.control, directory, wish).await.unwrap();
    let dump = json!({ "val": 0, "size": 128_u64 << 20, "filename": "dump" });
    qmp.execute("pmemsave", dump).await.unwrap();
    let has = std::fs::read(place.host.directory(guest.id).join("dump")).unwrap();
    let taken = std::fs::read(directory.join(snapshot::MEMORY_FILE)).unwrap();
    assert_eq!(has.len(), taken.len());
    snapshot::settle(&place, qmp, WasBefore::Running).await.unwrap();
    let pages = has.chunks(4096).zip(taken.chunks(4096)).enumerate();
    let torn = pages.filter(|(page, (has, taken))| !FIRMWARE.contains(page) && has != taken);
    torn.map(|(page, _)| page).collect()
}

/// A page that is not of the moment at which the guest was stopped makes it crash sooner or later.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn real_guest_memory_is_of_one_moment_while_it_changes() {
    let Some(rig) = Rig::open().await else { return };
    let source = rig.boot().await;
    rig.sh(&source, BUSY).await;
    let (files, _) = rig.snapshot(&source, "first").await;
    for round in 0..6 {
        // A guest that was just restored was seen to lose most.
        let clone = rig.clone_of(&files, &source).await;
        for again in 0..2 {
            let directory = rig.folder.path().join(format!("torn-{round}-{again}"));
            std::fs::create_dir(&directory).unwrap();
            assert_eq!(torn_pages(&rig, &clone, &directory).await, Vec::<usize>::new());
        }
        rig.driver().delete(clone.id).await.unwrap();
    }
    rig.close().await;
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

fn pss_kib(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).unwrap();
    line.trim().trim_end_matches("kB").trim().parse().unwrap()
}

/// Prints; `cargo nextest run -p aether-drivers --run-ignored only --no-capture measure`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement, for a quiet moment"]
async fn measure_real_guest_restore_and_pause() {
    const ROUNDS: usize = 21;
    let Some(rig) = Rig::open().await else { return };
    let source = rig.boot().await;
    let mut pauses = Vec::new();
    let mut last = None;
    for round in 0..5 {
        let begun = Instant::now();
        let (files, paused) = rig.snapshot(&source, &format!("s{round}")).await;
        println!("snapshot: {:?}, paused {paused:?}", begun.elapsed());
        pauses.push(paused);
        last = Some(files);
    }
    println!("pause: {:?}", median(pauses));
    let from = last.unwrap();
    let mut phases = std::collections::BTreeMap::<&str, Vec<Duration>>::new();
    for round in 0..ROUNDS {
        let spec = rig.spec(Some(&from));
        let guest = Guest { id: spec.id, token: source.token.clone() };
        let begun = Instant::now();
        rig.driver().create(spec).await.unwrap();
        phases.entry("0 create").or_default().push(begun.elapsed());
        let begun = Instant::now();
        let done = rig.driver().start(guest.id, Start::Restore(from.clone()), LIMIT).await.unwrap();
        phases.entry("9 start").or_default().push(begun.elapsed());
        for phase in done {
            phases.entry(phase.name).or_default().push(phase.took);
        }
        let begun = Instant::now();
        rig.sh(&guest, "true").await;
        phases.entry("first command").or_default().push(begun.elapsed());
        if round % 7 == 0 {
            let pid = rig.driver().inspect(guest.id).await.unwrap().unwrap().pid.unwrap();
            println!("PSS {} KiB", pss_kib(pid));
        }
        let begun = Instant::now();
        rig.driver().delete(guest.id).await.unwrap();
        phases.entry("delete").or_default().push(begun.elapsed());
    }
    let mut clones = Vec::new();
    for _ in 0..6 {
        let clone = rig.clone_of(&from, &source).await;
        let begun = Instant::now();
        rig.driver().set_background(clone.id, true).await.unwrap();
        rig.driver().pause(clone.id).await.unwrap();
        phases.entry("pause, low").or_default().push(begun.elapsed());
        clones.push(clone);
    }
    for clone in &clones {
        let pid = rig.driver().inspect(clone.id).await.unwrap().unwrap().pid.unwrap();
        println!("PSS of one of six, idle: {} KiB", pss_kib(pid));
        let (vm, policy) = (aether_types::VmId::new(), NetworkPolicy::default());
        let begun = Instant::now();
        rig.driver().claim(clone.id, vm, &policy).await.unwrap();
        phases.entry("claim").or_default().push(begun.elapsed());
        let begun = Instant::now();
        rig.driver().resume(clone.id).await.unwrap();
        phases.entry("resume").or_default().push(begun.elapsed());
    }
    for (name, times) in phases {
        let worst = times.iter().max().copied().unwrap_or_default();
        println!("{name:>14}: {:?}, worst {worst:?}", median(times));
    }
    rig.close().await;
}
