//! The network of this host's VMs.
//!
//! ```text
//!   host                      ┊ namespace aether-ID
//!                             ┊                                         VMM, in the namespace
//!   eth0 ── nat ── aeIDh ─────┊───── aehost ── rules ─┬─ aeu8  ═ TAP ═ eth0 of VM in slot 8
//!                veth pair    ┊                     ├─ aeu9  ═ TAP ═ eth0 of VM in slot 9
//!                             ┊              no route  aec9  ═ TAP ═ its private link (QEMU)
//! ```
//!
//! A container has a veth pair in the place of the TAP, under the same name and the same rules.
//!
//! Each VM's TAP is a link of its own: routed, not bridged. VMs share no Ethernet, so there is
//! none on which one could pose as another, and a VM that is allowed to reach another passes the
//! same rules as to anywhere else. To the guests the range looks like one network all the same: the
//! namespace answers ARP for every address of it.
//!
//! Invariants
//! - Everything is in the journal before it exists: what all VMs share under [`Owner::Host`], the
//!   rest under its VM.
//! - The rules fail closed: an empty set opens nothing, and so does a packet nobody thought of.
//! - What changes the host runs in a thread of its own, to its end, also if the caller is dropped.
//! - Every step can be repeated; making and mending are the same code.
//!
//! What this deliberately does not do: IPv6 for guests (refused, not ignored), ports of the host
//! that lead into VMs, names in rules.

mod channel;
mod control;
mod elements;
mod foreign;
mod instance;
mod lane;
mod leftovers;
mod link;
mod namespace;
mod netlink;
mod range;
mod resolver;
mod rules;

use std::{
    collections::HashMap,
    fmt,
    net::{IpAddr, Ipv4Addr},
    os::fd::{AsFd as _, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use aether_types::{MachineId, NetworkPolicy};
use rustix::io::Errno;
use tokio::time::{Instant, sleep};

pub use self::{
    channel::{READY_PORT, ReadyListener},
    leftovers::leftovers,
    range::{Ipv4Range, ParseRangeError},
};
use self::{
    control::{Control, Held, Links, Request, Slot},
    foreign::HostLock,
    instance::{Builder, Names, Surroundings},
    lane::Lane,
};
use crate::{
    DriverError, GuestNetwork,
    fault::FaultPoints,
    journal::{Journal, Owner, Resource},
};

/// From fork to exec, on a busy host.
const TAP_BUSY_LIMIT: Duration = Duration::from_secs(2);
/// Nothing says when such a copy is closed.
const TAP_BUSY_PAUSE: Duration = Duration::from_millis(1);

/// How the network is to be.
#[derive(Debug, Clone, Default)]
pub struct NetworkConfig {
    /// Addresses of the VMs. Refused where anything else on the host has a part of it. `None`:
    /// 10.213.0.0/16, or the next free one like it.
    pub range: Option<Ipv4Range>,
    /// Resolvers that guests use. Empty: the host's own.
    pub dns: Vec<IpAddr>,
    pub fault: FaultPoints,
}

/// What one VM has of the network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    /// The TAP that carries the guest's network; in [`Network::namespace`].
    pub tap: String,
    /// The TAP of the private link to the guest's agent, where one was asked for.
    pub channel_tap: Option<String>,
    pub guest: GuestNetwork,
    /// The host, as VMs see it: what an allow rule for a service on the host names.
    pub uplink_host_address: IpAddr,
}

/// The network while it is up.
struct Live {
    builder: Builder,
    around: Mutex<Surroundings>,
    namespace: OwnedFd,
    /// Changes links and rules.
    inner: Lane,
    /// Makes sockets, so that a connection never waits for a link.
    sockets: Lane,
    control: Arc<Mutex<Control>>,
    /// A copy for readers that must not wait for a change.
    attached: Mutex<HashMap<MachineId, (Slot, bool)>>,
}

struct Shared {
    config: NetworkConfig,
    journal: Journal,
    /// In the host's namespace. Making, mending and removing the network happen here, in turn.
    host: Lane,
    live: Mutex<Option<Arc<Live>>>,
}

/// Cheap to clone.
#[derive(Clone)]
pub struct Network(Arc<Shared>);

impl fmt::Debug for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Network").field("config", &self.0.config).finish_non_exhaustive()
    }
}

