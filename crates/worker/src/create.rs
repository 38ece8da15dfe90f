//! How a VM comes to be what it begins as.
//!
//! ```text
//!   image     boot
//!   template  a machine of its pool ──► restore (with its tools, see `derive`) ──► boot on its disk ──► boot its image (no steps)
//!   snapshot  restore, and nothing else
//! ```
//!
//! Each arrow is a way that is slower than the one before and gives the same VM; why it was taken
//! is in the report of the start and in the log.

use std::sync::Arc;

use aether_drivers::{
    Driver, GuestNetwork, LayerFile, MachineSpec, MachineState, Phase, SnapshotFiles, Start,
};
use aether_protocol::{Layer, Token};
use aether_types::{
    ErrorCode, Fault, MachineId, NetworkPolicy, Origin, SnapshotId, StartKind, StartReport,
    Template, TemplateId, Vm, VmTool,
};
use tokio::time::Instant;

use crate::{
    configure::new_token,
    derive::{self, covers},
    failure::{Failure, blocking, internal},
    guest::Guest,
    lifecycle::parse_token,
    phases::PhaseClock,
    pool::{InHand, Spare, Turn},
    sealed::Sealed,
    tool_build::Telling,
    toolset::{self, Toolset},
    worker::Core,
};

/// A VM that runs.
pub(crate) struct Started {
    pub(crate) network: GuestNetwork,
    pub(crate) report: StartReport,
    /// What it has of what it asks for, where that was looked at.
    pub(crate) tools: Option<Vec<VmTool>>,
}

/// A start in hand.
pub(crate) struct Starting<'a> {
    pub(crate) vm: &'a Vm,
    pub(crate) driver: Arc<dyn Driver>,
    pub(crate) clock: PhaseClock,
    /// Nothing is made for a pool while somebody waits for this.
    in_hand: InHand,
    toolset: Arc<Toolset>,
    /// Of the machine, once it is known.
    layers: Vec<LayerFile>,
    /// Why the faster ways were not taken.
    fallback: Vec<String>,
}

impl Starting<'_> {
    pub(crate) fn done(self, network: GuestNetwork, kind: StartKind) -> Started {
        let fallback = (!self.fallback.is_empty()).then(|| self.fallback.join("; "));
        let tools = &self.toolset.tools;
        let tools = (!tools.is_empty()).then(|| tools.clone());
        Started { network, report: self.clock.report(kind, fallback), tools }
    }

    pub(crate) fn with_layers(mut self, layers: Vec<LayerFile>) -> Self {
        self.layers = layers;
        self
    }

    /// As the guest is told of its layers.
    pub(crate) fn places(&self) -> Result<Vec<Layer>, Failure> {
        toolset::places(&self.layers)
    }

    fn falls_back(&mut self, from: &str, why: &Fault) {
        tracing::warn!(vm.id = %self.vm.id, code = %why.code, reason = why.message,
            "the VM cannot begin by {from}; the next slower way is taken");
        self.fallback.push(format!("{from}: {}", why.message));
    }
}

