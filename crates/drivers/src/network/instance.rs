//! One instance's part of the host: its namespace, uplink, routes and tables.
//!
//! Every step can be repeated; what is there already is left or replaced. All of it runs in
//! threads, not in tasks: see [`super::lane`].

use std::{
    net::{IpAddr, Ipv4Addr},
    os::fd::{AsFd as _, OwnedFd},
};

use rustix::io::Errno;

use super::{
    Ipv4Range, foreign,
    lane::Lane,
    link::{self, Known},
    namespace,
    netlink::{Family, Message, Socket},
    range, resolver, rules,
};
use crate::{
    DriverError,
    fault::FaultPoints,
    journal::{Journal, Owner, Resource},
};

const UPLINK_INNER: &str = "aehost";
const LOOPBACK_INDEX: u32 = 1;
const MTU_DEFAULT: u32 = 1500;
/// Below, IPv6 does not work, and above, no Ethernet is.
const MTU_BOUNDS: std::ops::RangeInclusive<u32> = 1280..=9216;

pub(super) fn failed(action: &str, errno: impl Into<std::io::Error>) -> DriverError {
    DriverError::Io { action: action.to_owned(), source: errno.into() }
}

/// Names of one instance's things.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Names {
    pub(super) instance: String,
}

impl Names {
    /// Also the comment on rules in other's chains.
    pub(super) fn namespace(&self) -> String {
        format!("aether-{}", self.instance)
    }

    pub(super) fn uplink(&self) -> String {
        format!("ae{}h", self.instance)
    }

    pub(super) fn table(&self) -> String {
        format!("aether_{}", self.instance)
    }
}

/// What of the host the rules and the guests' settings follow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Surroundings {
    pub(super) resolvers: Vec<Ipv4Addr>,
    pub(super) host_addresses: Vec<Ipv4Addr>,
    pub(super) mtu: u32,
}

impl Surroundings {
    pub(super) fn read(dns: &[IpAddr], uplink: &str) -> Result<Self, DriverError> {
        let mut socket = route_socket()?;
        let look = |e: Errno| failed("read the host's links", e);
        let links = link::links(&mut socket).map_err(look)?;
        let ours = links.iter().find(|l| l.name == uplink).map(|l| l.index);
        let mut host_addresses: Vec<Ipv4Addr> = link::addresses(&mut socket)
            .map_err(look)?
            .into_iter()
            .filter(|known| !known.address.is_loopback() && Some(known.index) != ours)
            .map(|known| known.address)
            .collect();
        host_addresses.sort_unstable();
        host_addresses.dedup();
        let routes = link::routes(&mut socket).map_err(look)?;
        let outward = routes.iter().filter(|r| r.prefix == 0).map(|r| r.index);
        let mtu = outward.filter_map(|i| links.iter().find(|l| l.index == i)).map(|l| l.mtu).min();
        let mtu = mtu.unwrap_or(MTU_DEFAULT).clamp(*MTU_BOUNDS.start(), *MTU_BOUNDS.end());
        Ok(Self { resolvers: resolver::resolvers(dns), host_addresses, mtu })
    }
}

pub(super) fn route_socket() -> Result<Socket, DriverError> {
    Socket::open(Family::Route).map_err(|e| failed("open a netlink socket", e))
}

pub(super) fn filter_socket() -> Result<Socket, DriverError> {
    Socket::open(Family::Netfilter).map_err(|e| failed("open a netlink socket", e))
}

/// Eight hex digits that no other instance of this host has.
pub(super) fn new_id() -> Result<String, DriverError> {
    let taken = namespace::names();
    loop {
        let mut bytes = [0; 4];
        rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
            .map_err(|e| failed("read random bytes", e))?;
        let names = Names { instance: format!("{:08x}", u32::from_ne_bytes(bytes)) };
        if !taken.contains(&names.namespace()) {
            return Ok(names.instance);
        }
    }
}

