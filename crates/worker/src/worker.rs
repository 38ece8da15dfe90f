//! A worker's life: adopt, claim, and stop in order.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, PoisonError, atomic::AtomicI64},
    time::Duration,
};

use aether_queue::Lease;
use aether_streams::{GuestLink, Pools};
use aether_types::{
    ErrorCode, Fault, Task, TaskId, Template, TemplateSpec, VmEvent, VmId, VmState,
};
use tokio::{
    sync::{Notify, Semaphore, watch},
    task::JoinHandle,
    time::{Instant, timeout_at},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    EnsureError, WorkerError, WorkerParts, claims,
    derive::Derivations,
    fault, garbage,
    garbage::Garbage,
    guest::{GuestLinks, Guests},
    pool::{self, PoolSet},
    reconcile, registry,
    template::{Builds, TemplateCache},
};

/// What becomes of running VMs when the worker ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShutdownMode {
    /// They are stopped, and their disks stay.
    StopVms,
    /// They run on, with the commands in them; the next start adopts both.
    KeepVms,
}

/// How a worker ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ShutdownReport {
    pub vms_stopped: usize,
    pub vms_kept: usize,
    /// Work that did not end before the deadline; its leases run out and it is taken up again.
    pub tasks_left: usize,
}

/// What all parts of the worker share.
pub(crate) struct Core {
    pub(crate) parts: WorkerParts,
    pub(crate) guests: Arc<Guests>,
    pub(crate) attempts: Attempts,
    /// Of its registration.
    pub(crate) epoch: AtomicI64,
    /// Whether work is claimed: not while the worker finds out what is its own.
    pub(crate) claiming: watch::Sender<bool>,
    pub(crate) boots: Arc<Semaphore>,
    pub(crate) restores: Semaphore,
    pub(crate) pools: Arc<PoolSet>,
    pub(crate) builds: Builds,
    pub(crate) templates: TemplateCache,
    pub(crate) derivations: Derivations,
    pub(crate) garbage: Garbage,
    pub(crate) tasks: TaskTracker,
    /// No new work.
    pub(crate) draining: CancellationToken,
    /// Commands are left to the next process.
    pub(crate) leaving: CancellationToken,
    /// Everything ends.
    pub(crate) closing: CancellationToken,
    /// Everything stops where it stands, as in a crash.
    dropped: CancellationToken,
}

/// The attempts in hand, by task.
#[derive(Default)]
pub(crate) struct Attempts {
    running: Mutex<HashMap<TaskId, InHand>>,
    ended: Notify,
}

struct InHand {
    lease: Lease,
    cancelled: CancellationToken,
    /// Once it is known.
    vm: Option<VmId>,
}

impl Attempts {
    pub(crate) fn begin(&self, lease: &Lease) -> CancellationToken {
        let token = CancellationToken::new();
        let in_hand = InHand { lease: lease.clone(), cancelled: token.clone(), vm: None };
        self.lock().insert(lease.task, in_hand);
        token
    }

    pub(crate) fn is_of(&self, task: &Task) {
        if let Some(in_hand) = self.lock().get_mut(&task.id) {
            in_hand.vm = task.vm_id;
        }
    }

    /// All others of the task's VM.
    pub(crate) fn cancel_others(&self, task: &Task) {
        for (id, in_hand) in self.lock().iter() {
            if *id != task.id && in_hand.vm.is_some() && in_hand.vm == task.vm_id {
                in_hand.cancelled.cancel();
            }
        }
    }

    pub(crate) fn end(&self, task: TaskId) {
        self.lock().remove(&task);
        self.ended.notify_waiters();
    }

    pub(crate) fn cancel(&self, task: TaskId) {
        if let Some(in_hand) = self.lock().get(&task) {
            in_hand.cancelled.cancel();
        }
    }

    pub(crate) fn cancel_all(&self) {
        for in_hand in self.lock().values() {
            in_hand.cancelled.cancel();
        }
    }

    /// Completes when nothing is in hand.
    pub(crate) async fn none(&self) {
        loop {
            let ended = self.ended.notified();
            if self.count() == 0 {
                return;
            }
            ended.await;
        }
    }

    pub(crate) fn leases(&self) -> Vec<Lease> {
        self.lock().values().map(|in_hand| in_hand.lease.clone()).collect()
    }

    fn count(&self) -> usize {
        self.lock().len()
    }

    // Nothing panics while the lock is held.
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<TaskId, InHand>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A running worker. Dropped without [`Worker::shutdown`] it stops as in a crash.
pub struct Worker {
    core: Arc<Core>,
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker").field("id", &self.core.parts.id).finish_non_exhaustive()
    }
}

impl Worker {
    /// Adopts what runs, repairs what an earlier process left half done, and begins to claim.
    pub async fn start(parts: WorkerParts) -> Result<Self, WorkerError> {
        parts.config.fleet.validate().map_err(WorkerError::Config)?;
        // First of all: what a predecessor of the same id still writes is refused from now on.
        let registered = registry::register(&parts).await?;
        let core = Arc::new(Core {
            guests: Arc::new(Guests::default()),
            attempts: Attempts::default(),
            epoch: AtomicI64::new(registered.epoch),
            claiming: watch::Sender::new(true),
            boots: Arc::new(Semaphore::new(parts.config.boots_at_once)),
            restores: Semaphore::new(parts.config.restores_at_once),
            pools: Arc::new(PoolSet::new(
                parts.config.pools.clone(),
                parts.config.spare_age_max,
                parts.config.memory_reserve_mb,
            )),
            builds: Builds::default(),
            templates: TemplateCache::default(),
            derivations: Derivations::default(),
            garbage: Garbage::default(),
            tasks: TaskTracker::new(),
            draining: CancellationToken::new(),
            leaving: CancellationToken::new(),
            closing: CancellationToken::new(),
            dropped: CancellationToken::new(),
            parts,
        });
        // A long look around must not cost the worker its lease.
        core.spawn(registry::keep(Arc::clone(&core)));
        let begun = reconcile::at_start(&core).await;
        begun.inspect_err(|_| core.dropped.cancel())?;
        core.spawn(claims::claim(Arc::clone(&core)));
        core.spawn(claims::renew(Arc::clone(&core)));
        core.spawn(claims::listen(Arc::clone(&core), core.parts.bus.subscribe()));
        core.spawn(reconcile::keep(Arc::clone(&core), core.parts.bus.subscribe()));
        core.spawn(pool::keep(Arc::clone(&core)));
        core.spawn(pool::listen(Arc::clone(&core), core.parts.bus.subscribe()));
        core.spawn(garbage::keep(Arc::clone(&core), core.parts.bus.subscribe()));
        Ok(Self { core })
    }

