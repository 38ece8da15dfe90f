//! A virtual machine: what was asked for, what it is now, and which transitions exist.
//!
//! ```text
//!              Started                  PauseDone
//!   creating ───────────► running ◄──────────────► paused
//!      │                  ▲  │ │      ResumeDone      │
//!      │ Failed    Started│  │ └─StopRequested─┐ ┌────┘
//!      ▼                  │  │Exited           ▼ ▼
//!   failed ◄── Failed ─ starting ◄──────── stopping
//!      │                  ▲  StartRequested    │ Stopped
//!      └─StartRequested───┴────── stopped ◄────┘
//!   every state but deleted ── DeleteRequested ──► deleting ── Deleted ──► deleted
//! ```
//!
//! A stop that keeps the memory takes the same way. The VM is then `stopped` with a snapshot in
//! `memory`, which lasts through `starting` and no further: whether the start goes on from it or
//! fails, it is used up. A snapshot that leaves the VM as it was is no transition.

use std::{collections::BTreeMap, fmt, net::IpAddr, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{
    Fault, NetworkPolicy, Placement, ProjectId, SnapshotId, StartReport, TemplateId, Timestamp,
    ToolRequest, VmId, VmTool, WorkerId, limits, tool::validate_tools,
};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    Creating,
    /// A stopped or failed VM is being started again.
    Starting,
    Running,
    Paused,
    Stopping,
    Stopped,
    Failed,
    Deleting,
    Deleted,
}

impl VmState {
    pub const ALL: &'static [Self] = &[
        Self::Creating,
        Self::Starting,
        Self::Running,
        Self::Paused,
        Self::Stopping,
        Self::Stopped,
        Self::Failed,
        Self::Deleting,
        Self::Deleted,
    ];

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
            Self::Deleting => "deleting",
            Self::Deleted => "deleted",
        }
    }

    /// The state after `event`, or `None` where no such transition exists.
    #[must_use]
    pub fn apply(self, event: VmEvent) -> Option<Self> {
        use VmState::{
            Creating, Deleted, Deleting, Failed, Paused, Running, Starting, Stopped, Stopping,
        };
        match (event, self) {
            (VmEvent::Started, Creating | Starting) | (VmEvent::ResumeDone, Paused) => {
                Some(Running)
            }
            (VmEvent::StartRequested, Stopped | Failed) => Some(Starting),
            (VmEvent::PauseDone, Running) => Some(Paused),
            (VmEvent::StopRequested, Running | Paused) => Some(Stopping),
            (VmEvent::Stopped, Stopping | Running | Paused) => Some(Stopped),
            (VmEvent::Failed, Creating | Starting | Running | Paused | Stopping) => Some(Failed),
            (
                VmEvent::DeleteRequested,
                Creating | Starting | Running | Paused | Stopping | Stopped | Failed,
            ) => Some(Deleting),
            (VmEvent::Deleted, Deleting) => Some(Deleted),
            (
                VmEvent::Started
                | VmEvent::ResumeDone
                | VmEvent::StartRequested
                | VmEvent::PauseDone
                | VmEvent::StopRequested
                | VmEvent::Stopped
                | VmEvent::Failed
                | VmEvent::DeleteRequested
                | VmEvent::Deleted,
                Creating | Starting | Running | Paused | Stopping | Stopped | Failed | Deleting
                | Deleted,
            ) => None,
        }
    }

    /// Commands may be sent to a VM in this state; those sent early wait until it runs.
    #[must_use]
    pub fn takes_commands(self) -> bool {
        match self {
            Self::Creating | Self::Starting | Self::Running => true,
            Self::Paused
            | Self::Stopping
            | Self::Stopped
            | Self::Failed
            | Self::Deleting
            | Self::Deleted => false,
        }
    }

    /// A VM in this state may have its memory kept in a snapshot.
    #[must_use]
    pub fn keeps_memory(self) -> bool {
        match self {
            Self::Stopped | Self::Starting => true,
            Self::Creating
            | Self::Running
            | Self::Paused
            | Self::Stopping
            | Self::Failed
            | Self::Deleting
            | Self::Deleted => false,
        }
    }

    /// A snapshot can be taken of a VM in this state, which it stays in.
    #[must_use]
    pub fn takes_snapshots(self) -> bool {
        match self {
            Self::Running | Self::Paused => true,
            Self::Creating
            | Self::Starting
            | Self::Stopping
            | Self::Stopped
            | Self::Failed
            | Self::Deleting
            | Self::Deleted => false,
        }
    }

    /// It counts against what its worker may promise: it runs, or is on its way to, or its machine
    /// is not known to be gone.
    #[must_use]
    pub fn holds_capacity(self) -> bool {
        match self {
            Self::Creating
            | Self::Starting
            | Self::Running
            | Self::Paused
            | Self::Stopping
            | Self::Deleting => true,
            Self::Stopped | Self::Failed | Self::Deleted => false,
        }
    }

    /// A process on the host is expected to exist.
    #[must_use]
    pub fn has_process(self) -> bool {
        matches!(self, Self::Running | Self::Paused | Self::Stopping)
    }
}

