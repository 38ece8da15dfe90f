//! What the host says on the kernel's command line.
//!
//! `ae.token=HEX ae.channel=vsock`, or `ae.channel=link:MAC ae.hostmac=MAC`.

use std::fs;
use std::io;

use aether_protocol::Token;
use rustix::mount::{MountFlags, mount_bind, mount_remount};

use crate::net::Mac;

const PATH: &str = "/proc/cmdline";
/// On a tmpfs that is there by then.
const HIDDEN_PATH: &str = "/run/.cmdline";

#[derive(Debug)]
pub(super) struct CommandLine {
    pub(super) token: Token,
    pub(super) channel: Channel,
    /// Everything that is not for the agent.
    rest: String,
}

/// Where the host connects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Channel {
    Vsock,
    /// A network device that is a private link to the host.
    Link {
        mac: Mac,
        host_mac: Mac,
    },
}

impl CommandLine {
    pub(super) fn read() -> io::Result<Self> {
        Self::parse(&fs::read_to_string(PATH)?)
    }

    fn parse(text: &str) -> io::Result<Self> {
        let value = |key: &str| {
            let mut words = text.split_ascii_whitespace();
            words.find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
        };
        let missing = |key: &'static str| io::Error::other(format!("{key} is missing or wrong"));
        let token = value("ae.token").and_then(|token| Token::from_hex(token).ok());
        let token = token.ok_or_else(|| missing("ae.token"))?;
        let channel = match value("ae.channel") {
            Some("vsock") => Channel::Vsock,
            Some(link) => {
                let mac = link.strip_prefix("link:").and_then(|mac| mac.parse().ok());
                let mac = mac.ok_or_else(|| missing("ae.channel"))?;
                let host_mac = value("ae.hostmac").and_then(|mac| mac.parse().ok());
                Channel::Link { mac, host_mac: host_mac.ok_or_else(|| missing("ae.hostmac"))? }
            }
            None => return Err(missing("ae.channel")),
        };
        let words = text.split_ascii_whitespace().filter(|word| !word.starts_with("ae."));
        let rest = words.collect::<Vec<_>>().join(" ") + "\n";
        Ok(Self { token, channel, rest })
    }

    /// Puts a command line without the agent's words over the true one.
    pub(super) fn hide(&self) -> io::Result<()> {
        fs::write(HIDDEN_PATH, &self.rest)?;
        mount_bind(HIDDEN_PATH, PATH)?;
        mount_remount(PATH, MountFlags::BIND | MountFlags::RDONLY, c"")?;
        // The kernel has written the true one into its log.
        drop(fs::write("/proc/sys/kernel/dmesg_restrict", "1"));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agents_words_are_read_and_kept_from_the_rest() {
        let token = "ab".repeat(32);
        let text = format!(
            "quiet ae.token={token} ae.channel=link:02:00:00:00:00:01 \
             ae.hostmac=02:00:00:00:00:02 panic=-1\n"
        );
        let line = CommandLine::parse(&text).unwrap();
        let mac = |text: &str| text.parse::<Mac>().unwrap();
        let (mac, host_mac) = (mac("02:00:00:00:00:01"), mac("02:00:00:00:00:02"));
        assert_eq!(line.channel, Channel::Link { mac, host_mac });
        assert_eq!(line.token.to_hex(), token);
        assert_eq!(line.rest, "quiet panic=-1\n");
        let vsock = CommandLine::parse(&format!("ae.channel=vsock ae.token={token}")).unwrap();
        assert_eq!(vsock.channel, Channel::Vsock);
    }

    #[test]
    fn a_guest_without_token_or_channel_does_not_start() {
        let token = format!("ae.token={}", "ab".repeat(32));
        for text in ["", "ae.token=ab ae.channel=vsock", &token, &format!("{token} ae.channel=x")] {
            assert!(CommandLine::parse(text).is_err(), "{text}");
        }
    }
}
