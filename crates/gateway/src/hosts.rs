//! Which `Host` headers are served. A browser on this machine can be lured to a name that an
//! attacker's DNS points at 127.0.0.1; such a request carries that name.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum HostCheck {
    /// For a server that has names of its own.
    #[default]
    Any,
    /// Addresses, `localhost`, and these names.
    LocalAnd(Vec<String>),
}

impl HostCheck {
    /// Strict where the listener is on a loopback address.
    #[must_use]
    pub fn for_listener(address: SocketAddr) -> Self {
        if address.ip().is_loopback() { Self::LocalAnd(Vec::new()) } else { Self::Any }
    }

    /// `host` is the header, with or without a port. HTTP/1.0 has none.
    pub(crate) fn allows(&self, host: Option<&str>) -> bool {
        let (Self::LocalAnd(names), Some(host)) = (self, host) else { return true };
        let name = without_port(host);
        let bare = name.strip_prefix('[').and_then(|n| n.strip_suffix(']'));
        name.eq_ignore_ascii_case("localhost")
            || name.parse::<IpAddr>().is_ok()
            || bare.is_some_and(|n| n.parse::<Ipv6Addr>().is_ok())
            || names.iter().any(|n| n.eq_ignore_ascii_case(name))
    }
}

fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        Some(_) | None => host,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_strange_name_is_refused_on_loopback_only() {
        let strict = HostCheck::for_listener(([127, 0, 0, 1], 8080).into());
        for good in
            ["localhost", "LOCALHOST:8080", "127.0.0.1:8080", "[::1]:80", "[::1]", "10.0.0.1"]
        {
            assert!(strict.allows(Some(good)), "{good}");
        }
        assert!(strict.allows(None));
        for bad in
            ["rebound.example", "rebound.example:8080", "localhost.rebound.example", "", ":1"]
        {
            assert!(!strict.allows(Some(bad)), "{bad}");
        }
        assert!(HostCheck::for_listener(([10, 0, 0, 1], 1).into()).allows(Some("api.example")));
        assert!(HostCheck::LocalAnd(vec!["My.host".into()]).allows(Some("my.host:1")));
    }
}
