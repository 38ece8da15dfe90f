//! Which pools there are.

use aether_types::{
    limits,
    template::{DEFAULT_TAG, DEFAULT_TEMPLATE},
};

/// Machines of one template that are kept ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolConfig {
    /// `name:tag`; without a tag, `latest`.
    pub template: String,
    /// As many at least, while the host has memory.
    pub min: u32,
    /// No more than that, however many are asked for.
    pub max: u32,
}

/// Of the host's memory, for guests in the default pool, were each to use all of its own.
const SHARE_OF_MEMORY: u64 = 8;
const DEFAULT_POOL_MAX: u64 = 4;
/// What is left to the rest of the host at least, and the share of all memory that is.
const RESERVE_MB_MIN: u64 = 512;
const RESERVE_SHARE: u64 = 10;

impl PoolConfig {
    pub(super) fn name_and_tag(&self) -> (&str, &str) {
        self.template.split_once(':').unwrap_or((&self.template, DEFAULT_TAG))
    }

    /// The pools of a host with this much memory: of the default template one machine to four, as
    /// many as fit into an eighth of the memory; none on a host of less than 2 GiB.
    #[must_use]
    pub fn default_for(memory_mb: Option<u64>) -> Vec<Self> {
        let per_guest = SHARE_OF_MEMORY * u64::from(limits::MEMORY_MB_DEFAULT);
        let fitting = (memory_mb.unwrap_or(0) / per_guest).min(DEFAULT_POOL_MAX);
        let max = u32::try_from(fitting).unwrap_or(0);
        let template = format!("{DEFAULT_TEMPLATE}:{DEFAULT_TAG}");
        if max == 0 { Vec::new() } else { vec![Self { template, min: 1, max }] }
    }
}

/// Memory that spare machines leave to the rest of a host: a tenth of it, 512 MiB at least.
#[must_use]
pub fn default_memory_reserve_mb(memory_mb: Option<u64>) -> u64 {
    (memory_mb.unwrap_or(0) / RESERVE_SHARE).max(RESERVE_MB_MIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_pool_is_as_large_as_the_host_allows() {
        let max = |mb| PoolConfig::default_for(Some(mb)).first().map(|pool| (pool.min, pool.max));
        assert_eq!(PoolConfig::default_for(None), []);
        assert_eq!(max(2047), None);
        assert_eq!(max(2048), Some((1, 1)));
        assert_eq!(max(6 * 1024), Some((1, 3)));
        assert_eq!(max(256 * 1024), Some((1, 4)));
        assert_eq!(default_memory_reserve_mb(None), 512);
        assert_eq!(default_memory_reserve_mb(Some(64_000)), 6400);
    }

    #[test]
    fn a_name_without_a_tag_means_the_latest() {
        let pool = |template: &str| PoolConfig { template: template.into(), min: 0, max: 1 };
        assert_eq!(pool("web").name_and_tag(), ("web", "latest"));
        assert_eq!(pool("web:v2").name_and_tag(), ("web", "v2"));
    }
}