/// The configured range if nothing else has a part of it, or the first free candidate. Called
/// under the host's lock: another instance's range shows as its route.
pub(super) fn choose_range(
    configured: Option<Ipv4Range>,
    dns: &[IpAddr],
) -> Result<Ipv4Range, DriverError> {
    let taken = taken(dns, None)?;
    if let Some(range) = configured {
        return match conflict(range, &taken) {
            Some(with) => Err(DriverError::RangeOverlaps { range: range.to_string(), with }),
            None => Ok(range),
        };
    }
    let free = range::candidates().find(|range| conflict(*range, &taken).is_none());
    free.ok_or_else(|| {
        DriverError::Unavailable(
            "no /16 of 10.128.0.0/9 is free on this host; configure network.range".to_owned(),
        )
    })
}

struct Taken {
    address: Ipv4Addr,
    prefix: u8,
    what: String,
}

/// Every address and route of the host but those of the link `except`, and the resolvers.
fn taken(dns: &[IpAddr], except: Option<&str>) -> Result<Vec<Taken>, DriverError> {
    let mut socket = route_socket()?;
    let look = |e: Errno| failed("read the host's routes", e);
    let links = link::links(&mut socket).map_err(look)?;
    let name = |index: u32| {
        links.iter().find(|l| l.index == index).map_or("another link", |l| l.name.as_str())
    };
    let describe = |what: &str, known: &Known| Taken {
        address: known.address,
        prefix: known.prefix,
        what: format!("the {what} {}/{} of {}", known.address, known.prefix, name(known.index)),
    };
    let except = links.iter().find(|l| Some(l.name.as_str()) == except).map(|l| l.index);
    let others = |known: &Known| Some(known.index) != except;
    let mut addresses = link::addresses(&mut socket).map_err(look)?;
    addresses.retain(others);
    let mut routes = link::routes(&mut socket).map_err(look)?;
    routes.retain(others);
    // A default route, also one in two halves as VPNs have it, leaves room for all.
    let routes = routes.iter().filter(|r| r.prefix > 1);
    let mut taken: Vec<Taken> = addresses.iter().map(|a| describe("address", a)).collect();
    taken.extend(routes.map(|r| describe("route to", r)));
    taken.extend(resolver::resolvers(dns).into_iter().map(|address| Taken {
        address,
        prefix: 32,
        what: format!("the resolver {address}"),
    }));
    Ok(taken)
}

fn conflict(range: Ipv4Range, taken: &[Taken]) -> Option<String> {
    taken.iter().find(|t| range.overlaps(t.address, t.prefix)).map(|t| t.what.clone())
}

/// What is needed to make, mend and remove an instance's part of the host.
#[derive(Debug, Clone)]
pub(super) struct Builder {
    pub(super) names: Names,
    pub(super) range: Ipv4Range,
    pub(super) journal: Journal,
    pub(super) fault: FaultPoints,
}

impl Builder {
    pub(super) fn resource(&self) -> Resource {
        let Self { names, range, .. } = self;
        Resource::Network { instance: names.instance.clone(), range: range.to_string() }
    }

    /// Whether the uplink is there, and with it the route to the range.
    pub(super) fn is_up(&self) -> Result<bool, DriverError> {
        let look = |e: Errno| failed("read the host's links", e);
        let mut socket = route_socket()?;
        let links = link::links(&mut socket).map_err(look)?;
        let name = self.names.uplink();
        let Some(uplink) = links.into_iter().find(|l| l.name == name) else { return Ok(false) };
        let routes = link::routes(&mut socket).map_err(look)?;
        let (base, prefix) = (self.range.base(), self.range.prefix());
        Ok(routes
            .iter()
            .any(|r| r.index == uplink.index && r.address == base && r.prefix == prefix))
    }

    /// What else on this host has a part of the range, while the uplink is not up.
    pub(super) fn conflict(&self, dns: &[IpAddr]) -> Result<Option<String>, DriverError> {
        Ok(conflict(self.range, &taken(dns, Some(&self.names.uplink()))?))
    }

    /// Opens the namespace, or makes it where there is none.
    pub(super) fn namespace(&self) -> Result<OwnedFd, DriverError> {
        let name = self.names.namespace();
        self.journal.intend(Owner::Host, &Resource::Namespace { name: name.clone() })?;
        if let Some(fd) = namespace::open(&name)? {
            return Ok(fd);
        }
        // An uplink without its namespace leads into one that only processes hold.
        self.remove_uplink()?;
        self.fault.hit("network.namespace.make")?;
        let fd = namespace::make(&name)?;
        self.fault.hit("network.namespace.made")?;
        Ok(fd)
    }

