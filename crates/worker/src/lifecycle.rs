//! Operations on machines. Each is safe to repeat from any point at which an earlier attempt may
//! have died, and undoes itself where it fails.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use aether_drivers::{Driver, DriverError, GuestNetwork, MachineSpec, MachineState};
use aether_protocol::{
    Configure, Dns, EnvVar, Environment, Hosts, HostsEntry, Interface, Shutdown, TOKEN_BYTES,
    Token, host,
};
use aether_store::{VmChange, VmPatch};
use aether_types::{ErrorCode, Fault, Vm, VmEvent, VmId, VmState};
use tokio::time::timeout;

use crate::{fault, guest::Guest, worker::Core};

/// How an operation went wrong.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) fault: Fault,
    /// Another attempt may do better.
    pub(crate) retryable: bool,
}

impl Failure {
    pub(crate) fn last(fault: Fault) -> Self {
        Self { fault, retryable: false }
    }

    fn driver(error: &DriverError, vm: VmId) -> Self {
        tracing::warn!(vm.id = %vm, error = fault::chain(error), "driver");
        Self { fault: fault::from_driver(error), retryable: error.is_retryable() }
    }
}

impl Core {
    /// Makes the machine, boots it and configures its guest. On failure nothing is left of it.
    pub(crate) async fn create(self: &Arc<Self>, vm: &Vm) -> Result<GuestNetwork, Failure> {
        let driver = self.driver(vm)?;
        let made = self.make(vm, &driver).await;
        if made.is_err() {
            self.undo_create(vm.id, &driver).await;
        }
        made
    }

    async fn make(
        self: &Arc<Self>,
        vm: &Vm,
        driver: &Arc<dyn Driver>,
    ) -> Result<GuestNetwork, Failure> {
        if let Some(network) = self.finish_earlier_create(vm, driver).await {
            return Ok(network);
        }
        let spec = self.machine_spec(vm).await?;
        let token = parse_token(&spec)?;
        let network = driver.create(spec).await.map_err(|e| Failure::driver(&e, vm.id))?;
        self.boot(vm, driver, token, &network).await?;
        Ok(network)
    }

    /// An attempt that died may have left a machine that lacks nothing but the word that it runs.
    async fn finish_earlier_create(
        self: &Arc<Self>,
        vm: &Vm,
        driver: &Arc<dyn Driver>,
    ) -> Option<GuestNetwork> {
        let machine = driver.inspect(vm.id).await.ok()??;
        let (spec, network) = (machine.spec?, machine.network?);
        if machine.state == MachineState::Running {
            let guest = Guest::new(vm.id, Arc::clone(driver), parse_token(&spec).ok()?);
            if self.configure(vm, &guest, &network).await.is_ok() {
                self.admit(guest);
                return Some(network);
            }
        }
        self.undo_create(vm.id, driver).await;
        None
    }

    async fn undo_create(&self, id: VmId, driver: &Arc<dyn Driver>) {
        self.guests.remove_guest(id);
        if let Err(error) = driver.delete(id).await {
            // The journal still has it; reconciling tries again.
            tracing::error!(vm.id = %id, error = fault::chain(&error), "undo a creation");
        }
    }

    async fn machine_spec(&self, vm: &Vm) -> Result<MachineSpec, Failure> {
        let (images, name) = (Arc::clone(&self.parts.images), vm.spec.image.clone());
        let boot = tokio::task::spawn_blocking(move || images.resolve(&name))
            .await
            .map_err(|_| Failure::last(internal("read the image")))?
            .map_err(Failure::last)?;
        let mut token = [0; TOKEN_BYTES];
        getrandom::fill(&mut token).map_err(|_| Failure::last(internal("make a token")))?;
        Ok(MachineSpec {
            vm_id: vm.id,
            vcpus: vm.spec.vcpus,
            memory_mb: vm.spec.memory_mb,
            disk_mb: vm.spec.disk_mb,
            boot,
            network: vm.spec.network.clone(),
            token: Token::from_bytes(token).to_hex(),
        })
    }

    async fn boot(
        self: &Arc<Self>,
        vm: &Vm,
        driver: &Arc<dyn Driver>,
        token: Token,
        network: &GuestNetwork,
    ) -> Result<(), Failure> {
        let guest = Guest::new(vm.id, Arc::clone(driver), token);
        {
            let _place = self.boots.acquire().await;
            let limit = self.parts.config.start_limit;
            driver.start(vm.id, limit).await.map_err(|e| Failure::driver(&e, vm.id))?;
        }
        self.configure(vm, &guest, network).await?;
        self.admit(guest);
        Ok(())
    }

