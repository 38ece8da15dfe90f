//! The lifecycle that every driver of a real VMM has: what is made in which order, what is undone,
//! and how a VM is found again.
//!
//! ```text
//!            create                start                      end of the VMM
//!   (none) ─────────► created ─────────────────► running ─────────────────────► exited
//!      ▲    record      │         process         │  ▲                            │ │
//!      │    directory   │         ready hint      │  │ pause, resume              │ │
//!      │    disk        │         connect         ▼  │                            │ │
//!      │    network     │         ◄── undone      paused                     start│ │
//!      └──── delete ────┴──── from every state, also half made ──────────────────┘ ┘
//! ```
//!
//! Invariants
//! - Operations on one VM are one at a time, but `kill` and `delete` do not wait for a start: they
//!   end it.
//! - An operation runs in a task of its own: a caller that stops waiting changes nothing.
//! - One watcher task for each VMM that runs; it alone says how the VMM ended.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use aether_protocol::host::BoxStream;
use aether_types::{DriverKind, VmId};
use async_trait::async_trait;
use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};

use crate::{
    Capabilities, Driver, DriverError, ExitReason, GuestNetwork, Machine, MachineSpec,
    MachineState,
    host::{Host, Record},
    journal::{Owner, Resource},
    network::Attachment,
    process::Process,
    stream::GuestStream,
};

/// How long a VMM may take to answer a question about itself.
const CONTROL_LIMIT: Duration = Duration::from_secs(10);

/// A VM, as its driver sees it while it acts.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) host: Arc<Host>,
    pub(crate) record: Record,
    pub(crate) attachment: Attachment,
}

impl Place {
    pub(crate) fn id(&self) -> VmId {
        self.record.spec.vm_id
    }
}

/// A VMM that was started.
pub(crate) struct Booted<C> {
    pub(crate) process: Process,
    pub(crate) control: C,
}

/// What differs between VMMs.
#[async_trait]
pub(crate) trait Vmm: Send + Sync + 'static {
    /// The way to a VMM that runs.
    type Control: Send + Sync + 'static;

    const KIND: DriverKind;
    /// The guest's channel is a private link of the network.
    const CHANNEL_LINK: bool;

    fn capabilities(&self) -> Capabilities;

    /// Starts the VMM and lets the guest boot. What it leaves when it fails is found in the
    /// journal.
    async fn boot(&self, place: &Place) -> Result<Booted<Self::Control>, DriverError>;

    /// Waits for the guest's hint that it can be connected to, and sees that it can.
    async fn ready(&self, place: &Place, control: &Self::Control) -> Result<(), DriverError>;

    /// Takes up the way to a VMM that an earlier worker started.
    async fn adopt(&self, place: &Place, process: &Process) -> Result<Self::Control, DriverError>;

    /// Waits until the VMM has ended, and says why as far as it can be told.
    async fn watch(&self, control: &Self::Control, process: &Process) -> ExitReason;

    /// The last words of guest and VMM, for an error.
    fn last_words(&self, control: &Self::Control) -> String;

    async fn pause(&self, control: &Self::Control) -> Result<(), DriverError>;
    async fn resume(&self, control: &Self::Control) -> Result<(), DriverError>;
    async fn is_paused(&self, control: &Self::Control) -> Result<bool, DriverError>;

    async fn connect(
        &self,
        place: &Place,
        port: u32,
        limit: Duration,
    ) -> Result<BoxStream, DriverError>;

    /// Removes what a VMM that has ended left in the VM's directory.
    fn clean(&self, host: &Host, record: &Record) -> Result<(), DriverError>;
}

/// A VMM that runs, or has just ended.
struct Live<C> {
    process: Process,
    control: C,
    /// The end is our doing.
    is_killed: AtomicBool,
    exit: watch::Sender<Option<ExitReason>>,
    /// Breaks the streams to the guest.
    ended: CancellationToken,
}

impl<C> Live<C> {
    fn has_ended(&self) -> bool {
        self.exit.borrow().is_some()
    }

    async fn ended(&self) -> ExitReason {
        let mut exit = self.exit.subscribe();
        let ended = exit.wait_for(Option::is_some).await;
        // The sender is in `self`.
        ended.ok().and_then(|exit| *exit).unwrap_or(ExitReason::VmmDied)
    }

