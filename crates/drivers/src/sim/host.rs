//! The simulated hardware.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use aether_protocol::Token;
use aether_types::{DriverKind, MachineId, NetworkPolicy, VmId};
use tokio::sync::{mpsc, watch};
use tokio_util::task::TaskTracker;

use super::{
    SimConfig,
    files::Disk,
    guest::Guest,
    saved::{self, SavedGuest},
};
use crate::{
    AfterSnapshot, DriverError, ExitReason, GuestNetwork, LayerFile, Machine, MachineSpec,
    MachineState, Phase, SnapshotDisk, SnapshotFiles, SnapshotMachine, SnapshotTaken, Start,
    fault::FaultPoints, host::blocking, layer_places, tools,
};

/// In the detail of a snapshot without a disk: which disk at which moment.
const LEFT_DISK: &str = "left_disk";

/// What a simulated VM takes of its host, so that a test can see that nothing is left over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Holding {
    Directory,
    Disk,
    Tap,
    Process,
}

pub(super) struct SimMachine {
    id: MachineId,
    spec: Mutex<MachineSpec>,
    network: GuestNetwork,
    pub(super) state: watch::Sender<MachineState>,
    disk: Arc<Mutex<Disk>>,
    guest: Mutex<Option<Arc<Guest>>>,
    pid: AtomicU32,
    pub(super) is_reachable: AtomicBool,
    pub(super) is_background: AtomicBool,
    /// Whether a guest has used the disk since it was made.
    is_disk_used: AtomicBool,
    /// The snapshot that left the disk in place, while nothing has used it since.
    left_disk: Mutex<Option<String>>,
    /// One operation at a time.
    pub(super) operation: tokio::sync::Mutex<()>,
    /// Who waits to end the machine: a start gives way.
    ends_wanted: watch::Sender<usize>,
    /// Ends the machine for a reason; none while no guest runs.
    end: Mutex<Option<mpsc::Sender<ExitReason>>>,
}

/// The simulated hardware.
pub struct SimHost {
    pub(super) config: SimConfig,
    machines: Mutex<BTreeMap<MachineId, Arc<SimMachine>>>,
    /// Also of VMs that are being made and have no record yet.
    holdings: Mutex<BTreeSet<(MachineId, Holding)>>,
    next: AtomicU32,
    pub(super) tasks: TaskTracker,
}

