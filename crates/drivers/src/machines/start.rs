//! How a machine comes to run: from its kernel, or from a memory.

use std::{sync::Arc, time::Duration};

use aether_types::MachineId;
use tokio::time::{Instant, timeout_at};

use super::{Booted, Machines, Phases, Place, Vmm, describe, lock, vmm::no_snapshots, wrong};
use crate::{
    Capabilities, DriverError, Phase, SnapshotFiles, Start,
    host::{Record, blocking},
    journal::Owner,
};

/// Of the guest's last words, in an error.
const LINES_SHOWN: usize = 12;

impl<V: Vmm> Machines<V> {
    pub(super) async fn start_one(
        self: &Arc<Self>,
        id: MachineId,
        how: Start,
        limit: Duration,
    ) -> Result<Vec<Phase>, DriverError> {
        let mut phases = Phases::begin();
        let deadline = Instant::now() + limit;
        self.known(id)?;
        let slot = self.slot(id);
        let interrupt = lock(&slot.interrupt).clone();
        let _one = slot.operation.lock().await;
        slot.work.wait().await;
        let mut record = self.known(id)?;
        if record.network.is_none() {
            return Err(wrong(id, "half made", "start it"));
        }
        if slot.running().is_some() {
            return Err(wrong(id, "running", "start it"));
        }
        if let Start::Restore(from) = &how {
            fits(&record, from, &self.vmm.capabilities())?;
        }
        let was_fresh = !record.started;
        let until = Until { deadline, limit };
        let started = tokio::select! {
            started = self.run(&mut record, &how, until, &mut phases) => started,
            () = interrupt.cancelled() => {
                Err(DriverError::ExitedDuringStart { detail: "it was killed".to_owned() })
            }
        };
        if let Err(error) = started {
            // The watcher, where there is one yet, sees the same end.
            if let Some(live) = slot.running() {
                live.kill(&*self.vmm).await?;
            }
            self.host.end_processes(Owner::Machine(id)).await?;
            self.vmm.clean(&self.host, &record)?;
            if was_fresh && matches!(how, Start::Restore(_)) {
                self.renew_disk(id).await?;
            }
            return Err(error);
        }
        Ok(phases.into_done())
    }

    async fn run(
        self: &Arc<Self>,
        record: &mut Record,
        how: &Start,
        until: Until,
        phases: &mut Phases,
    ) -> Result<(), DriverError> {
        let id = record.spec.id;
        self.vmm.clean(&self.host, record)?;
        self.host.fault.hit("attach network again")?;
        // Only after a release is there anything to do.
        let attachment = match self.host.network().attachment(id) {
            Some(attachment) => attachment,
            None => self.attach(record).await?,
        };
        phases.end("network");
        self.host.fault.hit("boot")?;
        // From here on the guest may write to its disk.
        (record.started, record.memory, record.snapshotting) = (true, None, None);
        record.network = Some(attachment.guest.clone());
        self.host.set_record(record)?;
        let place = self.place_at(record, attachment);
        let booted = match how {
            Start::Boot => until.bound(self.vmm.boot(&place)).await.inspect(|_| {
                phases.end("process");
            })?,
            Start::Restore(from) => until.bound(self.vmm.restore(&place, from, phases)).await?,
        };
        self.see_ready(&place, booted, until).await?;
        phases.end(match how {
            Start::Boot => "boot",
            Start::Restore(_) => "connect",
        });
        self.host.fault.hit("boot: ready")
    }

    async fn see_ready(
        self: &Arc<Self>,
        place: &Place,
        booted: Booted<V::Control>,
        until: Until,
    ) -> Result<(), DriverError> {
        let live = self.watch(place.id(), booted);
        self.host.fault.hit("boot: begun")?;
        tokio::select! {
            ready = until.bound(self.vmm.ready(place, &live.control)) => ready,
            reason = live.ended() => {
                let words = self.vmm.last_words(&live.control, LINES_SHOWN);
                let gap = if words.is_empty() { "" } else { ": " };
                let detail = format!("{}{gap}{words}", describe(reason));
                Err(DriverError::ExitedDuringStart { detail })
            }
        }
    }

    /// A restore that failed has used up a disk on which nothing was done that anyone saw: it is
    /// made anew, so that another attempt can be made.
    async fn renew_disk(&self, id: MachineId) -> Result<(), DriverError> {
        let mut record = self.known(id)?;
        let (vmm, host, machine) = (Arc::clone(&self.vmm), Arc::clone(&self.host), record.clone());
        match blocking(move || vmm.make_disk(&host, &machine)).await {
            Ok(()) => {
                record.started = false;
                self.host.set_record(&record)
            }
            // It stays used: only a restore is refused from here on.
            Err(error) => {
                tracing::warn!(machine.id = %id, %error, "cannot make a disk anew");
                Ok(())
            }
        }
    }
}

/// When a start must be done.
#[derive(Clone, Copy)]
struct Until {
    deadline: Instant,
    limit: Duration,
}

impl Until {
    async fn bound<T>(
        self,
        step: impl Future<Output = Result<T, DriverError>>,
    ) -> Result<T, DriverError> {
        let late = |_| DriverError::StartTimeout { limit_ms: self.limit.as_millis() };
        timeout_at(self.deadline, step).await.map_err(late)?
    }
}

/// Whether a machine can be restored from a snapshot.
fn fits(record: &Record, from: &SnapshotFiles, driver: &Capabilities) -> Result<(), DriverError> {
    let (spec, machine) = (&record.spec, &from.machine);
    let Some(format) = &driver.snapshot_format else {
        return Err(no_snapshots("restore a snapshot"));
    };
    machine.check(record.kind, format, spec)?;
    let left = machine.detail.get(LEFT_DISK).and_then(serde_json::Value::as_str);
    let disk_is_as_then = match left {
        Some(left) => record.memory.as_deref() == Some(left),
        None => !record.started && spec.disk_from.as_ref() == Some(from),
    };
    if disk_is_as_then {
        return Ok(());
    }
    Err(DriverError::WrongState {
        id: spec.id,
        state: "on a disk that is not as the snapshot left it",
        action: "restore it",
    })
}

/// In the detail of a snapshot without a disk: which machine's disk, and at which moment.
pub(super) const LEFT_DISK: &str = "left_disk";
