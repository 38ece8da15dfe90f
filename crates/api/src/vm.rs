use std::{collections::BTreeMap, net::IpAddr};

use aether_types::{
    DriverKind, Fault, NetworkPolicy, Origin, Placement, SnapshotId, StartKind, StartReport,
    StateChange, TemplateId, Timestamp, Vm, VmId, VmState, VmTool, WorkerId,
};
use serde::{Deserialize, Serialize};

/// `POST /vms`. Everything has a default.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct CreateVm {
    /// Unique among VMs that are not deleted; made from the id where it is not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(with = "Option<aether_types::schema::VmName>"))]
    pub name: Option<String>,
    /// A template to begin as: `name`, `name:tag` or an id. Not together with `image`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub template: Option<String>,
    /// A snapshot to begin as: its name or id. It decides the size too.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = aether_types::limits::VCPUS_MIN, max = aether_types::limits::VCPUS_MAX)))]
    pub vcpus: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = aether_types::limits::MEMORY_MB_MIN, max = aether_types::limits::MEMORY_MB_MAX)))]
    pub memory_mb: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = aether_types::limits::DISK_MB_MIN, max = aether_types::limits::DISK_MB_MAX)))]
    pub disk_mb: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(with = "Option<aether_types::schema::Image>"))]
    pub image: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub driver: Option<DriverKind>,
    /// Given to every command in the VM. Values are never shown again.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    #[cfg_attr(feature = "schema", schemars(with = "aether_types::schema::Env"))]
    pub env: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    #[cfg_attr(feature = "schema", schemars(with = "aether_types::schema::Labels"))]
    pub labels: BTreeMap<String, String>,
    /// Time to live from creation; the VM is deleted when it is over.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = aether_types::limits::VM_TIMEOUT_S_MAX)))]
    pub timeout_s: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkPolicy>,
    /// Tools of the catalogue, beside the defaults: `go`, `go@1.23.1`, `go=1.23`. One that is a
    /// default too, or that the template has, takes its place.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(feature = "schema", schemars(with = "aether_types::schema::ToolTexts"))]
    pub tools: Vec<String>,
    /// As `tools`; for clients that give names here and versions below.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(feature = "schema", schemars(with = "aether_types::schema::ToolTexts"))]
    pub additional_tools: Vec<String>,
    /// Versions of tools that are asked for above or are there by default.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    #[cfg_attr(feature = "schema", schemars(with = "aether_types::schema::ToolVersions"))]
    pub tool_versions: BTreeMap<String, String>,
    /// `false`: only the tools that are asked for. A template or a snapshot has the tools that it
    /// has, so not together with one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub default_tools: Option<bool>,
    /// Which workers it may go to: `{"zone": "eu-1", "labels": {"gpu": "a100"}}`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub placement: Option<Placement>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum OriginKind {
    Image,
    Template,
    Snapshot,
    /// The VM exists to build a template, and goes when that is done.
    Builder,
}

/// What a VM's memory and disk began as.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct OriginView {
    pub kind: OriginKind,
    /// `name:tag`, as it was then: the name may belong to a newer template by now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template_id: Option<TemplateId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot_id: Option<SnapshotId>,
}

impl OriginView {
    /// `template` is the name of the template that `origin` has, where it is known.
    #[must_use]
    pub fn new(origin: Origin, template: Option<String>) -> Self {
        let (kind, template_id, snapshot_id) = match origin {
            Origin::Image => (OriginKind::Image, None, None),
            Origin::Template(id) => (OriginKind::Template, Some(id), None),
            Origin::Snapshot(id) => (OriginKind::Snapshot, None, Some(id)),
            Origin::Builder(id) => (OriginKind::Builder, Some(id), None),
        };
        Self { kind, template, template_id, snapshot_id }
    }
}

/// How a VM came to run, and where the time went: from the moment at which the request was
/// recorded to the guest's readiness for commands.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct StartView {
    pub kind: StartKind,
    /// The sum of the phases.
    pub total_ms: f64,
    pub phases: Vec<PhaseView>,
    /// Why it was not the faster way that the VM's origin has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fallback: Option<String>,
}

/// One step of a start. The next begins where it ends.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct PhaseView {
    pub name: String,
    pub ms: f64,
}

impl From<StartReport> for StartView {
    fn from(report: StartReport) -> Self {
        let phases = report.phases.into_iter();
        Self {
            kind: report.kind,
            total_ms: ms(report.total_us),
            phases: phases.map(|phase| PhaseView { name: phase.name, ms: ms(phase.us) }).collect(),
            fallback: report.fallback,
        }
    }
}

/// A VM as it is now.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct VmView {
    pub id: VmId,
    pub name: String,
    pub state: VmState,
    /// Why it is in this state, where it is more than a request being carried out.
    pub reason: Option<Fault>,
    pub driver: DriverKind,
    /// How strong the wall around the VM is, in words; weaker forms say so.
    pub isolation: Option<String>,
    pub vcpus: u32,
    pub memory_mb: u32,
    pub disk_mb: u32,
    pub image: String,
    pub origin: OriginView,
    /// How it last came to run.
    pub start: Option<StartView>,
    /// It is stopped with its memory kept: a start goes on where it was.
    pub memory_kept: bool,
    /// By name: what was asked for, what it got, and when that was run to see that it works.
    #[serde(default)]
    pub tools: Vec<VmTool>,
    /// Names only.
    pub env: Vec<String>,
    pub labels: BTreeMap<String, String>,
    pub network: NetworkPolicy,
    pub address: Option<IpAddr>,
    /// The worker that has it, or is to have it. `null`: it waits for one.
    pub worker_id: Option<WorkerId>,
    /// Which workers it may be on.
    #[serde(default, skip_serializing_if = "Placement::is_anywhere")]
    pub placement: Placement,
    pub timeout_s: Option<u64>,
    pub created_at: Timestamp,
    pub updated_at: Timestamp,
    pub expires_at: Option<Timestamp>,
    /// Every change of state, oldest first. Only in the answer about one VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub history: Option<Vec<StateChange>>,
}

impl VmView {
    /// `template` is the name of the template that the VM began as, where it is known.
    #[must_use]
    pub fn new(
        vm: Vm,
        isolation: Option<String>,
        template: Option<String>,
        history: Option<Vec<StateChange>>,
    ) -> Self {
        let Vm {
            id,
            // That of the key that asks.
            project_id: _,
            name,
            state,
            reason,
            spec,
            worker_id,
            address,
            created_at,
            updated_at,
            expires_at,
            start,
            memory,
            tools,
            generation: _,
        } = vm;
        Self {
            id,
            name,
            state,
            reason,
            driver: spec.driver,
            isolation,
            vcpus: spec.vcpus,
            memory_mb: spec.memory_mb,
            disk_mb: spec.disk_mb,
            image: spec.image,
            origin: OriginView::new(spec.origin, template),
            start: start.map(StartView::from),
            memory_kept: memory.is_some(),
            tools,
            env: spec.env.into_keys().collect(),
            labels: spec.labels,
            network: spec.network,
            address,
            worker_id,
            placement: spec.placement,
            timeout_s: spec.timeout_s,
            created_at,
            updated_at,
            expires_at,
            history,
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "no step takes the 2^53 microseconds")]
pub(crate) fn ms(us: u64) -> f64 {
    us as f64 / 1000.0
}
