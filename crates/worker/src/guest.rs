//! The guests that this worker has, and how to reach their agents.

use std::{
    collections::HashMap,
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Waker},
    time::Duration,
};

use aether_drivers::{Driver, ExitReason};
use aether_protocol::{
    AGENT_PORT, Layer, Token,
    host::{BoxStream, ClientError},
    limits::HANDSHAKE_LIMIT,
};
use aether_streams::GuestConnection;
use aether_types::{ErrorCode, Fault, MachineId, VmId, limits};
use tokio::{
    io::{AsyncRead as _, ReadBuf},
    sync::{Mutex as AsyncMutex, Semaphore, watch},
    time::Instant,
};

use crate::{fault, metrics};

/// A fresh snapshot load may accept a first connection and never answer it; so may a guest whose
/// agent is being replaced.
const FIRST_EXCHANGE_TRIES: u32 = 2;
/// An agent closes a connection on which nothing was asked within its own, longer limit.
const EARLY_AGE_MAX: Duration = Duration::from_secs(HANDSHAKE_LIMIT.as_secs() / 2);

/// What ended, or is ending, a guest's life. Commands in it end with this.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Ending {
    /// Someone decided that the VM shall end; said before anything is done.
    pub(crate) wanted: Option<Fault>,
    /// The VMM has ended.
    pub(crate) exited: Option<ExitReason>,
}

impl Ending {
    pub(crate) fn fault(&self) -> Option<Fault> {
        self.wanted.clone().or_else(|| self.exited.map(fault::from_exit))
    }
}

/// A VM with a machine on this host, from its first boot to its deletion.
pub(crate) struct Guest {
    pub(crate) id: VmId,
    pub(crate) machine: MachineId,
    pub(crate) driver: Arc<dyn Driver>,
    pub(crate) token: Token,
    pub(crate) ending: watch::Sender<Ending>,
    /// Changes when the guest boots and when its agent is replaced.
    pub(crate) boot_id: Mutex<String>,
    pub(crate) places: Semaphore,
    /// Its tools, as it is told of them.
    layers: Mutex<Vec<Layer>>,
    /// Opened ahead for the first command, and when the guest came to know of it.
    early: Mutex<Option<(Instant, BoxStream)>>,
}

impl Guest {
    pub(crate) fn new(
        id: VmId,
        machine: MachineId,
        driver: Arc<dyn Driver>,
        token: Token,
    ) -> Arc<Self> {
        Arc::new(Self {
            id,
            machine,
            driver,
            token,
            ending: watch::Sender::new(Ending::default()),
            boot_id: Mutex::default(),
            places: Semaphore::new(limits::EXECUTIONS_PER_VM_MAX),
            layers: Mutex::default(),
            early: Mutex::default(),
        })
    }

    pub(crate) fn layers(&self) -> Vec<Layer> {
        self.layers.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Before it is configured.
    pub(crate) fn set_layers(&self, layers: Vec<Layer>) {
        *self.layers.lock().unwrap_or_else(PoisonError::into_inner) = layers;
    }

    pub(crate) fn boot_id(&self) -> String {
        self.boot_id.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn set_boot_id(&self, boot_id: &str) {
        boot_id.clone_into(&mut self.boot_id.lock().unwrap_or_else(PoisonError::into_inner));
    }

    pub(crate) fn will_end(&self, why: Fault) {
        self.ending.send_modify(|ending| ending.wanted = Some(why));
    }

    /// Completes with the reason once the guest's end is wanted or has come.
    pub(crate) async fn ended(&self) -> Fault {
        let mut watcher = self.ending.subscribe();
        // The sender lives as long as `self`, so waiting cannot fail.
        let found = watcher.wait_for(|ending| ending.fault().is_some()).await;
        let fault = found.ok().and_then(|ending| ending.fault());
        fault.unwrap_or_else(|| fault::from_exit(ExitReason::VmmDied))
    }

    /// Keeps a connection for the next command that can be repeated.
    pub(crate) fn keep_early(&self, stream: Option<BoxStream>) {
        *self.early() = stream.map(|stream| (Instant::now(), stream));
    }

    /// A connection for a command that can be repeated: the one that was opened ahead may end in
    /// the moment in which it is used.
    pub(crate) async fn connect_for_run(&self, limit: Duration) -> Result<BoxStream, Fault> {
        let early = self.early().take();
        if let Some((since, mut stream)) = early
            && since.elapsed() < EARLY_AGE_MAX
            && is_silent(&mut stream)
        {
            return Ok(stream);
        }
        Ok(self.connect(limit).await?.stream)
    }

    // Nothing panics while the lock is held.
    fn early(&self) -> std::sync::MutexGuard<'_, Option<(Instant, BoxStream)>> {
        self.early.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) async fn connect(&self, limit: Duration) -> Result<GuestConnection, Fault> {
        match self.driver.connect(self.machine, AGENT_PORT, limit).await {
            Ok(stream) => Ok(GuestConnection { stream, token: self.token.to_hex() }),
            Err(error) => {
                tracing::debug!(vm.id = %self.id, error = fault::chain(&error), "connect");
                Err(fault::from_driver(&error))
            }
        }
    }

    /// One question to the agent, on a connection of its own; asked once more where the
    /// connection fails, so the question must be harmless to repeat.
    pub(crate) async fn ask<T, F, Fut>(&self, limit: Duration, question: F) -> Result<T, AskError>
    where
        F: Fn(aether_protocol::host::BoxStream, Token) -> Fut,
        Fut: Future<Output = Result<T, ClientError>>,
    {
        let mut tries = 0;
        loop {
            tries += 1;
            let stream =
                self.driver.connect(self.machine, AGENT_PORT, limit).await.map_err(|e| {
                    tracing::debug!(vm.id = %self.id, error = fault::chain(&e), "connect");
                    AskError::Connect(fault::from_driver(&e))
                })?;
            match question(stream, self.token.clone()).await {
                Err(error) if error.is_connection_lost() && tries < FIRST_EXCHANGE_TRIES => {
                    tracing::debug!(vm.id = %self.id, error = fault::chain(&error), "ask again");
                }
                other => return other.map_err(AskError::Client),
            }
        }
    }
}

/// Whether the peer has said nothing, its end included.
fn is_silent(stream: &mut BoxStream) -> bool {
    let mut byte = [0; 1];
    let mut context = Context::from_waker(Waker::noop());
    Pin::new(stream).poll_read(&mut context, &mut ReadBuf::new(&mut byte)).is_pending()
}

/// Why a question to a guest has no answer.
#[derive(Debug)]
pub(crate) enum AskError {
    Connect(Fault),
    Client(ClientError),
}

impl AskError {
    pub(crate) fn fault(&self) -> Fault {
        match self {
            Self::Connect(fault) => fault.clone(),
            Self::Client(error) => fault::from_client(error),
        }
    }
}

/// What is known of a VM here: its guest, while it has one, and the order of operations on it.
#[derive(Default)]
struct Slot {
    order: Arc<AsyncMutex<()>>,
    guest: Option<Arc<Guest>>,
}

#[derive(Default)]
pub(crate) struct Guests {
    slots: Mutex<HashMap<VmId, Slot>>,
    /// Machines of VMs that do not have their VM's own id: they come from a pool.
    machines: Mutex<HashMap<VmId, MachineId>>,
    changed: watch::Sender<()>,
}

impl Guests {
    /// The host's side of a VM.
    pub(crate) fn machine(&self, id: VmId) -> MachineId {
        self.machines().get(&id).copied().unwrap_or_else(|| id.into())
    }

