//! Building templates: what an image and steps give, in a snapshot that is named by the digest of
//! all that went into it. The same content is built once, whoever asks and how often.
//!
//! ```text
//!   task ──► digest ──► there? ──yes──────────────────────────────────► ready
//!                         └─no─► boot ──► files, steps, ready ──► seal ──┘
//! ```
//!
//! A build is safe to repeat from any point: nothing is in the template store before it is whole,
//! and the builder's machine is made anew by each attempt. The builder goes when its task ends.

mod cache;
mod digest;
mod lock;
mod steps;

use std::{path::PathBuf, sync::Arc, time::Duration};

use aether_drivers::{AfterSnapshot, Driver, GuestNetwork, SnapshotDisk};
use aether_protocol::Token;
use aether_store::{
    AttemptEnd, NewSnapshot, NewTask, NewTemplate, NewVm, SnapshotFacts, StoreError,
};
use aether_tools::LockedTool;
use aether_types::{
    Fault, MachineId, Origin, Placement, Priority, ProjectId, SnapshotId, SnapshotPurpose, TaskId,
    TaskKind, Template, TemplateId, TemplateSpec, TemplateState, ToolRequest, Vm, VmId, VmSpec,
    limits,
    template::{DEFAULT_TAG, DEFAULT_TEMPLATE},
};
use tokio::time::{sleep, timeout};

use self::steps::{Steps, build_failed, no_guest};
pub(crate) use self::{
    cache::TemplateCache,
    lock::Builds,
    steps::{SYNC_LIMIT, WARM_UP},
};
use crate::{
    attempt::{Attempt, done},
    failure::{Failure, blocking, internal},
    fault,
    phases::PhaseClock,
    reconcile,
    snapshot::Take,
    tool_build::Telling,
    worker::Core,
};

/// Addresses leave less to be done than a boot and commands.
const LAST_REST_PART: u32 = 5;
/// A program that starts waits no longer for a source of tools to say what is new.
const LOOK_UP_LIMIT: Duration = Duration::from_secs(5);

/// An image and a size, and nothing on top: its VMs may as well boot the image.
pub(crate) fn is_plain(spec: &TemplateSpec) -> bool {
    spec.files.is_empty() && spec.steps.is_empty() && spec.start.is_none() && spec.ready.is_none()
}

impl Core {
    /// Builds the template of a builder VM, or finds it built.
    pub(crate) async fn build_template(
        self: &Arc<Self>,
        attempt: &Attempt,
        vm: &Vm,
    ) -> Result<AttemptEnd, Failure> {
        let template = self.template_of(vm).await?;
        let telling = Telling::default();
        let digest = Box::pin(self.template_digest(&template.spec, &telling));
        let digest = self.told(attempt, &telling, digest).await?;
        let _turn = self.builds.turn(&digest).await;
        let _lock = lock::lock(self.build_lock(&digest)).await?;
        let facts = match self.found(&self.parts.templates, &digest).await? {
            Some(sealed) => sealed.facts,
            None => self.build_anew(attempt, vm, &template, &digest).await?,
        };
        Ok(AttemptEnd { snapshot: Some(facts), template: Some(digest), ..done() })
    }

    async fn build_anew(
        self: &Arc<Self>,
        attempt: &Attempt,
        vm: &Vm,
        template: &Template,
        digest: &str,
    ) -> Result<SnapshotFacts, Failure> {
        // An attempt that died may have left a builder at any step.
        self.undo_create(vm).await;
        let limit = Duration::from_secs(limits::TEMPLATE_BUILD_TIMEOUT_S);
        let built = match timeout(limit, self.build_in(attempt, vm, template, digest)).await {
            Ok(built) => built,
            Err(_) => {
                Err(build_failed(format!("the build took longer than {} s", limit.as_secs())))
            }
        };
        self.undo_create(vm).await;
        built
    }

    async fn build_in(
        self: &Arc<Self>,
        attempt: &Attempt,
        vm: &Vm,
        template: &Template,
        digest: &str,
    ) -> Result<SnapshotFacts, Failure> {
        let telling = Telling::default();
        let clock = PhaseClock::since(attempt.task.created_at);
        let started = self.create(vm, clock, &telling).await?;
        let guest = self.guests.get(vm.id).ok_or_else(no_guest)?;
        Steps::new(self, attempt, Arc::clone(&guest), template).run().await?;
        let (driver, token) = (&guest.driver, &guest.token);
        self.bring_to_rest(driver, guest.machine, token, &started.network).await?;
        guest.will_end(Fault::new(aether_types::ErrorCode::VmStopped, "the template is built"));
        let take = Take {
            store: &self.parts.templates,
            entry: digest.to_owned(),
            disk: SnapshotDisk::Include,
            after: AfterSnapshot::End,
        };
        self.take(vm, take).await
    }

    /// Lets the guest come to rest, and takes its addresses from it: what is left to be done is done
    /// once, and not in every clone. A clone that has none to give up is configured in less.
    pub(crate) async fn bring_to_rest(
        &self,
        driver: &Arc<dyn Driver>,
        machine: MachineId,
        token: &Token,
        network: &GuestNetwork,
    ) -> Result<(), Failure> {
        // Nothing tells when a kernel has no more to do.
        let rest = self.parts.config.template_rest;
        sleep(rest).await;
        self.take_addresses(driver, machine, token, network).await?;
        sleep(rest / LAST_REST_PART).await;
        Ok(())
    }

