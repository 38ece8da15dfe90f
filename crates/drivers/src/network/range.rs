//! The range of IPv4 addresses of one instance, and who has which.
//!
//! ```text
//! base + 0       the network's own
//! base + 1       gateway of every VM, in the namespace
//! base + 2       the namespace's end of the uplink
//! base + 3       the host's end of the uplink: the host, as VMs see it
//! base + 8 ...   VMs; the offset is the VM's slot
//! last           broadcast
//! ```

use std::{fmt, net::Ipv4Addr, str::FromStr};

/// A network of IPv4: `10.213.0.0/16`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ipv4Range {
    base: Ipv4Addr,
    prefix: u8,
}

/// The text is not a range that VMs can be given addresses of.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a range for VMs; write ADDRESS/PREFIX, prefix 8 to 28, host bits zero")]
pub struct ParseRangeError(String);

/// Slots below are the platform's own.
pub(super) const SLOT_FIRST: u32 = 8;
/// More than any host runs, and few enough for the names of links (15 bytes).
const SLOT_LAST_MAX: u32 = 999_999;

impl Ipv4Range {
    pub const PREFIX_MIN: u8 = 8;
    /// Room for the platform's own addresses and a few VMs.
    pub const PREFIX_MAX: u8 = 28;

    pub fn new(base: Ipv4Addr, prefix: u8) -> Option<Self> {
        let range = Self { base, prefix };
        let fits = (Self::PREFIX_MIN..=Self::PREFIX_MAX).contains(&prefix)
            && base.to_bits() & range.host_mask() == 0;
        fits.then_some(range)
    }

    pub fn base(self) -> Ipv4Addr {
        self.base
    }

    pub fn prefix(self) -> u8 {
        self.prefix
    }

    fn host_mask(self) -> u32 {
        u32::MAX.checked_shr(u32::from(self.prefix)).unwrap_or(0)
    }

    /// The address of the gateway, in the namespace.
    pub fn gateway(self) -> Ipv4Addr {
        self.at(1)
    }

    pub(super) fn uplink_inner(self) -> Ipv4Addr {
        self.at(2)
    }

    /// The host's end of the uplink.
    pub fn uplink_host(self) -> Ipv4Addr {
        self.at(3)
    }

    pub(super) fn at(self, slot: u32) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.base.to_bits() + slot)
    }

    pub(super) fn slots(self) -> std::ops::RangeInclusive<u32> {
        SLOT_FIRST..=(self.host_mask() - 1).min(SLOT_LAST_MAX)
    }

    pub fn contains(self, address: Ipv4Addr) -> bool {
        address.to_bits() & !self.host_mask() == self.base.to_bits()
    }

    /// Whether any address is in both; `prefix` may be any, of a route or an address.
    pub(super) fn overlaps(self, other: Ipv4Addr, prefix: u8) -> bool {
        let shorter = u32::from(self.prefix.min(prefix));
        let mask = u32::MAX.checked_shl(32 - shorter).unwrap_or(0);
        self.base.to_bits() & mask == other.to_bits() & mask
    }
}

impl fmt::Display for Ipv4Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base, self.prefix)
    }
}

impl FromStr for Ipv4Range {
    type Err = ParseRangeError;

    fn from_str(text: &str) -> Result<Self, ParseRangeError> {
        let parsed = text
            .split_once('/')
            .and_then(|(base, prefix)| Self::new(base.parse().ok()?, prefix.parse().ok()?));
        parsed.ok_or_else(|| ParseRangeError(text.chars().take(64).collect()))
    }
}

/// What an instance with no range configured tries, in order: 10.213.0.0/16 first, so that a host
/// with one instance has the range that the documentation names.
pub(super) fn candidates() -> impl Iterator<Item = Ipv4Range> {
    (213..=254u8)
        .chain(128..213)
        .filter_map(|second| Ipv4Range::new(Ipv4Addr::new(10, second, 0, 0), 16))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_parse_and_print() {
        let range: Ipv4Range = "10.213.0.0/16".parse().unwrap();
        assert_eq!(range.to_string(), "10.213.0.0/16");
        assert_eq!(range.gateway(), Ipv4Addr::new(10, 213, 0, 1));
        assert_eq!(range.slots(), 8..=65534);
        for text in ["", "10.0.0.1/8", "10.0.0.0/29", "10.0.0.0/0", "fd00::/64", "10.213.0.0"] {
            assert!(text.parse::<Ipv4Range>().is_err(), "{text}");
        }
    }

    #[test]
    fn overlap_is_symmetric_in_size() {
        let range: Ipv4Range = "10.213.0.0/16".parse().unwrap();
        for (other, prefix, expected) in [
            ("10.213.4.0", 24, true),
            ("10.0.0.0", 8, true),
            ("10.213.255.255", 32, true),
            ("10.214.0.0", 16, false),
            ("192.168.0.0", 16, false),
            ("0.0.0.0", 0, true),
        ] {
            assert_eq!(range.overlaps(other.parse().unwrap(), prefix), expected, "{other}");
        }
    }

    #[test]
    fn the_documented_range_is_the_first_choice() {
        assert_eq!(candidates().next().unwrap().to_string(), "10.213.0.0/16");
    }
}
