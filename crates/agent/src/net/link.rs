//! Network devices and what the kernel keeps of each.

use std::net::{IpAddr, Ipv6Addr};

use rustix::io::Errno;

use super::netlink::{
    Failure, Message, NLM_F_CREATE, NLM_F_REPLACE, Netlink, attributes, nested, number,
};
use super::plan::{Mac, Network};
use crate::sys;

const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_GETADDR: u16 = 22;
const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_GETROUTE: u16 = 26;
const RTM_NEWNEIGH: u16 = 28;

const IFF_UP: u32 = 1;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINKINFO: u16 = 18;
/// In the one above; what is only part of a bridge has none.
const IFLA_INFO_KIND: u16 = 1;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const IN6_ADDR_GEN_MODE_NONE: u8 = 1;
const IFLA_EXT_MASK: u16 = 29;
/// Counters take the kernel the longest to gather.
const RTEXT_FILTER_SKIP_STATS: u32 = 8;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
/// Usable at once, without waiting for a duplicate to speak up.
const IFA_F_NODAD: u8 = 2;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_KERNEL: u8 = 2;
const RTPROT_STATIC: u8 = 4;
const RTN_UNICAST: u8 = 1;
/// The gateway need not be in a network of the interface.
const RTNH_F_ONLINK: u32 = 4;
const NUD_PERMANENT: u16 = 0x80;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
/// Default routes of one interface and family that are removed at most.
const ROUTES_MAX: usize = 16;

const AF_UNSPEC: u8 = 0;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

const LINK_LOCAL_PREFIX: u8 = 64;

/// A network device of the guest.
#[derive(Debug, Clone)]
pub(crate) struct Device {
    pub(crate) name: String,
    pub(crate) index: u32,
    mac: Option<Mac>,
    is_up: bool,
    /// A bridge, a tunnel: something that the kernel has made up.
    is_virtual: bool,
}

/// What a device shall be.
#[derive(Debug)]
pub(super) struct Wanted<'a> {
    pub(super) mac: Mac,
    pub(super) addresses: &'a [Network],
    pub(super) gateways: &'a [IpAddr],
    pub(super) mtu: Option<u32>,
    /// Nothing of what the device has may stay.
    pub(super) is_restored: bool,
    /// The addresses that it is known to have. It is up then.
    pub(super) present: Option<Vec<Network>>,
}

/// The devices, and the way to change them.
#[derive(Debug)]
pub(super) struct Links {
    netlink: Netlink,
    devices: Vec<Device>,
}

impl Links {
    pub(super) fn open() -> Result<Self, Errno> {
        let mut links = Self::unlisted()?;
        links.list()?;
        Ok(links)
    }

    /// Without a list of the devices, for who may know them.
    pub(super) fn unlisted() -> Result<Self, Errno> {
        Ok(Self { netlink: Netlink::route()?, devices: Vec::new() })
    }

    pub(super) fn list(&mut self) -> Result<(), Errno> {
        let question = Message::new("list", RTM_GETLINK, 0, &[0; 16])
            .with(IFLA_EXT_MASK, &RTEXT_FILTER_SKIP_STATS.to_ne_bytes());
        let mut devices = Vec::new();
        self.netlink.dump(&question, |body| devices.extend(read_device(body)))?;
        self.devices = devices;
        Ok(())
    }

    /// Whether the device has this MAC now.
    pub(super) fn has_mac(&self, device: &Device, mac: Mac) -> bool {
        sys::mac_of(self.netlink.fd(), &device.name) == Some(mac.0)
    }

    pub(super) fn find(&self, mac: Mac) -> Option<&Device> {
        let with_mac = self.devices.iter().filter(|device| device.mac == Some(mac));
        with_mac.min_by_key(|device| device.is_virtual)
    }

    pub(super) fn named(&self, name: &str) -> Option<&Device> {
        self.devices.iter().find(|device| device.name == name)
    }

    /// Whether a device that the kernel has made up is in use.
    pub(super) fn has_virtual(&self) -> bool {
        self.devices.iter().any(|device| device.is_virtual && device.is_up)
    }

    pub(super) fn bring_up(&mut self, device: &Device) -> Result<(), Errno> {
        self.netlink.call(&up(device.index))
    }

