//! Links, address and rules of each VM: made, undone and remembered.
//!
//! Runs in the lane of the namespace, one call after the other; nothing here waits.

use std::{collections::BTreeMap, net::Ipv4Addr, os::fd::BorrowedFd};

use aether_types::{MachineId, NetworkPolicy};
use rustix::io::Errno;

use super::{
    Ipv4Range, elements,
    elements::Elements,
    instance::{failed, filter_socket, route_socket},
    link, namespace,
    netlink::Socket,
    rules::INNER_TABLE,
};
use crate::{
    DriverError,
    fault::FaultPoints,
    journal::{Journal, Resource},
};

const TAP_INDEX_BASE: u32 = 1000;
const GROUP_BASE: u32 = 1000;
const TAP_PREFIX: &str = "aeu";
const CHANNEL_PREFIX: &str = "aec";

/// A VM's place in the range; all its names and numbers follow from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Slot(pub(super) u32);

impl Slot {
    pub(super) fn tap(self) -> String {
        format!("{TAP_PREFIX}{}", self.0)
    }

    pub(super) fn channel(self) -> String {
        format!("{CHANNEL_PREFIX}{}", self.0)
    }

    fn tap_index(self) -> u32 {
        TAP_INDEX_BASE + 2 * self.0
    }

    /// Also the scope of the link's addresses.
    pub(super) fn channel_index(self) -> u32 {
        self.tap_index() + 1
    }

    fn group(self) -> u32 {
        GROUP_BASE + self.0
    }

    fn of_link(name: &str) -> Option<Self> {
        let digits = name.strip_prefix(TAP_PREFIX).or_else(|| name.strip_prefix(CHANNEL_PREFIX))?;
        Some(Self(digits.parse().ok()?))
    }
}

/// What one VM has.
#[derive(Debug, Clone)]
pub(super) struct Held {
    pub(super) slot: Slot,
    pub(super) channel: bool,
    policy: Option<NetworkPolicy>,
    /// What the packet filter has, as far as we put it there.
    inner: Elements,
    host: Elements,
}

impl Held {
    fn new(slot: Slot) -> Self {
        let (inner, host) = (Elements::default(), Elements::default());
        Self { slot, channel: false, policy: None, inner, host }
    }
}

pub(super) struct Request {
    pub(super) policy: NetworkPolicy,
    pub(super) links: Links,
}

/// What carries a VM's packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Links {
    /// For a VMM that runs as this user, and with the private link where `channel` says so.
    Taps { owner_uid: u32, channel: bool },
    /// A veth pair that is made by [`Control::plug`], as often as there is a new namespace to
    /// reach into.
    Veth,
}

pub(super) struct Control {
    range: Ipv4Range,
    /// Of the guests' links.
    pub(super) mtu: u32,
    journal: Journal,
    fault: FaultPoints,
    host_table: String,
    inner_route: Socket,
    inner_filter: Socket,
    host_filter: Socket,
    held: BTreeMap<MachineId, Held>,
    /// Nothing is made any more; the network is being removed.
    pub(super) closed: bool,
    /// Slots are given out in turn: an address rests as long as it can before it is used again.
    next: u32,
}

impl Control {
    /// In a thread of the namespace; `host_filter` was opened in the host's.
    pub(super) fn new(
        range: Ipv4Range,
        mtu: u32,
        journal: Journal,
        fault: FaultPoints,
        host_table: String,
        host_filter: Socket,
    ) -> Result<Self, DriverError> {
        let mut control = Self {
            range,
            mtu,
            journal,
            fault,
            host_table,
            inner_route: route_socket()?,
            inner_filter: filter_socket()?,
            host_filter,
            held: BTreeMap::new(),
            closed: false,
            next: *range.slots().start(),
        };
        for vm in control.journal.machines() {
            control.load(vm);
        }
        Ok(control)
    }

