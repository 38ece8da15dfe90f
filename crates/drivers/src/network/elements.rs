//! What the packet filter knows of one VM: elements of the fixed sets of [`super::rules`], put in
//! and taken out by one netlink transaction. (`nft` takes 5 to 10 ms for the same.)

use std::{collections::BTreeSet, net::Ipv4Addr};

use aether_types::{Egress, NetworkPolicy, TransportProtocol};
use rustix::io::Errno;

use super::{
    link::{Mac, text},
    netlink::{CREATE, Message, Socket, attributes},
};
use crate::DriverError;

const SUBSYSTEM_CONNTRACK: u16 = 1 << 8;
const SUBSYSTEM_NFTABLES: u16 = 10 << 8;
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;
const GET_TABLE: u16 = SUBSYSTEM_NFTABLES + 1;
const NEW_SET_ELEMENT: u16 = SUBSYSTEM_NFTABLES + 12;
const DELETE_SET_ELEMENT: u16 = SUBSYSTEM_NFTABLES + 14;
const DELETE_CONNECTION: u16 = SUBSYSTEM_CONNTRACK + 2;

const FAMILY_INET: u8 = 1;
const LIST_TABLE: u16 = 1;
const LIST_SET: u16 = 2;
const LIST_ELEMENTS: u16 = 3;
const LIST_ELEMENT: u16 = 1;
const ELEMENT_KEY: u16 = 1;
const ELEMENT_KEY_END: u16 = 10;
const DATA_VALUE: u16 = 1;
const TABLE_NAME: u16 = 1;
const CTA_MARK: u16 = 8;
const CTA_MARK_MASK: u16 = 21;

/// An attribute's length has 16 bits; this many elements stay well below.
const ELEMENTS_PER_MESSAGE: usize = 256;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Set {
    Vms,
    Public,
    Allow,
    AllowPing,
}

impl Set {
    const ALL: [Self; 4] = [Self::Vms, Self::Public, Self::Allow, Self::AllowPing];

    fn name(self) -> &'static str {
        match self {
            Self::Vms => "vms",
            Self::Public => "public",
            Self::Allow => "allow",
            Self::AllowPing => "allow_ping",
        }
    }
}

/// A key, and the end of its range where the set has ranges.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Element {
    set: Set,
    key: Vec<u8>,
    end: Option<Vec<u8>>,
}

/// All elements of one VM in one table.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Elements(BTreeSet<Element>);

impl Elements {
    /// For the table in the namespace.
    pub(super) fn inner(tap: &str, mac: Mac, vm: Ipv4Addr, policy: &NetworkPolicy) -> Self {
        let mut elements = Self::host(vm, policy);
        let mut key = tap.as_bytes().to_vec();
        key.resize(libc::IFNAMSIZ, 0);
        key.extend_from_slice(&mac);
        key.extend_from_slice(&[0, 0]);
        key.extend_from_slice(&vm.octets());
        elements.0.insert(Element { set: Set::Vms, key, end: None });
        match policy.egress {
            Egress::Public => {
                let key = vm.octets().to_vec();
                elements.0.insert(Element { set: Set::Public, key, end: None });
            }
            Egress::None => {}
        }
        elements
    }

    /// For the table on the host, which has only what is allowed in addition.
    pub(super) fn host(vm: Ipv4Addr, policy: &NetworkPolicy) -> Self {
        let mut elements = BTreeSet::new();
        for cell in cells(policy) {
            let key = |address: u32, port: u16| {
                let [high, low] = port.to_be_bytes();
                let rest = [cell.protocol, 0, 0, 0, high, low, 0, 0];
                [&vm.octets()[..], &address.to_be_bytes(), &rest].concat()
            };
            let end = Some(key(cell.last, cell.ports.1));
            elements.insert(Element { set: Set::Allow, key: key(cell.first, cell.ports.0), end });
        }
        for (first, last) in pings(policy) {
            let key = |address: u32| [vm.octets(), address.to_be_bytes()].concat();
            elements.insert(Element { set: Set::AllowPing, key: key(first), end: Some(key(last)) });
        }
        Self(elements)
    }
}

/// Takes out what only `old` has and puts in what only `new` has: all of it or nothing.
pub(super) fn change(
    socket: &mut Socket,
    table: &str,
    old: &Elements,
    new: &Elements,
) -> Result<(), Errno> {
    let mut messages = vec![edge(BATCH_BEGIN)];
    messages.extend(list(table, DELETE_SET_ELEMENT, 0, old.0.difference(&new.0)));
    messages.extend(list(table, NEW_SET_ELEMENT, CREATE, new.0.difference(&old.0)));
    if messages.len() == 1 {
        return Ok(());
    }
    messages.push(edge(BATCH_END));
    socket.send_all(messages)
}

fn edge(kind: u16) -> Message {
    let [high, low] = (SUBSYSTEM_NFTABLES >> 8).to_be_bytes();
    Message::new(kind, 0, &[0, 0, high, low]).without_ack()
}

