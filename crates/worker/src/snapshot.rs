//! Taking snapshots: of a VM that goes on, of one that goes to sleep, of a template's builder.
//!
//! The driver writes into a draft, which is sealed when it is whole. A process that dies before
//! leaves a draft, which the next one sweeps; one that dies after leaves an entry under the
//! snapshot's own id, which the next attempt finds. So a snapshot is offered whole or not at all.

use std::{sync::Arc, time::Duration};

use aether_drivers::{
    AfterSnapshot, Driver, DriverError, MachineState, SnapshotDisk, SnapshotTaken,
};
use aether_images::{Draft, SnapshotError, SnapshotStore};
use aether_store::SnapshotFacts;
use aether_types::{ErrorCode, Fault, MachineId, SnapshotId, Task, Vm};

use crate::{
    attempt::Attempt,
    failure::{Failure, blocking, internal},
    fault,
    sealed::{Sealed, SnapshotDetail},
    worker::Core,
};

/// What to take, and where it goes.
pub(crate) struct Take<'a> {
    pub(crate) store: &'a Arc<SnapshotStore>,
    pub(crate) entry: String,
    pub(crate) disk: SnapshotDisk,
    pub(crate) after: AfterSnapshot,
}

/// What it is taken of.
pub(crate) struct Source<'a> {
    pub(crate) driver: &'a Arc<dyn Driver>,
    pub(crate) machine: MachineId,
    /// The image under its disk, by name.
    pub(crate) image: &'a str,
    /// What the agent in its memory asks for, in hex.
    pub(crate) token: String,
}

impl Core {
    /// Of a VM that goes on as it was. `None`: it is not wanted any more, and nothing is left.
    pub(crate) async fn take_snapshot(
        &self,
        attempt: &Attempt,
        vm: &Vm,
    ) -> Result<Option<SnapshotFacts>, Failure> {
        let entry = snapshot_of(&attempt.task)?.to_string();
        // An attempt that died may have lacked nothing but the word that it is there.
        let facts = match self.found(&self.parts.snapshots, &entry).await? {
            Some(sealed) => sealed.facts,
            None if attempt.cancelled.is_cancelled() => return Ok(None),
            None => {
                let (disk, after) = (SnapshotDisk::Include, AfterSnapshot::GoOn);
                let take = Take { store: &self.parts.snapshots, entry: entry.clone(), disk, after };
                self.take(vm, take).await?
            }
        };
        // A driver that writes is not interrupted; what it wrote is dropped.
        if attempt.cancelled.is_cancelled() {
            self.remove_entry(&self.parts.snapshots, entry).await;
            return Ok(None);
        }
        Ok(Some(facts))
    }

    /// Of a VM that goes to sleep: its memory, beside its disk. It stands still from before the
    /// snapshot to its end, so that its disk is what the memory knows, whenever this process dies.
    pub(crate) async fn suspend(
        &self,
        attempt: &Attempt,
        vm: &Vm,
    ) -> Result<SnapshotFacts, Failure> {
        let entry = snapshot_of(&attempt.task)?.to_string();
        let (driver, machine) = (self.driver(vm)?, self.machine(vm.id));
        let failed = |e| Failure::driver(&e, vm.id);
        let state = driver.inspect(machine).await.map_err(failed)?.map(|found| found.state);
        let earlier = self.found(&self.parts.snapshots, &entry).await?;
        if let Some(guest) = self.guests.get(vm.id) {
            guest.will_end(Fault::new(ErrorCode::VmStopped, "the VM was suspended"));
        }
        let facts = match (earlier, state) {
            (Some(sealed), Some(state)) if state != MachineState::Running => sealed.facts,
            (earlier, Some(state @ (MachineState::Running | MachineState::Paused))) => {
                if earlier.is_some() {
                    // The guest has run since.
                    self.remove_entry(&self.parts.snapshots, entry.clone()).await;
                }
                if state == MachineState::Running {
                    driver.pause(machine).await.map_err(failed)?;
                }
                let (disk, after) = (SnapshotDisk::Leave, AfterSnapshot::GoOn);
                let take = Take { store: &self.parts.snapshots, entry, disk, after };
                self.take(vm, take).await?
            }
            (_, _) => {
                let text = "the VM ended before its memory was kept";
                return Err(Failure::last(Fault::new(ErrorCode::VmmExited, text)));
            }
        };
        driver.kill(machine).await.map_err(failed)?;
        self.guests.remove_guest(vm.id);
        Ok(facts)
    }

    /// Of a VM that was to be suspended and cannot be: its guest ends as at any other stop.
    pub(crate) async fn end_without_memory(&self, vm: &Vm, why: Fault) -> Result<(), Failure> {
        let (driver, machine) = (self.driver(vm)?, self.machine(vm.id));
        // A paused guest hears nothing, and one that runs already says so.
        if let Err(error) = driver.resume(machine).await {
            tracing::debug!(vm.id = %vm.id, error = fault::chain(&error), "resume to stop");
        }
        self.stop(vm, why, self.parts.config.stop_grace).await
    }