impl fmt::Display for VmState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for VmState {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.iter().copied().find(|s| s.as_str() == text).ok_or_else(|| {
            let known: Vec<_> = Self::ALL.iter().map(|s| s.as_str()).collect();
            format!("unknown VM state; one of {}", known.join(", "))
        })
    }
}

/// What happens to a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum VmEvent {
    /// The guest answers: after a creation or a start.
    Started,
    StartRequested,
    PauseDone,
    ResumeDone,
    StopRequested,
    /// Stopped on request, or the guest powered itself off.
    Stopped,
    Failed,
    DeleteRequested,
    Deleted,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum DriverKind {
    Firecracker,
    Qemu,
    /// A container: weaker isolation, since it shares the host's kernel.
    Docker,
    /// No machine at all: scripted, for tests.
    Sim,
}

impl DriverKind {
    pub const ALL: &'static [Self] = &[Self::Firecracker, Self::Qemu, Self::Docker, Self::Sim];

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Firecracker => "firecracker",
            Self::Qemu => "qemu",
            Self::Docker => "docker",
            Self::Sim => "sim",
        }
    }
}

impl fmt::Display for DriverKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for DriverKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .iter()
            .copied()
            .find(|d| d.as_str() == text)
            .ok_or_else(|| "unknown driver; one of firecracker, qemu, docker, sim".to_owned())
    }
}

/// What a VM's memory and disk begin as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// The image, booted.
    #[default]
    Image,
    /// A template's snapshot; from its pool where that has a machine, and booted on the template's
    /// disk where its memory cannot be restored.
    Template(TemplateId),
    /// A snapshot, and nothing else in its place.
    Snapshot(SnapshotId),
    /// The VM exists to build this template, and goes when that is done. Not listed.
    Builder(TemplateId),
}

/// What was asked for, complete: defaults filled in and checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSpec {
    pub vcpus: u32,
    pub memory_mb: u32,
    /// Size of the writable layer; it takes room on the host only as it fills.
    pub disk_mb: u32,
    pub image: String,
    pub driver: DriverKind,
    /// Given to every command in the VM.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Time to live from creation; the VM is deleted when it is over.
    #[serde(default)]
    pub timeout_s: Option<u64>,
    #[serde(default)]
    pub network: NetworkPolicy,
    #[serde(default)]
    pub origin: Origin,
    /// By name, each once: the defaults, what the origin has, and what was asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tools: Vec<ToolRequest>,
    /// Where it is to be.
    #[serde(default, skip_serializing_if = "Placement::is_anywhere")]
    pub placement: Placement,
}