fn list<'a>(
    table: &str,
    kind: u16,
    flags: u16,
    elements: impl Iterator<Item = &'a Element>,
) -> Vec<Message> {
    let elements: Vec<&Element> = elements.collect();
    let mut messages = Vec::new();
    for set in Set::ALL {
        let of_set: Vec<&Element> = elements.iter().copied().filter(|e| e.set == set).collect();
        for chunk in of_set.chunks(ELEMENTS_PER_MESSAGE) {
            let message = Message::new(kind, flags, &[FAMILY_INET, 0, 0, 0])
                .attr_text(LIST_TABLE, table)
                .attr_text(LIST_SET, set.name())
                .nest(LIST_ELEMENTS, |m| chunk.iter().fold(m, |m, element| put(m, element)));
            messages.push(message);
        }
    }
    messages
}

fn put(message: Message, element: &Element) -> Message {
    message.nest(LIST_ELEMENT, |m| {
        let m = m.nest(ELEMENT_KEY, |m| m.attr(DATA_VALUE, &element.key));
        match &element.end {
            Some(end) => m.nest(ELEMENT_KEY_END, |m| m.attr(DATA_VALUE, end)),
            None => m,
        }
    })
}

/// Forgets the connections that carry the VM's mark, so that whoever has its address next
/// inherits none of them.
pub(super) fn forget_connections(socket: &mut Socket, vm: Ipv4Addr) -> Result<(), Errno> {
    let mark = u32::from_ne_bytes(vm.octets());
    let family = u8::try_from(libc::AF_INET).unwrap_or_default();
    let message = Message::new(DELETE_CONNECTION, 0, &[family, 0, 0, 0])
        .attr(CTA_MARK, &mark.to_be_bytes())
        .attr(CTA_MARK_MASK, &u32::MAX.to_be_bytes());
    socket.send_all(vec![message])
}

/// The packet filter's tables of family `inet` in the socket's namespace.
pub(super) fn tables(socket: &mut Socket) -> Result<Vec<String>, Errno> {
    let answers = socket.dump(GET_TABLE, &[FAMILY_INET, 0, 0, 0])?;
    let names = answers.iter().filter_map(|bytes| {
        let (_, name) = attributes(bytes, 4).find(|(kind, _)| *kind == TABLE_NAME)?;
        text(name)
    });
    Ok(names.collect())
}

/// Addresses, ports and a protocol that are open; no two cells of a policy overlap, which the
/// kernel's sets of ranges ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cell {
    protocol: u8,
    first: u32,
    last: u32,
    ports: (u16, u16),
}

const PROTOCOLS: [(TransportProtocol, u8); 2] =
    [(TransportProtocol::Tcp, 6), (TransportProtocol::Udp, 17)];

/// Refuses rules that this network cannot honour.
pub(super) fn check(policy: &NetworkPolicy) -> Result<(), DriverError> {
    match policy.allow.iter().find(|rule| rule.address.is_ipv6()) {
        Some(rule) => Err(DriverError::Unavailable(format!(
            "network.allow: VMs have no IPv6; remove the rule {rule}"
        ))),
        None => Ok(()),
    }
}

/// First and last address of each rule of IPv4, with its ports where it names a protocol or none.
fn spans(policy: &NetworkPolicy, protocol: TransportProtocol) -> Vec<(u64, u64, (u16, u16))> {
    let rules = policy.allow.iter().filter(|r| r.protocol.is_none_or(|p| p == protocol));
    rules
        .filter_map(|rule| {
            let (first, last) = address_span(rule)?;
            Some((first, last, rule.ports.map_or((0, u16::MAX), |p| (p.first, p.last))))
        })
        .collect()
}

fn address_span(rule: &aether_types::AllowRule) -> Option<(u64, u64)> {
    let std::net::IpAddr::V4(address) = rule.address else { return None };
    let size = 1u64 << 32u32.checked_sub(u32::from(rule.prefix))?;
    let first = u64::from(address.to_bits());
    Some((first, first + size - 1))
}

fn cells(policy: &NetworkPolicy) -> Vec<Cell> {
    let mut cells: Vec<Cell> = Vec::new();
    for (protocol, number) in PROTOCOLS {
        let spans = spans(policy, protocol);
        // Between two neighbouring edges the same rules hold for every address.
        let edges: BTreeSet<u64> = spans.iter().flat_map(|s| [s.0, s.1 + 1]).collect();
        let edges: Vec<u64> = edges.into_iter().collect();
        // The cells of the part before, to be made longer where nothing changes.
        let mut before: Vec<Cell> = Vec::new();
        for pair in edges.windows(2) {
            let (first, last) = (pair[0], pair[1] - 1);
            let holding = spans.iter().filter(|s| s.0 <= first && last <= s.1);
            let ports = merge(holding.map(|s| s.2).collect());
            let (Ok(first), Ok(last)) = (u32::try_from(first), u32::try_from(last)) else { break };
            let continues = before.first().is_some_and(|b| b.last.checked_add(1) == Some(first))
                && before.iter().map(|b| b.ports).eq(ports.iter().copied());
            if continues {
                for cell in &mut before {
                    cell.last = last;
                }
            } else {
                cells.append(&mut before);
                let cell = |ports| Cell { protocol: number, first, last, ports };
                before = ports.into_iter().map(cell).collect();
            }
        }
        cells.append(&mut before);
    }
    cells
}

