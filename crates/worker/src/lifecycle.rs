//! Operations on machines. Each is safe to repeat from any point at which an earlier attempt may
//! have died, and undoes itself where it fails.

use std::{sync::Arc, time::Duration};

use aether_drivers::{Driver, DriverError, GuestNetwork, MachineSpec, MachineState, Start};
use aether_logs::{Lines, LogService, LogStream};
use aether_protocol::{Shutdown, Token, host};
use aether_store::{VmChange, VmPatch};
use aether_types::{
    DriverKind, ErrorCode, Fault, MachineId, SnapshotId, StartKind, Vm, VmEvent, VmId, VmState,
};
use tokio::time::timeout;

use crate::{
    configure::Before,
    create::{Started, Starting},
    failure::{Failure, internal},
    fault,
    guest::Guest,
    metrics,
    phases::PhaseClock,
    tool_build::Telling,
    worker::Core,
};

impl Core {
    /// The guest takes commands from now on, and its end is noticed.
    pub(crate) fn admit(self: &Arc<Self>, guest: Arc<Guest>) {
        self.guests.insert(Arc::clone(&guest));
        let core = Arc::clone(self);
        self.spawn(async move {
            tokio::select! {
                () = core.closing.cancelled() => {}
                reason = guest.driver.exited(guest.machine) => core.machine_ended(&guest, reason).await,
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
        metrics::ended_by_itself(fault.code);
        tracing::warn!(vm.id = %guest.id, reason = %fault.code, "the VM ended by itself");
        let event = match reason {
            aether_drivers::ExitReason::GuestShutdown => VmEvent::Stopped,
            aether_drivers::ExitReason::Killed
            | aether_drivers::ExitReason::GuestPanic
            | aether_drivers::ExitReason::VmmDied => VmEvent::Failed,
        };
        self.change_vm(guest.id, event, Some(fault)).await;
        // Nobody waits for that.
        self.log_last_words(guest).await;
    }

    /// Why a guest ended by itself stands on its console, if anywhere.
    async fn log_last_words(&self, guest: &Guest) {
        let words = guest.driver.last_words(guest.machine).await;
        let logs = self.parts.logs.clone();
        let mut lines =
            Lines::new(logs, LogService::Guest, LogStream::Console).of(Some(guest.id), None);
        lines.push(words.as_bytes());
        lines.finish();
    }

    /// Brings a stopped or failed VM to run: with its memory where that was kept, else by a boot on
    /// its disk.
    pub(crate) async fn start(
        self: &Arc<Self>,
        vm: &Vm,
        clock: PhaseClock,
        telling: &Telling,
    ) -> Result<Started, Failure> {
        let driver = self.driver(vm)?;
        let inspected = driver.inspect(self.machine(vm.id)).await;
        let Some(machine) = inspected.map_err(|e| Failure::driver(&e, vm.id))? else {
            // A creation that failed left nothing; start it from the beginning.
            return self.create(vm, clock, telling).await;
        };
        let (Some(spec), Some(network)) = (machine.spec, machine.network) else {
            return Err(Failure::last(internal("read the VM's record")));
        };
        let starting = self.starting(vm, clock)?.with_layers(spec.layers.clone());
        let own = Own { token: parse_token(&spec)?, network, state: machine.state };
        let started = match vm.memory {
            Some(memory) => self.wake(starting, own, memory).await,
            None => self.boot_again(starting, own).await,
        };
        if started.is_err() {
            let _ = driver.kill(self.machine(vm.id)).await;
        }
        started
    }

    async fn boot_again(
        self: &Arc<Self>,
        mut starting: Starting<'_>,
        own: Own,
    ) -> Result<Started, Failure> {
        let vm = starting.vm;
        if own.state == MachineState::Running {
            let machine = self.machine(vm.id);
            let guest = Guest::new(vm.id, machine, Arc::clone(&starting.driver), own.token.clone());
            guest.set_layers(starting.places()?);
            let clock = &mut starting.clock;
            if self.configure_booted(vm, &guest, &own.network, clock).await.is_ok() {
                self.admit(guest);
                return Ok(starting.done(own.network, StartKind::Boot));
            }
            starting.driver.kill(machine).await.map_err(|e| Failure::driver(&e, vm.id))?;
        }
        let network = self.boot(&mut starting, own.token).await?;
        Ok(starting.done(network, StartKind::Boot))
    }

    /// Goes on where the VM was suspended. The driver refuses a memory whose disk has moved on: after
    /// a start that was interrupted, the VM fails and the next start boots the disk.
    async fn wake(
        self: &Arc<Self>,
        mut starting: Starting<'_>,
        own: Own,
        memory: SnapshotId,
    ) -> Result<Started, Failure> {
        let vm = starting.vm;
        let id = self.machine(vm.id);
        let guest = Guest::new(vm.id, id, Arc::clone(&starting.driver), own.token.clone());
        guest.set_layers(starting.places()?);
        // A memory is for its own machine, which has the same token before and after.
        let mac = own.network.mac.clone();
        let before = Before { token: &own.token, mac: &mac };
        if own.state != MachineState::Running {
            self.restore_own(&mut starting, id, memory).await?;
        }
        let network = self.present_network(&starting).await?;
        let clock = &mut starting.clock;
        let configured = self.configure_restored(vm, &guest, &network, before, clock).await;
        configured.map_err(|failure| Failure::last(failure.fault))?;
        self.admit(guest);
        Ok(starting.done(network, StartKind::Restore))
    }

    async fn restore_own(
        &self,
        starting: &mut Starting<'_>,
        id: MachineId,
        memory: SnapshotId,
    ) -> Result<(), Failure> {
        let sealed = self.sealed(&self.parts.snapshots, memory.to_string()).await?;
        starting.clock.mark("snapshot");
        sealed.check_format(&starting.driver).map_err(Failure::last)?;
        let _place = self.restores.acquire().await;
        starting.clock.mark("wait");
        let how = Start::Restore(sealed.files.clone());
        let started = starting.driver.start(id, how, self.parts.config.start_limit).await;
        let phases = started.map_err(|e| Failure::driver(&e, starting.vm.id))?;
        starting.clock.take(&phases);
        Ok(())
    }

    /// Asks the guest to end, waits, and ends it by force where it does not.
    pub(crate) async fn stop(&self, vm: &Vm, why: Fault, grace: Duration) -> Result<(), Failure> {
        let driver = self.driver(vm)?;
        if let Some(guest) = self.guests.get(vm.id) {
            guest.will_end(why);
            self.ask_to_end(vm, &guest, grace).await;
        }
        driver.kill(self.machine(vm.id)).await.map_err(|e| Failure::driver(&e, vm.id))?;
        self.guests.remove_guest(vm.id);
        Ok(())
    }

    async fn ask_to_end(&self, vm: &Vm, guest: &Guest, grace: Duration) {
        // A paused guest hears nothing.
        if vm.state == VmState::Paused && guest.driver.resume(guest.machine).await.is_err() {
            return;
        }
        let grace_ms = u32::try_from(grace.as_millis() / 2).unwrap_or(u32::MAX);
        let asked = guest.ask(grace / 2, |stream, token| async move {
            let wish = Shutdown { grace_ms, reboot: true };
            host::shutdown(stream, &token, wish, grace / 2).await
        });
        if asked.await.is_ok() && timeout(grace, guest.driver.exited(guest.machine)).await.is_err()
        {
            tracing::warn!(vm.id = %vm.id, "the guest did not end in time; it is ended by force");
        }
    }

    pub(crate) async fn delete(&self, vm: &Vm) -> Result<(), Failure> {
        if let Some(guest) = self.guests.get(vm.id) {
            guest.will_end(Fault::new(ErrorCode::VmStopped, "the VM was deleted"));
        }
        // A driver that this worker does not have has left nothing here.
        if let Ok(driver) = self.driver(vm) {
            driver.delete(self.machine(vm.id)).await.map_err(|e| Failure::driver(&e, vm.id))?;
        }
        self.guests.remove_guest(vm.id);
        Ok(())
    }

    pub(crate) async fn pause(&self, vm: &Vm) -> Result<(), Failure> {
        let driver = self.driver(vm)?;
        driver.pause(self.machine(vm.id)).await.map_err(|e| Failure::driver(&e, vm.id))
    }

    pub(crate) async fn resume(&self, vm: &Vm) -> Result<(), Failure> {
        let driver = self.driver(vm)?;
        driver.resume(self.machine(vm.id)).await.map_err(|e| Failure::driver(&e, vm.id))?;
        if let Some(guest) = self.guests.get(vm.id) {
            // The answer has the boot id too, of a guest that was adopted while it was paused.
            self.step_clock(&guest).await;
            self.guests.notify();
        }
        Ok(())
    }

    /// The host's side of a VM.
    pub(crate) fn machine(&self, id: VmId) -> MachineId {
        self.guests.machine(id)
    }

    pub(crate) fn driver(&self, vm: &Vm) -> Result<Arc<dyn Driver>, Failure> {
        self.driver_of(vm.spec.driver)
    }

    pub(crate) fn driver_of(&self, kind: DriverKind) -> Result<Arc<dyn Driver>, Failure> {
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
        match self.parts.store.change_vm(id, Some(self.registration()), change).await {
            Ok(vm) => {
                self.guests.notify();
                self.publish_vm(&vm).await;
            }
            // Nor where the VM is not this worker's any more.
            Err(aether_store::StoreError::WrongState { .. } | aether_store::StoreError::Fenced) => {
            }
            Err(error) => {
                tracing::error!(vm.id = %id, error = fault::chain(&error), "record a change");
            }
        }
    }
}

/// A machine that a VM has already.
struct Own {
    token: Token,
    network: GuestNetwork,
    state: MachineState,
}

pub(crate) fn parse_token(spec: &MachineSpec) -> Result<Token, Failure> {
    Token::from_hex(&spec.token).map_err(|_| Failure::last(internal("read the VM's record")))
}