/// What is behind our locks changes in steps that leave it sound.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Network {
    /// Makes the instance's network, or takes over the one that an earlier process left; mends
    /// what is missing of it. The host's side is the network namespace of the calling thread.
    pub async fn open(config: NetworkConfig, journal: Journal) -> Result<Self, DriverError> {
        let host = Lane::spawn("aether-host", None)?;
        let network = Self(Arc::new(Shared { config, journal, host, live: Mutex::new(None) }));
        network.live().await?;
        Ok(network)
    }

    /// Makes the VM's links, address and rules. Repeating it is harmless, mends what is missing
    /// and changes the policy. On failure everything made is undone. Once begun it completes, also
    /// if dropped. A network that was closed is made anew.
    pub async fn attach(
        &self,
        vm: MachineId,
        policy: &NetworkPolicy,
        owner_uid: u32,
        channel_link: bool,
    ) -> Result<Attachment, DriverError> {
        let links = Links::Taps { owner_uid, channel: channel_link };
        self.attach_with(vm, policy, links).await
    }

    /// The same for a VM in a network namespace of its own: address and rules, and a veth pair with
    /// each [`Network::plug`].
    pub async fn attach_veth(
        &self,
        vm: MachineId,
        policy: &NetworkPolicy,
    ) -> Result<Attachment, DriverError> {
        self.attach_with(vm, policy, Links::Veth).await
    }

    /// Makes the veth pair of a VM that was attached for one, into the namespace in which the VM
    /// has just begun, and gives the VM's end its address. Repeating it makes the pair anew.
    pub async fn plug(&self, vm: MachineId, netns: OwnedFd) -> Result<(), DriverError> {
        let live = self.current().ok_or_else(closed)?;
        let range = live.builder.range;
        let (slot, _) = *locked(&live.attached).get(&vm).ok_or(DriverError::UnknownVm(vm))?;
        let (inner, netns) = (live.inner.clone(), Arc::new(netns));
        let into = Arc::clone(&netns);
        inner.run(move || locked(&live.control).plug(vm, into.as_fd())).await?;
        let guest = Lane::spawn("aether-guest", Some(netns.as_fd()))?;
        let (address, prefix, gateway) = (range.at(slot.0), range.prefix(), range.gateway());
        guest
            .run(move || {
                link::set_up_guest(address, prefix, gateway)
                    .map_err(|e| instance::failed("set up the link in the VM's namespace", e))
            })
            .await
    }

    async fn attach_with(
        &self,
        vm: MachineId,
        policy: &NetworkPolicy,
        links: Links,
    ) -> Result<Attachment, DriverError> {
        let request = Arc::new(Request { policy: policy.clone(), links });
        loop {
            let live = self.live().await?;
            let (inner, request, at) = (live.inner.clone(), Arc::clone(&request), live.clone());
            let attached = inner.run(move || {
                let mut control = locked(&at.control);
                if control.closed {
                    return Ok(None);
                }
                let result = control.attach(vm, &request);
                at.publish(&control, vm);
                Ok(Some(at.attachment(&result?)))
            });
            // Closed in between; the next round opens it again.
            if let Some(attachment) = attached.await? {
                return Ok(attachment);
            }
        }
    }

    /// Removes the VM's links, address and rules. Succeeds for an unknown VM.
    pub async fn detach(&self, vm: MachineId) -> Result<(), DriverError> {
        let Some(live) = self.current() else { return Ok(()) };
        let inner = live.inner.clone();
        let detached = inner.run(move || {
            let mut control = locked(&live.control);
            let result = control.detach(vm);
            live.publish(&control, vm);
            result
        });
        detached.await
    }

    /// From the journal, so also after a restart. `None` for a VM that is not attached.
    pub fn attachment(&self, vm: MachineId) -> Option<Attachment> {
        let live = self.current()?;
        let (slot, channel) = *locked(&live.attached).get(&vm)?;
        Some(live.attachment_of(slot, channel))
    }

    /// For `setns` in the process of a VMM. An error while the network is closed: attach first.
    pub fn namespace(&self) -> Result<OwnedFd, DriverError> {
        let live = self.current().ok_or_else(closed)?;
        live.namespace.try_clone().map_err(|source| DriverError::Io {
            action: "duplicate the namespace's descriptor".to_owned(),
            source,
        })
    }

    /// Opens a TAP of an attachment, for a VMM to inherit: `/dev/net/tun` is not for the user that
    /// a VMM runs as. One VMM at a time; a TAP that was not made is not made by this.
    pub async fn open_tap(&self, name: &str) -> Result<OwnedFd, DriverError> {
        let live = self.current().ok_or_else(closed)?;
        let deadline = Instant::now() + TAP_BUSY_LIMIT;
        loop {
            let wanted = name.to_owned();
            match live.sockets.run(move || Ok(link::open_made_tap(&wanted))).await? {
                Ok(file) => return Ok(file.into()),
                // Another program that is being started has a copy of the descriptor that the TAP
                // was made with, until it runs; or the VMM before has not quite ended.
                Err(Errno::BUSY) if Instant::now() < deadline => sleep(TAP_BUSY_PAUSE).await,
                Err(errno) => return Err(instance::failed(&format!("open the TAP {name}"), errno)),
            }
        }
    }

    /// A connection to a port of the guest's agent over the private link.
    pub async fn dial(
        &self,
        vm: MachineId,
        port: u32,
        limit: Duration,
    ) -> Result<tokio::net::TcpStream, DriverError> {
        let (live, slot) = self.channel(vm)?;
        channel::dial(&live.sockets, slot, port, limit).await
    }

    /// Listens for the agent's ready hint; call it before the guest boots.
    pub async fn ready_listener(&self, vm: MachineId) -> Result<ReadyListener, DriverError> {
        let (live, slot) = self.channel(vm)?;
        ReadyListener::bind(&live.sockets, slot).await
    }

    /// Mends what is missing, follows changes of the host's addresses and resolvers, and removes
    /// what no VM of `known` owns; says what it removed. Does nothing while closed.
    pub async fn reconcile(&self, known: &[MachineId]) -> Result<Vec<String>, DriverError> {
        let Some(live) = self.current() else { return Ok(Vec::new()) };
        let known = known.to_vec();
        let dns = self.0.config.dns.clone();
        self.0.host.run(move || live.reconcile(&known, &dns)).await
    }

    /// Removes all of it from the host if no VM is attached; says whether nothing is left.
    pub async fn close_if_empty(&self) -> Result<bool, DriverError> {
        let shared = Arc::clone(&self.0);
        self.0.host.run(move || shared.close()).await
    }

    /// Removes all of it from the host, attachments included. VMMs must have ended.
    pub async fn remove_all(&self) -> Result<(), DriverError> {
        let shared = Arc::clone(&self.0);
        let removed = self.0.host.run(move || {
            if let Some(live) = locked(&shared.live).clone() {
                live.detach_all()?;
            }
            shared.close().map(drop)
        });
        removed.await
    }

    /// Eight hex digits, in the names of all its parts; `None` while closed.
    pub fn instance(&self) -> Option<String> {
        Some(self.current()?.builder.names.instance.clone())
    }

    /// The addresses in use; `None` while closed.
    pub fn range(&self) -> Option<Ipv4Range> {
        Some(self.current()?.builder.range)
    }

    fn current(&self) -> Option<Arc<Live>> {
        locked(&self.0.live).clone()
    }

    async fn live(&self) -> Result<Arc<Live>, DriverError> {
        if let Some(live) = self.current() {
            // Closing takes it away first, so this one was open a moment ago.
            return Ok(live);
        }
        let shared = Arc::clone(&self.0);
        self.0.host.run(move || shared.establish()).await
    }

    fn channel(&self, vm: MachineId) -> Result<(Arc<Live>, Slot), DriverError> {
        let live = self.current().ok_or_else(closed)?;
        let held = locked(&live.attached).get(&vm).copied();
        match held {
            Some((slot, true)) => Ok((live, slot)),
            Some((_, false)) => {
                Err(DriverError::Unavailable(format!("VM {vm} has no private link to its agent")))
            }
            None => Err(DriverError::UnknownVm(vm)),
        }
    }
}