impl Core {
    pub(crate) fn starting<'a>(
        &self,
        vm: &'a Vm,
        clock: PhaseClock,
    ) -> Result<Starting<'a>, Failure> {
        let (driver, in_hand) = (self.driver(vm)?, self.pools.begin());
        Ok(Starting {
            vm,
            driver,
            clock,
            in_hand,
            toolset: Arc::default(),
            layers: Vec::new(),
            fallback: Vec::new(),
        })
    }

    /// Makes the machine, brings its guest to run and configures it. On failure nothing is left of
    /// it.
    pub(crate) async fn create(
        self: &Arc<Self>,
        vm: &Vm,
        clock: PhaseClock,
        telling: &Telling,
    ) -> Result<Started, Failure> {
        let made = self.make_with_tools(vm, clock, telling).await;
        if made.is_err() {
            self.undo_create(vm).await;
        }
        made
    }

    /// Nothing is made for a VM before its tools are there.
    async fn make_with_tools(
        self: &Arc<Self>,
        vm: &Vm,
        clock: PhaseClock,
        telling: &Telling,
    ) -> Result<Started, Failure> {
        let toolset = self.toolset_of(vm, telling).await?;
        let mut starting = self.starting(vm, clock)?;
        if !toolset.layers.is_empty() {
            starting.clock.mark("tools");
        }
        starting.toolset = Arc::new(toolset);
        self.make(starting).await
    }

    async fn make(self: &Arc<Self>, mut starting: Starting<'_>) -> Result<Started, Failure> {
        if let Some(network) = self.finish_earlier_create(&mut starting).await? {
            return Ok(starting.done(network, StartKind::Boot));
        }
        match starting.vm.spec.origin {
            Origin::Image | Origin::Builder(_) => {
                let network = self.boot_new(&mut starting, None).await?;
                Ok(starting.done(network, StartKind::Boot))
            }
            Origin::Template(id) => self.from_template(starting, id).await,
            Origin::Snapshot(id) => self.from_snapshot(starting, id).await,
        }
    }

    /// An attempt that died may have left a machine that lacks nothing but the word that it runs.
    /// One that was restored is made anew: nobody knows how much of its snapshot's life it leads.
    async fn finish_earlier_create(
        self: &Arc<Self>,
        starting: &mut Starting<'_>,
    ) -> Result<Option<GuestNetwork>, Failure> {
        let vm = starting.vm;
        let id = self.machine(vm.id);
        let inspected = starting.driver.inspect(id).await;
        let Some(machine) = inspected.map_err(|e| Failure::driver(&e, vm.id))? else {
            return Ok(None);
        };
        let booted = matches!(vm.spec.origin, Origin::Image) && machine.spec.is_some();
        if let (true, MachineState::Running, Some(spec), Some(network)) =
            (booted, machine.state, machine.spec, machine.network)
        {
            let guest = Guest::new(vm.id, id, Arc::clone(&starting.driver), parse_token(&spec)?);
            guest.set_layers(toolset::places(&spec.layers)?);
            let clock = &mut starting.clock;
            if self.configure_booted(vm, &guest, &network, clock).await.is_ok() {
                self.admit(guest);
                return Ok(Some(network));
            }
        }
        self.remove_machine(vm).await?;
        Ok(None)
    }

    /// Removes the machine, so that the VM can be made again, as another one.
    pub(crate) async fn remove_machine(&self, vm: &Vm) -> Result<(), Failure> {
        if let Some(guest) = self.guests.get(vm.id) {
            guest.will_end(Fault::new(ErrorCode::VmStopped, "the VM was not to be kept"));
        }
        self.guests.remove_guest(vm.id);
        let deleted = self.driver(vm)?.delete(self.machine(vm.id)).await;
        deleted.map_err(|error| Failure::driver(&error, vm.id))?;
        self.guests.set_machine(vm.id, vm.id.into());
        Ok(())
    }

    /// What stays is in the driver's journal: the next attempt, the VM's deletion or the next start
    /// tries again.
    pub(crate) async fn undo_create(&self, vm: &Vm) {
        if let Err(failure) = self.remove_machine(vm).await {
            tracing::error!(vm.id = %vm.id, reason = failure.fault.message, "undo a creation");
        }
    }

    async fn from_template(
        self: &Arc<Self>,
        mut starting: Starting<'_>,
        id: TemplateId,
    ) -> Result<Started, Failure> {
        let known = self.template(id).await?;
        let is_covered = known.is_none_or(|known| covers(&known, &starting.vm.spec.tools));
        if is_covered && let Some(network) = self.from_pool(&mut starting, id).await? {
            return Ok(starting.done(network, StartKind::Pool));
        }
        let template = self.ready_template(id).await?;
        starting.clock.mark("wait");
        let digest = template.digest.clone().unwrap_or_default();
        let sealed = match self.sealed(&self.parts.templates, digest).await {
            Ok(sealed) => sealed,
            Err(failure) => return self.without_files(starting, &template, failure).await,
        };
        let there = sealed.files.layers();
        let entry = derive::entry(&template, &there, &starting.toolset);
        let derived = match &entry {
            Some(entry) => self.derived(entry).await,
            None => None,
        };
        starting.clock.mark("snapshot");
        let to_derive = entry.filter(|_| derived.is_none());
        if !is_covered
            && derived.is_none()
            && let Some(network) = self.from_pool(&mut starting, id).await?
        {
            self.derive_what_was_missing(&starting, &template, to_derive);
            return Ok(starting.done(network, StartKind::Pool));
        }
        let sealed = derived.unwrap_or(sealed);
        let fits =
            sealed.check_format(&starting.driver).and_then(|()| sealed.check_size(starting.vm));
        let restored = match fits {
            Ok(()) => self.restore(&mut starting, &sealed).await,
            Err(fault) => Err(Failure::last(fault)),
        };
        match restored {
            Ok(network) => {
                self.derive_what_was_missing(&starting, &template, to_derive);
                return Ok(starting.done(network, StartKind::Restore));
            }
            Err(failure) => {
                starting.falls_back("restoring its template", &failure.fault);
                self.remove_machine(starting.vm).await?;
            }
        }
        let network = self.boot_new(&mut starting, Some(&sealed.files)).await?;
        Ok(starting.done(network, StartKind::Boot))
    }

    /// The next VM with these tools begins with them.
    fn derive_what_was_missing(
        self: &Arc<Self>,
        starting: &Starting<'_>,
        template: &Arc<Template>,
        entry: Option<String>,
    ) {
        if let Some(entry) = entry {
            self.derive_later(Arc::clone(template), Arc::clone(&starting.toolset), entry);
        }
    }

    /// `None`: the pool has no machine for this VM.
    async fn from_pool(
        self: &Arc<Self>,
        starting: &mut Starting<'_>,
        id: TemplateId,
    ) -> Result<Option<GuestNetwork>, Failure> {
        let vm = starting.vm;
        let Some(template) = self.template(id).await? else { return Ok(None) };
        let spec = (template.spec.vcpus, template.spec.memory_mb, template.spec.disk_mb);
        if spec != (vm.spec.vcpus, vm.spec.memory_mb, vm.spec.disk_mb) {
            return Ok(None);
        }
        let Some(spare) = self.pools.claim(id, &starting.in_hand) else { return Ok(None) };
        match self.become_vm(starting, spare).await {
            Ok(network) => Ok(Some(network)),
            Err(failure) => {
                starting.falls_back("a machine of the pool", &failure.fault);
                self.remove_machine(vm).await?;
                Ok(None)
            }
        }
    }

    async fn become_vm(
        self: &Arc<Self>,
        starting: &mut Starting<'_>,
        spare: Spare,
    ) -> Result<GuestNetwork, Failure> {
        let vm = starting.vm;
        let Spare { machine, driver, token, network, boot_id, layers, connection } = spare;
        // Known before it is the VM's, so that whoever gives up deletes it.
        self.guests.set_machine(vm.id, machine);
        let guest = Guest::new(vm.id, machine, driver, token);
        guest.set_boot_id(&boot_id);
        let wanted = starting.toolset.over(&layers);
        if wanted.len() > layers.len() {
            let added = guest.driver.add_layers(machine, &wanted).await;
            added.map_err(|e| Failure::driver(&e, vm.id))?;
            guest.set_layers(toolset::places(&wanted)?);
        }
        // Rules that are the VM's own are there before it runs. Else only the record is to be
        // made; until then the machine is a spare one that a next start of the worker removes.
        let has_rules = vm.spec.network != NetworkPolicy::default();
        let claim = async || {
            let claimed = guest.driver.claim(machine, vm.id, &vm.spec.network).await;
            claimed.map_err(|e| Failure::driver(&e, vm.id))
        };
        if has_rules {
            claim().await?;
        }
        starting.clock.mark("pool");
        let begun = Instant::now();
        let resume = async {
            let resumed = guest.driver.resume(machine).await;
            resumed.map_err(|e| Failure::driver(&e, vm.id))?;
            let took = begun.elapsed();
            if !has_rules {
                claim().await?;
            }
            Ok(took)
        };
        // The words are on their way before the guest runs, which hears them first of all.
        let configure = self.configure_claimed(vm, &guest, &network, connection);
        let (took, ()) = tokio::try_join!(resume, configure)?;
        starting.clock.take(&[Phase { name: "resume", took }]);
        starting.clock.mark("configure");
        self.admit(guest);
        Ok(network)
    }

    /// The template's files are gone or damaged. One without steps is its image and no more.
    async fn without_files(
        self: &Arc<Self>,
        mut starting: Starting<'_>,
        template: &Template,
        failure: Failure,
    ) -> Result<Started, Failure> {
        if !crate::template::is_plain(&template.spec) {
            return Err(failure);
        }
        starting.falls_back("its template", &failure.fault);
        self.rebuild(template).await;
        let network = self.boot_new(&mut starting, None).await?;
        Ok(starting.done(network, StartKind::Boot))
    }

    async fn from_snapshot(
        self: &Arc<Self>,
        mut starting: Starting<'_>,
        id: SnapshotId,
    ) -> Result<Started, Failure> {
        self.ready_snapshot(id).await?;
        starting.clock.mark("wait");
        let sealed = self.sealed(&self.parts.snapshots, id.to_string()).await?;
        starting.clock.mark("snapshot");
        sealed
            .check_format(&starting.driver)
            .and_then(|()| sealed.check_size(starting.vm))
            .map_err(Failure::last)?;
        let network = self.restore(&mut starting, &sealed).await?;
        Ok(starting.done(network, StartKind::Restore))
    }

    /// A new machine that goes on where the snapshot was taken.
    async fn restore(
        self: &Arc<Self>,
        starting: &mut Starting<'_>,
        sealed: &Sealed,
    ) -> Result<GuestNetwork, Failure> {
        let vm = starting.vm;
        let _place = self.restores.acquire().await;
        starting.clock.mark("wait");
        let id = MachineId::from(vm.id);
        let mut spec = spec_of(sealed, id, Some(vm))?;
        spec.layers = starting.toolset.over(&spec.layers);
        let guest = Guest::new(vm.id, id, Arc::clone(&starting.driver), parse_token(&spec)?);
        guest.set_layers(toolset::places(&spec.layers)?);
        let failed = |e| Failure::driver(&e, vm.id);
        let network = starting.driver.create(spec).await.map_err(failed)?;
        starting.clock.mark("create");
        let how = Start::Restore(sealed.files.clone());
        let limit = self.parts.config.start_limit;
        let phases = starting.driver.start(id, how, limit).await.map_err(failed)?;
        starting.clock.take(&phases);
        let clock = &mut starting.clock;
        self.configure_restored(vm, &guest, &network, sealed.before(), clock).await?;
        self.admit(guest);
        Ok(network)
    }

    /// A new machine that boots: on an empty layer over its image, or on a snapshot's disk.
    async fn boot_new(
        self: &Arc<Self>,
        starting: &mut Starting<'_>,
        disk_from: Option<&SnapshotFiles>,
    ) -> Result<GuestNetwork, Failure> {
        let vm = starting.vm;
        let mut spec = self.machine_spec(vm, disk_from).await?;
        spec.layers = starting.toolset.over(&spec.layers);
        starting.layers.clone_from(&spec.layers);
        let token = parse_token(&spec)?;
        let created = starting.driver.create(spec).await;
        created.map_err(|e| Failure::driver(&e, vm.id))?;
        starting.clock.mark("create");
        self.boot(starting, token).await
    }

    async fn machine_spec(
        &self,
        vm: &Vm,
        disk_from: Option<&SnapshotFiles>,
    ) -> Result<MachineSpec, Failure> {
        // What is written on a snapshot's disk is over the very root file system of its image.
        let boot = if let Some(files) = disk_from {
            files.machine.boot.clone()
        } else {
            let (images, name) = (Arc::clone(&self.parts.images), vm.spec.image.clone());
            let resolved = blocking("read the image", move || images.resolve(&name)).await?;
            resolved.map_err(Failure::last)?
        };
        Ok(MachineSpec {
            id: vm.id.into(),
            vm: Some(vm.id),
            vcpus: vm.spec.vcpus,
            memory_mb: vm.spec.memory_mb,
            disk_mb: vm.spec.disk_mb,
            boot,
            network: vm.spec.network.clone(),
            token: new_token()?.to_hex(),
            disk_from: disk_from.cloned(),
            // What was written over them is on the disk.
            layers: disk_from.map(SnapshotFiles::layers).unwrap_or_default(),
            output_mb: None,
        })
    }

    /// Boots a machine that is there and configures its guest.
    pub(crate) async fn boot(
        self: &Arc<Self>,
        starting: &mut Starting<'_>,
        token: Token,
    ) -> Result<GuestNetwork, Failure> {
        let vm = starting.vm;
        let id = self.machine(vm.id);
        let guest = Guest::new(vm.id, id, Arc::clone(&starting.driver), token);
        guest.set_layers(starting.places()?);
        {
            let _place = self.boots.acquire().await;
            starting.clock.mark("wait");
            let limit = self.parts.config.start_limit;
            let started = starting.driver.start(id, Start::Boot, limit).await;
            let phases = started.map_err(|e| Failure::driver(&e, vm.id))?;
            starting.clock.take(&phases);
        }
        let network = self.present_network(starting).await?;
        self.configure_booted(vm, &guest, &network, &mut starting.clock).await?;
        self.admit(guest);
        Ok(network)
    }

    /// A machine whose network was given back has another address after its next start.
    pub(crate) async fn present_network(
        &self,
        starting: &Starting<'_>,
    ) -> Result<GuestNetwork, Failure> {
        let vm = starting.vm.id;
        let found = starting.driver.inspect(self.machine(vm)).await;
        let machine = found.map_err(|e| Failure::driver(&e, vm))?;
        let network = machine.and_then(|machine| machine.network);
        network.ok_or_else(|| Failure::last(internal("read the VM's record")))
    }

    /// A machine of a template that is nobody's yet: restored and configured, with these tools, and
    /// running, without a connection. What a failure leaves is the caller's to delete.
    pub(crate) async fn restore_spare(
        &self,
        template: &Template,
        id: MachineId,
        turn: &Turn,
        toolset: &Toolset,
    ) -> Result<Spare, Failure> {
        let driver = self.driver_of(template.spec.driver)?;
        let digest = template.digest.clone().unwrap_or_default();
        let sealed = self.sealed(&self.parts.templates, digest).await?;
        sealed.check_format(&driver).map_err(Failure::last)?;
        let mut spec = spec_of(&sealed, id, None)?;
        let there = spec.layers.len();
        spec.layers = toolset.over(&spec.layers);
        // What the snapshot has is mounted in it.
        let added = if spec.layers.len() > there { toolset::places(&spec.layers)? } else { vec![] };
        let (token, layers) = (parse_token(&spec)?, spec.layers.clone());
        let failed = |e: aether_drivers::DriverError| Failure::machine(&e, id);
        turn.pass().await;
        let network = driver.create(spec).await.map_err(failed)?;
        driver.set_background(id, true).await.map_err(failed)?;
        turn.pass().await;
        let limit = self.parts.config.start_limit;
        driver.start(id, Start::Restore(sealed.files.clone()), limit).await.map_err(failed)?;
        turn.pass().await;
        let before = sealed.before();
        let configured = self.configure_spare(&driver, id, &network, &token, before, added);
        let boot_id = configured.await?;
        let connection = None;
        Ok(Spare { machine: id, driver, token, network, boot_id, layers, connection })
    }
}

/// A machine that can be restored from this: for a VM, or for none yet.
fn spec_of(sealed: &Sealed, id: MachineId, vm: Option<&Vm>) -> Result<MachineSpec, Failure> {
    let machine = &sealed.files.machine;
    Ok(MachineSpec {
        id,
        vm: vm.map(|vm| vm.id),
        vcpus: machine.vcpus,
        memory_mb: machine.memory_mb,
        disk_mb: machine.disk_mb,
        boot: machine.boot.clone(),
        network: vm.map(|vm| vm.spec.network.clone()).unwrap_or_default(),
        token: new_token()?.to_hex(),
        disk_from: Some(sealed.files.clone()),
        layers: sealed.files.layers(),
        output_mb: None,
    })
}