impl VmSpec {
    /// Checks what can be checked without the host; names the field and its bounds.
    pub fn validate(&self) -> Result<(), String> {
        validate_machine(self.vcpus, self.memory_mb, self.disk_mb, &self.image)?;
        if let Some(s) = self.timeout_s
            && (s == 0 || s > limits::VM_TIMEOUT_S_MAX)
        {
            return Err(format!("timeout_s: 1 to {} seconds", limits::VM_TIMEOUT_S_MAX));
        }
        validate_env("env", &self.env)?;
        validate_labels(&self.labels)?;
        validate_tools("tools", &self.tools)?;
        self.placement.validate()?;
        self.network.validate()
    }
}

/// What a VM and a template have in common.
pub(crate) fn validate_machine(
    vcpus: u32,
    memory_mb: u32,
    disk_mb: u32,
    image: &str,
) -> Result<(), String> {
    bounds("vcpus", vcpus, limits::VCPUS_MIN, limits::VCPUS_MAX)?;
    bounds("memory_mb", memory_mb, limits::MEMORY_MB_MIN, limits::MEMORY_MB_MAX)?;
    bounds("disk_mb", disk_mb, limits::DISK_MB_MIN, limits::DISK_MB_MAX)?;
    if image.is_empty() || image.len() > limits::IMAGE_NAME_BYTES_MAX {
        return Err(format!("image: 1 to {} bytes", limits::IMAGE_NAME_BYTES_MAX));
    }
    Ok(())
}

fn bounds(field: &str, value: u32, min: u32, max: u32) -> Result<(), String> {
    if (min..=max).contains(&value) {
        Ok(())
    } else {
        Err(format!("{field}: {value} is outside {min} to {max}"))
    }
}

/// Environment variables as Linux takes them. `field` names them in the error; values are never
/// repeated.
pub fn validate_env(field: &str, env: &BTreeMap<String, String>) -> Result<(), String> {
    if env.len() > limits::ENV_VARS_MAX {
        return Err(format!("{field}: at most {} variables", limits::ENV_VARS_MAX));
    }
    let mut total = 0;
    for (name, value) in env {
        if name.is_empty() || name.contains(['=', '\0']) {
            return Err(format!("{field}: a name must not be empty or contain `=` or NUL"));
        }
        if value.contains('\0') {
            return Err(format!("{field}: the value of `{name}` contains NUL"));
        }
        total += name.len() + value.len() + 2;
    }
    if total > limits::ENV_BYTES_MAX {
        return Err(format!("{field}: {total} bytes in all, at most {}", limits::ENV_BYTES_MAX));
    }
    Ok(())
}

pub(crate) fn validate_labels(labels: &BTreeMap<String, String>) -> Result<(), String> {
    if labels.len() > limits::LABELS_MAX {
        return Err(format!("labels: at most {}", limits::LABELS_MAX));
    }
    for (key, value) in labels {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/');
        if key.is_empty() || key.len() > limits::LABEL_KEY_BYTES_MAX || !key.chars().all(plain) {
            return Err(format!(
                "labels: a key has 1 to {} of the characters a-z A-Z 0-9 - _ . /",
                limits::LABEL_KEY_BYTES_MAX
            ));
        }
        if value.len() > limits::LABEL_VALUE_BYTES_MAX || value.contains(char::is_control) {
            return Err(format!(
                "labels: the value of `{key}` has more than {} bytes or control characters",
                limits::LABEL_VALUE_BYTES_MAX
            ));
        }
    }
    Ok(())
}

/// A VM's name is its host name: lower-case letters, digits and inner hyphens. It cannot look
/// like an id, since routes take either.
pub fn validate_name(name: &str) -> Result<(), String> {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let ok = !name.is_empty()
        && name.len() <= limits::VM_NAME_BYTES_MAX
        && name.chars().all(plain)
        && !name.starts_with('-')
        && !name.ends_with('-')
        && name.parse::<VmId>().is_err();
    if ok {
        Ok(())
    } else {
        Err(format!(
            "name: 1 to {} lower-case letters, digits and inner hyphens, and not an id",
            limits::VM_NAME_BYTES_MAX
        ))
    }
}

