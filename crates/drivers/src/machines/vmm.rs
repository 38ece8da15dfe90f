//! What differs between VMMs.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use aether_protocol::host::BoxStream;
use aether_types::{DriverKind, MachineId};
use async_trait::async_trait;
use tokio_util::task::TaskTracker;

use crate::{
    AfterSnapshot, Capabilities, DriverError, ExitReason, Phase, SnapshotDisk, SnapshotFiles,
    SnapshotTaken,
    host::{Host, Record},
    network::Attachment,
    process::Process,
    tools,
};

/// A VM, as its driver sees it while it acts.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) host: Arc<Host>,
    pub(crate) record: Record,
    pub(crate) attachment: Attachment,
    /// What works on the machine's files. A start, a snapshot and a deletion wait for it.
    pub(crate) work: TaskTracker,
}

impl Place {
    pub(crate) fn id(&self) -> MachineId {
        self.record.spec.id
    }

    /// Works on the machine's files in a thread of its own, to its end, also if this is dropped.
    pub(crate) async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, DriverError> + Send + 'static,
    ) -> Result<T, DriverError> {
        crate::finished(self.work.spawn_blocking(work).await)
    }
}

/// What a snapshot is to have and to leave.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SnapshotWish {
    pub(crate) disk: SnapshotDisk,
    pub(crate) after: AfterSnapshot,
}

/// A VMM that was started.
pub(crate) struct Booted<C> {
    pub(crate) process: Process,
    pub(crate) control: C,
}

/// The steps of a start, one after the other: each lasts from the end of the one before.
#[derive(Debug)]
pub(crate) struct Phases {
    since: Instant,
    done: Vec<Phase>,
}

impl Phases {
    pub(crate) fn begin() -> Self {
        Self { since: Instant::now(), done: Vec::new() }
    }

    /// The present step is done.
    pub(crate) fn end(&mut self, name: &'static str) {
        let now = Instant::now();
        let took = now.duration_since(std::mem::replace(&mut self.since, now));
        self.done.push(Phase { name, took });
    }

    pub(crate) fn into_done(self) -> Vec<Phase> {
        self.done
    }
}

/// What a VMM has of the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Links {
    /// A TAP.
    Tap,
    /// And one for a private link, which is the guest's channel.
    TapAndChannel,
    /// A veth pair, which the VMM has made as it starts.
    Veth,
}

/// What differs between VMMs.
#[async_trait]
pub(crate) trait Vmm: Send + Sync + 'static {
    /// The way to a VMM that runs.
    type Control: Send + Sync + 'static;

    const KIND: DriverKind;
    /// What the network makes for the guest.
    const LINKS: Links;

    /// Without a `snapshot_format`, `restore` and `snapshot` are never called.
    fn capabilities(&self) -> Capabilities;

    /// Makes the disk of a machine whose directory is there: the image's empty layer, or what the
    /// snapshot of its specification has. Blocks. Repeating it makes the disk anew.
    fn make_disk(&self, host: &Host, record: &Record) -> Result<(), DriverError> {
        match record.spec.disk_from {
            None => host.make_disk(record),
            Some(_) => Err(no_snapshots("make a disk of a snapshot")),
        }
    }

    /// Makes the machine's own links to the layers of its specification after the first `have`.
    /// Blocks. Repeating it is harmless.
    fn keep_layers(&self, host: &Host, record: &Record, have: usize) -> Result<(), DriverError> {
        tools::keep(host, record.spec.id, have, &record.spec.layers[have..])
    }

    /// Puts layers over those that a VMM that runs has: `place.record` has all, of which the first
    /// `have` are there. Repeating it is harmless.
    async fn add_layers(
        &self,
        place: &Place,
        control: &Self::Control,
        have: usize,
    ) -> Result<(), DriverError> {
        let _ = (place, control, have);
        Err(DriverError::Unavailable("this driver cannot add tools to a machine".to_owned()))
    }

    /// Starts the VMM and lets the guest boot. What it leaves when it fails is found in the
    /// journal.
    async fn boot(&self, place: &Place) -> Result<Booted<Self::Control>, DriverError>;

    /// Starts the VMM with the memory and devices of a snapshot, which was found to fit, and lets
    /// the guest go on. The disk is as it was then. The phases that it adds end with
    /// `load`; `ready` follows. What it leaves when it fails is found in the journal.
    async fn restore(
        &self,
        place: &Place,
        from: &SnapshotFiles,
        phases: &mut Phases,
    ) -> Result<Booted<Self::Control>, DriverError> {
        let _ = (place, from, phases);
        Err(no_snapshots("restore a snapshot"))
    }

    /// Writes memory and devices, and the disk where told, into an empty directory. `Ok`: the
    /// machine is what it was, running or paused; one that is to end stands still, since its disk
    /// must stay as it was for this memory. On failure, and where this is dropped, `settle` follows.
    /// Work on files that may go on when this is dropped belongs into [`Place::work`].
    async fn snapshot(
        &self,
        place: &Place,
        control: &Self::Control,
        into: &Path,
        wish: SnapshotWish,
    ) -> Result<SnapshotTaken, DriverError> {
        let _ = (place, control, into, wish);
        Err(no_snapshots("take a snapshot"))
    }

    /// Ends what is left of a snapshot that failed or whose worker died, and lets the machine be
    /// what it was before. Repeating it is harmless.
    async fn settle(
        &self,
        place: &Place,
        control: &Self::Control,
        was: WasBefore,
    ) -> Result<(), DriverError> {
        let _ = place;
        match was {
            WasBefore::Running => self.resume(control).await,
            WasBefore::Paused => Ok(()),
        }
    }

    /// Waits for the guest's hint that it can be connected to, and sees that it can. After a
    /// restore no hint comes.
    async fn ready(&self, place: &Place, control: &Self::Control) -> Result<(), DriverError>;

    /// Takes up the way to a VMM that an earlier worker started.
    async fn adopt(&self, place: &Place, process: &Process) -> Result<Self::Control, DriverError>;

    /// Waits until the VMM has ended, and says why as far as it can be told.
    async fn watch(&self, control: &Self::Control, process: &Process) -> ExitReason;

    /// Ends a VMM at once, whatever it does; its end is then seen by `watch`.
    async fn end(&self, control: &Self::Control, process: &Process) -> Result<(), DriverError> {
        let _ = control;
        process.kill()
    }

    /// The last lines of the guest's console, or of the VMM where there is none.
    fn last_words(&self, control: &Self::Control, lines: usize) -> String;

    async fn pause(&self, control: &Self::Control) -> Result<(), DriverError>;
    async fn resume(&self, control: &Self::Control) -> Result<(), DriverError>;
    async fn is_paused(&self, control: &Self::Control) -> Result<bool, DriverError>;

    /// A connection to the port that was made to see that the guest is ready and is still unused.
    fn take_connection(&self, _control: &Self::Control, _port: u32) -> Option<BoxStream> {
        None
    }

    async fn connect(
        &self,
        place: &Place,
        port: u32,
        limit: Duration,
    ) -> Result<BoxStream, DriverError>;

    /// Removes what a VMM that has ended left in the VM's directory.
    fn clean(&self, host: &Host, record: &Record) -> Result<(), DriverError>;
}

/// What a machine was when a snapshot of it was begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum WasBefore {
    Running,
    Paused,
}

pub(super) fn no_snapshots(action: &str) -> DriverError {
    DriverError::Unavailable(format!("this driver cannot {action}"))
}