    fn load(&mut self, vm: MachineId) {
        let resources = self.journal.resources(vm);
        let slot = resources.iter().find_map(|resource| match resource {
            Resource::Address { slot, .. } => Some(Slot(*slot)),
            _ => None,
        });
        let Some(slot) = slot else { return };
        let mut held = Held::new(slot);
        for resource in resources {
            match resource {
                Resource::Tap { name } if name == slot.channel() => held.channel = true,
                Resource::Rules { policy, .. } => held.policy = Some(policy),
                _ => {}
            }
        }
        self.next = self.next.max(slot.0 + 1);
        self.held.insert(vm, held);
    }

    pub(super) fn held(&self, vm: MachineId) -> Option<&Held> {
        self.held.get(&vm)
    }

    pub(super) fn vms(&self) -> Vec<MachineId> {
        self.held.keys().copied().collect()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    pub(super) fn attach(&mut self, vm: MachineId, request: &Request) -> Result<Held, DriverError> {
        elements::check(&request.policy)?;
        let fresh = !self.held.contains_key(&vm);
        match self.make(vm, request) {
            Ok(held) => Ok(held),
            Err(error) => {
                // A VM that was attached before keeps what it has.
                if fresh && let Err(undo) = self.detach(vm) {
                    tracing::warn!(vm.id = %vm, error = %undo, "cannot undo; the journal keeps it");
                }
                Err(error)
            }
        }
    }

    fn make(&mut self, vm: MachineId, request: &Request) -> Result<Held, DriverError> {
        let mut held = match self.held.get(&vm) {
            Some(held) => held.clone(),
            None => Held::new(self.free_slot()?),
        };
        let slot = held.slot;
        let ip = self.range.at(slot.0);
        self.fault.hit("network.address.reserve")?;
        self.journal.intend(vm, &Resource::Address { ip, slot: slot.0 })?;
        self.held.insert(vm, held.clone());
        self.fault.hit("network.address.reserved")?;
        match request.links {
            Links::Taps { owner_uid, channel } => {
                self.make_links(vm, slot, owner_uid, channel)?;
                held.channel |= channel;
            }
            Links::Veth => self.journal.intend(vm, &Resource::Tap { name: slot.tap() })?,
        }
        self.held.insert(vm, held);
        self.make_rules(vm, slot, &request.policy)?;
        self.held.get(&vm).cloned().ok_or(DriverError::UnknownVm(vm))
    }

    fn make_links(
        &mut self,
        vm: MachineId,
        slot: Slot,
        owner_uid: u32,
        channel: bool,
    ) -> Result<(), DriverError> {
        let ip = self.range.at(slot.0);
        let made = |name: &str, e: Errno| failed(&format!("make the TAP {name}"), e);
        let tap = slot.tap();
        self.journal.intend(vm, &Resource::Tap { name: tap.clone() })?;
        self.fault.hit("network.tap.make")?;
        link::make_tap(&tap, slot.tap_index(), owner_uid).map_err(|e| made(&tap, e))?;
        self.fault.hit("network.tap.made")?;
        // Answers to ARP for others' addresses go out at once.
        namespace::set(&format!("ipv4/neigh/{tap}/proxy_delay"), "0")?;
        let mut messages = vec![
            link::set_tap(slot.tap_index(), link::MAC_HOST, self.mtu, slot.group()),
            link::new_neighbour(slot.tap_index(), ip, link::guest_mac(ip)),
            link::new_route(ip, 32, slot.tap_index(), None),
        ];
        if channel {
            let channel = slot.channel();
            let index = slot.channel_index();
            if !namespace::has_ipv6() {
                return Err(DriverError::Unavailable(
                    "this host's kernel has IPv6 switched off, which the link to a guest's agent \
                     needs; remove ipv6.disable=1 from its command line"
                        .to_owned(),
                ));
            }
            self.journal.intend(vm, &Resource::Tap { name: channel.clone() })?;
            self.fault.hit("network.channel.make")?;
            link::make_tap(&channel, index, owner_uid).map_err(|e| made(&channel, e))?;
            self.fault.hit("network.channel.made")?;
            namespace::set(&format!("ipv6/conf/{channel}/disable_ipv6"), "0")?;
            messages.extend([
                link::set_tap(index, link::MAC_HOST, self.mtu, slot.group()),
                link::new_address(index, link::CHANNEL_HOST, 64, None),
                link::new_neighbour(index, link::CHANNEL_GUEST, link::MAC_CHANNEL_GUEST),
            ]);
        }
        self.fault.hit("network.links.set")?;
        self.inner_route.send_all(messages).map_err(|e| failed("set the VM's links up", e))?;
        self.fault.hit("network.links.done")
    }

    /// Makes the VM's veth pair anew, with one end in a namespace of its own: where the TAP would be
    /// stands the other, under the same rules. Its address is set there by [`link::set_up_guest`].
    pub(super) fn plug(&mut self, vm: MachineId, netns: BorrowedFd<'_>) -> Result<(), DriverError> {
        let slot = self.held.get(&vm).ok_or(DriverError::UnknownVm(vm))?.slot;
        let ip = self.range.at(slot.0);
        let (name, index) = (slot.tap(), slot.tap_index());
        let made = |e: Errno| failed(&format!("make the veth pair {name}"), e);
        self.fault.hit("network.veth.make")?;
        // The namespace that the one before led into has ended, or is about to.
        match self.inner_route.send_all(vec![link::delete_link(&name)]) {
            Ok(()) | Err(Errno::NODEV) => {}
            Err(errno) => return Err(made(errno)),
        }
        let guest = link::GuestEnd { mac: link::guest_mac(ip), mtu: self.mtu, netns };
        self.inner_route
            .send_all(vec![link::new_guest_veth(&name, index, &guest)])
            .map_err(made)?;
        self.fault.hit("network.veth.made")?;
        namespace::set(&format!("ipv4/neigh/{name}/proxy_delay"), "0")?;
        let messages = vec![
            link::set_tap(index, link::MAC_HOST, self.mtu, slot.group()),
            link::new_neighbour(index, ip, link::guest_mac(ip)),
            link::new_route(ip, 32, index, None),
        ];
        self.inner_route.send_all(messages).map_err(|e| failed("set the VM's links up", e))
    }

    fn make_rules(
        &mut self,
        vm: MachineId,
        slot: Slot,
        policy: &NetworkPolicy,
    ) -> Result<(), DriverError> {
        let ip = self.range.at(slot.0);
        let Some(held) = self.held.get_mut(&vm) else { return Err(DriverError::UnknownVm(vm)) };
        let old = held.policy.replace(policy.clone());
        let changes = old.as_ref().is_some_and(|old| old != policy);
        self.journal.intend(vm, &Resource::Rules { ip, policy: policy.clone() })?;
        if let Some(old) = old.filter(|_| changes) {
            self.journal.forget(vm, &Resource::Rules { ip, policy: old })?;
        }
        let inner = Elements::inner(&slot.tap(), link::guest_mac(ip), ip, policy);
        let host = Elements::host(ip, policy);
        let put = |e: Errno| failed("change the VM's packet-filter rules", e);
        self.fault.hit("network.rules.make")?;
        elements::change(&mut self.host_filter, &self.host_table, &held.host, &host)
            .map_err(put)?;
        held.host = host;
        elements::change(&mut self.inner_filter, INNER_TABLE, &held.inner, &inner).map_err(put)?;
        held.inner = inner;
        self.fault.hit("network.rules.made")?;
        if changes {
            self.forget_connections(ip);
        }
        Ok(())
    }

    /// Leaves nothing of the VM; what is not there any more counts as removed.
    pub(super) fn detach(&mut self, vm: MachineId) -> Result<(), DriverError> {
        let Some(held) = self.held.get_mut(&vm) else { return Ok(()) };
        let slot = held.slot;
        let ip = self.range.at(slot.0);
        let none = Elements::default();
        let gone = |result: Result<(), Errno>, action: &str| match result {
            Ok(()) | Err(Errno::NOENT | Errno::NODEV) => Ok(()),
            Err(errno) => Err(failed(action, errno)),
        };
        let filter = "remove the VM's packet-filter rules";
        let inner = elements::change(&mut self.inner_filter, INNER_TABLE, &held.inner, &none);
        gone(inner, filter)?;
        held.inner = Elements::default();
        let host = elements::change(&mut self.host_filter, &self.host_table, &held.host, &none);
        gone(host, filter)?;
        held.host = Elements::default();
        self.forget_connections(ip);
        // The names for what was made and not yet put in the group.
        let removed = self.inner_route.send(vec![
            link::delete_group(slot.group()),
            link::delete_link(&slot.tap()),
            link::delete_link(&slot.channel()),
        ]);
        for result in removed.map_err(|e| failed("remove the VM's links", e))? {
            gone(result, "remove the VM's links")?;
        }
        // The address last: while it stands in the journal, nobody else gets the slot.
        let address = Resource::Address { ip, slot: slot.0 };
        for resource in self.journal.resources(vm) {
            match &resource {
                Resource::Tap { .. } | Resource::Rules { .. } => {
                    self.journal.forget(vm, &resource)?;
                }
                _ => {}
            }
        }
        self.journal.forget(vm, &address)?;
        self.held.remove(&vm);
        Ok(())
    }

    /// Best effort: what is left ends by itself.
    fn forget_connections(&mut self, ip: Ipv4Addr) {
        match elements::forget_connections(&mut self.inner_filter, ip) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => tracing::debug!(%ip, %error, "cannot forget the VM's connections"),
        }
    }

