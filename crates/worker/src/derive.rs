//! Templates with more tools on top: what a restore and its added layers come to, kept as a
//! snapshot of its own, so that the next VM that asks for the same is restored with them.
//!
//! ```text
//!   first VM   restore the template ──► add layers, mount them     while it starts
//!   after it   restore, add, rest, seal                            in a machine that is no VM's
//!   next VMs   restore what was sealed
//! ```
//!
//! Nothing of it is in the store. An entry of the template store is named by what it is made of;
//! it may be removed at any time, and whoever finds none does as the first VM did. Entries are made
//! one at a time, at background priority, and only while nobody waits for a machine.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use aether_drivers::{AfterSnapshot, LayerFile, SnapshotDisk};
use aether_images::SnapshotEntry;
use aether_types::{MachineId, Template, ToolRequest};
use tokio::sync::Semaphore;

use crate::{
    failure::Failure,
    fault,
    pool::Agent,
    sealed::Sealed,
    snapshot::{Source, Take},
    template::{SYNC_LIMIT, WARM_UP},
    toolset::Toolset,
    worker::Core,
};

/// Of all templates together; the least recently used go first.
pub(crate) const KEPT_MAX: usize = 16;
/// More are asked for again by the next VM.
const WAITING_MAX: usize = 16;
/// Of the digest of the tools: 128 bits.
const TOOLS_HEX: usize = 32;
/// Between the template's digest and that of the tools.
const SEPARATOR: char = '-';

/// What is being made, or waits for that.
pub(crate) struct Derivations {
    entries: Mutex<HashSet<String>>,
    turn: Semaphore,
}

impl Default for Derivations {
    fn default() -> Self {
        Self { entries: Mutex::default(), turn: Semaphore::new(1) }
    }
}

impl Derivations {
    /// `None`: somebody makes it, or too many wait.
    fn begin(&self, entry: &str) -> Option<InHand<'_>> {
        let mut entries = self.lock();
        let is_mine = entries.len() < WAITING_MAX && entries.insert(entry.to_owned());
        is_mine.then(|| InHand { of: self, entry: entry.to_owned() })
    }

    // Nothing panics while the lock is held.
    fn lock(&self) -> MutexGuard<'_, HashSet<String>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct InHand<'a> {
    of: &'a Derivations,
    entry: String,
}

impl Drop for InHand<'_> {
    fn drop(&mut self) {
        self.of.lock().remove(&self.entry);
    }
}

/// Whether a VM of the template has all that it asks for by what the template has. Versions that
/// were resolved at different times may differ all the same.
pub(crate) fn covers(template: &Template, wanted: &[ToolRequest]) -> bool {
    wanted.iter().all(|tool| template.spec.tools.contains(tool))
}

/// The name of a template with these layers on top. `None`: it has no digest, or nothing is added.
pub(crate) fn entry(template: &Template, there: &[LayerFile], toolset: &Toolset) -> Option<String> {
    let layers = toolset.over(there);
    let added = layers.get(there.len()..).filter(|added| !added.is_empty())?;
    let mut hasher = blake3::Hasher::new();
    for layer in added {
        hasher.update(&(layer.digest.len() as u64).to_le_bytes());
        hasher.update(layer.digest.as_bytes());
    }
    let tools = hasher.finalize().to_hex();
    Some(format!("{}{SEPARATOR}{}", template.digest.as_ref()?, &tools[..TOOLS_HEX]))
}

/// Those to remove of the entries of a template store: of templates that are not needed, and the
/// least recently used of too many.
pub(crate) fn past(entries: &[SnapshotEntry], needed: &HashSet<String>) -> Vec<String> {
    let mut past = Vec::new();
    let mut derived = Vec::new();
    for entry in entries {
        match entry.id.split_once(SEPARATOR) {
            Some((template, _)) if needed.contains(template) => derived.push(entry),
            None if needed.contains(&entry.id) => {}
            _ => past.push(entry.id.clone()),
        }
    }
    derived.sort_by_key(|entry| std::cmp::Reverse(entry.last_used_unix_ms));
    past.extend(derived.iter().skip(KEPT_MAX).map(|entry| entry.id.clone()));
    past
}

