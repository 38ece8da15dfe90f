//! Sealed snapshots as a worker uses them, and waiting for one that is being made.

use std::{fmt, sync::Arc};

use aether_drivers::{Driver, SnapshotFiles, SnapshotMachine};
use aether_events::{Event, Received};
use aether_images::{SealedSnapshot, SnapshotStore};
use aether_protocol::Token;
use aether_store::SnapshotFacts;
use aether_types::{
    ErrorCode, Fault, Snapshot, SnapshotId, SnapshotState, Template, TemplateId, TemplateState, Vm,
};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, timeout_at};

use crate::{
    configure::Before,
    failure::{Failure, blocking},
    worker::Core,
};

/// What we keep in a snapshot's manifest.
#[derive(Serialize, Deserialize)]
pub(crate) struct SnapshotDetail {
    pub(crate) machine: SnapshotMachine,
    /// What the agent in the memory asks for, in hex.
    pub(crate) token: String,
    pub(crate) paused_us: u64,
    /// `name@digest` of the image under the disk, where it was known when this was made.
    pub(crate) image: Option<String>,
}

/// A snapshot whose files were checked. They stay while this lives.
pub(crate) struct Sealed {
    pub(crate) files: SnapshotFiles,
    pub(crate) token: Token,
    pub(crate) facts: SnapshotFacts,
    _in_use: SealedSnapshot,
}

// The token must not reach a log.
impl fmt::Debug for Sealed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sealed").field("directory", &self.files.directory).finish_non_exhaustive()
    }
}

impl Sealed {
    pub(crate) fn new(sealed: SealedSnapshot) -> Result<Self, Failure> {
        let unreadable = || {
            let text = format!("the manifest of the snapshot `{}` cannot be read", sealed.id);
            Failure::last(Fault::new(ErrorCode::SnapshotDamaged, text))
        };
        let detail = SnapshotDetail::deserialize(&sealed.detail).map_err(|_| unreadable())?;
        let token = Token::from_hex(&detail.token).map_err(|_| unreadable())?;
        Ok(Self {
            files: SnapshotFiles { directory: sealed.directory.clone(), machine: detail.machine },
            token,
            facts: SnapshotFacts {
                size_bytes: sealed.size_bytes,
                digest: sealed.digest.clone(),
                paused_us: detail.paused_us,
            },
            _in_use: sealed,
        })
    }

    pub(crate) fn before(&self) -> Before<'_> {
        Before { token: &self.token, mac: &self.files.machine.mac }
    }

    /// Whether this host's driver restores it at all.
    pub(crate) fn check_format(&self, driver: &Arc<dyn Driver>) -> Result<(), Fault> {
        let capabilities = driver.capabilities();
        let machine = &self.files.machine;
        if machine.driver == capabilities.kind
            && capabilities.snapshot_format.as_ref() == Some(&machine.format)
        {
            return Ok(());
        }
        let here = capabilities.snapshot_format.unwrap_or_else(|| "none".to_owned());
        let text =
            format!("the snapshot is of `{}`; this worker restores `{here}`", machine.format);
        Err(Fault::new(ErrorCode::SnapshotIncompatible, text))
    }

    /// Whether the VM that is asked for has the size of this one.
    pub(crate) fn check_size(&self, vm: &Vm) -> Result<(), Fault> {
        let (have, want) = (&self.files.machine, &vm.spec);
        let have = (have.vcpus, have.memory_mb, have.disk_mb);
        let want = (want.vcpus, want.memory_mb, want.disk_mb);
        if have == want {
            return Ok(());
        }
        let words = |(vcpus, memory, disk): (u32, u32, u32)| {
            format!("{vcpus} processors, {memory} MiB of memory and {disk} MiB of disk")
        };
        let text = format!("the snapshot has {}, the VM {}", words(have), words(want));
        Err(Fault::new(ErrorCode::SnapshotIncompatible, text))
    }
}

