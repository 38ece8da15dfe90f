//! What may pass: the fixed rules, as text for `nft`.
//!
//! Two tables. The one in the namespace decides everything that can be decided there, by sets
//! that a VM's elements are put in ([`super::elements`]); its rules never change while it runs.
//! The one on the host closes the host itself, whose addresses only the host knows for certain,
//! and translates addresses. Both are replaced as a whole, in one transaction.
//!
//! Rules match on names of links: `aeu*` carries a guest's network, `aec*` is the private link to
//! its agent, `aehost` is the uplink.

use std::{
    fmt::Write as _,
    io::{self, Write as _},
    net::Ipv4Addr,
    process::{Command, Stdio},
};

use super::range::Ipv4Range;
use crate::DriverError;

/// The table in the namespace.
pub(super) const INNER_TABLE: &str = "aether";

/// Ranges that are not the public internet (RFC 6890 and its registry): this network, private,
/// shared, loopback, link-local with the clouds' metadata, protocol assignments, documentation,
/// benchmarking, multicast, reserved and broadcast. 6to4's relay anycast (192.88.99.0/24) was
/// withdrawn.
pub(super) const CLOSED: &[&str] = &[
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.0.2.0/24",
    "192.88.99.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "224.0.0.0/4",
    "240.0.0.0/4",
];

/// Sets that both tables have, for what requests allow. Port 0 to 65535 stands for all.
const ALLOW_SETS: &str = "\
  set allow { type ipv4_addr . ipv4_addr . inet_proto . inet_service; flags interval; }
  set allow_ping { type ipv4_addr . ipv4_addr; flags interval; }
";

/// The table of the namespace, with empty sets for VMs: until they are filled, all is closed.
pub(super) fn inner(range: Ipv4Range, resolvers: &[Ipv4Addr], host: &[Ipv4Addr]) -> String {
    let table = INNER_TABLE;
    let closed = CLOSED.iter().map(ToString::to_string).chain([range.to_string()]);
    let closed = closed.collect::<Vec<_>>().join(", ");
    let resolvers = set("resolvers", "ipv4_addr", resolvers);
    let host = set("host", "ipv4_addr", host);
    // In `raw`: before connection tracking, so that a forged packet costs no entry there. The
    // channel is not tracked at all: its links all have the same addresses, so connections of two
    // VMs could look the same. There a guest may answer and send the ready hint, no more.
    //
    // `ct mark` keeps the VM's address, by which its connections are found when it goes.
    format!(
        "table inet {table}
delete table inet {table}
table inet {table} {{
  set vms {{ type ifname . ether_addr . ipv4_addr; }}
  set public {{ type ipv4_addr; }}
  set closed {{ type ipv4_addr; flags interval; auto-merge; elements = {{ {closed} }} }}
{ALLOW_SETS}{resolvers}{host}
  chain raw {{
    type filter hook prerouting priority raw; policy drop;
    iifname \"aehost\" meta nfproto ipv4 accept
    iifname . ether saddr . ip saddr @vms accept
    iifname \"aec*\" ip6 saddr fe80::2 ip6 daddr fe80::1 notrack accept
    iifname \"aec*\" icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} notrack accept
  }}
  chain input {{
    type filter hook input priority filter; policy drop;
    iifname \"aeu*\" meta l4proto tcp reject with tcp reset
    iifname \"aeu*\" reject with icmpx admin-prohibited
    iifname != \"aec*\" drop
    tcp flags & (fin | syn | rst | ack) != syn accept
    udp dport 1025 accept
    icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept
  }}
  chain output_raw {{
    type filter hook output priority raw; policy accept;
    oifname \"aec*\" notrack
  }}
  chain output {{
    type filter hook output priority filter; policy drop;
    oifname \"aec*\" accept
    oifname \"aeu*\" meta l4proto icmp accept
    oifname \"aeu*\" tcp flags & rst == rst accept
  }}
  chain forward {{
    type filter hook forward priority filter; policy drop;
    ct state established,related accept
    iifname != \"aeu*\" drop
    ct state invalid drop
    ct mark set @nh,96,32
    ip saddr . ip daddr . meta l4proto . th dport @allow accept
    icmp type echo-request ip saddr . ip daddr @allow_ping accept
    ip saddr @public jump public_internet
    meta l4proto tcp reject with tcp reset
    reject with icmpx admin-prohibited
  }}
  chain public_internet {{
    ip daddr @resolvers meta l4proto {{ tcp, udp }} th dport 53 accept
    ip daddr @closed return
    ip daddr @host return
    oifname \"aehost\" accept
  }}
}}
"
    )
}

/// The table on the host.
pub(super) fn host(table: &str, uplink: &str, range: Ipv4Range, resolvers: &[Ipv4Addr]) -> String {
    let resolvers = set("resolvers", "ipv4_addr", resolvers);
    // Before address translation (-100), where a service that the host publishes by DNAT still
    // has the host's address.
    format!(
        "table inet {table}
delete table inet {table}
table inet {table} {{
{ALLOW_SETS}{resolvers}
  chain prerouting {{
    type filter hook prerouting priority -160; policy accept;
    iifname != \"{uplink}\" return
    meta nfproto != ipv4 drop
    ip saddr != {range} drop
    ct state established,related accept
    fib daddr type unicast accept
    ip saddr . ip daddr . meta l4proto . th dport @allow accept
    icmp type echo-request ip saddr . ip daddr @allow_ping accept
    ip daddr @resolvers meta l4proto {{ tcp, udp }} th dport 53 accept
    meta l4proto tcp reject with tcp reset
    reject with icmpx admin-prohibited
  }}
  chain forward {{
    type filter hook forward priority filter; policy accept;
    oifname \"{uplink}\" ct state != {{ established, related }} drop
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr {range} oifname != \"{uplink}\" masquerade
  }}
}}
"
    )
}

fn set(name: &str, kind: &str, elements: &[Ipv4Addr]) -> String {
    let mut text = format!("  set {name} {{ type {kind}; ");
    if !elements.is_empty() {
        let elements: Vec<String> = elements.iter().map(ToString::to_string).collect();
        // Writing to a `String` does not fail.
        let _ = write!(text, "elements = {{ {} }} ", elements.join(", "));
    }
    text.push_str("}\n");
    text
}

/// Runs `nft` on a text, as one transaction, in the namespace of this thread.
pub(super) fn apply(text: &str) -> Result<(), DriverError> {
    run_nft(&["-f", "-"], text).map(drop)
}

pub(super) fn run_nft(args: &[&str], input: &str) -> Result<String, DriverError> {
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => DriverError::Unavailable(
            "the program nft is missing; install the package nftables".to_owned(),
        ),
        _ => DriverError::Program { program: "nft", detail: error.to_string() },
    };
    let mut child = Command::new("nft")
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    // It reads all of its input before it writes anything; closing ends the input.
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes()).map_err(failed)?;
    }
    let output = child.wait_with_output().map_err(failed)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let detail = String::from_utf8_lossy(&output.stderr);
    let detail = detail.lines().take(4).collect::<Vec<_>>().join(" ");
    Err(DriverError::Program { program: "nft", detail })
}