    pub(crate) fn set_machine(&self, id: VmId, machine: MachineId) {
        if machine == MachineId::from(id) {
            self.machines().remove(&id);
        } else {
            self.machines().insert(id, machine);
        }
    }

    /// Held during an operation on the VM.
    pub(crate) fn order(&self, id: VmId) -> Arc<AsyncMutex<()>> {
        Arc::clone(&self.slots().entry(id).or_default().order)
    }

    pub(crate) fn get(&self, id: VmId) -> Option<Arc<Guest>> {
        self.slots().get(&id).and_then(|slot| slot.guest.clone())
    }

    pub(crate) fn all(&self) -> Vec<Arc<Guest>> {
        self.slots().values().filter_map(|slot| slot.guest.clone()).collect()
    }

    pub(crate) fn insert(&self, guest: Arc<Guest>) {
        let id = guest.id;
        let mut slots = self.slots();
        slots.entry(id).or_default().guest = Some(guest);
        count(&slots);
        drop(slots);
        self.changed.send_replace(());
    }

    pub(crate) fn remove_guest(&self, id: VmId) {
        let mut slots = self.slots();
        if let Some(slot) = slots.get_mut(&id) {
            slot.guest = None;
        }
        count(&slots);
        drop(slots);
        self.changed.send_replace(());
    }

    /// Forgets a VM that is gone, unless an operation still waits for its turn.
    pub(crate) fn forget(&self, id: VmId) {
        let mut slots = self.slots();
        if slots.get(&id).is_some_and(|slot| Arc::strong_count(&slot.order) <= 2) {
            slots.remove(&id);
        } else if let Some(slot) = slots.get_mut(&id) {
            slot.guest = None;
        }
        count(&slots);
        drop(slots);
        self.machines().remove(&id);
        self.changed.send_replace(());
    }

    /// Those who wait for a guest look again.
    pub(crate) fn notify(&self) {
        self.changed.send_replace(());
    }

    /// Completes at the next change of any guest.
    pub(crate) fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    // Nothing panics while the lock is held.
    fn machines(&self) -> std::sync::MutexGuard<'_, HashMap<VmId, MachineId>> {
        self.machines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // Nothing panics while the lock is held.
    fn slots(&self) -> std::sync::MutexGuard<'_, HashMap<VmId, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn count(slots: &HashMap<VmId, Slot>) {
    metrics::vms(slots.values().filter(|slot| slot.guest.is_some()).count());
}

#[async_trait::async_trait]
impl aether_streams::GuestLink for GuestLinks {
    async fn connect(&self, vm: VmId) -> Result<GuestConnection, Fault> {
        let guest = self.guests.get(vm).ok_or_else(|| {
            Fault::new(ErrorCode::VmStateConflict, "the VM does not run on this worker")
        })?;
        if let Some(fault) = guest.ending.borrow().fault() {
            return Err(fault);
        }
        guest.connect(self.limit).await
    }
}

/// The way to guests that the gateway is given.
pub(crate) struct GuestLinks {
    pub(crate) guests: Arc<Guests>,
    pub(crate) limit: Duration,
}