impl Core {
    /// The files of a snapshot, checked, and its image with them.
    pub(crate) async fn sealed(
        &self,
        store: &Arc<SnapshotStore>,
        entry: String,
    ) -> Result<Sealed, Failure> {
        let (store, images) = (Arc::clone(store), Arc::clone(&self.parts.images));
        blocking("read a snapshot", move || {
            let sealed = store.get(&entry).map_err(|error| Failure::snapshot(&error))?;
            let image = sealed.detail.get("image").and_then(|image| image.as_str());
            let boot = image.map(|image| images.resolve(image)).transpose();
            let boot = boot.map_err(Failure::last)?;
            let sealed = Sealed::new(sealed)?;
            if boot.is_some_and(|boot| boot != sealed.files.machine.boot) {
                let text = "the files of the snapshot's image are not where they were";
                return Err(Failure::last(Fault::new(ErrorCode::SnapshotIncompatible, text)));
            }
            Ok(sealed)
        })
        .await?
    }

    /// A snapshot that is ready; waits for one that is being made.
    pub(crate) async fn ready_snapshot(&self, id: SnapshotId) -> Result<Snapshot, Failure> {
        let deadline = Instant::now() + self.parts.config.start_limit;
        // First listen, then read: nothing is missed between.
        let mut events = self.parts.bus.subscribe();
        loop {
            let found = self.parts.store.snapshot(id).await.map_err(|e| Failure::store(&e))?;
            let snapshot = found
                .filter(|snapshot| snapshot.state != SnapshotState::Deleted)
                .ok_or_else(|| gone(ErrorCode::SnapshotNotFound, "snapshot"))?;
            match snapshot.state {
                SnapshotState::Ready => return Ok(snapshot),
                SnapshotState::Failed => return Err(failed(snapshot.reason, "snapshot")),
                SnapshotState::Creating | SnapshotState::Deleted => {}
            }
            let changed = async {
                loop {
                    match events.next().await {
                        Received::Event(Event::Snapshot { snapshot_id, .. })
                            if snapshot_id == id =>
                        {
                            return;
                        }
                        Received::Missed => return,
                        Received::Event(_) => {}
                        Received::Closed => std::future::pending().await,
                    }
                }
            };
            if timeout_at(deadline, changed).await.is_err() {
                return Err(late("snapshot"));
            }
        }
    }

    /// A template that is ready; waits for one that is being built.
    pub(crate) async fn ready_template(&self, id: TemplateId) -> Result<Arc<Template>, Failure> {
        let deadline = Instant::now() + self.parts.config.start_limit;
        let mut events = self.parts.bus.subscribe();
        loop {
            let template = self
                .template(id)
                .await?
                .ok_or_else(|| gone(ErrorCode::TemplateNotFound, "template"))?;
            match template.state {
                // A template that was deleted after the VM was asked for may still have its files.
                TemplateState::Ready | TemplateState::Deleted => return Ok(template),
                TemplateState::Failed => return Err(failed(template.reason.clone(), "template")),
                TemplateState::Building => {}
            }
            let changed = async {
                loop {
                    match events.next().await {
                        Received::Event(Event::Template { template_id, .. })
                            if template_id == id =>
                        {
                            return;
                        }
                        Received::Missed => return,
                        Received::Event(_) => {}
                        Received::Closed => std::future::pending().await,
                    }
                }
            };
            if timeout_at(deadline, changed).await.is_err() {
                return Err(late("template"));
            }
        }
    }

    /// A template as the store has it; one that is ready does not change and is remembered.
    pub(crate) async fn template(&self, id: TemplateId) -> Result<Option<Arc<Template>>, Failure> {
        if let Some(known) = self.templates.get(id) {
            return Ok(Some(known));
        }
        let found = self.parts.store.template(id).await.map_err(|e| Failure::store(&e))?;
        let template = found.map(Arc::new);
        if let Some(template) = &template {
            self.templates.remember(template);
        }
        Ok(template)
    }
}

fn gone(code: ErrorCode, what: &str) -> Failure {
    Failure::last(Fault::new(code, format!("the {what} that the VM begins as is gone")))
}

fn failed(reason: Option<Fault>, what: &str) -> Failure {
    let reason = reason.unwrap_or_else(|| {
        Fault::new(ErrorCode::SnapshotStateConflict, "nobody knows why".to_owned())
    });
    let text = format!("the {what} that the VM begins as failed: {}", reason.message);
    Failure::last(Fault::new(reason.code, text))
}

fn late(what: &str) -> Failure {
    let text = format!("the {what} that the VM begins as was not ready in time");
    Failure::last(Fault::new(ErrorCode::VmStartTimeout, text))
}