    /// Fills the sets of a table that was replaced, one VM after the other.
    pub(super) fn refill_inner(&mut self) -> Result<(), DriverError> {
        let none = Elements::default();
        for held in self.held.values_mut() {
            let Some(policy) = &held.policy else { continue };
            let ip = self.range.at(held.slot.0);
            held.inner = Elements::inner(&held.slot.tap(), link::guest_mac(ip), ip, policy);
            elements::change(&mut self.inner_filter, INNER_TABLE, &none, &held.inner)
                .map_err(|e| failed("fill the packet filter's sets", e))?;
        }
        Ok(())
    }

    pub(super) fn refill_host(&mut self) -> Result<(), DriverError> {
        let none = Elements::default();
        for held in self.held.values_mut() {
            let Some(policy) = &held.policy else { continue };
            held.host = Elements::host(self.range.at(held.slot.0), policy);
            elements::change(&mut self.host_filter, &self.host_table, &none, &held.host)
                .map_err(|e| failed("fill the packet filter's sets", e))?;
        }
        Ok(())
    }

    pub(super) fn tables(&mut self) -> Result<(Vec<String>, Vec<String>), DriverError> {
        let look = |e: Errno| failed("list the packet filter's tables", e);
        let inner = elements::tables(&mut self.inner_filter).map_err(look)?;
        let host = elements::tables(&mut self.host_filter).map_err(look)?;
        Ok((inner, host))
    }

