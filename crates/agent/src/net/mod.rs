//! Interfaces, addresses, routes, neighbours, and connections that must not survive a clone.

mod held;
mod link;
mod netlink;
mod plan;
mod sockets;

use std::io;
use std::net::Ipv6Addr;

use aether_protocol::ErrorCode;

pub(crate) use link::Device;
pub(crate) use plan::{Mac, Plan};

use crate::error::Fail;
use link::{Links, Wanted};
use netlink::{Failure, Netlink};
use plan::{Network, PlannedInterface};

/// Makes every planned interface what it shall be. A restored guest's lose everything that they had
/// before: an address that stays is given up and taken again, with what hung on it. And their
/// connections end; what could not be done of that is the text.
pub(crate) fn apply(
    plan: &Plan,
    is_restored: bool,
    link: Option<u32>,
) -> Result<Option<String>, Fail> {
    if plan.0.is_empty() && !is_restored {
        return Ok(None);
    }
    let mut links = Links::open().map_err(Fail::sys("list the interfaces"))?;
    for planned in &plan.0 {
        apply_one(&mut links, planned, is_restored)?;
    }
    if !is_restored {
        return Ok(None);
    }
    let ended = sockets::end_connections(link, links.has_virtual());
    Ok(ended.err().map(|errno| format!("end connections: {errno}")))
}

fn apply_one(links: &mut Links, planned: &PlannedInterface, is_restored: bool) -> Result<(), Fail> {
    let found = links.find(planned.mac).or_else(|| links.find(planned.new_mac?));
    let device = found.cloned().ok_or_else(|| {
        let message = format!("no interface has the MAC {}", planned.mac);
        Fail::new(ErrorCode::InvalidArgument, message)
    })?;
    let wanted = Wanted {
        mac: planned.new_mac.unwrap_or(planned.mac),
        addresses: &planned.addresses,
        gateways: &planned.gateways,
        mtu: planned.mtu,
        is_restored,
    };
    links
        .make(&device, &wanted)
        .map_err(|Failure { what, errno }| Fail::sys(format!("{what} of {}", device.name))(errno))
}

/// The device with this MAC; one with hardware behind it before bridges and the like that took it.
pub(crate) fn find_device(mac: Mac) -> Option<Device> {
    Links::open().ok()?.find(mac).cloned()
}

/// Brings up the loopback device.
pub(crate) fn bring_up_loopback() -> io::Result<()> {
    let mut links = Links::open()?;
    let device = links.named("lo").cloned().ok_or(io::ErrorKind::NotFound)?;
    Ok(links.bring_up(&device)?)
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
        drop(std::fs::write(format!("/proc/sys/net/ipv6/conf/{}/{name}", device.name), value));
    }
    let address = Network { ip: guest.into(), prefix: 64 };
    let messages = [
        link::up(device.index),
        link::new_address(device.index, address),
        link::new_neighbour(device.index, host, host_mac),
    ];
    let errno = |failure: Failure| failure.errno;
    Ok(Netlink::route()?.batch(&messages).map_err(errno)?)
}