    /// Few messages in few system calls: a restored guest pays for each.
    pub(super) fn make(&mut self, index: u32, wanted: &Wanted<'_>) -> Result<(), Failure> {
        let failed = |what| move |errno| Failure { what, errno };
        let present = match &wanted.present {
            Some(known) => known.clone(),
            None => self.addresses(index).map_err(failed("list the addresses"))?,
        };
        let wants_v6 = wanted.addresses.iter().any(|network| network.ip.is_ipv6())
            || wanted.gateways.iter().any(IpAddr::is_ipv6);
        let has_v6 = present.iter().any(|it| it.ip.is_ipv6() && !is_link_local(*it));
        let mut messages = Vec::new();
        // A restored guest's was told already.
        if !wants_v6 && !wanted.is_restored {
            messages.push(no_link_local(index));
        }
        // Neighbours go with the MAC, also where it is the same; routes of IPv4 with the last
        // address; those of IPv6 one by one.
        messages.push(device(index, wanted));
        if wanted.is_restored && (has_v6 || wants_v6) {
            messages.extend(self.routes(index).map_err(failed("list the routes"))?);
        }
        let stays = |network: &Network| {
            !wanted.is_restored && (is_link_local(*network) || wanted.addresses.contains(network))
        };
        let gone = present.iter().filter(|network| !stays(network));
        messages.extend(gone.map(|&network| old_address(index, network)));
        messages.extend(wanted.addresses.iter().map(|&network| new_address(index, network)));
        if wanted.is_restored && wants_v6 {
            let ip = wanted.mac.link_local().into();
            messages.push(new_address(index, Network { ip, prefix: LINK_LOCAL_PREFIX }));
        }
        if !wanted.is_restored {
            self.netlink.batch(&messages)?;
            messages.clear();
            self.remove_default_routes(index);
        }
        messages.extend(wanted.gateways.iter().map(|&gateway| new_route(index, gateway)));
        self.netlink.batch(&messages)
    }

    fn addresses(&mut self, index: u32) -> Result<Vec<Network>, Errno> {
        let mut present = Vec::new();
        let question = Message::new("list", RTM_GETADDR, 0, &[AF_UNSPEC, 0, 0, 0, 0, 0, 0, 0]);
        self.netlink.dump(&question, |body| {
            let found = read_address(body).filter(|(of, _)| *of == index);
            present.extend(found.map(|(_, network)| network));
        })?;
        Ok(present)
    }

    /// What removes each route of IPv6 through a device that did not come with an address.
    fn routes(&mut self, index: u32) -> Result<Vec<Message>, Errno> {
        let mut messages = Vec::new();
        let question = Message::new("list", RTM_GETROUTE, 0, &route_header(AF_INET6, 0, 0));
        self.netlink.dump(&question, |body| messages.extend(old_route(body, index)))?;
        Ok(messages)
    }

    fn remove_default_routes(&mut self, index: u32) {
        for family in [AF_INET, AF_INET6] {
            let fixed = route_header(family, 0, 0);
            let message = Message::new("remove the route", RTM_DELROUTE, 0, &fixed)
                .with(RTA_OIF, &index.to_ne_bytes());
            // Ends with the error that none is left.
            let removed = (0..ROUTES_MAX).take_while(|_| self.netlink.call(&message).is_ok());
            let _count = removed.count();
        }
    }
}

pub(super) fn up(index: u32) -> Message {
    link_message("bring up", index, IFF_UP)
}

/// The device as it shall be, up. Its MAC changes while it is up, which the drivers of virtual
/// machines' devices allow.
fn device(index: u32, wanted: &Wanted<'_>) -> Message {
    // To say that it is up makes it hear what it shall receive, once more.
    let flags = if wanted.present.is_some() { 0 } else { IFF_UP };
    let message = link_message("set the MAC or the MTU, or bring up", index, flags)
        .with(IFLA_ADDRESS, &wanted.mac.0);
    match wanted.mtu {
        Some(mtu) => message.with(IFLA_MTU, &mtu.to_ne_bytes()),
        None => message,
    }
}

/// Where nobody speaks IPv6 the device makes no address for that by itself: a clone would have to
/// make another.
fn no_link_local(index: u32) -> Message {
    let mode = nested(IFLA_INET6_ADDR_GEN_MODE, &[IN6_ADDR_GEN_MODE_NONE]);
    // A kernel without IPv6 does not know it.
    link_message("leave out link-local addresses", index, 0)
        .with(IFLA_AF_SPEC, &nested(u16::from(AF_INET6), &mode))
        .unless(Errno::AFNOSUPPORT)
}

/// Sets these flags and leaves the others.
fn link_message(what: &'static str, index: u32, flags: u32) -> Message {
    // struct ifinfomsg: family, pad, type, index, flags, change.
    let mut fixed = [0; 16];
    fixed[4..8].copy_from_slice(&index.to_ne_bytes());
    fixed[8..12].copy_from_slice(&flags.to_ne_bytes());
    fixed[12..16].copy_from_slice(&flags.to_ne_bytes());
    Message::new(what, RTM_NEWLINK, 0, &fixed)
}

pub(super) fn new_address(index: u32, network: Network) -> Message {
    let flags = NLM_F_CREATE | NLM_F_REPLACE;
    address("add an address", RTM_NEWADDR, flags, index, network).unless(Errno::EXIST)
}

fn old_address(index: u32, network: Network) -> Message {
    // It may have gone with another one.
    address("remove an address", RTM_DELADDR, 0, index, network).unless(Errno::ADDRNOTAVAIL)
}