fn closed() -> DriverError {
    DriverError::Unavailable("the VMs' network is closed; no VM is attached to it".to_owned())
}

/// These run in the host's lane.
impl Shared {
    fn establish(&self) -> Result<Arc<Live>, DriverError> {
        if let Some(live) = locked(&self.live).clone() {
            return Ok(live);
        }
        let (builder, lock) = self.builder()?;
        let built = Live::build(builder.clone(), &self.config);
        drop(lock);
        match built {
            Ok(live) => {
                let live = Arc::new(live);
                *locked(&self.live) = Some(Arc::clone(&live));
                Ok(live)
            }
            Err(error) => {
                // With VMs on it, what is there is left for them and for the next attempt.
                if !self.has_attachments()
                    && let Err(undo) = builder.remove()
                {
                    tracing::warn!(error = %undo, "cannot undo; the journal keeps it");
                }
                Err(error)
            }
        }
    }

    /// The instance that the journal names, or a new one; with the host's lock, since its route
    /// is what tells others that the range is taken.
    fn builder(&self) -> Result<(Builder, HostLock), DriverError> {
        if let Some(before) = self.recorded() {
            let range = before.range;
            let moved = self.config.range.is_some_and(|wanted| wanted != range);
            let lock = foreign::lock_host()?;
            let taken = if before.is_up()? { None } else { before.conflict(&self.config.dns)? };
            if !moved && taken.is_none() {
                return Ok((before, lock));
            }
            drop(lock);
            if self.has_attachments() {
                return Err(match taken.filter(|_| !moved) {
                    Some(with) => DriverError::RangeOverlaps { range: range.to_string(), with },
                    None => DriverError::Unavailable(format!(
                        "VMs have addresses of {range}; delete them before another range is used"
                    )),
                });
            }
            before.remove()?;
        }
        let lock = foreign::lock_host()?;
        let range = instance::choose_range(self.config.range, &self.config.dns)?;
        let builder = self.builder_of(instance::new_id()?, range);
        self.journal.intend(Owner::Host, &builder.resource())?;
        Ok((builder, lock))
    }