    /// Gives the guest its name, addresses, environment, clock and randomness. The same words
    /// after a boot as after a restore.
    async fn configure(
        &self,
        vm: &Vm,
        guest: &Guest,
        network: &GuestNetwork,
    ) -> Result<(), Failure> {
        let limit = self.parts.config.guest_limit;
        let words = configuration(vm, network)?;
        let ask = guest.ask(limit, |stream, token| {
            let words = words.clone();
            async move {
                let pong = host::ping(stream, &token, limit).await?;
                Ok((pong, words))
            }
        });
        let failed = |e: crate::guest::AskError| Failure { fault: e.fault(), retryable: true };
        let (pong, words) = ask.await.map_err(failed)?;
        guest.set_boot_id(&pong.boot_id);
        let ask = guest.ask(limit, |stream, token| {
            // Stepped at the last moment: the clock is as old as the words.
            let words = Configure { unix_time_ns: Some(unix_time_ns()), ..words.clone() };
            async move { host::configure(stream, &token, words, limit).await }
        });
        let configured = ask.await.map_err(failed)?;
        for warning in configured.warnings {
            tracing::warn!(vm.id = %vm.id, warning, "the guest is not wholly configured");
        }
        Ok(())
    }

    /// The guest takes commands from now on, and its end is noticed.
    pub(crate) fn admit(self: &Arc<Self>, guest: Arc<Guest>) {
        self.guests.insert(Arc::clone(&guest));
        let core = Arc::clone(self);
        self.spawn(async move {
            tokio::select! {
                () = core.closing.cancelled() => {}
                reason = guest.driver.exited(guest.id) => core.machine_ended(&guest, reason).await,
            }
        });
    }

    async fn machine_ended(
        &self,
        guest: &Guest,
        reason: Result<aether_drivers::ExitReason, DriverError>,
    ) {
        let reason = reason.unwrap_or(aether_drivers::ExitReason::VmmDied);
        let mut wanted = false;
        guest.ending.send_modify(|ending| {
            ending.exited = Some(reason);
            wanted = ending.wanted.is_some();
        });
        if wanted {
            return;
        }
        self.guests.remove_guest(guest.id);
        let fault = fault::from_exit(reason);
        tracing::warn!(vm.id = %guest.id, reason = %fault.code, "the VM ended by itself");
        let event = match reason {
            aether_drivers::ExitReason::GuestShutdown => VmEvent::Stopped,
            aether_drivers::ExitReason::Killed
            | aether_drivers::ExitReason::GuestPanic
            | aether_drivers::ExitReason::VmmDied => VmEvent::Failed,
        };
        self.change_vm(guest.id, event, Some(fault)).await;
    }

    /// Boots a stopped or failed VM on its disk.
    pub(crate) async fn start(self: &Arc<Self>, vm: &Vm) -> Result<GuestNetwork, Failure> {
        let driver = self.driver(vm)?;
        let inspected = driver.inspect(vm.id).await.map_err(|e| Failure::driver(&e, vm.id))?;
        let Some(machine) = inspected else {
            // A creation that failed left nothing; start it from the beginning.
            return self.create(vm).await;
        };
        let (Some(spec), Some(network)) = (machine.spec, machine.network) else {
            return Err(Failure::last(internal("read the VM's record")));
        };
        let token = parse_token(&spec)?;
        if machine.state == MachineState::Running {
            let guest = Guest::new(vm.id, Arc::clone(&driver), token.clone());
            if self.configure(vm, &guest, &network).await.is_ok() {
                self.admit(guest);
                return Ok(network);
            }
            driver.kill(vm.id).await.map_err(|e| Failure::driver(&e, vm.id))?;
        }
        let booted = self.boot(vm, &driver, token, &network).await;
        if booted.is_err() {
            let _ = driver.kill(vm.id).await;
        }
        booted.map(|()| network)
    }

    /// Asks the guest to end, waits, and ends it by force where it does not.
    pub(crate) async fn stop(&self, vm: &Vm, why: Fault, grace: Duration) -> Result<(), Failure> {
        let driver = self.driver(vm)?;
        if let Some(guest) = self.guests.get(vm.id) {
            guest.will_end(why);
            self.ask_to_end(vm, &guest, grace).await;
        }
        driver.kill(vm.id).await.map_err(|e| Failure::driver(&e, vm.id))?;
        self.guests.remove_guest(vm.id);
        Ok(())
    }