    async fn kill(&self) -> Result<(), DriverError> {
        if self.has_ended() {
            return Ok(());
        }
        self.is_killed.store(true, Ordering::Release);
        self.process.kill()?;
        self.ended().await;
        Ok(())
    }
}

struct Slot<C> {
    /// One operation at a time.
    operation: tokio::sync::Mutex<()>,
    live: Mutex<Option<Arc<Live<C>>>>,
    /// Ends the start that is under way, if any.
    interrupt: Mutex<CancellationToken>,
}

impl<C> Default for Slot<C> {
    fn default() -> Self {
        Self {
            operation: tokio::sync::Mutex::default(),
            live: Mutex::default(),
            interrupt: Mutex::default(),
        }
    }
}

impl<C> Slot<C> {
    fn running(&self) -> Option<Arc<Live<C>>> {
        lock(&self.live).as_ref().filter(|live| !live.has_ended()).cloned()
    }

    /// Ends a start that is under way; later starts are not concerned.
    fn interrupt(&self) {
        std::mem::take(&mut *lock(&self.interrupt)).cancel();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The driver of one kind of VMM on one host. Dropping it leaves the VMMs running.
pub(crate) struct Machines<V: Vmm> {
    host: Arc<Host>,
    vmm: Arc<V>,
    slots: Mutex<HashMap<VmId, Arc<Slot<V::Control>>>>,
    tasks: TaskTracker,
    /// Ends the watchers with this.
    closing: CancellationToken,
    _closing: DropGuard,
}

fn wrong(id: VmId, state: &'static str, action: &'static str) -> DriverError {
    DriverError::WrongState { id, state, action }
}

impl<V: Vmm> Machines<V> {
    /// Takes over the VMs of this kind that run.
    pub(crate) async fn open(host: Arc<Host>, vmm: V) -> Result<Arc<Self>, DriverError> {
        let closing = CancellationToken::new();
        let machines = Arc::new(Self {
            host,
            vmm: Arc::new(vmm),
            slots: Mutex::default(),
            tasks: TaskTracker::new(),
            _closing: closing.clone().drop_guard(),
            closing,
        });
        for id in machines.host.journal.machines() {
            if machines.host.record(id).is_some_and(|record| record.kind == V::KIND) {
                machines.adopt(id).await?;
            }
        }
        Ok(machines)
    }

    /// Finds a VM's VMM again, or that it has ended.
    async fn adopt(self: &Arc<Self>, id: VmId) -> Result<(), DriverError> {
        let Some(mut record) = self.host.record(id) else { return Ok(()) };
        let journaled = self.host.journal.resources(id);
        if !journaled.iter().any(|r| matches!(r, Resource::Process { .. })) {
            return Ok(());
        }
        if let (Some(process), Some(place)) = (self.host.running(id)?, self.place(&record)) {
            let adopted =
                tokio::time::timeout(CONTROL_LIMIT, self.vmm.adopt(&place, &process)).await;
            match adopted {
                Ok(Ok(control)) => {
                    tracing::info!(vm.id = %id, pid = process.pid(), "adopted a running VM");
                    self.watch(id, Booted { process, control });
                    return Ok(());
                }
                // A VMM that cannot be spoken to cannot be stopped, paused or believed.
                Ok(Err(error)) => {
                    tracing::error!(vm.id = %id, %error, "end a VMM that cannot be adopted");
                }
                Err(_) => tracing::error!(vm.id = %id, "end a VMM that does not answer"),
            }
        }
        self.host.end_processes(Owner::Vm(id)).await?;
        record.last_exit = Some(ExitReason::VmmDied);
        self.host.set_record(&record)
    }

    fn place(&self, record: &Record) -> Option<Place> {
        let attachment = self.host.network().attachment(record.spec.vm_id)?;
        Some(Place { host: Arc::clone(&self.host), record: record.clone(), attachment })
    }

    fn slot(&self, id: VmId) -> Arc<Slot<V::Control>> {
        Arc::clone(lock(&self.slots).entry(id).or_default())
    }

    fn known(&self, id: VmId) -> Result<Record, DriverError> {
        self.host
            .record(id)
            .filter(|record| record.kind == V::KIND)
            .ok_or(DriverError::UnknownVm(id))
    }

    /// Runs an operation to its end, also if the caller stops waiting.
    async fn finish<T: Send + 'static>(
        &self,
        operation: impl Future<Output = Result<T, DriverError>> + Send + 'static,
    ) -> Result<T, DriverError> {
        crate::finished(self.tasks.spawn(operation).await)
    }

    async fn create_one(self: &Arc<Self>, spec: MachineSpec) -> Result<GuestNetwork, DriverError> {
        let id = spec.vm_id;
        let slot = self.slot(id);
        let _one = slot.operation.lock().await;
        match self.host.record(id) {
            Some(Record { kind, spec: old, network: Some(network), .. })
                if kind == V::KIND && old == spec =>
            {
                return Ok(network);
            }
            Some(Record { network: Some(_), .. }) => {
                return Err(wrong(id, "known with another specification", "create it"));
            }
            // Half made by a worker that died.
            Some(Record { network: None, .. }) => self.remove(id).await?,
            None => {}
        }
        match self.make(spec).await {
            Ok(network) => Ok(network),
            Err(error) => {
                if let Err(undo) = self.remove(id).await {
                    tracing::error!(vm.id = %id, error = %undo, "cannot undo a creation");
                }
                lock(&self.slots).remove(&id);
                Err(error)
            }
        }
    }

    async fn make(&self, spec: MachineSpec) -> Result<GuestNetwork, DriverError> {
        let host = Arc::clone(&self.host);
        let fault = host.fault.clone();
        let mut record = host.begin(V::KIND, spec)?;
        let made = record.clone();
        crate::host::blocking(move || {
            host.fault.hit("make directory")?;
            host.make_directory(&made)?;
            host.fault.hit("make directory: made")?;
            host.fault.hit("make disk")?;
            host.make_disk(&made)?;
            host.fault.hit("make disk: made")
        })
        .await?;
        fault.hit("attach network")?;
        let attachment = self.attach(&record).await?;
        fault.hit("attach network: attached")?;
        record.network = Some(attachment.guest.clone());
        self.host.set_record(&record)?;
        fault.hit("make VM: recorded")?;
        Ok(attachment.guest)
    }

    async fn attach(&self, record: &Record) -> Result<Attachment, DriverError> {
        let policy = &record.spec.network;
        let uid = record.uid.unwrap_or_else(|| rustix::process::geteuid().as_raw());
        self.host.network().attach(record.spec.vm_id, policy, uid, V::CHANNEL_LINK).await
    }

    async fn start_one(self: &Arc<Self>, id: VmId, limit: Duration) -> Result<(), DriverError> {
        let deadline = Instant::now() + limit;
        self.known(id)?;
        let slot = self.slot(id);
        let interrupt = lock(&slot.interrupt).clone();
        let _one = slot.operation.lock().await;
        let mut record = self.known(id)?;
        if record.network.is_none() {
            return Err(wrong(id, "half made", "start it"));
        }
        if slot.running().is_some() {
            return Err(wrong(id, "running", "start it"));
        }
        let started = tokio::select! {
            started = self.boot(&mut record, deadline, limit) => started,
            () = interrupt.cancelled() => {
                Err(DriverError::ExitedDuringStart { detail: "it was killed".to_owned() })
            }
        };
        if started.is_err() {
            // The watcher, where there is one yet, sees the same end.
            if let Some(live) = slot.running() {
                live.kill().await?;
            }
            self.host.end_processes(Owner::Vm(id)).await?;
            self.vmm.clean(&self.host, &record)?;
        }
        started
    }

    async fn boot(
        self: &Arc<Self>,
        record: &mut Record,
        deadline: Instant,
        limit: Duration,
    ) -> Result<(), DriverError> {
        let id = record.spec.vm_id;
        let late = || DriverError::StartTimeout { limit_ms: limit.as_millis() };
        self.vmm.clean(&self.host, record)?;
        self.host.fault.hit("attach network again")?;
        // Only after a release is there anything to do.
        let attachment = self.attach(record).await?;
        let place = Place { host: Arc::clone(&self.host), record: record.clone(), attachment };
        self.host.fault.hit("boot")?;
        let booted = timeout_at(deadline, self.vmm.boot(&place)).await.map_err(|_| late())??;
        let live = self.watch(id, booted);
        self.host.fault.hit("boot: begun")?;
        tokio::select! {
            ready = timeout_at(deadline, self.vmm.ready(&place, &live.control)) => {
                ready.map_err(|_| late())??;
            }
            reason = live.ended() => {
                let words = self.vmm.last_words(&live.control);
                let detail = format!("{}{}{words}", describe(reason), if words.is_empty() { "" } else { ": " });
                return Err(DriverError::ExitedDuringStart { detail });
            }
        }
        self.host.fault.hit("boot: ready")
    }

    /// Makes a VMM known, and watches it to its end.
    fn watch(self: &Arc<Self>, id: VmId, booted: Booted<V::Control>) -> Arc<Live<V::Control>> {
        let live = Arc::new(Live {
            process: booted.process,
            control: booted.control,
            is_killed: AtomicBool::new(false),
            exit: watch::Sender::new(None),
            ended: CancellationToken::new(),
        });
        *lock(&self.slot(id).live) = Some(Arc::clone(&live));
        let closing = self.closing.clone();
        let watcher = Watcher {
            id,
            vmm: Arc::clone(&self.vmm),
            live: Arc::clone(&live),
            machines: Arc::downgrade(self),
        };
        self.tasks.spawn(closing.run_until_cancelled_owned(watcher.watch()));
        live
    }

    async fn record_end(&self, id: VmId, reason: ExitReason) -> Result<(), DriverError> {
        if let Some(mut record) = self.host.record(id) {
            record.last_exit = Some(reason);
            self.host.set_record(&record)?;
        }
        self.host.end_processes(Owner::Vm(id)).await
    }

    /// Removes everything of a VM, in the reverse order of its making. Repeating it is harmless.
    async fn remove(&self, id: VmId) -> Result<(), DriverError> {
        let host = &self.host;
        if !host.journal.machines().contains(&id) {
            return Ok(());
        }
        host.fault.hit("delete process")?;
        let live = self.slot(id).running();
        if let Some(live) = live {
            live.kill().await?;
        }
        host.end_processes(Owner::Vm(id)).await?;
        host.fault.hit("delete network")?;
        host.network().detach(id).await?;
        host.fault.hit("delete files")?;
        host.remove_files(id).await?;
        host.fault.hit("delete record")?;
        host.journal.forget_owner(id)?;
        host.fault.hit("delete record: deleted")
    }

    async fn machine(&self, id: VmId) -> Result<Option<Machine>, DriverError> {
        let Some(value) = self.host.journal.machine(id) else { return Ok(None) };
        let record: Record = match serde_json::from_value(value) {
            Ok(record) => record,
            Err(error) => {
                // It can be deleted, and nothing else.
                tracing::error!(vm.id = %id, %error, "the record of a VM is damaged");
                let state = MachineState::Created;
                return Ok(Some(Machine {
                    vm_id: id,
                    state,
                    network: None,
                    pid: None,
                    spec: None,
                }));
            }
        };
        if record.kind != V::KIND {
            return Ok(None);
        }
        let live = self.slot(id).running();
        let (state, pid) = match live {
            Some(live) if live.process.is_alive() => {
                let asked = tokio::select! {
                    asked = tokio::time::timeout(CONTROL_LIMIT, self.vmm.is_paused(&live.control)) => asked,
                    _ = live.ended() => Ok(Ok(false)),
                };
                match asked {
                    _ if live.has_ended() => (self.at_rest(id), None),
                    Ok(Ok(true)) => (MachineState::Paused, Some(live.process.pid())),
                    // A VMM that is busy is one that runs.
                    Ok(Ok(false)) | Err(_) => (MachineState::Running, Some(live.process.pid())),
                    Ok(Err(error)) => return Err(error),
                }
            }
            Some(live) => {
                live.ended().await;
                (self.at_rest(id), None)
            }
            None => (self.at_rest(id), None),
        };
        Ok(Some(Machine {
            vm_id: id,
            state,
            network: record.network,
            pid,
            spec: Some(record.spec),
        }))
    }

    /// The state of a VM without a VMM.
    fn at_rest(&self, id: VmId) -> MachineState {
        let last = self.host.record(id).and_then(|record| record.last_exit);
        last.map_or(MachineState::Created, MachineState::Exited)
    }

    fn running(
        &self,
        id: VmId,
        action: &'static str,
    ) -> Result<Arc<Live<V::Control>>, DriverError> {
        self.known(id)?;
        self.slot(id).running().ok_or_else(|| wrong(id, "not running", action))
    }

    async fn set_paused(self: &Arc<Self>, id: VmId, paused: bool) -> Result<(), DriverError> {
        self.known(id)?;
        let slot = self.slot(id);
        let _one = slot.operation.lock().await;
        let action = if paused { "pause it" } else { "resume it" };
        let live = self.running(id, action)?;
        let change = async {
            if paused {
                self.vmm.pause(&live.control).await
            } else {
                self.vmm.resume(&live.control).await
            }
        };
        self.host.fault.hit(if paused { "pause" } else { "resume" })?;
        tokio::select! {
            changed = tokio::time::timeout(CONTROL_LIMIT, change) => changed.unwrap_or_else(|_| {
                let detail = format!("no answer within {} s", CONTROL_LIMIT.as_secs());
                Err(DriverError::Vmm { action: action.to_owned(), detail })
            }),
            _ = live.ended() => Err(wrong(id, "stopped", action)),
        }
    }
}

/// Sees a VMM to its end.
struct Watcher<V: Vmm> {
    id: VmId,
    vmm: Arc<V>,
    live: Arc<Live<V::Control>>,
    machines: Weak<Machines<V>>,
}

impl<V: Vmm> Watcher<V> {
    async fn watch(self) {
        let seen = self.vmm.watch(&self.live.control, &self.live.process).await;
        // A guest that ended by itself just before the kill has done so.
        let reason = match seen {
            ExitReason::VmmDied if self.live.is_killed.load(Ordering::Acquire) => {
                ExitReason::Killed
            }
            reason => reason,
        };
        let pid = self.live.process.pid();
        tracing::info!(vm.id = %self.id, pid, reason = describe(reason), "a VMM has ended");
        if let Some(machines) = self.machines.upgrade()
            && let Err(error) = machines.record_end(self.id, reason).await
        {
            tracing::error!(vm.id = %self.id, %error, "cannot record the end of a VMM");
        }
        self.live.exit.send_replace(Some(reason));
        self.live.ended.cancel();
    }
}

fn describe(reason: ExitReason) -> &'static str {
    match reason {
        ExitReason::Killed => "it was killed",
        ExitReason::GuestShutdown => "the guest shut down",
        ExitReason::GuestPanic => "the guest's kernel panicked",
        ExitReason::VmmDied => "the VMM died",
    }
}