    fn recorded(&self) -> Option<Builder> {
        self.journal.resources(Owner::Host).into_iter().find_map(|resource| match resource {
            Resource::Network { instance, range } => {
                Some(self.builder_of(instance, range.parse().ok()?))
            }
            _ => None,
        })
    }

    fn builder_of(&self, instance: String, range: Ipv4Range) -> Builder {
        let (journal, fault) = (self.journal.clone(), self.config.fault.clone());
        Builder { names: Names { instance }, range, journal, fault }
    }

    fn has_attachments(&self) -> bool {
        self.journal.machines().into_iter().any(|vm| {
            let resources = self.journal.resources(vm);
            resources.iter().any(|r| matches!(r, Resource::Address { .. }))
        })
    }

    /// Whether nothing is left.
    fn close(&self) -> Result<bool, DriverError> {
        let Some(live) = locked(&self.live).clone() else {
            // Also what an earlier attempt could not remove.
            return match self.recorded() {
                Some(_) if self.has_attachments() => Ok(false),
                Some(builder) => builder.remove().map(|()| true),
                None => Ok(true),
            };
        };
        let control = Arc::clone(&live.control);
        let empty = live.inner.call(move || {
            let mut control = locked(&control);
            control.closed = control.is_empty();
            Ok(control.closed)
        })?;
        if !empty {
            return Ok(false);
        }
        // Whoever comes now opens it again, after this.
        *locked(&self.live) = None;
        live.builder.remove()?;
        Ok(true)
    }
}

