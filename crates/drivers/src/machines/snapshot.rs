//! What is done with a machine that runs, beside pausing it: snapshots, claims, and its share of
//! the processors.
//!
//! ```text
//!   running or paused ── recorded ── VMM's snapshot ── recorded ──► as before, or ended
//!                           │              │
//!                           └── failure, or the next worker: settle ──► as before
//! ```

use std::{path::Path, sync::Arc, time::Duration};

use aether_types::{MachineId, NetworkPolicy, VmId};
use serde_json::json;
use tokio::time::timeout;

use super::{
    CONTROL_LIMIT, Machines, Place, SnapshotWish, Vmm, WasBefore, background, live::Live, lock,
    start::LEFT_DISK, vmm::no_snapshots, wrong,
};
use crate::{AfterSnapshot, DriverError, MachineSpec, SnapshotDisk, SnapshotTaken, host::Record};

/// Of a whole snapshot: a large memory and a large disk on a slow disk of the host.
const SNAPSHOT_LIMIT: Duration = Duration::from_mins(20);
const ACTION: &str = "take a snapshot of it";

impl<V: Vmm> Machines<V> {
    pub(super) async fn snapshot_one(
        self: &Arc<Self>,
        id: MachineId,
        into: &Path,
        wish: SnapshotWish,
    ) -> Result<SnapshotTaken, DriverError> {
        self.known(id)?;
        if self.vmm.capabilities().snapshot_format.is_none() {
            return Err(no_snapshots("take a snapshot"));
        }
        let slot = self.slot(id);
        let interrupt = lock(&slot.interrupt).clone();
        let _one = slot.operation.lock().await;
        slot.work.wait().await;
        let live = self.running(id, ACTION)?;
        let mut record = self.known(id)?;
        let place = self.place(&record).ok_or(DriverError::UnknownVm(id))?;
        self.host.fault.hit("snapshot")?;
        let was = match timeout(CONTROL_LIMIT, self.vmm.is_paused(&live.control)).await {
            Ok(Ok(true)) => WasBefore::Paused,
            Ok(Ok(false)) => WasBefore::Running,
            Ok(Err(error)) => return Err(error),
            Err(_) => return Err(no_answer("say whether it is paused")),
        };
        record.snapshotting = Some(was);
        self.host.set_record(&record)?;
        let taken = tokio::select! {
            taken = timeout(SNAPSHOT_LIMIT, self.take(&place, &live, into, wish)) => {
                taken.unwrap_or_else(|_| Err(no_answer("take a snapshot")))
            }
            _ = live.ended() => Err(wrong(id, "stopped", ACTION)),
            () = interrupt.cancelled() => Err(wrong(id, "being stopped", ACTION)),
        };
        let finished = match taken {
            Ok(taken) => self.finish_snapshot(&mut record, &live, taken, (was, wish)).await,
            Err(error) => Err(error),
        };
        if finished.is_err() {
            self.settle(&place, &live, was).await?;
            record = self.known(id)?;
            record.snapshotting = None;
            self.host.set_record(&record)?;
        }
        finished
    }

    async fn take(
        &self,
        place: &Place,
        live: &Live<V::Control>,
        into: &Path,
        wish: SnapshotWish,
    ) -> Result<SnapshotTaken, DriverError> {
        self.host.fault.hit("snapshot: begun")?;
        let taken = self.vmm.snapshot(place, &live.control, into, wish).await?;
        self.host.fault.hit("snapshot: taken")?;
        Ok(taken)
    }

    async fn finish_snapshot(
        &self,
        record: &mut Record,
        live: &Live<V::Control>,
        mut taken: SnapshotTaken,
        (was, SnapshotWish { disk, after }): (WasBefore, SnapshotWish),
    ) -> Result<SnapshotTaken, DriverError> {
        if after == AfterSnapshot::End {
            self.host.fault.hit("snapshot end")?;
            live.kill(&*self.vmm).await?;
            // The watcher has recorded the end by now.
            *record = self.known(record.spec.id)?;
        }
        if disk == SnapshotDisk::Leave {
            let left = MachineId::new().to_string();
            taken.machine.detail[LEFT_DISK] = json!(left);
            // One that stands still leaves its disk as the memory knows it, until it goes on.
            let stands_still = after == AfterSnapshot::End || was == WasBefore::Paused;
            record.memory = stands_still.then_some(left);
        }
        record.snapshotting = None;
        self.host.set_record(record)?;
        self.host.fault.hit("snapshot: recorded")?;
        Ok(taken)
    }

    /// Lets a machine be again what it was before a snapshot.
    async fn settle(
        &self,
        place: &Place,
        live: &Live<V::Control>,
        was: WasBefore,
    ) -> Result<(), DriverError> {
        tokio::select! {
            settled = timeout(CONTROL_LIMIT, self.vmm.settle(place, &live.control, was)) => {
                settled.unwrap_or_else(|_| Err(no_answer("go on after a snapshot")))
            }
            _ = live.ended() => Ok(()),
        }
    }

    pub(super) async fn claim_one(
        self: &Arc<Self>,
        id: MachineId,
        vm: VmId,
        network: &NetworkPolicy,
    ) -> Result<(), DriverError> {
        self.known(id)?;
        let slot = self.slot(id);
        let _one = slot.operation.lock().await;
        let mut record = self.known(id)?;
        if record.spec.vm.is_some_and(|owner| owner != vm) {
            return Err(wrong(id, "another VM's", "claim it"));
        }
        if record.network.is_none() {
            return Err(wrong(id, "half made", "claim it"));
        }
        let spec = MachineSpec { vm: Some(vm), network: network.clone(), ..record.spec.clone() };
        if record.spec == spec && !record.background {
            return Ok(());
        }
        self.host.fault.hit("claim")?;
        let policy_changes = record.spec.network != spec.network;
        record.spec = spec;
        if policy_changes {
            self.attach(&record).await?;
        }
        if record.background {
            self.lower(id, false)?;
            record.background = false;
        }
        self.host.fault.hit("claim: made its own")?;
        self.host.set_record(&record)?;
        self.host.fault.hit("claim: recorded")
    }

    pub(super) async fn set_background_one(
        self: &Arc<Self>,
        id: MachineId,
        background: bool,
    ) -> Result<(), DriverError> {
        self.known(id)?;
        let slot = self.slot(id);
        let _one = slot.operation.lock().await;
        let mut record = self.known(id)?;
        self.lower(id, background)?;
        if record.background != background {
            record.background = background;
            self.host.set_record(&record)?;
        }
        Ok(())
    }

    fn lower(&self, id: MachineId, background: bool) -> Result<(), DriverError> {
        let Some(live) = self.slot(id).running() else { return Ok(()) };
        match background::set(live.process.pid(), background) {
            // It ends just now.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            changed => changed.map_err(|source| DriverError::Io {
                action: "change a VMM's share of the processors".to_owned(),
                source,
            }),
        }
    }
}

fn no_answer(action: &str) -> DriverError {
    DriverError::Vmm { action: action.to_owned(), detail: "no answer in time".to_owned() }
}