/// What a driver's public type delegates to.
#[async_trait]
impl<V: Vmm> Driver for Arc<Machines<V>> {
    fn capabilities(&self) -> Capabilities {
        self.vmm.capabilities()
    }

    async fn create(&self, spec: MachineSpec) -> Result<GuestNetwork, DriverError> {
        let machines = Arc::clone(self);
        self.finish(async move { machines.create_one(spec).await }).await
    }

    async fn start(&self, id: VmId, limit: Duration) -> Result<(), DriverError> {
        let machines = Arc::clone(self);
        self.finish(async move { machines.start_one(id, limit).await }).await
    }

    async fn pause(&self, id: VmId) -> Result<(), DriverError> {
        let machines = Arc::clone(self);
        self.finish(async move { machines.set_paused(id, true).await }).await
    }

    async fn resume(&self, id: VmId) -> Result<(), DriverError> {
        let machines = Arc::clone(self);
        self.finish(async move { machines.set_paused(id, false).await }).await
    }

    async fn kill(&self, id: VmId) -> Result<(), DriverError> {
        let machines = Arc::clone(self);
        self.finish(async move {
            machines.known(id)?;
            let slot = machines.slot(id);
            slot.interrupt();
            let _one = slot.operation.lock().await;
            machines.host.fault.hit("kill")?;
            let live = slot.running();
            match live {
                Some(live) => live.kill().await,
                None => Ok(()),
            }
        })
        .await
    }

