//! Machines that are none: scripted, in this process, for tests and for `aether up --driver sim`.
//!
//! A [`SimHost`] is the simulated hardware: machines, their disks and what they take of a host.
//! It outlives the [`SimDriver`]s made on it, as a real host outlives its worker. A guest speaks
//! the guest's side of the protocol over in-memory streams and has a small set of programs
//! ([`command`]).
//!
//! What this deliberately does not do: isolate anything, and keep anything when its process ends.

mod clock;
mod command;
mod files;
mod guest;
mod output;
mod run;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use aether_protocol::{AGENT_PORT, Token, host::BoxStream};
use aether_types::{DriverKind, VmId};
use async_trait::async_trait;
use tokio::sync::{mpsc, watch};
use tokio_util::task::TaskTracker;

pub use self::clock::{ManualClock, SimClock};
use self::{files::Disk, guest::Guest};
use crate::{
    Capabilities, Driver, DriverError, ExitReason, GuestNetwork, Machine, MachineSpec,
    MachineState, fault::FaultPoints,
};

/// In one direction of a stream to a simulated guest; about a socket's.
const STREAM_BYTES: usize = 256 * 1024;

/// How a simulated host behaves.
#[derive(Debug, Clone, Default)]
pub struct SimConfig {
    pub clock: SimClock,
    pub latency: SimLatency,
    pub fault: FaultPoints,
}

/// How long things take. Zero by default.
#[derive(Debug, Clone, Default)]
pub struct SimLatency {
    pub create: Duration,
    pub boot: Duration,
    pub pause: Duration,
    pub connect: Duration,
    pub delete: Duration,
}

/// What a simulated VM takes of its host, so that a test can see that nothing is left over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Holding {
    Directory,
    Disk,
    Tap,
    Process,
}

struct SimMachine {
    spec: MachineSpec,
    network: GuestNetwork,
    state: watch::Sender<MachineState>,
    disk: Arc<Mutex<Disk>>,
    guest: Mutex<Option<Arc<Guest>>>,
    pid: AtomicU32,
    is_reachable: AtomicBool,
    /// One operation at a time.
    operation: tokio::sync::Mutex<()>,
    /// Ends the machine for a reason; none while no guest runs.
    end: Mutex<Option<mpsc::Sender<ExitReason>>>,
}

/// The simulated hardware.
pub struct SimHost {
    config: SimConfig,
    machines: Mutex<BTreeMap<VmId, Arc<SimMachine>>>,
    /// Also of VMs that are being made and have no record yet.
    holdings: Mutex<BTreeSet<(VmId, Holding)>>,
    next: AtomicU32,
    tasks: TaskTracker,
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
    pub fn panic_guest(&self, id: VmId) {
        self.end(id, ExitReason::GuestPanic);
    }

    /// The guest powers itself off.
    pub fn power_off_guest(&self, id: VmId) {
        self.end(id, ExitReason::GuestShutdown);
    }

    /// The VMM dies by a signal that nobody of us sent.
    pub fn kill_vmm(&self, id: VmId) {
        self.end(id, ExitReason::VmmDied);
    }

    /// The agent ends while the machine runs on: connections break, new ones are refused.
    pub fn kill_agent(&self, id: VmId) {
        if let Some(guest) = self.guest(id) {
            guest.kill_agent();
        }
    }

    /// Whether packets reach the guest. Streams that are open stay so.
    pub fn set_reachable(&self, id: VmId, reachable: bool) {
        if let Some(machine) = lock(&self.machines).get(&id) {
            machine.is_reachable.store(reachable, Ordering::Relaxed);
        }
    }

    /// Whether the guest's disk has no room for one byte more.
    pub fn set_disk_full(&self, id: VmId, full: bool) {
        if let Some(machine) = lock(&self.machines).get(&id) {
            lock(&machine.disk).is_full = full;
        }
    }

    fn guest(&self, id: VmId) -> Option<Arc<Guest>> {
        let machine = self.known(id)?;
        let guest = lock(&machine.guest);
        guest.clone()
    }

    fn known(&self, id: VmId) -> Option<Arc<SimMachine>> {
        lock(&self.machines).get(&id).cloned()
    }

    fn end(&self, id: VmId, reason: ExitReason) {
        if let Some(machine) = self.known(id)
            && let Some(end) = &*lock(&machine.end)
        {
            // Full: an earlier reason is on its way.
            let _ = end.try_send(reason);
        }
    }

    fn hold(&self, id: VmId, what: Holding) {
        lock(&self.holdings).insert((id, what));
    }

    fn let_go(&self, id: VmId, what: Holding) {
        lock(&self.holdings).remove(&(id, what));
    }

