//! Interfaces, addresses, routes and neighbours.

mod netlink;

use std::fmt;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use aether_protocol::{ErrorCode, Interface};
use rustix::io::Errno;

use crate::error::Fail;
use netlink::{
    Message, NLM_F_CREATE, NLM_F_REPLACE, Netlink, RTM_DELADDR, RTM_DELROUTE, RTM_GETADDR,
    RTM_NEWADDR, RTM_NEWLINK, RTM_NEWNEIGH, RTM_NEWROUTE, attributes,
};

const IFF_UP: u32 = 1;
const IFLA_ADDRESS: u16 = 1;
const IFLA_MTU: u16 = 4;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
/// Usable at once, without waiting for a duplicate to speak up.
const IFA_F_NODAD: u8 = 2;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_STATIC: u8 = 4;
const RTN_UNICAST: u8 = 1;
/// The gateway need not be in a network of the interface.
const RTNH_F_ONLINK: u32 = 4;
const NUD_PERMANENT: u16 = 0x80;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
/// Default routes of one interface and family that are removed at most.
const ROUTES_MAX: usize = 16;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mac([u8; 6]);

impl FromStr for Mac {
    type Err = Fail;

    fn from_str(text: &str) -> Result<Self, Fail> {
        let wrong = || Fail::new(ErrorCode::InvalidArgument, format!("{text:?} is not a MAC"));
        let mut parts = text.split(':');
        let mut bytes = [0; 6];
        for byte in &mut bytes {
            let is_hex =
                |part: &&str| part.len() == 2 && part.bytes().all(|it| it.is_ascii_hexdigit());
            let part = parts.next().filter(is_hex).ok_or_else(wrong)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
        }
        if parts.next().is_some() { Err(wrong()) } else { Ok(Self(bytes)) }
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = self.0.map(|byte| format!("{byte:02x}"));
        f.write_str(&digits.join(":"))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Network {
    ip: IpAddr,
    prefix: u8,
}

impl FromStr for Network {
    type Err = Fail;

    fn from_str(text: &str) -> Result<Self, Fail> {
        let wrong = || {
            let message = format!("{text:?} is not an address with a prefix length");
            Fail::new(ErrorCode::InvalidArgument, message)
        };
        let (ip, prefix) = text.split_once('/').ok_or_else(wrong)?;
        let ip: IpAddr = ip.parse().map_err(|_| wrong())?;
        let prefix = prefix.parse().map_err(|_| wrong())?;
        let longest = if ip.is_ipv4() { 32 } else { 128 };
        if prefix > longest { Err(wrong()) } else { Ok(Self { ip, prefix }) }
    }
}

/// Interfaces as they shall be, checked.
#[derive(Debug)]
pub(crate) struct Plan(Vec<PlannedInterface>);

#[derive(Debug)]
struct PlannedInterface {
    mac: Mac,
    new_mac: Option<Mac>,
    addresses: Vec<Network>,
    gateways: Vec<IpAddr>,
    mtu: Option<u32>,
}

impl Plan {
    pub(crate) fn of(interfaces: &[Interface]) -> Result<Self, Fail> {
        interfaces.iter().map(PlannedInterface::of).collect::<Result<_, _>>().map(Self)
    }
}

impl PlannedInterface {
    fn of(interface: &Interface) -> Result<Self, Fail> {
        let gateway = |text: &String| {
            let wrong = || format!("{text:?} is not an address");
            text.parse().map_err(|_| Fail::new(ErrorCode::InvalidArgument, wrong()))
        };
        Ok(Self {
            mac: interface.mac.parse()?,
            new_mac: interface.new_mac.as_deref().map(str::parse).transpose()?,
            addresses: interface.addresses.iter().map(|it| it.parse()).collect::<Result<_, _>>()?,
            gateways: interface.gateways.iter().map(gateway).collect::<Result<_, _>>()?,
            mtu: interface.mtu,
        })
    }
}

/// Makes every planned interface what it shall be.
pub(crate) fn apply(plan: &Plan) -> Result<(), Fail> {
    for interface in &plan.0 {
        apply_one(interface)?;
    }
    Ok(())
}

fn apply_one(planned: &PlannedInterface) -> Result<(), Fail> {
    let device =
        find_device(planned.mac).or_else(|| find_device(planned.new_mac?)).ok_or_else(|| {
            let message = format!("no interface has the MAC {}", planned.mac);
            Fail::new(ErrorCode::InvalidArgument, message)
        })?;
    let mut link = Link::open(&device).map_err(Fail::sys("open netlink"))?;
    let named = |what: &str| format!("{what} of {}", device.name);
    if let Some(new_mac) = planned.new_mac.filter(|&mac| Some(mac) != mac_of(&device.name)) {
        link.set_mac(new_mac).map_err(Fail::sys(named("set the MAC")))?;
    }
    link.set_up(planned.mtu).map_err(Fail::sys(named("bring up, or set the MTU")))?;
    link.keep_addresses(&planned.addresses).map_err(Fail::sys(named("remove addresses")))?;
    for &network in &planned.addresses {
        link.add_address(network).map_err(Fail::sys(named("add an address")))?;
    }
    link.remove_default_routes();
    for &gateway in &planned.gateways {
        link.add_default_route(gateway).map_err(Fail::sys(named("add the route")))?;
    }
    Ok(())
}

/// A network device of the guest.
#[derive(Debug)]
pub(crate) struct Device {
    pub(crate) name: String,
    pub(crate) index: u32,
}

/// The device with this MAC; one with hardware behind it before bridges and the like that took it.
pub(crate) fn find_device(mac: Mac) -> Option<Device> {
    let names = fs::read_dir("/sys/class/net").ok()?;
    let names = names.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut found: Vec<_> = names.filter(|name| mac_of(name) == Some(mac)).collect();
    found.sort_by_key(|name| !fs::exists(format!("/sys/class/net/{name}/device")).unwrap_or(false));
    device(found.first()?)
}

fn mac_of(name: &str) -> Option<Mac> {
    fs::read_to_string(format!("/sys/class/net/{name}/address")).ok()?.trim().parse().ok()
}

fn device(name: &str) -> Option<Device> {
    let index = fs::read_to_string(format!("/sys/class/net/{name}/ifindex")).ok()?;
    Some(Device { name: name.to_owned(), index: index.trim().parse().ok()? })
}

/// Brings up the loopback device.
pub(crate) fn bring_up_loopback() -> io::Result<()> {
    let device = device("lo").ok_or(io::ErrorKind::NotFound)?;
    Ok(Link::open(&device)?.set_up(None)?)
}

/// Makes the private link ready: the guest's address, and the host's as a neighbour that need not be
/// asked for.
pub(crate) fn prepare_link(
    device: &Device,
    guest: Ipv6Addr,
    host: Ipv6Addr,
    host_mac: Mac,
) -> io::Result<()> {
    // What a router would announce, on a link that has none.
    for (name, value) in [("accept_ra", "0"), ("accept_dad", "0"), ("addr_gen_mode", "1")] {
        drop(fs::write(format!("/proc/sys/net/ipv6/conf/{}/{name}", device.name), value));
    }
    let mut link = Link::open(device)?;
    link.set_up(None)?;
    link.add_address(Network { ip: guest.into(), prefix: 64 })?;
    Ok(link.add_neighbour(host, host_mac)?)
}

struct Link {
    netlink: Netlink,
    index: u32,
}

impl Link {
    fn open(device: &Device) -> Result<Self, Errno> {
        Ok(Self { netlink: Netlink::open()?, index: device.index })
    }

    fn link_message(&self, up: bool) -> Message {
        // struct ifinfomsg: family, pad, type, index, flags, change.
        let mut fixed = [0; 16];
        fixed[4..8].copy_from_slice(&self.index.to_ne_bytes());
        fixed[8..12].copy_from_slice(&(if up { IFF_UP } else { 0 }).to_ne_bytes());
        fixed[12..16].copy_from_slice(&IFF_UP.to_ne_bytes());
        Message::new(RTM_NEWLINK, 0, &fixed)
    }

    fn set_mac(&mut self, mac: Mac) -> Result<(), Errno> {
        // Many drivers take a new one only while they are down.
        self.netlink.call(&self.link_message(false))?;
        self.netlink.call(&self.link_message(false).with(IFLA_ADDRESS, &mac.0))
    }

    fn set_up(&mut self, mtu: Option<u32>) -> Result<(), Errno> {
        let mut message = self.link_message(true);
        if let Some(mtu) = mtu {
            message = message.with(IFLA_MTU, &mtu.to_ne_bytes());
        }
        self.netlink.call(&message)
    }

    fn address_message(&self, kind: u16, flags: u16, network: Network) -> Message {
        let (family, address_flags) = match network.ip {
            IpAddr::V4(_) => (AF_INET, 0),
            IpAddr::V6(_) => (AF_INET6, IFA_F_NODAD),
        };
        // struct ifaddrmsg: family, prefix length, flags, scope, index.
        let mut fixed = [family, network.prefix, address_flags, 0, 0, 0, 0, 0];
        fixed[4..8].copy_from_slice(&self.index.to_ne_bytes());
        Message::new(kind, flags, &fixed)
            .with_ip(IFA_LOCAL, network.ip)
            .with_ip(IFA_ADDRESS, network.ip)
    }

    fn add_address(&mut self, network: Network) -> Result<(), Errno> {
        let flags = NLM_F_CREATE | NLM_F_REPLACE;
        let message = self.address_message(RTM_NEWADDR, flags, network);
        match self.netlink.call(&message) {
            Ok(()) | Err(Errno::EXIST) => Ok(()),
            Err(errno) => Err(errno),
        }
    }

    /// Removes every address that is not in the list, but for the link-local ones of IPv6.
    fn keep_addresses(&mut self, wanted: &[Network]) -> Result<(), Errno> {
        let mut present = Vec::new();
        let index = self.index;
        let question = Message::new(RTM_GETADDR, 0, &[0; 8]);
        self.netlink.dump(&question, |body| {
            if let Some((of, network)) = read_address(body)
                && of == index
            {
                present.push(network);
            }
        })?;
        for network in present {
            let is_link_local = matches!(network.ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
            if !is_link_local && !wanted.contains(&network) {
                let message = self.address_message(RTM_DELADDR, 0, network);
                match self.netlink.call(&message) {
                    // It went with another one.
                    Ok(()) | Err(Errno::ADDRNOTAVAIL) => {}
                    Err(errno) => return Err(errno),
                }
            }
        }
        Ok(())
    }

    fn default_route(&self, kind: u16, flags: u16, family: u8, route_flags: u32) -> Message {
        // struct rtmsg: family, two prefix lengths, tos, table, protocol, scope, type, flags. For
        // removal the protocol and the type match any.
        let is_new = kind == RTM_NEWROUTE;
        let (protocol, route_type) = if is_new { (RTPROT_STATIC, RTN_UNICAST) } else { (0, 0) };
        let mut fixed = [family, 0, 0, 0, RT_TABLE_MAIN, protocol, 0, route_type, 0, 0, 0, 0];
        fixed[8..12].copy_from_slice(&route_flags.to_ne_bytes());
        Message::new(kind, flags, &fixed).with(RTA_OIF, &self.index.to_ne_bytes())
    }

    fn remove_default_routes(&mut self) {
        for family in [AF_INET, AF_INET6] {
            let message = self.default_route(RTM_DELROUTE, 0, family, 0);
            // Ends with the error that none is left.
            let removed = (0..ROUTES_MAX).take_while(|_| self.netlink.call(&message).is_ok());
            let _count = removed.count();
        }
    }

    fn add_default_route(&mut self, gateway: IpAddr) -> Result<(), Errno> {
        let family = if gateway.is_ipv4() { AF_INET } else { AF_INET6 };
        let flags = NLM_F_CREATE | NLM_F_REPLACE;
        let message = self.default_route(RTM_NEWROUTE, flags, family, RTNH_F_ONLINK);
        self.netlink.call(&message.with_ip(RTA_GATEWAY, gateway))
    }

    fn add_neighbour(&mut self, ip: Ipv6Addr, mac: Mac) -> Result<(), Errno> {
        // struct ndmsg: family, pads, index, state, flags, type.
        let mut fixed = [AF_INET6, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        fixed[4..8].copy_from_slice(&self.index.to_ne_bytes());
        fixed[8..10].copy_from_slice(&NUD_PERMANENT.to_ne_bytes());
        let message = Message::new(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, &fixed);
        self.netlink.call(&message.with_ip(NDA_DST, ip.into()).with(NDA_LLADDR, &mac.0))
    }
}

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// The interface and the address of one entry of a dump.
fn read_address(body: &[u8]) -> Option<(u32, Network)> {
    let (fixed, rest) = body.split_first_chunk::<8>()?;
    let index = u32::from_ne_bytes([fixed[4], fixed[5], fixed[6], fixed[7]]);
    let value = |kind| attributes(rest).find(|(it, _)| *it == kind).map(|(_, value)| value);
    let value = value(IFA_LOCAL).or_else(|| value(IFA_ADDRESS))?;
    let ip = match fixed[0] {
        AF_INET => IpAddr::from(<[u8; 4]>::try_from(value).ok()?),
        AF_INET6 => IpAddr::from(<[u8; 16]>::try_from(value).ok()?),
        _ => return None,
    };
    Some((index, Network { ip, prefix: fixed[1] }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn macs_and_networks_are_read_strictly() {
        let mac: Mac = "02:00:0A:0b:00:ff".parse().unwrap();
        assert_eq!(mac.to_string(), "02:00:0a:0b:00:ff");
        for wrong in
            ["", "02:00:00:00:00", "02:00:00:00:00:00:00", "2:0:0:0:0:0", "+2:00:00:00:00:00"]
        {
            assert!(wrong.parse::<Mac>().is_err(), "{wrong}");
        }
        let network: Network = "fd00::2/64".parse().unwrap();
        assert_eq!(network.prefix, 64);
        for wrong in ["10.0.0.1", "10.0.0.1/33", "::/129", "a/8", "10.0.0.1/"] {
            assert!(wrong.parse::<Network>().is_err(), "{wrong}");
        }
    }
}