    fn remove_uplink(&self) -> Result<(), DriverError> {
        match route_socket()?.send_all(vec![link::delete_link(&self.names.uplink())]) {
            Ok(()) | Err(Errno::NODEV) => Ok(()),
            Err(errno) => Err(failed("remove the uplink", errno)),
        }
    }

    /// Links and routes of both sides. Runs in a thread of the host's namespace; `inner` is a
    /// lane in ours.
    pub(super) fn uplink(
        &self,
        namespace: &OwnedFd,
        inner: &Lane,
        mtu: u32,
    ) -> Result<(), DriverError> {
        inner.call(set_up_namespace)?;
        let name = self.names.uplink();
        let mut socket = route_socket()?;
        let set = |e: Errno| failed("set the uplink up", e);
        let present = |socket: &mut Socket| {
            let links = link::links(socket).map_err(set)?;
            Ok::<_, DriverError>(links.into_iter().find(|l| l.name == name))
        };
        if present(&mut socket)?.is_none() {
            self.journal.intend(Owner::Host, &Resource::Veth { name: name.clone() })?;
            self.fault.hit("network.uplink.make")?;
            let veth = link::new_veth(&name, mtu, UPLINK_INNER, namespace.as_fd());
            socket.send_all(vec![veth]).map_err(set)?;
            self.fault.hit("network.uplink.made")?;
        }
        let Some(uplink) = present(&mut socket)? else { return Err(set(Errno::NODEV)) };
        if namespace::has_ipv6() {
            namespace::set(&format!("ipv6/conf/{name}/disable_ipv6"), "1")?;
        }
        let range = self.range;
        socket
            .send_all(vec![
                link::set_mtu(uplink.index, mtu),
                link::new_address(
                    uplink.index,
                    range.uplink_host(),
                    32,
                    Some(range.uplink_inner()),
                ),
                link::link_up(uplink.index),
                link::new_route(
                    range.base(),
                    range.prefix(),
                    uplink.index,
                    Some(range.uplink_inner()),
                ),
            ])
            .map_err(set)?;
        inner.call(move || set_up_inner_links(range, mtu))
    }

    /// What lets the VMs' packets through the host: forwarding, and others' filters.
    pub(super) fn passage(&self) -> Result<(), DriverError> {
        self.fault.hit("network.forwarding.enable")?;
        foreign::enable_forwarding()?;
        self.fault.hit("network.forwarding.enabled")?;
        let comment = self.names.namespace();
        self.journal.intend(Owner::Host, &Resource::ForeignRules { comment: comment.clone() })?;
        foreign::open(&self.names.uplink(), &comment)?;
        self.fault.hit("network.forwarding.opened")
    }

    /// Replaces the table on the host; its sets are empty then.
    pub(super) fn host_table(&self, around: &Surroundings) -> Result<(), DriverError> {
        let name = self.names.table();
        let table = Resource::Table { family: "inet".to_owned(), name: name.clone() };
        self.journal.intend(Owner::Host, &table)?;
        self.fault.hit("network.host_rules.make")?;
        rules::apply(&rules::host(&name, &self.names.uplink(), self.range, &around.resolvers))?;
        self.fault.hit("network.host_rules.made")
    }

    /// Replaces the table in the namespace; its sets are empty then, and all is closed.
    pub(super) fn inner_table(
        &self,
        inner: &Lane,
        around: &Surroundings,
    ) -> Result<(), DriverError> {
        let text = rules::inner(self.range, &around.resolvers, &around.host_addresses);
        self.fault.hit("network.inner_rules.make")?;
        inner.call(move || rules::apply(&text))?;
        self.fault.hit("network.inner_rules.made")
    }

    /// Removes all of it from the host, in a thread of the host's namespace. Links and rules in
    /// the namespace end with it.
    pub(super) fn remove(&self) -> Result<(), DriverError> {
        let _lock = foreign::lock_host()?;
        let forget = |resource: Resource| self.journal.forget(Owner::Host, &resource);
        let (uplink, comment) = (self.names.uplink(), self.names.namespace());
        foreign::close(&uplink, &comment)?;
        forget(Resource::ForeignRules { comment })?;
        self.remove_uplink()?;
        forget(Resource::Veth { name: uplink })?;
        let table = self.names.table();
        // Declared first, so that deleting what is not there does not fail.
        rules::apply(&format!("table inet {table}\ndelete table inet {table}\n"))?;
        forget(Resource::Table { family: "inet".to_owned(), name: table })?;
        namespace::remove(&self.names.namespace())?;
        forget(Resource::Namespace { name: self.names.namespace() })?;
        let links = link::links(&mut route_socket()?);
        let links = links.map_err(|e| failed("read the host's links", e))?;
        if !links.iter().any(|l| is_uplink(&l.name)) {
            foreign::restore_forwarding()?;
        }
        forget(self.resource())
    }
}