/// Address ranges that may be pinged: those of the rules without ports.
fn pings(policy: &NetworkPolicy) -> Vec<(u32, u32)> {
    let rules = policy.allow.iter().filter(|rule| rule.ports.is_none());
    let spans = rules.filter_map(|rule| {
        let (first, last) = address_span(rule)?;
        Some((u32::try_from(first).ok()?, u32::try_from(last).ok()?))
    });
    merge(spans.collect())
}

/// Inclusive ranges, sorted, with no two that overlap or touch.
fn merge<T: Copy + Ord + Into<u64>>(mut ranges: Vec<(T, T)>) -> Vec<(T, T)> {
    ranges.sort_unstable();
    let mut merged: Vec<(T, T)> = Vec::new();
    for (first, last) in ranges {
        match merged.last_mut() {
            Some(before) if first.into() <= before.1.into() + 1 => before.1 = before.1.max(last),
            _ => merged.push((first, last)),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use aether_types::{AllowRule, PortRange};
    use proptest::prelude::*;

    use super::*;

    fn policy(rules: &[&str]) -> NetworkPolicy {
        let allow = rules.iter().map(|r| r.parse().unwrap()).collect();
        NetworkPolicy { egress: Egress::None, allow }
    }

    #[test]
    fn one_rule_is_one_cell_for_each_protocol() {
        let found = cells(&policy(&["192.0.2.7:443/tcp"]));
        let address = u32::from(Ipv4Addr::new(192, 0, 2, 7));
        let ports = (443, 443);
        assert_eq!(found, [Cell { protocol: 6, first: address, last: address, ports }]);
        assert_eq!(cells(&policy(&["192.0.2.7"])).len(), 2);
        assert_eq!(cells(&policy(&["0.0.0.0/0"]))[0].last, u32::MAX);
        assert!(pings(&policy(&["192.0.2.7:443"])).is_empty());
    }

    #[test]
    fn rules_of_ipv6_are_refused() {
        assert!(check(&policy(&["192.0.2.7", "2001:db8::1"])).is_err());
    }

    fn rule() -> impl Strategy<Value = AllowRule> {
        // A small world, so that rules meet.
        let protocol = prop_oneof![
            Just(None),
            Just(Some(TransportProtocol::Tcp)),
            Just(Some(TransportProtocol::Udp))
        ];
        let ports = prop::option::of((1..20u16, 0..6u16));
        (0..16u32, 28..=32u8, ports, protocol).prop_map(|(low, prefix, ports, protocol)| {
            let mask = u32::MAX << (32 - u32::from(prefix));
            AllowRule {
                address: Ipv4Addr::from_bits((0x0a00_0000 | low) & mask).into(),
                prefix,
                ports: ports.map(|(first, more)| PortRange { first, last: first + more }),
                protocol: if ports.is_some() { protocol } else { None },
            }
        })
    }

    fn opens(rule: &AllowRule, protocol: u8, address: u32, port: u16) -> bool {
        let (first, last) = address_span(rule).unwrap();
        (first..=last).contains(&u64::from(address))
            && rule.ports.is_none_or(|p| (p.first..=p.last).contains(&port))
            && match rule.protocol {
                None => true,
                Some(TransportProtocol::Tcp) => protocol == 6,
                Some(TransportProtocol::Udp) => protocol == 17,
            }
    }

    proptest! {
        #[test]
        fn cells_open_what_the_rules_open_and_never_overlap(
            allow in prop::collection::vec(rule(), 0..8)
        ) {
            let policy = NetworkPolicy { egress: Egress::None, allow };
            let cells = cells(&policy);
            let pings = pings(&policy);
            for address in 0x0a00_0000..0x0a00_0012u32 {
                for protocol in [6, 17] {
                    for port in [0, 1, 2, 5, 10, 11, 19, 24, 25, 65535] {
                        let open =
                            policy.allow.iter().any(|r| opens(r, protocol, address, port));
                        let holding = cells.iter().filter(|c| {
                            c.protocol == protocol
                                && (c.first..=c.last).contains(&address)
                                && (c.ports.0..=c.ports.1).contains(&port)
                        });
                        prop_assert_eq!(holding.count(), usize::from(open));
                    }
                }
                let open = policy.allow.iter().any(|r| r.ports.is_none() && opens(r, 6, address, 1));
                let holding = pings.iter().filter(|p| (p.0..=p.1).contains(&address));
                prop_assert_eq!(holding.count(), usize::from(open));
            }
        }
    }
}
