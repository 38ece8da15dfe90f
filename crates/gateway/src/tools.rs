//! The tools that VMs can have, as far as the gateway is concerned: names, defaults, and what is
//! known of versions. What a version comes to is the worker's business.

use aether_api::{LockedToolView, ToolVersionsView, ToolView, ToolsPruned};
use aether_types::{Fault, ToolRequest};
use async_trait::async_trait;

/// Given by the composition root.
#[async_trait]
pub trait ToolCatalogue: Send + Sync + 'static {
    /// The catalogue's name of a tool, by name or alias; from memory, since it is asked with every
    /// request. The fault is `tool_not_found` and has the closest names.
    fn find(&self, name: &str) -> Result<String, Fault>;

    /// What a VM has that asks for nothing else: by name, each once, names of the catalogue.
    fn defaults(&self) -> Vec<ToolRequest>;

    /// Every tool, by name.
    async fn list(&self) -> Result<Vec<ToolView>, Fault>;

    /// Every version of a tool that the catalogue has, newest first, without a next page.
    async fn versions(&self, name: &str) -> Result<ToolVersionsView, Fault>;

    /// Every record of the lock.
    async fn locked(&self) -> Result<Vec<LockedToolView>, Fault>;

    /// Forgets what `latest` and ranges of versions came to.
    async fn refresh(&self) -> Result<(), Fault>;

    /// Removes the layers that were not used for longest until the rest fits.
    async fn prune(&self, keep_bytes: Option<u64>) -> Result<ToolsPruned, Fault>;
}