    /// The way to this worker's guests, for files.
    #[must_use]
    pub fn links(&self) -> Arc<dyn GuestLink> {
        let guests = Arc::clone(&self.core.guests);
        Arc::new(GuestLinks { guests, limit: self.core.parts.config.guest_limit })
    }

    /// What the pools hold.
    #[must_use]
    pub fn pools(&self) -> Arc<dyn Pools> {
        Arc::clone(&self.core.pools) as Arc<dyn Pools>
    }

    /// The template that VMs get which ask for none: as it is, or as it is being built now.
    pub async fn ensure_default_template(
        &self,
        spec: TemplateSpec,
    ) -> Result<Template, EnsureError> {
        self.core.ensure_default_template(spec).await
    }

    /// VMs that run here now.
    #[must_use]
    pub fn vm_ids(&self) -> Vec<VmId> {
        self.core.guests.all().iter().map(|guest| guest.id).collect()
    }

    /// Stops claiming, ends or leaves the work in hand, stops or leaves the VMs, and gives back
    /// what the drivers hold. Not longer than `limit`; past it, what is left is as after a crash.
    pub async fn shutdown(self, mode: ShutdownMode, limit: Duration) -> ShutdownReport {
        let deadline = Instant::now() + limit;
        let core = &self.core;
        core.draining.cancel();
        let mut report = ShutdownReport::default();
        match mode {
            ShutdownMode::KeepVms => {
                core.leaving.cancel();
                report.vms_kept = core.guests.all().len();
            }
            ShutdownMode::StopVms => {
                report.vms_stopped = self.stop_all(deadline).await;
                core.leaving.cancel();
            }
        }
        core.closing.cancel();
        core.tasks.close();
        let _ = timeout_at(deadline, core.tasks.wait()).await;
        if mode == ShutdownMode::StopVms {
            // A boot may have ended between the word to end and the list of those that run.
            report.vms_stopped += self.stop_all(deadline).await;
            if timeout_at(deadline, reconcile::at_end(core)).await.is_err() {
                tracing::error!("no time was left to look for machines that still run");
            }
        }
        report.tasks_left = core.attempts.count();
        if timeout_at(deadline, registry::leave(core)).await.is_err() {
            tracing::warn!("no time was left to leave the registry");
        }
        if mode == ShutdownMode::StopVms {
            for driver in &core.parts.drivers {
                match timeout_at(deadline, driver.release()).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => {
                        tracing::error!(error = fault::chain(&error), "release host resources");
                    }
                    Err(_) => tracing::error!("no time was left to release host resources"),
                }
            }
        }
        report
    }

    /// Stops everything where it stands, as a crash would, and returns when it has stopped.
    pub async fn abandon(self) {
        self.core.dropped.cancel();
        self.core.tasks.close();
        self.core.tasks.wait().await;
    }

    async fn stop_all(&self, deadline: Instant) -> usize {
        let why = Fault::new(ErrorCode::VmStopped, "the platform was shut down");
        let guests = self.core.guests.all();
        // What does not end in half of the time is ended by force in the other half.
        let left = deadline.saturating_duration_since(Instant::now());
        let grace = self.core.parts.config.stop_grace.min(left / 2);
        let stops = guests.iter().map(|guest| {
            let (core, id, why) = (Arc::clone(&self.core), guest.id, why.clone());
            async move {
                // An operation in hand on this VM comes first; it is short or it is a boot.
                let order = core.guests.order(id);
                let _turn = timeout_at(deadline, order.lock()).await.ok()?;
                core.stop_for_shutdown(id, why, grace).await.then_some(())
            }
        });
        let stops: Vec<_> = stops.map(|stop| self.core.spawn(stop)).collect();
        let mut stopped = 0;
        for stop in stops {
            if let Ok(Ok(Some(Some(())))) = timeout_at(deadline, stop).await {
                stopped += 1;
            }
        }
        stopped
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.core.dropped.cancel();
    }
}

impl Core {
    /// A task that ends with the worker.
    pub(crate) fn spawn<F>(&self, future: F) -> JoinHandle<Option<F::Output>>
    where
        F: Future<Output: Send + 'static> + Send + 'static,
    {
        self.tasks.spawn(self.dropped.clone().run_until_cancelled_owned(future))
    }

    async fn stop_for_shutdown(&self, id: VmId, why: Fault, grace: Duration) -> bool {
        let Ok(Some(vm)) = self.parts.store.vm(id).await else { return false };
        if !matches!(vm.state, VmState::Running | VmState::Paused) {
            return false;
        }
        if let Err(failure) = self.stop(&vm, why.clone(), grace).await {
            tracing::error!(vm.id = %id, code = %failure.fault.code, "stop a VM at shutdown");
            return false;
        }
        self.change_vm(id, VmEvent::Stopped, Some(why)).await;
        true
    }
}