impl std::fmt::Debug for SimHost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SimHost").field("config", &self.config).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl SimHost {
    #[must_use]
    pub fn new(config: SimConfig) -> Arc<Self> {
        Arc::new(Self {
            config,
            machines: Mutex::default(),
            holdings: Mutex::default(),
            next: AtomicU32::new(0),
            tasks: TaskTracker::new(),
        })
    }

    pub fn fault(&self) -> &FaultPoints {
        &self.config.fault
    }

    /// What VMs hold of the host: empty when nothing is left over.
    pub fn leftovers(&self) -> Vec<String> {
        lock(&self.holdings).iter().map(|(id, what)| format!("{what:?} of {id}")).collect()
    }

    /// The guest's kernel panics.
    pub fn panic_guest(&self, id: MachineId) {
        self.end(id, ExitReason::GuestPanic);
    }

    /// The guest powers itself off.
    pub fn power_off_guest(&self, id: MachineId) {
        self.end(id, ExitReason::GuestShutdown);
    }

    /// The VMM dies by a signal that nobody of us sent.
    pub fn kill_vmm(&self, id: MachineId) {
        self.end(id, ExitReason::VmmDied);
    }

    /// The agent ends while the machine runs on: connections break, new ones are refused.
    pub fn kill_agent(&self, id: MachineId) {
        if let Some(guest) = self.guest(id) {
            guest.kill_agent();
        }
    }

    /// Whether packets reach the guest. Streams that are open stay so.
    pub fn set_reachable(&self, id: MachineId, reachable: bool) {
        if let Some(machine) = lock(&self.machines).get(&id) {
            machine.is_reachable.store(reachable, Ordering::Relaxed);
        }
    }

    /// Whether the guest's disk has no room for one byte more.
    pub fn set_disk_full(&self, id: MachineId, full: bool) {
        if let Some(machine) = lock(&self.machines).get(&id) {
            lock(&machine.disk).is_full = full;
        }
    }

    /// Whether the machine's share of the processors is low.
    pub fn is_background(&self, id: MachineId) -> bool {
        self.known(id).is_some_and(|machine| machine.is_background.load(Ordering::Relaxed))
    }

    pub(super) fn guest(&self, id: MachineId) -> Option<Arc<Guest>> {
        let machine = self.known(id)?;
        let guest = lock(&machine.guest);
        guest.clone()
    }

    pub(super) fn known(&self, id: MachineId) -> Option<Arc<SimMachine>> {
        lock(&self.machines).get(&id).cloned()
    }

    pub(super) fn all(&self) -> Vec<Arc<SimMachine>> {
        lock(&self.machines).values().cloned().collect()
    }

    fn end(&self, id: MachineId, reason: ExitReason) {
        if let Some(machine) = self.known(id)
            && let Some(end) = &*lock(&machine.end)
        {
            // Full: an earlier reason is on its way.
            let _ = end.try_send(reason);
        }
    }

    fn hold(&self, id: MachineId, what: Holding) {
        lock(&self.holdings).insert((id, what));
    }

    fn let_go(&self, id: MachineId, what: Holding) {
        lock(&self.holdings).remove(&(id, what));
    }

    pub(super) async fn create(&self, spec: MachineSpec) -> Result<GuestNetwork, DriverError> {
        let id = spec.id;
        if let Some(machine) = self.known(id) {
            return if *lock(&machine.spec) == spec {
                Ok(machine.network.clone())
            } else {
                Err(wrong(id, "known with another specification", "create it"))
            };
        }
        let disk = match self.make(&spec).await {
            Ok(disk) => disk,
            Err(error) => {
                lock(&self.holdings).retain(|(holder, _)| *holder != id);
                return Err(error);
            }
        };
        let network = guest_network(self.next.fetch_add(1, Ordering::Relaxed));
        let machine = SimMachine {
            id,
            spec: Mutex::new(spec),
            network: network.clone(),
            state: watch::Sender::new(MachineState::Created),
            disk: Arc::new(Mutex::new(disk)),
            guest: Mutex::default(),
            pid: AtomicU32::new(0),
            is_reachable: AtomicBool::new(true),
            is_background: AtomicBool::new(false),
            is_disk_used: AtomicBool::new(false),
            left_disk: Mutex::default(),
            operation: tokio::sync::Mutex::default(),
            ends_wanted: watch::Sender::new(0),
            end: Mutex::default(),
        };
        lock(&self.machines).insert(id, Arc::new(machine));
        Ok(network)
    }

    async fn make(&self, spec: &MachineSpec) -> Result<Disk, DriverError> {
        layer_places(&spec.layers)?;
        let (id, fault) = (spec.id, &self.config.fault);
        fault.hit("sim create directory")?;
        self.hold(id, Holding::Directory);
        fault.hit("sim created directory")?;
        fault.hit("sim create disk")?;
        self.hold(id, Holding::Disk);
        let disk = match &spec.disk_from {
            None => Disk::new(u64::from(spec.disk_mb) << 20),
            Some(files) => {
                files.machine.check_disk(DriverKind::Sim, spec)?;
                let directory = files.directory.clone();
                blocking(move || saved::read(&directory, saved::DISK_FILE)).await?
            }
        };
        fault.hit("sim created disk")?;
        fault.hit("sim attach network")?;
        self.hold(id, Holding::Tap);
        fault.hit("sim attached network")?;
        self.config.clock.sleep(self.config.latency.create).await;
        Ok(disk)
    }

    pub(super) async fn start(
        self: &Arc<Self>,
        machine: &Arc<SimMachine>,
        how: Start,
        limit: Duration,
    ) -> Result<Vec<Phase>, DriverError> {
        let id = machine.id;
        let state = *machine.state.borrow();
        if let MachineState::Running | MachineState::Paused = state {
            return Err(wrong(id, state_name(state), "start it"));
        }
        let spec = lock(&machine.spec).clone();
        if let Start::Restore(files) = &how {
            files.machine.check(DriverKind::Sim, saved::FORMAT, &spec)?;
            machine.has_disk_of(&spec, files)?;
        }
        let (fault, clock) = (&self.config.fault, &self.config.clock);
        let begun = clock.now();
        fault.hit("sim attach network again")?;
        self.hold(id, Holding::Tap);
        fault.hit("sim start process")?;
        self.hold(id, Holding::Process);
        let attached = clock.now();
        let name = match how {
            Start::Boot => "boot",
            Start::Restore(_) => "load",
        };
        let (end, ended) = mpsc::channel(1);
        let guest = match self.bring_up(machine, &spec, how, limit, end.clone()).await {
            Ok(guest) => guest,
            Err(error) => {
                self.let_go(id, Holding::Process);
                return Err(error);
            }
        };
        machine.is_disk_used.store(true, Ordering::Relaxed);
        *lock(&machine.left_disk) = None;
        *lock(&machine.guest) = Some(Arc::clone(&guest));
        *lock(&machine.end) = Some(end);
        let pid = 1_000_000 + self.next.fetch_add(1, Ordering::Relaxed);
        machine.pid.store(pid, Ordering::Relaxed);
        machine.state.send_replace(MachineState::Running);
        self.watch(machine, guest, ended);
        Ok(vec![
            Phase { name: "network", took: attached.saturating_sub(begun) },
            Phase { name, took: clock.now().saturating_sub(attached) },
        ])
    }

    async fn bring_up(
        &self,
        machine: &SimMachine,
        spec: &MachineSpec,
        how: Start,
        limit: Duration,
        end: mpsc::Sender<ExitReason>,
    ) -> Result<Arc<Guest>, DriverError> {
        let (fault, clock, latency) =
            (&self.config.fault, &self.config.clock, &self.config.latency);
        fault.hit("sim started process")?;
        let (took, before, after) = match how {
            Start::Boot => (latency.boot, "sim boot", "sim booted"),
            Start::Restore(_) => (latency.restore, "sim restore", "sim restored"),
        };
        fault.hit(before)?;
        let mut ends_wanted = machine.ends_wanted.subscribe();
        tokio::select! {
            () = clock.sleep(took.min(limit)) => {}
            _ = ends_wanted.wait_for(|ends| *ends > 0) => {
                let detail = "it was ended".to_owned();
                return Err(DriverError::ExitedDuringStart { detail });
            }
        }
        if took > limit {
            return Err(DriverError::StartTimeout { limit_ms: limit.as_millis() });
        }
        let (clock, disk) = (clock.clone(), Arc::clone(&machine.disk));
        let guest = match how {
            Start::Boot => Guest::boot(clock, token(&spec.token)?, disk, end),
            Start::Restore(files) => {
                let read = move || saved::read::<SavedGuest>(&files.directory, saved::MEMORY_FILE);
                let saved = blocking(read).await?;
                let token = token(&saved.token)?;
                Guest::restore(saved, clock, token, disk, end)
            }
        };
        fault.hit(after).inspect_err(|_| guest.halt())?;
        Ok(guest)
    }

    /// Sees a machine to its end.
    fn watch(
        self: &Arc<Self>,
        machine: &Arc<SimMachine>,
        guest: Arc<Guest>,
        mut ended: mpsc::Receiver<ExitReason>,
    ) {
        let (host, machine) = (Arc::clone(self), Arc::clone(machine));
        self.tasks.spawn(async move {
            // The senders stay in the machine until this task takes them out.
            let reason = ended.recv().await.unwrap_or(ExitReason::VmmDied);
            guest.halt();
            *lock(&machine.end) = None;
            *lock(&machine.guest) = None;
            host.let_go(machine.id, Holding::Process);
            machine.state.send_replace(MachineState::Exited(reason));
        });
    }

    pub(super) async fn snapshot(
        &self,
        machine: &SimMachine,
        into: PathBuf,
        disk: SnapshotDisk,
        after: AfterSnapshot,
    ) -> Result<SnapshotTaken, DriverError> {
        const ACTION: &str = "take a snapshot of it";
        let (id, state) = (machine.id, *machine.state.borrow());
        let Some(guest) = lock(&machine.guest).clone() else {
            return Err(wrong(id, state_name(state), ACTION));
        };
        let (fault, clock) = (&self.config.fault, &self.config.clock);
        fault.hit("sim snapshot")?;
        let was_running = state == MachineState::Running;
        let begun = clock.now();
        if was_running {
            guest.pause(true);
        }
        clock.sleep(self.config.latency.snapshot).await;
        let memory = guest.save();
        let kept = (disk == SnapshotDisk::Include).then(|| lock(&machine.disk).clone());
        if was_running && after == AfterSnapshot::GoOn {
            guest.pause(false);
        }
        let stood_still = clock.now().saturating_sub(begun);
        let paused = if was_running { stood_still } else { Duration::ZERO };
        let written = async {
            fault.hit("sim snapshot: write")?;
            blocking(move || saved::write(&into, &memory, kept.as_ref())).await?;
            fault.hit("sim snapshot: written")?;
            match *machine.state.borrow() {
                MachineState::Running | MachineState::Paused => Ok(()),
                MachineState::Created | MachineState::Exited(_) => {
                    Err(wrong(id, "stopped", ACTION))
                }
            }
        };
        let written = written.await;
        match after {
            AfterSnapshot::End if written.is_ok() => kill(self, machine).await,
            // On failure it is what it was.
            AfterSnapshot::End if was_running => guest.pause(false),
            AfterSnapshot::End | AfterSnapshot::GoOn => {}
        }
        written?;
        let left = (disk == SnapshotDisk::Leave).then(|| MachineId::new().to_string());
        let taken = SnapshotTaken { machine: machine.for_snapshot(left.as_deref()), paused };
        // One that stands still leaves its disk as the memory knows it, until it goes on.
        if after == AfterSnapshot::End || state == MachineState::Paused {
            *lock(&machine.left_disk) = left;
        }
        Ok(taken)
    }

    /// There are no files to attach: what is recorded and refused is as with real machines.
    pub(super) fn add_layers(
        &self,
        machine: &SimMachine,
        layers: Vec<LayerFile>,
    ) -> Result<(), DriverError> {
        self.config.fault.hit("sim add layers")?;
        let mut spec = lock(&machine.spec);
        if !tools::begin_with(&layers, &spec.layers) {
            let detail = "the machine has others, which would have to go".to_owned();
            return Err(DriverError::Layers(detail));
        }
        layer_places(&layers)?;
        spec.layers = layers;
        Ok(())
    }

    pub(super) async fn claim(
        &self,
        machine: &SimMachine,
        vm: VmId,
        network: NetworkPolicy,
    ) -> Result<(), DriverError> {
        if lock(&machine.spec).vm.is_some_and(|owner| owner != vm) {
            return Err(wrong(machine.id, "another VM's", "claim it"));
        }
        self.config.fault.hit("sim claim")?;
        self.config.clock.sleep(self.config.latency.claim).await;
        let mut spec = lock(&machine.spec);
        (spec.vm, spec.network) = (Some(vm), network);
        drop(spec);
        self.config.fault.hit("sim claimed")
    }

    pub(super) async fn delete(&self, id: MachineId) -> Result<(), DriverError> {
        let Some(machine) = self.known(id) else { return Ok(()) };
        let _one = machine.turn_to_end().await;
        let fault = &self.config.fault;
        self.config.clock.sleep(self.config.latency.delete).await;
        fault.hit("sim delete process")?;
        kill(self, &machine).await;
        fault.hit("sim delete network")?;
        self.let_go(id, Holding::Tap);
        fault.hit("sim delete disk")?;
        self.let_go(id, Holding::Disk);
        fault.hit("sim delete directory")?;
        self.let_go(id, Holding::Directory);
        lock(&self.machines).remove(&id);
        fault.hit("sim deleted")
    }

    pub(super) async fn release(&self) {
        for machine in self.all() {
            let _one = machine.operation.lock().await;
            if !matches!(*machine.state.borrow(), MachineState::Running | MachineState::Paused) {
                self.let_go(machine.id, Holding::Tap);
            }
        }
    }

    pub(super) async fn set_paused(
        &self,
        machine: &SimMachine,
        paused: bool,
    ) -> Result<(), DriverError> {
        let id = machine.id;
        let _one = machine.operation.lock().await;
        let state = *machine.state.borrow();
        let (from, to, action) = if paused {
            (MachineState::Running, MachineState::Paused, "pause it")
        } else {
            (MachineState::Paused, MachineState::Running, "resume it")
        };
        if state != from && state != to {
            return Err(wrong(id, state_name(state), action));
        }
        self.config.fault.hit(if paused { "sim pause" } else { "sim resume" })?;
        self.config.clock.sleep(self.config.latency.pause).await;
        if !paused {
            *lock(&machine.left_disk) = None;
        }
        if let Some(guest) = &*lock(&machine.guest) {
            guest.pause(paused);
        }
        machine.state.send_if_modified(|state| {
            let runs = *state == from;
            if runs {
                *state = to;
            }
            runs
        });
        Ok(())
    }
}