    async fn exited(&self, id: VmId) -> Result<ExitReason, DriverError> {
        self.known(id)?;
        let live = self.slot(id).running();
        match live {
            Some(live) => Ok(live.ended().await),
            None => Ok(match self.at_rest(id) {
                MachineState::Exited(reason) => reason,
                // It never ran: nobody but its owner keeps it from running.
                MachineState::Created | MachineState::Running | MachineState::Paused => {
                    ExitReason::Killed
                }
            }),
        }
    }

    async fn delete(&self, id: VmId) -> Result<(), DriverError> {
        let machines = Arc::clone(self);
        self.finish(async move {
            if machines.host.record(id).is_some_and(|record| record.kind != V::KIND) {
                return Ok(());
            }
            let slot = machines.slot(id);
            slot.interrupt();
            let _one = slot.operation.lock().await;
            machines.remove(id).await?;
            lock(&machines.slots).remove(&id);
            Ok(())
        })
        .await
    }

    async fn inspect(&self, id: VmId) -> Result<Option<Machine>, DriverError> {
        self.machine(id).await
    }

    async fn list(&self) -> Result<Vec<Machine>, DriverError> {
        let mut found = Vec::new();
        for id in self.host.journal.machines() {
            found.extend(self.machine(id).await?);
        }
        Ok(found)
    }

