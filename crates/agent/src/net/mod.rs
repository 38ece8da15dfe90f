//! Interfaces, addresses, routes, neighbours, and connections that must not survive a clone.

mod held;
mod link;
mod netlink;
mod plan;
mod sockets;

use std::io;
use std::net::Ipv6Addr;

use aether_protocol::ErrorCode;
use rustix::io::Errno;

pub(crate) use link::Device;
pub(crate) use plan::{Mac, Plan};

use crate::error::Fail;
use link::{Links, Wanted};
use netlink::{Failure, Netlink};
use plan::{Network, PlannedInterface};

/// What a guest keeps from its last configuration: a restored one need not look for its devices, nor
/// make the socket to change them.
#[derive(Debug, Default)]
pub(crate) struct KnownDevices {
    links: Option<Links>,
    devices: Vec<KnownDevice>,
}

#[derive(Debug)]
struct KnownDevice {
    mac: Mac,
    device: Device,
    addresses: Vec<Network>,
}

/// How a configuration begins.
#[derive(Debug, Clone, Copy)]
pub(crate) struct How {
    /// The guest is a clone: nothing of what its devices have may stay.
    pub(crate) is_restored: bool,
    /// Nobody can have changed its devices since they were configured.
    pub(crate) is_known: bool,
}

impl KnownDevices {
    /// The planned devices with the addresses that they are known to have, if each of them still
    /// has the MAC by which it was known.
    fn find_all(&self, plan: &Plan, links: &Links, is_known: bool) -> Option<Vec<Found>> {
        let find = |planned: &PlannedInterface| {
            let known = self.devices.iter().find(|known| known.mac == planned.mac)?;
            let found = is_known || links.has_mac(&known.device, planned.mac);
            let addresses = is_known.then(|| known.addresses.clone());
            found.then(|| (known.device.clone(), addresses))
        };
        plan.0.iter().map(find).collect()
    }
}

/// A device, and its addresses where they are known.
type Found = (Device, Option<Vec<Network>>);

/// Makes every planned interface what it shall be. A restored guest's lose everything that they had
/// before: an address that stays is given up and taken again, with what hung on it.
pub(crate) fn apply(plan: &Plan, how: How, known: &mut KnownDevices) -> Result<(), Fail> {
    if plan.0.is_empty() {
        return Ok(());
    }
    // Taken out: what fails is begun anew the next time.
    let mut links = match known.links.take() {
        Some(links) => links,
        None => Links::unlisted().map_err(Fail::sys("open netlink"))?,
    };
    let devices = if let Some(devices) = known.find_all(plan, &links, how.is_known) {
        devices
    } else {
        links.list().map_err(Fail::sys("list the interfaces"))?;
        let find = |planned| Ok((listed(&links, planned)?, None));
        plan.0.iter().map(find).collect::<Result<_, Fail>>()?
    };
    known.devices.clear();
    for (planned, (device, present)) in plan.0.iter().zip(devices) {
        let wanted = Wanted {
            mac: planned.new_mac.unwrap_or(planned.mac),
            addresses: &planned.addresses,
            gateways: &planned.gateways,
            mtu: planned.mtu,
            is_restored: how.is_restored,
            present,
        };
        links.make(device.index, &wanted).map_err(|Failure { what, errno }| {
            Fail::sys(format!("{what} of {}", device.name))(errno)
        })?;
        let (mac, addresses) = (wanted.mac, planned.addresses.clone());
        known.devices.push(KnownDevice { mac, device, addresses });
    }
    known.links = Some(links);
    Ok(())
}

fn listed(links: &Links, planned: &PlannedInterface) -> Result<Device, Fail> {
    let found = links.find(planned.mac).or_else(|| links.find(planned.new_mac?));
    found.cloned().ok_or_else(|| {
        let message = format!("no interface has the MAC {}", planned.mac);
        Fail::new(ErrorCode::InvalidArgument, message)
    })
}

/// Ends the connections of a restored guest that go beyond it and its private link.
pub(crate) fn end_connections(link: Option<u32>) -> Result<(), Errno> {
    // Without devices that the kernel has made up there is no way out of another namespace.
    let has_virtual = Links::open().map_or(true, |links| links.has_virtual());
    sockets::end_connections(link, has_virtual)
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
