//! What a VM may reach.

use std::{fmt, net::IpAddr, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::limits;

/// What a VM may reach by default; `allow` opens more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Egress {
    /// The public internet; other VMs, the host, private ranges, link-local addresses and cloud
    /// metadata stay closed.
    #[default]
    Public,
    /// Nothing but what `allow` names.
    None,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct NetworkPolicy {
    pub egress: Egress,
    /// Opened in addition, also inside ranges that are closed otherwise.
    #[cfg_attr(feature = "schema", schemars(length(max = limits::ALLOW_RULES_MAX)))]
    pub allow: Vec<AllowRule>,
}

impl NetworkPolicy {
    pub fn validate(&self) -> Result<(), String> {
        if self.allow.len() > limits::ALLOW_RULES_MAX {
            return Err(format!("network.allow: at most {} rules", limits::ALLOW_RULES_MAX));
        }
        Ok(())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TransportProtocol {
    Tcp,
    Udp,
}

/// An inclusive range of ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PortRange {
    pub first: u16,
    pub last: u16,
}

/// An address or a network, and the ports there: `192.0.2.7`, `192.0.2.0/24`, `192.0.2.7:443`,
/// `192.0.2.7:8000-8999`, `[2001:db8::1]:53/udp`. Without a protocol, TCP and UDP; without a
/// port, every port (and ICMP echo).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct AllowRule {
    pub address: IpAddr,
    pub prefix: u8,
    pub ports: Option<PortRange>,
    pub protocol: Option<TransportProtocol>,
}

impl fmt::Display for AllowRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bits = if self.address.is_ipv4() { 32 } else { 128 };
        let net = if self.prefix == bits {
            self.address.to_string()
        } else {
            format!("{}/{}", self.address, self.prefix)
        };
        match (self.ports, self.address.is_ipv6()) {
            (None, _) => write!(f, "{net}")?,
            (Some(p), v6) => {
                if v6 {
                    write!(f, "[{net}]:{}", p.first)?;
                } else {
                    write!(f, "{net}:{}", p.first)?;
                }
                if p.last != p.first {
                    write!(f, "-{}", p.last)?;
                }
            }
        }
        match self.protocol {
            Some(TransportProtocol::Tcp) => f.write_str("/tcp"),
            Some(TransportProtocol::Udp) => f.write_str("/udp"),
            None => Ok(()),
        }
    }
}

/// The text is not an allow rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not an address rule; write ADDRESS, ADDRESS/PREFIX, ADDRESS:PORT or \
     [ADDRESS]:FIRST-LAST, with /tcp or /udp after a port"
)]
pub struct ParseRuleError(String);

impl FromStr for AllowRule {
    type Err = ParseRuleError;

    fn from_str(text: &str) -> Result<Self, ParseRuleError> {
        parse_rule(text).ok_or_else(|| ParseRuleError(text.chars().take(80).collect()))
    }
}

fn parse_rule(text: &str) -> Option<AllowRule> {
    let (body, protocol) = match text.rsplit_once('/') {
        Some((body, "tcp")) => (body, Some(TransportProtocol::Tcp)),
        Some((body, "udp")) => (body, Some(TransportProtocol::Udp)),
        _ => (text, None),
    };
    let (net, ports) = if let Some(rest) = body.strip_prefix('[') {
        let (net, after) = rest.split_once(']')?;
        (net, if after.is_empty() { None } else { Some(after.strip_prefix(':')?) })
    } else if body.matches(':').count() == 1 {
        let (net, ports) = body.split_once(':')?;
        (net, Some(ports))
    } else {
        (body, None)
    };
    let (address, prefix) = match net.split_once('/') {
        Some((address, prefix)) => (address, Some(prefix.parse::<u8>().ok()?)),
        None => (net, None),
    };
    let address: IpAddr = address.parse().ok()?;
    let bits = if address.is_ipv4() { 32 } else { 128 };
    let prefix = prefix.unwrap_or(bits);
    if prefix > bits || !host_bits_are_zero(address, prefix) {
        return None;
    }
    let ports = ports.map(parse_ports).map_or(Some(None), |p| p.map(Some))?;
    if protocol.is_some() && ports.is_none() {
        return None;
    }
    Some(AllowRule { address, prefix, ports, protocol })
}

fn parse_ports(text: &str) -> Option<PortRange> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let range = PortRange { first: first.parse().ok()?, last: last.parse().ok()? };
    (range.first > 0 && range.first <= range.last).then_some(range)
}

/// `10.0.0.1/8` is more often a mistake than a wish.
fn host_bits_are_zero(address: IpAddr, prefix: u8) -> bool {
    let prefix = u32::from(prefix);
    match address {
        IpAddr::V4(a) => a.to_bits().checked_shl(prefix).unwrap_or(0) == 0,
        IpAddr::V6(a) => a.to_bits().checked_shl(prefix).unwrap_or(0) == 0,
    }
}

impl Serialize for AllowRule {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for AllowRule {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_round_trip() {
        for text in [
            "192.0.2.7",
            "192.0.2.0/24",
            "0.0.0.0/0",
            "192.0.2.7:443",
            "192.0.2.7:443/tcp",
            "192.0.2.0/24:8000-8999",
            "2001:db8::1",
            "2001:db8::/32",
            "[2001:db8::1]:53/udp",
        ] {
            assert_eq!(text.parse::<AllowRule>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn bad_rules_are_refused() {
        for text in [
            "",
            "host.example",
            "192.0.2.7/33",
            "192.0.2.7/24",
            "192.0.2.7:0",
            "192.0.2.7:9-8",
            "192.0.2.7/tcp",
            "192.0.2.7:70000",
            "[2001:db8::1",
            "2001:db8::1/12",
        ] {
            assert!(text.parse::<AllowRule>().is_err(), "{text}");
        }
    }
}