    async fn release(&self) -> Result<(), DriverError> {
        let machines = Arc::clone(self);
        self.finish(async move {
            for id in machines.host.journal.machines() {
                if !machines.host.record(id).is_some_and(|record| record.kind == V::KIND) {
                    continue;
                }
                let slot = machines.slot(id);
                let _one = slot.operation.lock().await;
                if slot.running().is_none() {
                    machines.host.network().detach(id).await?;
                }
            }
            machines.host.network().close_if_empty().await?;
            Ok(())
        })
        .await
    }

    async fn connect(
        &self,
        id: VmId,
        port: u32,
        limit: Duration,
    ) -> Result<BoxStream, DriverError> {
        let live = self.running(id, "connect to it")?;
        let place = self.place(&self.known(id)?).ok_or(DriverError::UnknownVm(id))?;
        tokio::select! {
            stream = self.vmm.connect(&place, port, limit) => {
                Ok(Box::new(GuestStream::new(stream?, live.ended.clone())))
            }
            _ = live.ended() => Err(wrong(id, "stopped", "connect to it")),
        }
    }
}

/// Makes a public driver of a tuple around `Arc<Machines<_>>`.
macro_rules! delegate_driver {
    ($driver:ty) => {
        #[async_trait]
        impl Driver for $driver {
            fn capabilities(&self) -> Capabilities {
                self.0.capabilities()
            }
            async fn create(&self, spec: MachineSpec) -> Result<GuestNetwork, DriverError> {
                self.0.create(spec).await
            }
            async fn start(&self, id: VmId, limit: Duration) -> Result<(), DriverError> {
                self.0.start(id, limit).await
            }
            async fn pause(&self, id: VmId) -> Result<(), DriverError> {
                self.0.pause(id).await
            }
            async fn resume(&self, id: VmId) -> Result<(), DriverError> {
                self.0.resume(id).await
            }
            async fn kill(&self, id: VmId) -> Result<(), DriverError> {
                self.0.kill(id).await
            }
            async fn exited(&self, id: VmId) -> Result<ExitReason, DriverError> {
                self.0.exited(id).await
            }
            async fn delete(&self, id: VmId) -> Result<(), DriverError> {
                self.0.delete(id).await
            }
            async fn inspect(&self, id: VmId) -> Result<Option<Machine>, DriverError> {
                self.0.inspect(id).await
            }
            async fn list(&self) -> Result<Vec<Machine>, DriverError> {
                self.0.list().await
            }
            async fn release(&self) -> Result<(), DriverError> {
                self.0.release().await
            }
            async fn connect(
                &self,
                id: VmId,
                port: u32,
                limit: Duration,
            ) -> Result<BoxStream, DriverError> {
                self.0.connect(id, port, limit).await
            }
        }
    };
}
pub(crate) use delegate_driver;
