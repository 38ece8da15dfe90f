//! Files of snapshots that nothing needs any more, and snapshots that are past what is kept.
//!
//! The store decides what is needed; files go after their rows have. A VM's directory has links of
//! its own to what it maps, so that nothing here can harm a VM.

use std::{
    collections::{BTreeMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use aether_events::{Event, Received, Subscription};
use aether_images::SnapshotEntry;
use aether_store::{PageRequest, SnapshotFilter, StoreError, TemplateFilter};
use aether_types::{
    Snapshot, SnapshotId, SnapshotPurpose, SnapshotState, TemplateState, Timestamp, VmId, VmState,
    limits,
};

use tokio::time::Instant;

use crate::{
    derive,
    failure::{Failure, blocking},
    worker::Core,
};

/// After something ended: more may end with it.
const SETTLE: Duration = Duration::from_millis(250);
/// Ages run out without an event.
const SWEEP: Duration = Duration::from_mins(1);

/// How many snapshots that clients asked for are kept. The oldest go first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Retention {
    pub snapshots_per_vm_max: Option<u32>,
    pub snapshot_age_max: Option<Duration>,
    /// Of all of them together.
    pub snapshot_bytes_max: Option<u64>,
}

/// What is to be looked at.
#[derive(Default)]
pub(crate) struct Garbage {
    /// There may be files in the snapshot store without a row.
    orphans: AtomicBool,
    /// There may be files in the template store that no template is made of.
    templates: AtomicBool,
}

impl Garbage {
    /// Looked at by the next sweep at the latest.
    pub(crate) fn templates_changed(&self) {
        self.templates.store(true, Ordering::Relaxed);
    }
}

/// Runs until the worker closes.
pub(crate) async fn keep(core: Arc<Core>, mut events: Box<dyn Subscription>) {
    core.garbage.orphans.store(true, Ordering::Relaxed);
    core.garbage.templates.store(true, Ordering::Relaxed);
    loop {
        if let Err(failure) = collect(&core).await {
            tracing::error!(reason = failure.fault.message, "collect the files of snapshots");
        }
        if !something_ended(&core, &mut events).await {
            return;
        }
    }
}

/// Completes a moment after something ended, or at the next sweep; `false`: the worker drains.
async fn something_ended(core: &Core, events: &mut Box<dyn Subscription>) -> bool {
    let mut until = Instant::now() + SWEEP;
    let mut is_settling = false;
    loop {
        tokio::select! {
            () = core.draining.cancelled() => return false,
            () = tokio::time::sleep_until(until) => return true,
            received = next(events) => {
                if note(core, &received) && !is_settling {
                    is_settling = true;
                    until = Instant::now() + SETTLE;
                }
            }
        }
    }
}

/// A bus that has ended says nothing more; then the sweep alone looks.
async fn next(events: &mut Box<dyn Subscription>) -> Received {
    match events.next().await {
        Received::Closed => std::future::pending().await,
        received => received,
    }
}

/// Whether there may be something to collect after this.
fn note(core: &Core, received: &Received) -> bool {
    match received {
        Received::Event(Event::Vm { state, .. }) => {
            matches!(state, VmState::Running | VmState::Failed | VmState::Deleted)
        }
        Received::Event(Event::Snapshot { state, .. }) => match state {
            SnapshotState::Creating => false,
            SnapshotState::Ready | SnapshotState::Failed => true,
            SnapshotState::Deleted => {
                core.garbage.orphans.store(true, Ordering::Relaxed);
                true
            }
        },
        Received::Event(Event::Template { template_id, state, .. }) => match state {
            TemplateState::Building => false,
            TemplateState::Ready | TemplateState::Failed | TemplateState::Deleted => {
                core.templates.forget(*template_id);
                core.garbage.templates.store(true, Ordering::Relaxed);
                true
            }
        },
        Received::Missed => {
            core.templates.forget_all();
            core.garbage.orphans.store(true, Ordering::Relaxed);
            core.garbage.templates.store(true, Ordering::Relaxed);
            true
        }
        Received::Event(_) | Received::Closed => false,
    }
}

async fn collect(core: &Arc<Core>) -> Result<(), Failure> {
    retain(core).await?;
    let retired = core.parts.store.retire_snapshots().await.map_err(|e| Failure::store(&e))?;
    for snapshot in &retired {
        match snapshot.purpose {
            SnapshotPurpose::Template => core.garbage.templates.store(true, Ordering::Relaxed),
            SnapshotPurpose::User | SnapshotPurpose::Fork | SnapshotPurpose::Memory => {
                remove(core, snapshot).await;
            }
        }
    }
    if core.garbage.orphans.swap(false, Ordering::Relaxed) {
        orphans(core).await?;
    }
    if core.garbage.templates.swap(false, Ordering::Relaxed) {
        templates(core).await?;
    }
    Ok(())
}

async fn remove(core: &Core, snapshot: &Snapshot) {
    tracing::debug!(snapshot.id = %snapshot.id, purpose = snapshot.purpose.as_str(),
        "remove a snapshot's files");
    core.remove_entry(&core.parts.snapshots, snapshot.id.to_string()).await;
}

/// Files whose snapshot is deleted, failed or unknown: a process died between the two.
async fn orphans(core: &Core) -> Result<(), Failure> {
    for entry in list(&core.parts.snapshots).await? {
        let id = entry.id.parse::<SnapshotId>().ok();
        let snapshot = match id {
            Some(id) => core.parts.store.snapshot(id).await.map_err(|e| Failure::store(&e))?,
            None => None,
        };
        let is_needed = snapshot.is_some_and(|snapshot| match snapshot.state {
            SnapshotState::Creating | SnapshotState::Ready => true,
            SnapshotState::Failed | SnapshotState::Deleted => false,
        });
        if !is_needed {
            tracing::info!(
                entry = entry.id,
                bytes = entry.size_bytes,
                "remove the files of a snapshot that is not there"
            );
            core.remove_entry(&core.parts.snapshots, entry.id).await;
        }
    }
    Ok(())
}

/// Files that no template of this store is made of, and what was derived from templates and is one
/// too many. Where other stores share the folder, templates go by age alone, as nobody knows who
/// needs them.
async fn templates(core: &Core) -> Result<(), Failure> {
    let entries = list(&core.parts.templates).await?;
    let needed = if core.parts.config.templates_are_shared {
        Some(entries.iter().map(|entry| entry.id.clone()).collect())
    } else {
        needed(core).await?
    };
    let Some(needed) = needed else { return Ok(()) };
    for entry in derive::past(&entries, &needed) {
        tracing::info!(entry, "remove the files of a template that is not kept");
        core.remove_entry(&core.parts.templates, entry).await;
    }
    Ok(())
}

/// The digests of all templates. `None`: one is being built, and its end brings us back.
async fn needed(core: &Core) -> Result<Option<HashSet<String>>, Failure> {
    let mut needed = HashSet::new();
    let mut page = PageRequest { limit: limits::PAGE_LIMIT_MAX, after: None };
    loop {
        let read = core.parts.store.templates(TemplateFilter::default(), page).await;
        let templates = read.map_err(|e| Failure::store(&e))?;
        for template in templates.items {
            match template.state {
                // What it seals is not in its row yet.
                TemplateState::Building => return Ok(None),
                TemplateState::Ready => needed.extend(template.digest),
                TemplateState::Failed | TemplateState::Deleted => {}
            }
        }
        match templates.next {
            Some(cursor) => page = PageRequest { limit: page.limit, after: Some(cursor) },
            None => return Ok(Some(needed)),
        }
    }
}

async fn list(store: &Arc<aether_images::SnapshotStore>) -> Result<Vec<SnapshotEntry>, Failure> {
    let store = Arc::clone(store);
    let listed = blocking("list the snapshots", move || store.list()).await?;
    listed.map_err(|e| Failure::snapshot(&e))
}

/// Deletes what clients asked for and is past what is kept.
async fn retain(core: &Core) -> Result<(), Failure> {
    let rules = core.parts.config.retention;
    if rules == Retention::default() {
        return Ok(());
    }
    let snapshots = user_snapshots(core).await?;
    for (snapshot, why) in past(&snapshots, rules, Timestamp::now()) {
        match core.parts.store.delete_snapshot(snapshot.id).await {
            Ok(deleted) => {
                tracing::info!(snapshot.id = %snapshot.id, vm.id = %snapshot.vm_id, why,
                    "a snapshot is deleted, as it is past what is kept");
                core.publish_snapshot(&deleted).await;
                remove(core, &deleted).await;
            }
            // A VM begins as it; the next sweep looks again.
            Err(StoreError::SnapshotNotReady { .. } | StoreError::SnapshotNotFound) => {}
            Err(error) => return Err(Failure::store(&error)),
        }
    }
    Ok(())
}

/// Newest first.
async fn user_snapshots(core: &Core) -> Result<Vec<Snapshot>, Failure> {
    let mut found = Vec::new();
    let mut page = PageRequest { limit: limits::PAGE_LIMIT_MAX, after: None };
    loop {
        let filter = SnapshotFilter {
            states: vec![SnapshotState::Ready],
            purposes: vec![SnapshotPurpose::User],
            worker_id: Some(core.parts.id),
            ..SnapshotFilter::default()
        };
        let read = core.parts.store.snapshots(filter, page).await;
        let snapshots = read.map_err(|e| Failure::store(&e))?;
        found.extend(snapshots.items);
        match snapshots.next {
            Some(cursor) => {
                page = PageRequest { limit: limits::PAGE_LIMIT_MAX, after: Some(cursor) }
            }
            None => return Ok(found),
        }
    }
}

/// Which of them are past the rules, oldest first, and by which.
fn past(
    newest_first: &[Snapshot],
    rules: Retention,
    now: Timestamp,
) -> Vec<(&Snapshot, &'static str)> {
    let mut of_vm: BTreeMap<VmId, u32> = BTreeMap::new();
    let mut bytes = 0_u64;
    let mut past = Vec::new();
    for snapshot in newest_first {
        let age_ms = now.unix_ms().saturating_sub(snapshot.created_at.unix_ms());
        let age = Duration::from_millis(u64::try_from(age_ms).unwrap_or(0));
        let count = of_vm.entry(snapshot.vm_id).or_default();
        let size = snapshot.size_bytes.unwrap_or(0);
        let why = if rules.snapshot_age_max.is_some_and(|max| age > max) {
            "age"
        } else if rules.snapshots_per_vm_max.is_some_and(|max| *count >= max) {
            "count"
        } else if rules.snapshot_bytes_max.is_some_and(|max| bytes.saturating_add(size) > max) {
            "disk budget"
        } else {
            *count += 1;
            bytes = bytes.saturating_add(size);
            continue;
        };
        past.push((snapshot, why));
    }
    past.reverse();
    past
}

#[cfg(test)]
mod tests {
    use aether_types::{DriverKind, ProjectId};

    use super::*;

    fn snapshot(vm_id: VmId, age_s: i64, size_bytes: u64) -> Snapshot {
        let at = Timestamp::from_unix_ms(10_000_000 - age_s * 1000);
        Snapshot {
            id: SnapshotId::new(),
            project_id: ProjectId::DEFAULT,
            name: None,
            purpose: SnapshotPurpose::User,
            state: SnapshotState::Ready,
            reason: None,
            vm_id,
            worker_id: None,
            driver: DriverKind::Sim,
            image: "debian".into(),
            vcpus: 1,
            memory_mb: 256,
            disk_mb: 64,
            size_bytes: Some(size_bytes),
            digest: None,
            paused_us: None,
            created_at: at,
            updated_at: at,
        }
    }

    #[test]
    fn the_oldest_past_a_rule_go_first() {
        let (a, b) = (VmId::new(), VmId::new());
        let all =
            [snapshot(a, 1, 10), snapshot(a, 2, 10), snapshot(b, 3, 10), snapshot(a, 400, 10)];
        let now = Timestamp::from_unix_ms(10_000_000);
        let of = |rules| -> Vec<_> {
            past(&all, rules, now)
                .into_iter()
                .map(|(s, why)| (all.iter().position(|x| x.id == s.id).unwrap(), why))
                .collect()
        };
        assert_eq!(of(Retention::default()), []);
        let count = Retention { snapshots_per_vm_max: Some(1), ..Retention::default() };
        assert_eq!(of(count), [(3, "count"), (1, "count")]);
        let minute = Some(Duration::from_mins(1));
        let age = Retention { snapshot_age_max: minute, ..Retention::default() };
        assert_eq!(of(age), [(3, "age")]);
        let bytes = Retention { snapshot_bytes_max: Some(25), ..Retention::default() };
        assert_eq!(of(bytes), [(3, "disk budget"), (2, "disk budget")]);
    }
}