/// Whether a link on the host is some instance's uplink.
pub(super) fn is_uplink(name: &str) -> bool {
    name.strip_prefix("ae")
        .and_then(|rest| rest.strip_suffix('h'))
        .is_some_and(|id| id.len() == 8 && id.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// Kernel settings that links made later take over.
fn set_up_namespace() -> Result<(), DriverError> {
    // A new namespace takes over the host's settings of IPv4, whatever they are: each that matters
    // is set here.
    const SETTINGS: &[(&str, &str)] = &[
        ("ipv4/ip_forward", "1"),
        ("ipv4/conf/all/forwarding", "1"),
        ("ipv4/conf/default/forwarding", "1"),
        ("ipv4/conf/all/route_localnet", "0"),
        ("ipv4/conf/default/route_localnet", "0"),
        ("ipv4/conf/default/accept_local", "0"),
        ("ipv4/conf/all/arp_ignore", "0"),
        ("ipv4/conf/default/arp_ignore", "0"),
        ("ipv4/conf/all/arp_filter", "0"),
        ("ipv4/conf/default/arp_filter", "0"),
        // A packet whose source is not routed back to where it came from is dropped.
        ("ipv4/conf/all/rp_filter", "1"),
        ("ipv4/conf/default/rp_filter", "1"),
        ("ipv4/conf/all/send_redirects", "0"),
        ("ipv4/conf/default/send_redirects", "0"),
        ("ipv4/conf/all/accept_redirects", "0"),
        ("ipv4/conf/default/accept_redirects", "0"),
        ("ipv4/conf/all/accept_source_route", "0"),
        // Guests take the whole range for one Ethernet; each is alone on its link, and we answer
        // for all the others.
        ("ipv4/conf/default/proxy_arp", "1"),
    ];
    // A guest's own link has no IPv6; the private link has, switched on when it is made, with one
    // fixed address and nothing automatic.
    const SETTINGS_IPV6: &[(&str, &str)] = &[
        ("ipv6/conf/default/disable_ipv6", "1"),
        ("ipv6/conf/default/addr_gen_mode", "1"),
        ("ipv6/conf/default/accept_ra", "0"),
        ("ipv6/conf/default/accept_redirects", "0"),
        ("ipv6/conf/default/dad_transmits", "0"),
        ("ipv6/conf/default/router_solicitations", "0"),
    ];
    for (key, value) in SETTINGS {
        namespace::set(key, value)?;
    }
    if namespace::has_ipv6() {
        for (key, value) in SETTINGS_IPV6 {
            namespace::set(key, value)?;
        }
    }
    Ok(())
}

fn set_up_inner_links(range: Ipv4Range, mtu: u32) -> Result<(), DriverError> {
    let mut socket = route_socket()?;
    let set = |e: Errno| failed("set the namespace's links up", e);
    let links = link::links(&mut socket).map_err(set)?;
    let uplink = links.iter().find(|l| l.name == UPLINK_INNER).ok_or_else(|| set(Errno::NODEV))?;
    let peer = Some(range.uplink_host());
    let unspecified = Ipv4Addr::UNSPECIFIED;
    let messages: Vec<Message> = vec![
        link::link_up(LOOPBACK_INDEX),
        // An address of any link is answered for on all of them.
        link::new_address(LOOPBACK_INDEX, range.gateway(), 32, None),
        link::set_mtu(uplink.index, mtu),
        link::new_address(uplink.index, range.uplink_inner(), 32, peer),
        link::link_up(uplink.index),
        link::new_route(unspecified, 0, uplink.index, peer),
    ];
    socket.send_all(messages).map_err(set)?;
    namespace::set("ipv4/conf/aehost/proxy_arp", "0")
}