    async fn create(&self, spec: MachineSpec) -> Result<GuestNetwork, DriverError> {
        let id = spec.vm_id;
        if let Some(machine) = self.known(id) {
            return if machine.spec == spec {
                Ok(machine.network.clone())
            } else {
                Err(wrong(id, "known with another specification", "create it"))
            };
        }
        let fault = &self.config.fault;
        let made = async {
            fault.hit("sim create directory")?;
            self.hold(id, Holding::Directory);
            fault.hit("sim created directory")?;
            fault.hit("sim create disk")?;
            self.hold(id, Holding::Disk);
            fault.hit("sim created disk")?;
            fault.hit("sim attach network")?;
            self.hold(id, Holding::Tap);
            fault.hit("sim attached network")?;
            self.config.clock.sleep(self.config.latency.create).await;
            Ok(())
        };
        if let Err(error) = made.await {
            lock(&self.holdings).retain(|(holder, _)| *holder != id);
            return Err(error);
        }
        let network = guest_network(self.next.fetch_add(1, Ordering::Relaxed));
        let disk = Disk::new(u64::from(spec.disk_mb) << 20);
        let machine = SimMachine {
            spec,
            network: network.clone(),
            state: watch::Sender::new(MachineState::Created),
            disk: Arc::new(Mutex::new(disk)),
            guest: Mutex::default(),
            pid: AtomicU32::new(0),
            is_reachable: AtomicBool::new(true),
            operation: tokio::sync::Mutex::default(),
            end: Mutex::default(),
        };
        lock(&self.machines).insert(id, Arc::new(machine));
        Ok(network)
    }

    async fn start(
        self: &Arc<Self>,
        machine: &Arc<SimMachine>,
        limit: Duration,
    ) -> Result<(), DriverError> {
        let id = machine.spec.vm_id;
        let state = *machine.state.borrow();
        if let MachineState::Running | MachineState::Paused = state {
            return Err(wrong(id, state_name(state), "start it"));
        }
        let token = Token::from_hex(&machine.spec.token).map_err(|e| DriverError::Vmm {
            action: "take the token".to_owned(),
            detail: e.to_string(),
        })?;
        let fault = &self.config.fault;
        fault.hit("sim attach network again")?;
        self.hold(id, Holding::Tap);
        fault.hit("sim start process")?;
        self.hold(id, Holding::Process);
        let booted = async {
            fault.hit("sim started process")?;
            fault.hit("sim boot")?;
            let boot = self.config.latency.boot;
            if boot > limit {
                self.config.clock.sleep(limit).await;
                return Err(DriverError::StartTimeout { limit_ms: limit.as_millis() });
            }
            self.config.clock.sleep(boot).await;
            fault.hit("sim booted")
        };
        if let Err(error) = booted.await {
            self.let_go(id, Holding::Process);
            return Err(error);
        }
        let (end, mut ended) = mpsc::channel(1);
        let clock = self.config.clock.clone();
        let disk = Arc::clone(&machine.disk);
        let guest = Arc::new(Guest::boot(clock, token, disk, end.clone()));
        *lock(&machine.guest) = Some(Arc::clone(&guest));
        *lock(&machine.end) = Some(end);
        let pid = 1_000_000 + self.next.fetch_add(1, Ordering::Relaxed);
        machine.pid.store(pid, Ordering::Relaxed);
        machine.state.send_replace(MachineState::Running);
        let (host, machine) = (Arc::clone(self), Arc::clone(machine));
        self.tasks.spawn(async move {
            // The senders stay in the machine until this task takes them out.
            let reason = ended.recv().await.unwrap_or(ExitReason::VmmDied);
            guest.halt();
            *lock(&machine.end) = None;
            *lock(&machine.guest) = None;
            host.let_go(id, Holding::Process);
            machine.state.send_replace(MachineState::Exited(reason));
        });
        Ok(())
    }

    async fn set_paused(&self, machine: &SimMachine, paused: bool) -> Result<(), DriverError> {
        let id = machine.spec.vm_id;
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

    fn describe(machine: &SimMachine) -> Machine {
        let state = *machine.state.borrow();
        let runs = matches!(state, MachineState::Running | MachineState::Paused);
        Machine {
            vm_id: machine.spec.vm_id,
            state,
            network: Some(machine.network.clone()),
            pid: runs.then(|| machine.pid.load(Ordering::Relaxed)),
            spec: Some(machine.spec.clone()),
        }
    }
}

/// A driver on a simulated host. Dropping it leaves the host's machines as they are.
#[derive(Debug, Clone)]
pub struct SimDriver {
    host: Arc<SimHost>,
}

impl SimDriver {
    #[must_use]
    pub fn new(host: Arc<SimHost>) -> Self {
        Self { host }
    }

    pub fn host(&self) -> &Arc<SimHost> {
        &self.host
    }

    fn known(&self, id: VmId) -> Result<Arc<SimMachine>, DriverError> {
        self.host.known(id).ok_or(DriverError::UnknownVm(id))
    }

    /// Runs an operation to its end, also if the caller stops waiting.
    async fn finish<T: Send + 'static>(
        &self,
        operation: impl Future<Output = Result<T, DriverError>> + Send + 'static,
    ) -> Result<T, DriverError> {
        crate::finished(self.host.tasks.spawn(operation).await)
    }
}

