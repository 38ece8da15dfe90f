//! What this installation offers, as far as a request can be refused for it at once.

use aether_types::DriverKind;

/// A driver that was configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DriverInfo {
    pub kind: DriverKind,
    /// How strong its wall is, in words, such as `software emulation; not an isolation boundary`.
    pub isolation: String,
    /// Why it does not work on this host, where it does not.
    pub unavailable: Option<String>,
    /// Whether snapshots, and with them forks and templates, can be had of its VMs.
    pub takes_snapshots: bool,
}

/// The most that one VM can be given here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostLimits {
    pub vcpus_max: u32,
    pub memory_mb_max: u32,
    pub disk_mb_max: u32,
}

/// Read with every request: answers come from memory.
pub trait Catalogue: Send + Sync + 'static {
    fn images(&self) -> Vec<String>;

    fn default_image(&self) -> String;

    fn drivers(&self) -> Vec<DriverInfo>;

    fn default_driver(&self) -> DriverKind;

    fn host_limits(&self) -> HostLimits;
}
