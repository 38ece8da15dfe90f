//! Projects: whose VMs, tasks, snapshots, templates and keys they are. What is of one project does
//! not exist for another.

use serde::{Deserialize, Serialize};

use crate::{ProjectId, Timestamp};

/// Of the project that there is from the start.
pub const DEFAULT_PROJECT: &str = "default";

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Project {
    pub id: ProjectId,
    /// Unique among projects that are not deleted.
    pub name: String,
    pub created_at: Timestamp,
    pub quota: Quota,
}

/// What a project may have at most; `null` is no bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct Quota {
    /// VMs that are not deleted.
    pub vms: Option<u32>,
    /// Of VMs that have a machine: those that are created, started, running, paused or stopped now.
    pub vcpus: Option<u32>,
    /// As above.
    pub memory_mb: Option<u32>,
    /// Tasks that no worker has taken yet.
    pub waiting_tasks: Option<u32>,
}

/// What a project has, or what a request asks for beside that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Usage {
    pub vms: u64,
    pub vcpus: u64,
    pub memory_mb: u64,
    pub waiting_tasks: u64,
}

/// What there is too little of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum QuotaResource {
    Vms,
    Vcpus,
    MemoryMb,
    WaitingTasks,
}

impl QuotaResource {
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Vms => "vms",
            Self::Vcpus => "vcpus",
            Self::MemoryMb => "memory_mb",
            Self::WaitingTasks => "waiting_tasks",
        }
    }
}

/// A request asks for more than the project may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[error(
    "the project's quota of {} is {limit}; {used} are used, and {asked} more are asked for",
    resource.as_str()
)]
pub struct Shortage {
    pub resource: QuotaResource,
    pub limit: u64,
    pub used: u64,
    pub asked: u64,
}

impl Quota {
    /// Whether anything of what is asked for is bounded: else nothing needs to be counted.
    #[must_use]
    pub fn bounds(&self, asked: &Usage) -> bool {
        self.pairs(asked).iter().any(|(_, limit, asked)| limit.is_some() && *asked > 0)
    }

    /// Decides. What is asked for nothing of is not looked at: a project that is over a quota that was
    /// lowered may still do what needs no more of it.
    pub fn admit(&self, used: &Usage, asked: &Usage) -> Result<(), Shortage> {
        let used = self.pairs(used).map(|(_, _, used)| used);
        for ((resource, limit, asked), used) in self.pairs(asked).into_iter().zip(used) {
            let Some(limit) = limit.map(u64::from) else { continue };
            if asked > 0 && used.saturating_add(asked) > limit {
                return Err(Shortage { resource, limit, used, asked });
            }
        }
        Ok(())
    }

    fn pairs(&self, of: &Usage) -> [(QuotaResource, Option<u32>, u64); 4] {
        [
            (QuotaResource::Vms, self.vms, of.vms),
            (QuotaResource::Vcpus, self.vcpus, of.vcpus),
            (QuotaResource::MemoryMb, self.memory_mb, of.memory_mb),
            (QuotaResource::WaitingTasks, self.waiting_tasks, of.waiting_tasks),
        ]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_shortage_says_what_there_is_too_little_of() {
        let quota = Quota { vcpus: Some(4), memory_mb: Some(100), ..Quota::default() };
        let used = Usage { vcpus: 3, memory_mb: 200, ..Usage::default() };
        let one = Usage { vms: 1, vcpus: 1, ..Usage::default() };
        assert_eq!(quota.admit(&used, &one), Ok(()), "nothing more of memory is asked for");
        let two = Usage { vms: 1, vcpus: 2, ..Usage::default() };
        let short = quota.admit(&used, &two).unwrap_err();
        assert_eq!(
            short.to_string(),
            "the project's quota of vcpus is 4; 3 are used, and 2 more are asked for"
        );
        assert!(!quota.bounds(&Usage { vms: 9, waiting_tasks: 9, ..Usage::default() }));
    }

    proptest! {
        #[test]
        fn whatever_is_admitted_stays_within_the_quota(
            limit: u32, used: u32, asked: u32,
        ) {
            let quota = Quota { vms: Some(limit), ..Quota::default() };
            let of = |vms: u32| Usage { vms: vms.into(), ..Usage::default() };
            let admitted = quota.admit(&of(used), &of(asked)).is_ok();
            let fits = u64::from(used) + u64::from(asked) <= u64::from(limit);
            prop_assert_eq!(admitted, fits || asked == 0);
        }
    }
}
