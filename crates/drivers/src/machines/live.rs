//! A VMM that runs, from the moment it is known to the moment its end is recorded.

use std::sync::{
    Arc, Mutex, Weak,
    atomic::{AtomicBool, Ordering},
};

use aether_types::MachineId;
use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{Booted, Machines, Vmm, describe, lock};
use crate::{DriverError, ExitReason, process::Process};

/// A VMM that runs, or has just ended.
pub(crate) struct Live<C> {
    pub(super) process: Process,
    pub(crate) control: C,
    /// The end is our doing.
    pub(super) is_killed: AtomicBool,
    pub(super) exit: watch::Sender<Option<ExitReason>>,
    /// Breaks the streams to the guest.
    pub(super) ended: CancellationToken,
}

impl<C> Live<C> {
    pub(super) fn new(booted: Booted<C>) -> Self {
        Self {
            process: booted.process,
            control: booted.control,
            is_killed: AtomicBool::new(false),
            exit: watch::Sender::new(None),
            ended: CancellationToken::new(),
        }
    }

    pub(super) fn has_ended(&self) -> bool {
        self.exit.borrow().is_some()
    }

    pub(super) async fn ended(&self) -> ExitReason {
        let mut exit = self.exit.subscribe();
        let ended = exit.wait_for(Option::is_some).await;
        // The sender is in `self`.
        ended.ok().and_then(|exit| *exit).unwrap_or(ExitReason::VmmDied)
    }

    pub(super) async fn kill<V: Vmm<Control = C>>(&self, vmm: &V) -> Result<(), DriverError> {
        if self.has_ended() {
            return Ok(());
        }
        self.is_killed.store(true, Ordering::Release);
        vmm.end(&self.control, &self.process).await?;
        self.ended().await;
        Ok(())
    }
}

pub(super) struct Slot<C> {
    /// One operation at a time.
    pub(super) operation: tokio::sync::Mutex<()>,
    pub(super) live: Mutex<Option<Arc<Live<C>>>>,
    /// Ends the start or snapshot that is under way, if any.
    pub(super) interrupt: Mutex<CancellationToken>,
    /// What still works on the machine's files for an operation that was ended.
    pub(super) work: TaskTracker,
}

impl<C> Default for Slot<C> {
    fn default() -> Self {
        Self {
            operation: tokio::sync::Mutex::default(),
            live: Mutex::default(),
            interrupt: Mutex::default(),
            work: {
                let work = TaskTracker::new();
                // Only then its end can be waited for; more can begin all the same.
                work.close();
                work
            },
        }
    }
}

impl<C> Slot<C> {
    pub(super) fn running(&self) -> Option<Arc<Live<C>>> {
        lock(&self.live).as_ref().filter(|live| !live.has_ended()).cloned()
    }

    /// Ends a start that is under way; later starts are not concerned.
    pub(super) fn interrupt(&self) {
        std::mem::take(&mut *lock(&self.interrupt)).cancel();
    }
}

/// Sees a VMM to its end.
pub(super) struct Watcher<V: Vmm> {
    pub(super) id: MachineId,
    pub(super) vmm: Arc<V>,
    pub(super) live: Arc<Live<V::Control>>,
    pub(super) machines: Weak<Machines<V>>,
}

impl<V: Vmm> Watcher<V> {
    pub(super) async fn watch(self) {
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