    /// Removes TAPs of slots that no VM has; says which.
    pub(super) fn remove_stray_links(&mut self) -> Result<Vec<String>, DriverError> {
        let links = link::links(&mut self.inner_route)
            .map_err(|e| failed("list the namespace's links", e))?;
        let mut removed = Vec::new();
        for name in links.into_iter().map(|l| l.name) {
            let Some(slot) = Slot::of_link(&name) else { continue };
            if self.held.values().any(|held| held.slot == slot) {
                continue;
            }
            match self.inner_route.send_all(vec![link::delete_link(&name)]) {
                Ok(()) | Err(Errno::NODEV) => removed.push(format!("link {name}")),
                Err(errno) => return Err(failed(&format!("remove the link {name}"), errno)),
            }
        }
        Ok(removed)
    }

    fn free_slot(&mut self) -> Result<Slot, DriverError> {
        let slots = self.range.slots();
        let taken: std::collections::BTreeSet<u32> =
            self.held.values().map(|held| held.slot.0).collect();
        let from = if slots.contains(&self.next) { self.next } else { *slots.start() };
        let free = (from..=*slots.end()).chain(*slots.start()..from).find(|s| !taken.contains(s));
        let slot = free.ok_or_else(|| DriverError::NoAddress { range: self.range.to_string() })?;
        self.next = slot + 1;
        Ok(Slot(slot))
    }
}