impl SimMachine {
    /// The turn of an operation that ends the machine; a start in hand ends early.
    pub(super) async fn turn_to_end(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.ends_wanted.send_modify(|ends| *ends += 1);
        let turn = self.operation.lock().await;
        self.ends_wanted.send_modify(|ends| *ends -= 1);
        turn
    }

    pub(super) fn describe(&self) -> Machine {
        let state = *self.state.borrow();
        let runs = matches!(state, MachineState::Running | MachineState::Paused);
        Machine {
            id: self.id,
            state,
            network: Some(self.network.clone()),
            pid: runs.then(|| self.pid.load(Ordering::Relaxed)),
            spec: Some(lock(&self.spec).clone()),
        }
    }

    fn for_snapshot(&self, left_disk: Option<&str>) -> SnapshotMachine {
        let spec = lock(&self.spec);
        SnapshotMachine {
            driver: DriverKind::Sim,
            format: saved::FORMAT.to_owned(),
            vcpus: spec.vcpus,
            memory_mb: spec.memory_mb,
            disk_mb: spec.disk_mb,
            boot: spec.boot.clone(),
            layers: tools::in_snapshot(&spec.layers),
            mac: self.network.mac.clone(),
            detail: serde_json::json!({ LEFT_DISK: left_disk }),
        }
    }