    /// Of a VM's machine.
    pub(crate) async fn take(&self, vm: &Vm, take: Take<'_>) -> Result<SnapshotFacts, Failure> {
        let driver = self.driver(vm)?;
        let guest = self.guests.get(vm.id).ok_or_else(|| {
            let text = "the VM does not run on this worker";
            Failure::last(Fault::new(ErrorCode::VmStateConflict, text))
        })?;
        let source = Source {
            driver: &driver,
            machine: self.machine(vm.id),
            image: &vm.spec.image,
            token: guest.token.to_hex(),
        };
        let sealed = self.take_of(source, take, |error| Failure::driver(error, vm.id)).await?;
        Ok(sealed.facts)
    }

    /// The machine writes a draft, and the store seals it.
    pub(crate) async fn take_of(
        &self,
        source: Source<'_>,
        take: Take<'_>,
        failed: impl Fn(&DriverError) -> Failure,
    ) -> Result<Sealed, Failure> {
        let (store, entry) = (Arc::clone(take.store), take.entry.clone());
        let draft = blocking("make room for a snapshot", move || store.draft(&entry))
            .await?
            .map_err(|e| Failure::snapshot(&e))?;
        let into = draft.path().to_owned();
        let written = source.driver.snapshot(source.machine, &into, take.disk, take.after).await;
        match written {
            Ok(taken) => self.seal(source, take, draft, taken).await,
            Err(error) => {
                discard(draft).await;
                Err(failed(&error))
            }
        }
    }

    async fn seal(
        &self,
        source: Source<'_>,
        take: Take<'_>,
        draft: Draft,
        taken: SnapshotTaken,
    ) -> Result<Sealed, Failure> {
        let (store, images) = (Arc::clone(take.store), Arc::clone(&self.parts.images));
        let (image, token) = (source.image.to_owned(), source.token);
        let holder = store.entry_path(&take.entry);
        blocking("seal a snapshot", move || {
            // The name may have come to mean another image since the machine was made.
            let same = images.resolve(&image).is_ok_and(|boot| boot == taken.machine.boot);
            let image = same.then(|| pinned(&image, &images.digest(&image).ok()?)).flatten();
            if let Some(image) = &image {
                images.pin(image, &holder).map_err(Failure::last)?;
            }
            let detail = SnapshotDetail {
                machine: taken.machine,
                token,
                paused_us: micros(taken.paused),
                image,
            };
            let detail = serde_json::to_value(detail)
                .map_err(|_| Failure::last(internal("describe a snapshot")))?;
            let sealed = store.seal(draft, detail).map_err(|e| Failure::snapshot(&e))?;
            Sealed::new(sealed)
        })
        .await?
    }

    /// A snapshot that an earlier attempt sealed. What is there and of no use is removed.
    pub(crate) async fn found(
        &self,
        store: &Arc<SnapshotStore>,
        entry: &str,
    ) -> Result<Option<Sealed>, Failure> {
        let (shared, name) = (Arc::clone(store), entry.to_owned());
        let got = blocking("look for a snapshot", move || shared.get(&name)).await?;
        let why = match got {
            Ok(sealed) => match Sealed::new(sealed) {
                Ok(sealed) => return Ok(Some(sealed)),
                Err(failure) => failure.fault.message,
            },
            Err(SnapshotError::Unknown { .. }) => return Ok(None),
            Err(error @ (SnapshotError::Damaged { .. } | SnapshotError::Foreign { .. })) => {
                fault::chain(&error)
            }
            Err(error) => return Err(Failure::snapshot(&error)),
        };
        tracing::warn!(entry, reason = why, "a snapshot that is of no use is removed");
        self.remove_entry(store, entry.to_owned()).await;
        Ok(None)
    }

    /// Harmless to repeat. What stays is found by the next start.
    pub(crate) async fn remove_entry(&self, store: &Arc<SnapshotStore>, entry: String) {
        let store = Arc::clone(store);
        let removed = blocking("remove a snapshot", move || {
            let removed = store.remove(&entry);
            (entry, removed)
        });
        if let Ok((entry, Err(error))) = removed.await {
            tracing::error!(entry, error = fault::chain(&error), "remove a snapshot");
        }
    }
}

/// `name@digest`, which means this very image for ever.
fn pinned(image: &str, digest: &str) -> Option<String> {
    let name = image.split('@').next()?;
    Some(format!("{name}@{digest}"))
}

async fn discard(draft: Draft) {
    let _ = blocking("discard a draft", move || drop(draft)).await;
}

pub(crate) fn snapshot_of(task: &Task) -> Result<SnapshotId, Failure> {
    task.snapshot_id.ok_or_else(|| Failure::last(internal("find the task's snapshot")))
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