#[async_trait]
impl Driver for SimDriver {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            kind: DriverKind::Sim,
            accelerated: false,
            isolation: "none: simulated machines, for tests",
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    async fn create(&self, spec: MachineSpec) -> Result<GuestNetwork, DriverError> {
        let host = Arc::clone(&self.host);
        self.finish(async move { host.create(spec).await }).await
    }

    async fn start(&self, id: VmId, limit: Duration) -> Result<(), DriverError> {
        let (host, machine) = (Arc::clone(&self.host), self.known(id)?);
        self.finish(async move {
            let _one = machine.operation.lock().await;
            host.start(&machine, limit).await
        })
        .await
    }

    async fn pause(&self, id: VmId) -> Result<(), DriverError> {
        let (host, machine) = (Arc::clone(&self.host), self.known(id)?);
        self.finish(async move { host.set_paused(&machine, true).await }).await
    }

    async fn resume(&self, id: VmId) -> Result<(), DriverError> {
        let (host, machine) = (Arc::clone(&self.host), self.known(id)?);
        self.finish(async move { host.set_paused(&machine, false).await }).await
    }

    async fn kill(&self, id: VmId) -> Result<(), DriverError> {
        let (host, machine) = (Arc::clone(&self.host), self.known(id)?);
        self.finish(async move {
            let _one = machine.operation.lock().await;
            host.config.fault.hit("sim kill")?;
            kill(&host, &machine).await;
            host.config.fault.hit("sim killed")
        })
        .await
    }

    async fn exited(&self, id: VmId) -> Result<ExitReason, DriverError> {
        let machine = self.known(id)?;
        Ok(ended(&machine).await)
    }

    async fn delete(&self, id: VmId) -> Result<(), DriverError> {
        let host = Arc::clone(&self.host);
        self.finish(async move {
            let Some(machine) = host.known(id) else { return Ok(()) };
            let _one = machine.operation.lock().await;
            let fault = &host.config.fault;
            host.config.clock.sleep(host.config.latency.delete).await;
            fault.hit("sim delete process")?;
            kill(&host, &machine).await;
            fault.hit("sim delete network")?;
            host.let_go(id, Holding::Tap);
            fault.hit("sim delete disk")?;
            host.let_go(id, Holding::Disk);
            fault.hit("sim delete directory")?;
            host.let_go(id, Holding::Directory);
            lock(&host.machines).remove(&id);
            fault.hit("sim deleted")
        })
        .await
    }

    async fn inspect(&self, id: VmId) -> Result<Option<Machine>, DriverError> {
        Ok(self.host.known(id).map(|machine| SimHost::describe(&machine)))
    }

    async fn list(&self) -> Result<Vec<Machine>, DriverError> {
        Ok(lock(&self.host.machines).values().map(|m| SimHost::describe(m)).collect())
    }

    async fn release(&self) -> Result<(), DriverError> {
        let machines: Vec<_> = lock(&self.host.machines).values().cloned().collect();
        for machine in machines {
            let _one = machine.operation.lock().await;
            if !matches!(*machine.state.borrow(), MachineState::Running | MachineState::Paused) {
                self.host.let_go(machine.spec.vm_id, Holding::Tap);
            }
        }
        Ok(())
    }

    async fn connect(
        &self,
        id: VmId,
        port: u32,
        limit: Duration,
    ) -> Result<BoxStream, DriverError> {
        let machine = self.known(id)?;
        let state = *machine.state.borrow();
        let silent = match state {
            MachineState::Running => !machine.is_reachable.load(Ordering::Relaxed),
            MachineState::Paused => true,
            MachineState::Created | MachineState::Exited(_) => {
                return Err(wrong(id, state_name(state), "connect to it"));
            }
        };
        let clock = &self.host.config.clock;
        let latency = self.host.config.latency.connect;
        if silent || latency > limit {
            tokio::select! {
                () = clock.sleep(limit) => {}
                _ = ended(&machine) => {}
            }
            return Err(DriverError::ConnectTimeout { port, limit_ms: limit.as_millis() });
        }
        clock.sleep(latency).await;
        let guest = self.host.guest(id);
        let Some(guest) = guest.filter(|guest| port == AGENT_PORT && guest.has_agent()) else {
            return Err(DriverError::ConnectRefused { port });
        };
        let (ours, theirs) = tokio::io::duplex(STREAM_BYTES);
        guest.accept(Box::new(theirs));
        Ok(Box::new(ours))
    }
}

async fn kill(host: &SimHost, machine: &SimMachine) {
    host.end(machine.spec.vm_id, ExitReason::Killed);
    ended(machine).await;
}

async fn ended(machine: &SimMachine) -> ExitReason {
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

fn wrong(id: VmId, state: &'static str, action: &'static str) -> DriverError {
    DriverError::WrongState { id, state, action }
}

fn state_name(state: MachineState) -> &'static str {
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
