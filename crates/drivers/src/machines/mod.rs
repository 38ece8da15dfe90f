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

pub(crate) mod background;
mod driver;
mod layers;
mod live;
mod snapshot;
mod start;
mod vmm;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use aether_types::MachineId;
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};

use self::live::{Live, Slot, Watcher};
pub(crate) use self::{
    driver::delegate_driver,
    vmm::{Booted, Links, Phases, Place, SnapshotWish, Vmm, WasBefore},
};
use crate::{
    DriverError, ExitReason, GuestNetwork, Machine, MachineSpec, MachineState,
    host::{Host, Record},
    journal::{Owner, Resource},
    layer_places,
    network::Attachment,
    tools,
};

/// How long a VMM may take to answer a question about itself.
const CONTROL_LIMIT: Duration = Duration::from_secs(10);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The driver of one kind of VMM on one host. Dropping it leaves the VMMs running.
pub(crate) struct Machines<V: Vmm> {
    pub(crate) host: Arc<Host>,
    pub(crate) vmm: Arc<V>,
    slots: Mutex<HashMap<MachineId, Arc<Slot<V::Control>>>>,
    tasks: TaskTracker,
    /// Ends the watchers with this.
    closing: CancellationToken,
    _closing: DropGuard,
}

fn wrong(id: MachineId, state: &'static str, action: &'static str) -> DriverError {
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
    async fn adopt(self: &Arc<Self>, id: MachineId) -> Result<(), DriverError> {
        let Some(mut record) = self.host.record(id) else { return Ok(()) };
        let journaled = self.host.journal.resources(id);
        if !journaled.iter().any(|r| matches!(r, Resource::Process { .. })) {
            return Ok(());
        }
        if let (Some(process), Some(place)) = (self.host.running(id)?, self.place(&record)) {
            let adopted = async {
                let control = self.vmm.adopt(&place, &process).await?;
                if let Some(was) = record.snapshotting {
                    self.vmm.settle(&place, &control, was).await?;
                }
                Ok::<_, DriverError>(control)
            };
            match tokio::time::timeout(CONTROL_LIMIT, adopted).await {
                Ok(Ok(control)) => {
                    if record.snapshotting.take().is_some() {
                        self.host.set_record(&record)?;
                    }
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
        self.host.end_processes(Owner::Machine(id)).await?;
        record.last_exit = Some(ExitReason::VmmDied);
        self.host.set_record(&record)
    }

    fn place(&self, record: &Record) -> Option<Place> {
        let attachment = self.host.network().attachment(record.spec.id)?;
        Some(self.place_at(record, attachment))
    }

    fn place_at(&self, record: &Record, attachment: Attachment) -> Place {
        let work = self.slot(record.spec.id).work.clone();
        Place { host: Arc::clone(&self.host), record: record.clone(), attachment, work }
    }

    fn slot(&self, id: MachineId) -> Arc<Slot<V::Control>> {
        Arc::clone(lock(&self.slots).entry(id).or_default())
    }

    /// A machine that runs, as a VMM sees it.
    #[cfg(test)]
    pub(crate) fn at_work(&self, id: MachineId) -> (Place, Arc<Live<V::Control>>) {
        let place = self.place(&self.known(id).unwrap()).unwrap();
        (place, self.slot(id).running().unwrap())
    }

    fn known(&self, id: MachineId) -> Result<Record, DriverError> {
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
        let id = spec.id;
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
        if let Some(from) = &record.spec.disk_from {
            from.machine.check_disk(V::KIND, &record.spec)?;
        }
        layer_places(&record.spec.layers)?;
        let (made, vmm) = (record.clone(), Arc::clone(&self.vmm));
        crate::host::blocking(move || {
            host.fault.hit("make directory")?;
            host.make_directory(&made)?;
            host.fault.hit("make directory: made")?;
            host.fault.hit("make disk")?;
            vmm.make_disk(&host, &made)?;
            vmm.keep_layers(&host, &made, 0)?;
            tools::make_output(&host, &made)?;
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
        let (id, policy, network) = (record.spec.id, &record.spec.network, self.host.network());
        let uid = record.uid.unwrap_or_else(|| rustix::process::geteuid().as_raw());
        match V::LINKS {
            Links::Tap => network.attach(id, policy, uid, false).await,
            Links::TapAndChannel => network.attach(id, policy, uid, true).await,
            Links::Veth => network.attach_veth(id, policy).await,
        }
    }

    /// Makes a VMM known, and watches it to its end.
    fn watch(self: &Arc<Self>, id: MachineId, booted: Booted<V::Control>) -> Arc<Live<V::Control>> {
        let live = Arc::new(Live::new(booted));
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

    async fn record_end(&self, id: MachineId, reason: ExitReason) -> Result<(), DriverError> {
        if let Some(mut record) = self.host.record(id) {
            record.last_exit = Some(reason);
            self.host.set_record(&record)?;
        }
        self.host.end_processes(Owner::Machine(id)).await
    }

    /// Removes everything of a VM, in the reverse order of its making. Repeating it is harmless.
    async fn remove(&self, id: MachineId) -> Result<(), DriverError> {
        let host = &self.host;
        if !host.journal.machines().contains(&id) {
            return Ok(());
        }
        host.fault.hit("delete process")?;
        let live = self.slot(id).running();
        if let Some(live) = live {
            live.kill(&*self.vmm).await?;
        }
        host.end_processes(Owner::Machine(id)).await?;
        self.slot(id).work.wait().await;
        host.fault.hit("delete network")?;
        host.network().detach(id).await?;
        host.fault.hit("delete files")?;
        host.remove_files(id).await?;
        host.fault.hit("delete record")?;
        host.journal.forget_owner(id)?;
        host.fault.hit("delete record: deleted")
    }

    async fn machine(&self, id: MachineId) -> Result<Option<Machine>, DriverError> {
        if !self.host.journal.machines().contains(&id) {
            return Ok(None);
        }
        let Some(record) = self.host.record(id) else {
            // It can be deleted, and nothing else.
            tracing::error!(vm.id = %id, "the record of a VM is damaged");
            let state = MachineState::Created;
            return Ok(Some(Machine { id, state, network: None, pid: None, spec: None }));
        };
        if record.kind != V::KIND {
            return Ok(None);
        }
        let live = self.slot(id).running();
        let (state, pid) = match live {
            Some(live) if live.process.is_alive() => {
                // It stands still for a snapshot, or is about to: that is nobody's state.
                let asked = if let Some(was) = record.snapshotting {
                    Ok(Ok(was == WasBefore::Paused))
                } else {
                    let asked = self.vmm.is_paused(&live.control);
                    tokio::select! {
                        asked = tokio::time::timeout(CONTROL_LIMIT, asked) => asked,
                        _ = live.ended() => Ok(Ok(false)),
                    }
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
        Ok(Some(Machine { id, state, network: record.network, pid, spec: Some(record.spec) }))
    }

    /// The state of a VM without a VMM.
    fn at_rest(&self, id: MachineId) -> MachineState {
        let last = self.host.record(id).and_then(|record| record.last_exit);
        last.map_or(MachineState::Created, MachineState::Exited)
    }

    fn running(
        &self,
        id: MachineId,
        action: &'static str,
    ) -> Result<Arc<Live<V::Control>>, DriverError> {
        self.known(id)?;
        self.slot(id).running().ok_or_else(|| wrong(id, "not running", action))
    }

    async fn set_paused(self: &Arc<Self>, id: MachineId, paused: bool) -> Result<(), DriverError> {
        self.known(id)?;
        let slot = self.slot(id);
        let _one = slot.operation.lock().await;
        let action = if paused { "pause it" } else { "resume it" };
        let live = self.running(id, action)?;
        if !paused {
            self.forget_memory(id)?;
        }
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

impl<V: Vmm> Machines<V> {
    /// The machine's disk moves on from what a memory that was kept of it knows.
    fn forget_memory(&self, id: MachineId) -> Result<(), DriverError> {
        let mut record = self.known(id)?;
        if record.memory.take().is_none() {
            return Ok(());
        }
        self.host.set_record(&record)
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