/// One change of state, kept for ever.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct StateChange {
    pub state: VmState,
    pub at: Timestamp,
    /// Why, where it is more than a request being carried out.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub reason: Option<Fault>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vm {
    pub id: VmId,
    pub project_id: ProjectId,
    pub name: String,
    pub state: VmState,
    /// Of the present state.
    pub reason: Option<Fault>,
    pub spec: VmSpec,
    /// The worker that has the VM.
    pub worker_id: Option<WorkerId>,
    /// The VM's own address, as it is seen on its network.
    pub address: Option<IpAddr>,
    pub created_at: Timestamp,
    pub updated_at: Timestamp,
    pub expires_at: Option<Timestamp>,
    /// How it last came to run.
    pub start: Option<StartReport>,
    /// The snapshot that holds its memory while it is stopped with its memory kept.
    pub memory: Option<SnapshotId>,
    /// Those of its specification, with what it got once it runs.
    pub tools: Vec<VmTool>,
    /// Counts every change; the store changes a VM only for one who knows the last.
    pub generation: i64,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const EVENTS: &[VmEvent] = &[
        VmEvent::Started,
        VmEvent::StartRequested,
        VmEvent::PauseDone,
        VmEvent::ResumeDone,
        VmEvent::StopRequested,
        VmEvent::Stopped,
        VmEvent::Failed,
        VmEvent::DeleteRequested,
        VmEvent::Deleted,
    ];

    #[test]
    fn every_state_but_deleted_can_be_deleted() {
        for &state in VmState::ALL {
            let after = state.apply(VmEvent::DeleteRequested);
            match state {
                VmState::Deleting | VmState::Deleted => assert_eq!(after, None),
                _ => assert_eq!(after, Some(VmState::Deleting)),
            }
        }
    }

    #[test]
    fn names_spell_themselves() {
        for &state in VmState::ALL {
            assert_eq!(serde_json::to_string(&state).unwrap(), format!("\"{state}\""));
            assert_eq!(state.to_string().parse(), Ok(state));
        }
        for &driver in DriverKind::ALL {
            assert_eq!(serde_json::to_string(&driver).unwrap(), format!("\"{driver}\""));
        }
    }

    #[test]
    fn names_are_host_names() {
        for good in ["a", "my-vm", "0", &"x".repeat(63)] {
            assert_eq!(validate_name(good), Ok(()));
        }
        let id = VmId::new().to_string();
        for bad in ["", "-a", "a-", "A", "a.b", "a b", "ä", &"x".repeat(64), id.as_str()] {
            assert!(validate_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn memory_is_kept_from_a_stop_to_the_end_of_a_start() {
        for &state in VmState::ALL {
            for next in EVENTS.iter().filter_map(|event| state.apply(*event)) {
                let lost = state.keeps_memory() && !next.keeps_memory();
                let ends = matches!(
                    next,
                    VmState::Running | VmState::Failed | VmState::Deleting | VmState::Deleted
                );
                assert!(!lost || ends, "lost from {state} to {next}");
            }
            assert!(!(state.keeps_memory() && state.takes_snapshots()));
        }
    }

    proptest! {
        /// Against a model of two booleans: a deleted VM never comes back, and a VM that is
        /// being deleted does nothing else.
        #[test]
        fn deletion_is_final(events in prop::collection::vec(prop::sample::select(EVENTS), 0..40)) {
            let (mut state, mut deleting, mut deleted) = (VmState::Creating, false, false);
            for event in events {
                let Some(next) = state.apply(event) else { continue };
                prop_assert!(!deleted, "left deleted by {event:?}");
                prop_assert!(!deleting || next == VmState::Deleted);
                deleting = next == VmState::Deleting;
                deleted = next == VmState::Deleted;
                state = next;
            }
        }
    }
}
