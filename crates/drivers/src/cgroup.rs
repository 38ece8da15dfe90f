//! What a VMM may take of the host, held by cgroup v2 where the worker may make cgroups.
//!
//! The guest's own size bounds it already: a VMM cannot run more vCPUs or map more guest memory
//! than it was given. A cgroup adds the VMM's own memory, its threads, and a share of the
//! processors that does not depend on how many threads it has.

use std::{
    io,
    path::{Path, PathBuf},
};

use crate::{DriverError, MachineSpec};

/// Memory of a VMM beside its guest's: QEMU with its translated code, measured under 200 MiB.
const VMM_MEMORY_MB: u64 = 384;
/// Threads of a VMM beside one for each vCPU.
const VMM_THREADS: u32 = 128;
/// In each of which a group may use `vcpus` whole periods of processor time.
const PERIOD_US: u64 = 100_000;
/// One processor's worth of time for the VMM's own threads.
const VMM_CPUS: u64 = 1;
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];

/// Where the cgroups of VMs are made.
#[derive(Debug, Clone, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CgroupMode {
    /// Below `aetherium` in the root of cgroup v2, if this process may make it.
    #[default]
    Auto,
    /// Below this cgroup, given to the worker by whoever started it.
    Under(PathBuf),
    Off,
}

/// Whether limits hold; shown to people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CgroupStatus {
    Enforced { parent: PathBuf },
    NotEnforced { reason: String },
}

impl CgroupStatus {
    /// Makes the parent group and hands the controllers down to it.
    pub(crate) fn prepare(mode: &CgroupMode) -> Self {
        let parent = match mode {
            CgroupMode::Off => {
                return Self::NotEnforced { reason: "switched off".to_owned() };
            }
            CgroupMode::Auto => Path::new("/sys/fs/cgroup/aetherium").to_owned(),
            CgroupMode::Under(parent) => parent.clone(),
        };
        match prepare(&parent) {
            Ok(()) => Self::Enforced { parent },
            Err(reason) => Self::NotEnforced { reason },
        }
    }

    /// The group of a VM, if there are groups.
    pub(crate) fn group_of(&self, spec: &MachineSpec) -> Option<PathBuf> {
        match self {
            Self::Enforced { parent } => Some(parent.join(format!("vm-{}", spec.id))),
            Self::NotEnforced { .. } => None,
        }
    }
}

fn prepare(parent: &Path) -> Result<(), String> {
    let above = parent.parent().ok_or("the root itself cannot hold VMs")?;
    let usable = std::fs::read_to_string(above.join("cgroup.controllers"))
        .map_err(|_| format!("{} is not in a cgroup v2 hierarchy", above.display()))?;
    let has = |list: &str, name: &str| list.split_ascii_whitespace().any(|c| c == name);
    if let Some(missing) = CONTROLLERS.iter().find(|name| !has(&usable, name)) {
        return Err(format!("the {missing} controller is not available in {}", above.display()));
    }
    std::fs::create_dir_all(parent).map_err(|e| format!("make {}: {e}", parent.display()))?;
    for group in [above, parent] {
        let control = group.join("cgroup.subtree_control");
        let on = std::fs::read_to_string(&control).unwrap_or_default();
        for name in CONTROLLERS.iter().filter(|name| !has(&on, name)) {
            std::fs::write(&control, format!("+{name}"))
                .map_err(|e| format!("hand {name} down in {}: {e}", group.display()))?;
        }
    }
    Ok(())
}

/// Makes a VM's group with its limits, and puts the process in it.
pub(crate) fn admit(group: &Path, spec: &MachineSpec, pid: u32) -> Result<(), DriverError> {
    let set = |name: &str, value: String| {
        let path = group.join(name);
        std::fs::write(&path, value).map_err(|source| DriverError::File {
            action: "set the limit",
            path,
            source,
        })
    };
    match std::fs::create_dir(group) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
            let path = group.to_owned();
            return Err(DriverError::File { action: "make cgroup", path, source: e });
        }
        Ok(()) | Err(_) => {}
    }
    for (name, value) in limits(spec) {
        set(name, value)?;
    }
    set("cgroup.procs", pid.to_string())
}

fn limits(spec: &MachineSpec) -> [(&'static str, String); 3] {
    let memory = (u64::from(spec.memory_mb) + VMM_MEMORY_MB) << 20;
    let quota = (u64::from(spec.vcpus) + VMM_CPUS) * PERIOD_US;
    [
        ("memory.max", memory.to_string()),
        ("cpu.max", format!("{quota} {PERIOD_US}")),
        ("pids.max", (spec.vcpus + VMM_THREADS).to_string()),
    ]
}

/// Removes a group whose processes have ended; one that is gone is no error.
pub(crate) fn remove(group: &Path) -> Result<(), DriverError> {
    match std::fs::remove_dir(group) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(DriverError::File { action: "remove cgroup", path: group.to_owned(), source: e })
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_without_the_controllers_says_so() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("cgroup.controllers"), "cpu pids\n").unwrap();
        let status = CgroupStatus::prepare(&CgroupMode::Under(folder.path().join("vms")));
        let CgroupStatus::NotEnforced { reason } = status else { panic!("{status:?}") };
        assert!(reason.contains("memory controller"), "{reason}");
    }

    #[test]
    fn limits_are_written_before_the_process_enters() {
        // An ordinary folder stands for a cgroup: the writes are the same.
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("cgroup.controllers"), "cpu memory pids\n").unwrap();
        let status = CgroupStatus::prepare(&CgroupMode::Under(folder.path().join("vms")));
        let spec = crate::tests::spec(folder.path());
        let group = status.group_of(&spec).unwrap();
        admit(&group, &spec, 42).unwrap();
        let read = |name: &str| std::fs::read_to_string(group.join(name)).unwrap();
        assert_eq!(read("memory.max"), ((128 + VMM_MEMORY_MB) << 20).to_string());
        assert_eq!(read("cpu.max"), "200000 100000");
        assert_eq!(read("cgroup.procs"), "42");
    }
}