fn address(what: &'static str, kind: u16, flags: u16, index: u32, network: Network) -> Message {
    let (family, address_flags) = match network.ip {
        IpAddr::V4(_) => (AF_INET, 0),
        IpAddr::V6(_) => (AF_INET6, IFA_F_NODAD),
    };
    // struct ifaddrmsg: family, prefix length, flags, scope, index.
    let mut fixed = [family, network.prefix, address_flags, 0, 0, 0, 0, 0];
    fixed[4..8].copy_from_slice(&index.to_ne_bytes());
    Message::new(what, kind, flags, &fixed)
        .with_ip(IFA_LOCAL, network.ip)
        .with_ip(IFA_ADDRESS, network.ip)
}

/// struct rtmsg: family, two prefix lengths, tos, table, protocol, scope, type, flags. For a removal
/// no protocol and no type match any.
fn route_header(family: u8, protocol: u8, route_type: u8) -> [u8; 12] {
    [family, 0, 0, 0, RT_TABLE_MAIN, protocol, 0, route_type, 0, 0, 0, 0]
}

fn new_route(index: u32, gateway: IpAddr) -> Message {
    let family = if gateway.is_ipv4() { AF_INET } else { AF_INET6 };
    let mut fixed = route_header(family, RTPROT_STATIC, RTN_UNICAST);
    fixed[8..12].copy_from_slice(&RTNH_F_ONLINK.to_ne_bytes());
    Message::new("add the route", RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, &fixed)
        .with(RTA_OIF, &index.to_ne_bytes())
        .with_ip(RTA_GATEWAY, gateway)
}

/// What removes the route of an entry of a dump, where it is one through the device that somebody
/// has added.
fn old_route(body: &[u8], index: u32) -> Option<Message> {
    let (fixed, rest) = body.split_first_chunk::<12>()?;
    let value = |kind| attributes(rest).find(|(it, _)| *it == kind).map(|(_, value)| value);
    let is_through = value(RTA_OIF).and_then(|oif| number(oif, 0)) == Some(index);
    let (table, protocol) = (fixed[4], fixed[5]);
    if !is_through || table != RT_TABLE_MAIN || protocol == RTPROT_KERNEL {
        return None;
    }
    let mut message = Message::new("remove a route", RTM_DELROUTE, 0, fixed).unless(Errno::SRCH);
    for kind in [RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY] {
        if let Some(value) = value(kind) {
            message = message.with(kind, value);
        }
    }
    Some(message)
}

pub(super) fn new_neighbour(index: u32, ip: Ipv6Addr, mac: Mac) -> Message {
    // struct ndmsg: family, pads, index, state, flags, type.
    let mut fixed = [AF_INET6, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    fixed[4..8].copy_from_slice(&index.to_ne_bytes());
    fixed[8..10].copy_from_slice(&NUD_PERMANENT.to_ne_bytes());
    Message::new("add a neighbour", RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, &fixed)
        .with_ip(NDA_DST, ip.into())
        .with(NDA_LLADDR, &mac.0)
}

fn is_link_local(network: Network) -> bool {
    matches!(network.ip, IpAddr::V6(ip) if ip.is_unicast_link_local())
}

/// One entry of the list of devices.
fn read_device(body: &[u8]) -> Option<Device> {
    let (fixed, rest) = body.split_first_chunk::<16>()?;
    let mut device = Device {
        name: String::new(),
        index: number(fixed, 4)?,
        mac: None,
        is_up: number(fixed, 8)? & IFF_UP != 0,
        is_virtual: false,
    };
    for (kind, value) in attributes(rest) {
        match kind {
            IFLA_ADDRESS => device.mac = value.try_into().ok().map(Mac),
            IFLA_IFNAME => {
                let name = value.strip_suffix(&[0]).unwrap_or(value);
                device.name = String::from_utf8_lossy(name).into_owned();
            }
            IFLA_LINKINFO => {
                device.is_virtual = attributes(value).any(|(kind, _)| kind == IFLA_INFO_KIND);
            }
            _ => {}
        }
    }
    Some(device)
}

/// The interface and the address of one entry of a dump.
fn read_address(body: &[u8]) -> Option<(u32, Network)> {
    let (fixed, rest) = body.split_first_chunk::<8>()?;
    let index = number(fixed, 4)?;
    let value = |kind| attributes(rest).find(|(it, _)| *it == kind).map(|(_, value)| value);
    let value = value(IFA_LOCAL).or_else(|| value(IFA_ADDRESS))?;
    let ip = match fixed[0] {
        AF_INET => IpAddr::from(<[u8; 4]>::try_from(value).ok()?),
        AF_INET6 => IpAddr::from(<[u8; 16]>::try_from(value).ok()?),
        _ => return None,
    };
    Some((index, Network { ip, prefix: fixed[1] }))
}