    async fn template_of(&self, vm: &Vm) -> Result<Arc<Template>, Failure> {
        let Origin::Builder(id) = vm.spec.origin else {
            return Err(Failure::last(internal("find the template to build")));
        };
        let template = self.template(id).await?;
        template.ok_or_else(|| Failure::last(internal("find the template to build")))
    }

    /// Builds what there is not of its tools: they are part of what it is.
    async fn template_digest(
        &self,
        spec: &TemplateSpec,
        telling: &Telling,
    ) -> Result<String, Failure> {
        let driver = self.driver_of(spec.driver)?;
        let format = driver.capabilities().snapshot_format.ok_or_else(|| {
            let text = format!("the {} driver takes no snapshots on this host", spec.driver);
            Failure::last(Fault::new(aether_types::ErrorCode::DriverUnavailable, text))
        })?;
        let (images, name) = (Arc::clone(&self.parts.images), spec.image.clone());
        let image = blocking("read the image", move || images.digest(&name)).await?;
        let tools = self.toolset(&spec.tools, &spec.image, spec.driver, telling).await?;
        digest::digest(spec, &image.map_err(Failure::last)?, &format, &tools.digests())
    }

    fn build_lock(&self, digest: &str) -> PathBuf {
        let entry = self.parts.templates.entry_path(digest);
        let root = entry.ancestors().nth(2).map(PathBuf::from).unwrap_or_default();
        root.join("builds").join(digest)
    }

    /// Asks for a template to be built again from what it was built from.
    pub(crate) async fn rebuild(self: &Arc<Self>, template: &Template) {
        let (name, tag) = (template.name.clone(), template.tag.clone());
        if let Err(error) = self.request_build(name, tag, template.spec.clone()).await {
            tracing::warn!(
                template = template.name,
                error = fault::chain(&error),
                "ask for a template to be built again"
            );
        }
    }

    /// The default template as it shall be; asks for its build where it is not.
    pub(crate) async fn ensure_default_template(
        self: &Arc<Self>,
        spec: TemplateSpec,
    ) -> Result<Template, EnsureError> {
        let Some(digest) = self.digest_at_hand(&spec).await? else {
            // Its tools are built by the task.
            return Ok(self
                .request_build(DEFAULT_TEMPLATE.into(), DEFAULT_TAG.into(), spec)
                .await?);
        };
        let known = self
            .parts
            .store
            .template_by_name(ProjectId::DEFAULT, DEFAULT_TEMPLATE, DEFAULT_TAG)
            .await?;
        let ready = known.filter(|template| {
            template.state == TemplateState::Ready && template.digest.as_ref() == Some(&digest)
        });
        if let Some(template) = ready {
            let found = self.found(&self.parts.templates, &digest).await;
            if found.is_ok_and(|sealed| sealed.is_some()) {
                return Ok(template);
            }
        }
        Ok(self.request_build(DEFAULT_TEMPLATE.into(), DEFAULT_TAG.into(), spec).await?)
    }

    /// The digest, unless some of the tools are yet to be built or looked up.
    async fn digest_at_hand(&self, spec: &TemplateSpec) -> Result<Option<String>, EnsureError> {
        let known = self.parts.tools.locked().await.unwrap_or_default();
        let is_there = |tool: &ToolRequest| {
            let is_it = |at: &LockedTool| at.name == tool.name && at.asked == tool.version;
            known.iter().any(|at| at.cached && is_it(at))
        };
        if !spec.tools.iter().all(is_there) {
            return Ok(None);
        }
        let telling = Telling::default();
        match timeout(LOOK_UP_LIMIT, self.template_digest(spec, &telling)).await {
            Ok(digest) => Ok(Some(digest.map_err(|f| EnsureError::Fault(f.fault))?)),
            Err(_) => Ok(None),
        }
    }

    /// Records the build as a client's request would be.
    async fn request_build(
        self: &Arc<Self>,
        name: String,
        tag: String,
        spec: TemplateSpec,
    ) -> Result<Template, StoreError> {
        let id = TemplateId::new();
        let builder = VmId::new();
        let vm = VmSpec {
            vcpus: spec.vcpus,
            memory_mb: spec.memory_mb,
            disk_mb: spec.disk_mb,
            image: spec.image.clone(),
            driver: spec.driver,
            env: spec.env.clone(),
            labels: std::collections::BTreeMap::new(),
            timeout_s: None,
            network: spec.network.clone(),
            origin: Origin::Builder(id),
            tools: spec.tools.clone(),
            placement: Placement::default(),
        };
        let task = NewTask {
            id: TaskId::new(),
            kind: TaskKind::TemplateBuild,
            priority: Priority::Low,
            max_attempts: limits::TASK_ATTEMPTS_MAX,
            project: None,
        };
        let snapshot =
            NewSnapshot { id: SnapshotId::new(), name: None, purpose: SnapshotPurpose::Template };
        let template = NewTemplate { id, name, tag, spec };
        let vm = NewVm { id: builder, name: format!("builder-{builder}"), spec: vm };
        let recorded = self.parts.store.build_template(template, snapshot, vm, task, None).await?;
        let (accepted, template) = recorded;
        if !accepted.repeated {
            self.publish_template(&template).await;
            // What is not dispatched now is by the next sweep.
            if let Err(error) = reconcile::dispatch(self, vec![accepted.task]).await {
                tracing::warn!(error = fault::chain(&error), "dispatch a build");
            }
        }
        Ok(template)
    }
}

/// Why the default template cannot be seen to.
#[derive(Debug, thiserror::Error)]
pub enum EnsureError {
    /// The image or the driver cannot give one.
    #[error("{0}")]
    Fault(Fault),
    #[error("record the build of the default template")]
    Store(#[from] StoreError),
}