    async fn ask_to_end(&self, vm: &Vm, guest: &Guest, grace: Duration) {
        // A paused guest hears nothing.
        if vm.state == VmState::Paused && guest.driver.resume(vm.id).await.is_err() {
            return;
        }
        let grace_ms = u32::try_from(grace.as_millis() / 2).unwrap_or(u32::MAX);
        let asked = guest.ask(grace / 2, |stream, token| async move {
            let wish = Shutdown { grace_ms, reboot: true };
            host::shutdown(stream, &token, wish, grace / 2).await
        });
        if asked.await.is_ok() && timeout(grace, guest.driver.exited(vm.id)).await.is_err() {
            tracing::warn!(vm.id = %vm.id, "the guest did not end in time; it is ended by force");
        }
    }

    pub(crate) async fn delete(&self, vm: &Vm) -> Result<(), Failure> {
        if let Some(guest) = self.guests.get(vm.id) {
            guest.will_end(Fault::new(ErrorCode::VmStopped, "the VM was deleted"));
        }
        // A driver that this worker does not have has left nothing here.
        if let Ok(driver) = self.driver(vm) {
            driver.delete(vm.id).await.map_err(|e| Failure::driver(&e, vm.id))?;
        }
        self.guests.remove_guest(vm.id);
        Ok(())
    }

    pub(crate) async fn pause(&self, vm: &Vm) -> Result<(), Failure> {
        let driver = self.driver(vm)?;
        driver.pause(vm.id).await.map_err(|e| Failure::driver(&e, vm.id))
    }

    pub(crate) async fn resume(&self, vm: &Vm) -> Result<(), Failure> {
        let driver = self.driver(vm)?;
        driver.resume(vm.id).await.map_err(|e| Failure::driver(&e, vm.id))?;
        if let Some(guest) = self.guests.get(vm.id).filter(|guest| guest.boot_id().is_empty()) {
            self.refresh_boot_id(&guest).await;
            self.guests.notify();
        }
        Ok(())
    }

    pub(crate) fn driver(&self, vm: &Vm) -> Result<Arc<dyn Driver>, Failure> {
        let kind = vm.spec.driver;
        let found = self.parts.drivers.iter().find(|d| d.capabilities().kind == kind);
        found.cloned().ok_or_else(|| {
            let text = format!("this worker has no {kind} driver");
            Failure::last(Fault::new(ErrorCode::DriverUnavailable, text))
        })
    }

    /// A change that no task asked for. Where the state machine does not have it, someone was
    /// faster, and the VM is as they left it.
    pub(crate) async fn change_vm(&self, id: VmId, event: VmEvent, reason: Option<Fault>) {
        let change = VmChange { event, reason, patch: VmPatch::default() };
        match self.parts.store.change_vm(id, change).await {
            Ok(vm) => {
                self.guests.notify();
                self.publish_vm(&vm).await;
            }
            Err(aether_store::StoreError::WrongState { .. }) => {}
            Err(error) => {
                tracing::error!(vm.id = %id, error = fault::chain(&error), "record a change");
            }
        }
    }
}

fn configuration(vm: &Vm, network: &GuestNetwork) -> Result<Configure, Failure> {
    let mut entropy = vec![0; 64];
    getrandom::fill(&mut entropy).map_err(|_| Failure::last(internal("read randomness")))?;
    let text = |address: &std::net::IpAddr| address.to_string();
    let mut entries = vec![
        HostsEntry { address: "127.0.0.1".into(), names: vec!["localhost".into()] },
        HostsEntry { address: "::1".into(), names: vec!["localhost".into()] },
    ];
    entries.extend(
        network.addresses.first().map(|(address, _)| HostsEntry {
            address: text(address),
            names: vec![vm.name.clone()],
        }),
    );
    Ok(Configure {
        hostname: Some(vm.name.clone()),
        machine_id: Some(vm.id.to_string().replace('-', "")),
        env: Some(Environment {
            vars: vm.spec.env.iter().map(|(name, value)| EnvVar::new(name, value)).collect(),
        }),
        interfaces: vec![Interface {
            mac: network.mac.clone(),
            new_mac: None,
            addresses: network.addresses.iter().map(|(a, p)| format!("{a}/{p}")).collect(),
            gateways: network.gateways.iter().map(text).collect(),
            mtu: Some(network.mtu),
        }],
        dns: Some(Dns { servers: network.dns.iter().map(text).collect(), search: Vec::new() }),
        hosts: Some(Hosts { entries }),
        unix_time_ns: None,
        entropy: entropy.into(),
    })
}

fn unix_time_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

pub(crate) fn parse_token(spec: &MachineSpec) -> Result<Token, Failure> {
    Token::from_hex(&spec.token).map_err(|_| Failure::last(internal("read the VM's record")))
}

fn internal(action: &str) -> Fault {
    Fault::new(ErrorCode::Internal, format!("the worker could not {action}; its log says why"))
}
