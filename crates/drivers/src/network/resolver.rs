//! Which resolvers guests are told to use.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr},
};

/// Where systemd-resolved names the servers behind its own address, 127.0.0.53.
const UPSTREAM: &str = "/run/systemd/resolve/resolv.conf";
const OWN: &str = "/etc/resolv.conf";

/// Asked where the host has no resolver that a guest could reach (as Docker does).
const PUBLIC: [Ipv4Addr; 2] = [Ipv4Addr::new(1, 1, 1, 1), Ipv4Addr::new(9, 9, 9, 9)];

/// More than three are read by no libc.
const RESOLVERS_MAX: usize = 3;

/// The configured ones, else the host's. Only IPv4: guests have nothing else.
pub(super) fn resolvers(configured: &[IpAddr]) -> Vec<Ipv4Addr> {
    let configured = usable(configured.iter().copied());
    if !configured.is_empty() {
        return configured;
    }
    for path in [OWN, UPSTREAM] {
        let text = fs::read_to_string(path).unwrap_or_default();
        let found = usable(parse(&text));
        if !found.is_empty() {
            return found;
        }
    }
    tracing::warn!(
        "this host has no resolver that a VM can reach; VMs ask 1.1.1.1 and 9.9.9.9 (configure \
         network.dns to change that)"
    );
    PUBLIC.to_vec()
}

fn usable(addresses: impl Iterator<Item = IpAddr>) -> Vec<Ipv4Addr> {
    let mut found = Vec::new();
    for address in addresses {
        if let IpAddr::V4(address) = address
            && !address.is_loopback()
            && !address.is_unspecified()
            && !found.contains(&address)
        {
            found.push(address);
        }
    }
    found.truncate(RESOLVERS_MAX);
    found
}

fn parse(text: &str) -> impl Iterator<Item = IpAddr> {
    text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        (words.next() == Some("nameserver")).then(|| words.next()?.parse().ok()).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_ipv6_and_repeats_are_left_out() {
        let text = "# nameserver 8.8.8.8\nsearch example\nnameserver 127.0.0.53\n\
                    nameserver 10.0.0.53\nnameserver fd00::1\nnameserver 10.0.0.53 \n";
        assert_eq!(usable(parse(text)), [Ipv4Addr::new(10, 0, 0, 53)]);
    }

    #[test]
    fn configured_resolvers_come_first() {
        assert_eq!(resolvers(&["192.0.2.53".parse().unwrap()]), [Ipv4Addr::new(192, 0, 2, 53)]);
    }
}
