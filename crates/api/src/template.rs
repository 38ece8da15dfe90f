use std::collections::BTreeMap;

use aether_types::{
    DriverKind, Fault, NetworkPolicy, SnapshotId, TaskId, Template, TemplateFile, TemplateId,
    TemplateProgress, TemplateReady, TemplateSpec, TemplateState, TemplateStep, Timestamp, VmId,
};
use serde::{Deserialize, Serialize};

use crate::PoolView;

/// `POST /templates`. Also the form of a template file. Everything but the name has a default.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct BuildTemplate {
    #[cfg_attr(feature = "schema", schemars(with = "aether_types::schema::PlainName"))]
    pub name: String,
    /// `latest` where it is not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(with = "Option<aether_types::schema::PlainName>"))]
    pub tag: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(with = "Option<aether_types::schema::Image>"))]
    pub image: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub driver: Option<DriverKind>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = aether_types::limits::VCPUS_MIN, max = aether_types::limits::VCPUS_MAX)))]
    pub vcpus: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = aether_types::limits::MEMORY_MB_MIN, max = aether_types::limits::MEMORY_MB_MAX)))]
    pub memory_mb: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = aether_types::limits::DISK_MB_MIN, max = aether_types::limits::DISK_MB_MAX)))]
    pub disk_mb: Option<u32>,
    /// Run last and left running: a server that is up in every VM from its first moment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(with = "Option<aether_types::schema::Command>"))]
    pub start: Option<String>,
    /// Of the build, and of every command in VMs made from it, unless they have their own. Values
    /// are never shown again.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[cfg_attr(feature = "schema", schemars(with = "aether_types::schema::Env"))]
    pub env: BTreeMap<String, String>,
    /// The snapshot is taken when this is so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready: Option<TemplateReady>,
    /// What the build may reach.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkPolicy>,
    /// Written before the first step.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(feature = "schema", schemars(length(max = aether_types::limits::TEMPLATE_FILES_MAX)))]
    pub files: Vec<TemplateFile>,
    /// One after the other, as root; one that fails ends the build.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(feature = "schema", schemars(length(max = aether_types::limits::TEMPLATE_STEPS_MAX)))]
    pub steps: Vec<TemplateStep>,
    /// Tools of the catalogue, beside the defaults: `go`, `go@1.23.1`. There for the steps, and in
    /// every VM made from it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(feature = "schema", schemars(with = "aether_types::schema::ToolTexts"))]
    pub tools: Vec<String>,
    /// `false`: only the tools that are asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub default_tools: Option<bool>,
}

/// A template as it is now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct TemplateView {
    pub id: TemplateId,
    pub name: String,
    pub tag: String,
    pub state: TemplateState,
    /// Why it is in this state, where it is more than a request being carried out.
    pub reason: Option<Fault>,
    /// What it was built from, in hex; known when it is ready.
    pub digest: Option<String>,
    pub spec: TemplateSpecView,
    /// How far the build has come. The log is empty in lists.
    pub progress: TemplateProgress,
    pub size_bytes: Option<u64>,
    pub snapshot_id: SnapshotId,
    pub task_id: TaskId,
    /// The VM in which it is, or was, built.
    pub builder_id: VmId,
    /// Machines that wait to become VMs of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<PoolView>,
    pub created_at: Timestamp,
    pub updated_at: Timestamp,
    /// Counts every change; `?generation=` waits for one.
    pub generation: i64,
}

/// What a template is made from, without what may be secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct TemplateSpecView {
    pub image: String,
    pub driver: DriverKind,
    pub vcpus: u32,
    pub memory_mb: u32,
    pub disk_mb: u32,
    /// Names only.
    pub env: Vec<String>,
    pub network: NetworkPolicy,
    /// `name@version`, as they were asked for, by name.
    #[serde(default)]
    pub tools: Vec<String>,
    /// This and what follows only in the answer about one template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub files: Option<Vec<TemplateFileView>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steps: Option<Vec<TemplateStep>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready: Option<TemplateReady>,
}

/// A file without its content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct TemplateFileView {
    pub path: String,
    pub size_bytes: u64,
    /// Permission bits.
    pub mode: u32,
}

impl From<TemplateFile> for TemplateFileView {
    fn from(file: TemplateFile) -> Self {
        Self { size_bytes: file.content.len() as u64, path: file.path, mode: file.mode }
    }
}

impl From<TemplateSpec> for TemplateSpecView {
    fn from(spec: TemplateSpec) -> Self {
        Self {
            image: spec.image,
            driver: spec.driver,
            vcpus: spec.vcpus,
            memory_mb: spec.memory_mb,
            disk_mb: spec.disk_mb,
            env: spec.env.into_keys().collect(),
            network: spec.network,
            tools: spec.tools.iter().map(ToString::to_string).collect(),
            files: Some(spec.files.into_iter().map(TemplateFileView::from).collect()),
            steps: Some(spec.steps),
            start: spec.start,
            ready: spec.ready,
        }
    }
}

impl TemplateView {
    /// All of it.
    #[must_use]
    pub fn new(template: Template, pool: Option<PoolView>) -> Self {
        let Template {
            id,
            // That of the key that asks.
            project_id: _,
            name,
            tag,
            state,
            reason,
            spec,
            digest,
            snapshot_id,
            builder_id,
            task_id,
            progress,
            size_bytes,
            created_at,
            updated_at,
            generation,
        } = template;
        Self {
            id,
            name,
            tag,
            state,
            reason,
            digest,
            spec: spec.into(),
            progress,
            size_bytes,
            snapshot_id,
            task_id,
            builder_id,
            pool,
            created_at,
            updated_at,
            generation,
        }
    }

    /// Without what can be long: for lists.
    #[must_use]
    pub fn brief(template: Template, pool: Option<PoolView>) -> Self {
        let mut view = Self::new(template, pool);
        view.progress.log.clear();
        let spec = &mut view.spec;
        (spec.files, spec.steps, spec.start, spec.ready) = (None, None, None, None);
        view
    }

    /// `name:tag`.
    #[must_use]
    pub fn full_name(&self) -> String {
        format!("{}:{}", self.name, self.tag)
    }
}