/// These run in the host's lane, except `attachment` and `publish`.
impl Live {
    fn build(builder: Builder, config: &NetworkConfig) -> Result<Self, DriverError> {
        let around = Surroundings::read(&config.dns, &builder.names.uplink())?;
        let namespace = builder.namespace()?;
        let inner = Lane::spawn("aether-net", Some(namespace.as_fd()))?;
        let sockets = Lane::spawn("aether-sockets", Some(namespace.as_fd()))?;
        builder.uplink(&namespace, &inner, around.mtu)?;
        builder.host_table(&around)?;
        builder.inner_table(&inner, &around)?;
        builder.passage()?;
        let host_filter = instance::filter_socket()?;
        let (for_control, table, mtu) = (builder.clone(), builder.names.table(), around.mtu);
        let control = inner.call(move || {
            let Builder { range, journal, fault, .. } = for_control;
            let mut control = Control::new(range, mtu, journal, fault, table, host_filter)?;
            control.refill_host()?;
            control.refill_inner()?;
            Ok(control)
        })?;
        let attached = control
            .vms()
            .into_iter()
            .filter_map(|vm| control.held(vm).map(|held| (vm, (held.slot, held.channel))))
            .collect();
        Ok(Self {
            builder,
            around: Mutex::new(around),
            namespace,
            inner,
            sockets,
            control: Arc::new(Mutex::new(control)),
            attached: Mutex::new(attached),
        })
    }

    fn attachment(&self, held: &Held) -> Attachment {
        self.attachment_of(held.slot, held.channel)
    }

    fn attachment_of(&self, slot: Slot, channel: bool) -> Attachment {
        let range = self.builder.range;
        let address: Ipv4Addr = range.at(slot.0);
        let around = locked(&self.around);
        Attachment {
            tap: slot.tap(),
            channel_tap: channel.then(|| slot.channel()),
            guest: GuestNetwork {
                mac: link::mac_text(link::guest_mac(address)),
                addresses: vec![(address.into(), range.prefix())],
                gateways: vec![range.gateway().into()],
                dns: around.resolvers.iter().map(|a| IpAddr::V4(*a)).collect(),
                mtu: around.mtu,
            },
            uplink_host_address: range.uplink_host().into(),
        }
    }

    fn publish(&self, control: &Control, vm: MachineId) {
        let mut attached = locked(&self.attached);
        match control.held(vm) {
            Some(held) => attached.insert(vm, (held.slot, held.channel)),
            None => attached.remove(&vm),
        };
    }

    fn detach_all(self: &Arc<Self>) -> Result<(), DriverError> {
        let live = Arc::clone(self);
        self.inner.call(move || {
            let mut control = locked(&live.control);
            for vm in control.vms() {
                let result = control.detach(vm);
                live.publish(&control, vm);
                result?;
            }
            Ok(())
        })
    }

    fn reconcile(
        self: &Arc<Self>,
        known: &[MachineId],
        dns: &[IpAddr],
    ) -> Result<Vec<String>, DriverError> {
        let known = known.to_vec();
        let live = Arc::clone(self);
        let removed = self.inner.call(move || {
            let mut control = locked(&live.control);
            let mut removed = Vec::new();
            for vm in control.vms().into_iter().filter(|vm| !known.contains(vm)) {
                let result = control.detach(vm);
                live.publish(&control, vm);
                result?;
                removed.push(format!("network of VM {vm}"));
            }
            removed.extend(control.remove_stray_links()?);
            Ok(removed)
        })?;
        self.mend(dns)?;
        Ok(removed)
    }

    fn mend(self: &Arc<Self>, dns: &[IpAddr]) -> Result<(), DriverError> {
        let builder = &self.builder;
        namespace::pin(&builder.names.namespace(), &self.namespace)?;
        let around = Surroundings::read(dns, &builder.names.uplink())?;
        let changed = *locked(&self.around) != around;
        if changed || !builder.is_up()? {
            builder.uplink(&self.namespace, &self.inner, around.mtu)?;
        }
        let (inner_tables, host_tables) = {
            let control = Arc::clone(&self.control);
            self.inner.call(move || locked(&control).tables())?
        };
        let refill = |which: fn(&mut Control) -> Result<(), DriverError>| {
            let control = Arc::clone(&self.control);
            self.inner.call(move || which(&mut locked(&control)))
        };
        if changed || !host_tables.contains(&builder.names.table()) {
            tracing::info!("making the host's packet-filter table again");
            builder.host_table(&around)?;
            refill(Control::refill_host)?;
        }
        if changed || !inner_tables.iter().any(|t| t == rules::INNER_TABLE) {
            tracing::info!("making the namespace's packet-filter table again");
            builder.inner_table(&self.inner, &around)?;
            refill(Control::refill_inner)?;
        }
        builder.passage()?;
        locked(&self.control).mtu = around.mtu;
        *locked(&self.around) = around;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
