//! What the host wants of interfaces, read and checked.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use aether_protocol::{ErrorCode, Interface};

use crate::error::Fail;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mac(pub(super) [u8; 6]);

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

impl Mac {
    /// The link-local address that a device with this MAC makes for itself.
    pub(super) fn link_local(self) -> Ipv6Addr {
        let (maker, device) = self.0.split_at(3);
        let mut octets = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xfe, 0, 0, 0];
        octets[8..11].copy_from_slice(maker);
        octets[13..].copy_from_slice(device);
        // The bit that says that the rest is unique in the world is kept the other way round.
        octets[8] ^= 2;
        octets.into()
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = self.0.map(|byte| format!("{byte:02x}"));
        f.write_str(&digits.join(":"))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Network {
    pub(super) ip: IpAddr,
    pub(super) prefix: u8,
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
pub(crate) struct Plan(pub(super) Vec<PlannedInterface>);

#[derive(Debug)]
pub(super) struct PlannedInterface {
    pub(super) mac: Mac,
    pub(super) new_mac: Option<Mac>,
    pub(super) addresses: Vec<Network>,
    pub(super) gateways: Vec<IpAddr>,
    pub(super) mtu: Option<u32>,
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
        assert_eq!(mac.link_local().to_string(), "fe80::aff:fe0b:ff");
        let network: Network = "fd00::2/64".parse().unwrap();
        assert_eq!(network.prefix, 64);
        for wrong in ["10.0.0.1", "10.0.0.1/33", "::/129", "a/8", "10.0.0.1/"] {
            assert!(wrong.parse::<Network>().is_err(), "{wrong}");
        }
    }
}