    /// Whether the disk is as it was when the snapshot was taken.
    fn has_disk_of(&self, spec: &MachineSpec, files: &SnapshotFiles) -> Result<(), DriverError> {
        let left = files.machine.detail.get(LEFT_DISK).and_then(serde_json::Value::as_str);
        let is_as_then = match left {
            Some(left) => lock(&self.left_disk).as_deref() == Some(left),
            None => {
                !self.is_disk_used.load(Ordering::Relaxed) && spec.disk_from.as_ref() == Some(files)
            }
        };
        let used = || wrong(self.id, "on a disk that is not as the snapshot left it", "restore it");
        is_as_then.then_some(()).ok_or_else(used)
    }
}

fn token(hex: &str) -> Result<Token, DriverError> {
    Token::from_hex(hex).map_err(|e| DriverError::Vmm {
        action: "take the token".to_owned(),
        detail: e.to_string(),
    })
}

pub(super) async fn kill(host: &SimHost, machine: &SimMachine) {
    host.end(machine.id, ExitReason::Killed);
    ended(machine).await;
}

pub(super) async fn ended(machine: &SimMachine) -> ExitReason {
    let mut state = machine.state.subscribe();
    let ended = state
        .wait_for(|state| matches!(state, MachineState::Created | MachineState::Exited(_)))
        .await;
    match ended.map(|state| *state) {
        Ok(MachineState::Exited(reason)) => reason,
        // Created: it never ran. The sender is in `machine`, so there is no error.
        Ok(_) | Err(_) => ExitReason::Killed,
    }
}

pub(super) fn wrong(id: MachineId, state: &'static str, action: &'static str) -> DriverError {
    DriverError::WrongState { id, state, action }
}

pub(super) fn state_name(state: MachineState) -> &'static str {
    match state {
        MachineState::Created => "created",
        MachineState::Running => "running",
        MachineState::Paused => "paused",
        MachineState::Exited(_) => "stopped",
    }
}

/// Of the range for benchmarks (RFC 2544), which nothing real has.
fn guest_network(slot: u32) -> GuestNetwork {
    let base = u32::from(Ipv4Addr::new(198, 18, 0, 0)) + (slot % 32768) * 4;
    let [_, b, c, d] = (base + 2).to_be_bytes();
    GuestNetwork {
        mac: format!("02:ae:51:{b:02x}:{c:02x}:{d:02x}"),
        addresses: vec![(IpAddr::V4(Ipv4Addr::from(base + 2)), 30)],
        gateways: vec![IpAddr::V4(Ipv4Addr::from(base + 1))],
        dns: vec![IpAddr::V4(Ipv4Addr::from(base + 1))],
        mtu: 1500,
    }
}