impl Core {
    /// What an earlier VM led to.
    pub(crate) async fn derived(&self, entry: &str) -> Option<Sealed> {
        match self.found(&self.parts.templates, entry).await {
            Ok(found) => found,
            Err(failure) => {
                let reason = failure.fault.message;
                tracing::warn!(entry, reason, "read a template with more tools");
                None
            }
        }
    }

    /// Makes the entry once nobody waits for a machine; the VM that asked has its tools already.
    pub(crate) fn derive_later(
        self: &Arc<Self>,
        template: Arc<Template>,
        toolset: Arc<Toolset>,
        entry: String,
    ) {
        let core = Arc::clone(self);
        self.spawn(async move {
            let Some(_in_hand) = core.derivations.begin(&entry) else { return };
            let Ok(_turn) = core.derivations.turn.acquire().await else { return };
            let id = MachineId::new();
            let derived = core.derive(&template, &toolset, &entry, id);
            let ended = core.draining.run_until_cancelled(derived).await;
            if let Some(Err(failure)) = &ended {
                let reason = &failure.fault.message;
                tracing::warn!(entry, reason, "keep a template with more tools");
            }
            core.remove_derivation(&template, id).await;
            core.garbage.templates_changed();
        });
    }

    async fn derive(
        &self,
        template: &Template,
        toolset: &Toolset,
        entry: &str,
        id: MachineId,
    ) -> Result<(), Failure> {
        let turn = self.pools.turn();
        turn.pass().await;
        if self.found(&self.parts.templates, entry).await?.is_some() {
            return Ok(());
        }
        let spare = self.restore_spare(template, id, &turn, toolset).await?;
        turn.pass().await;
        // The tools are over what the template had read; what it has written is not all on its disk.
        let (driver, token) = (&spare.driver, &spare.token);
        let agent = Agent { driver, machine: id, token, limit: SYNC_LIMIT };
        let script = format!("{WARM_UP}; sync");
        agent.run_script("rest", &script).await.map_err(Failure::last)?;
        self.bring_to_rest(&spare.driver, id, &spare.token, &spare.network).await?;
        let source = Source {
            driver: &spare.driver,
            machine: id,
            image: &template.spec.image,
            token: spare.token.to_hex(),
        };
        let take = Take {
            store: &self.parts.templates,
            entry: entry.to_owned(),
            disk: SnapshotDisk::Include,
            after: AfterSnapshot::End,
        };
        let sealed = self.take_of(source, take, |error| Failure::machine(error, id)).await?;
        tracing::info!(template.id = %template.id, entry, bytes = sealed.facts.size_bytes,
            "a template is kept with more tools");
        Ok(())
    }

    /// What stays is removed by the next start, as any machine that is no VM's.
    async fn remove_derivation(&self, template: &Template, id: MachineId) {
        let Ok(driver) = self.driver_of(template.spec.driver) else { return };
        if let Err(error) = driver.delete(id).await {
            tracing::error!(machine.id = %id, error = fault::chain(&error),
                "remove the machine of a template with more tools; the next start does it");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(id: &str, last_used_unix_ms: u64) -> SnapshotEntry {
        SnapshotEntry { id: id.to_owned(), size_bytes: 1, created_unix_ms: 0, last_used_unix_ms }
    }

    #[test]
    fn what_is_derived_goes_with_its_template_and_when_it_is_one_too_many() {
        let needed = HashSet::from(["aa".to_owned()]);
        let mut entries = vec![at("aa", 0), at("bb", 9), at("bb-1", 9)];
        assert_eq!(past(&entries, &needed), ["bb", "bb-1"]);
        let count = u64::try_from(KEPT_MAX).unwrap();
        entries.extend((0..=count).map(|n| at(&format!("aa-{n}"), 100 - n)));
        let oldest = format!("aa-{count}");
        assert_eq!(past(&entries, &needed), ["bb", "bb-1", &oldest]);
    }

    #[test]
    fn one_makes_an_entry_and_not_too_many_wait() {
        let derivations = Derivations::default();
        let first = derivations.begin("a");
        assert!(first.is_some());
        assert!(derivations.begin("a").is_none());
        drop(first);
        let all: Vec<_> = (0..WAITING_MAX).map(|n| derivations.begin(&n.to_string())).collect();
        assert!(all.iter().all(Option::is_some));
        assert!(derivations.begin("a").is_none());
    }
}
