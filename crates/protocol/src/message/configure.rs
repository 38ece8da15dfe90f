//! What makes a booted or restored guest this VM.

use std::fmt;

use bytes::Bytes;

use super::EnvVar;

/// Configure the guest: after its boot, and again after a restore from a snapshot.
///
/// Every part is optional and what is absent stays as it is; the same message twice has the effect
/// of one, but for the boot id of a restored guest. The random generator is seeded first, then the
/// clock is set, then the rest. A token and a boot id change last: after a failure the old ones hold.
#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
pub struct Configure {
    #[prost(string, optional, tag = "1")]
    pub hostname: Option<String>,
    /// 32 hexadecimal digits.
    #[prost(string, optional, tag = "2")]
    pub machine_id: Option<String>,
    #[prost(message, optional, tag = "3")]
    pub env: Option<Environment>,
    #[prost(message, repeated, tag = "4")]
    pub interfaces: Vec<Interface>,
    #[prost(message, optional, tag = "5")]
    pub dns: Option<Dns>,
    #[prost(message, optional, tag = "6")]
    pub hosts: Option<Hosts>,
    #[prost(uint64, optional, tag = "7")]
    pub unix_time_ns: Option<u64>,
    /// 32 bytes or more; credited to the kernel's generator, which is then reseeded.
    #[prost(bytes = "bytes", tag = "8")]
    pub entropy: Bytes,
    /// 32 bytes: what connections after the answer must show. This connection goes on, and so do
    /// those that are open already. A host that loses the answer tries both.
    #[prost(bytes = "bytes", optional, tag = "9")]
    pub new_token: Option<Bytes>,
    /// The guest is a clone, or was asleep: it takes a new boot id, ends every other connection of
    /// the host and every TCP connection that the guest has beyond itself, and forgets ended runs
    /// and the environment. Processes go on. Entropy must be given.
    #[prost(bool, tag = "10")]
    pub restored: bool,
    /// All tool layers that the guest shall have, from the lowest to the highest. What it has
    /// already must be the beginning of the list; only the rest is mounted. None: as it is.
    #[prost(message, repeated, tag = "11")]
    pub layers: Vec<Layer>,
}

// The entropy and the token are secrets of the guest.
impl fmt::Debug for Configure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Configure")
            .field("hostname", &self.hostname)
            .field("env", &self.env)
            .field("interfaces", &self.interfaces)
            .field("dns", &self.dns)
            .field("hosts", &self.hosts)
            .field("restored", &self.restored)
            .field("layers", &self.layers)
            .finish_non_exhaustive()
    }
}

/// Environment of every run that is started later; replaces the one given before.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Environment {
    #[prost(message, repeated, tag = "1")]
    pub vars: Vec<EnvVar>,
}

/// An interface as it shall be. Addresses and routes that it had before are removed.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Interface {
    /// Finds the interface, as `02:00:00:00:00:01`.
    #[prost(string, tag = "1")]
    pub mac: String,
    /// An interface that already has it is taken as found.
    #[prost(string, optional, tag = "2")]
    pub new_mac: Option<String>,
    /// With prefix length, as `10.0.0.2/30` and `fd00::2/64`.
    #[prost(string, repeated, tag = "3")]
    pub addresses: Vec<String>,
    /// Default gateways, at most one of each family.
    #[prost(string, repeated, tag = "4")]
    pub gateways: Vec<String>,
    #[prost(uint32, optional, tag = "5")]
    pub mtu: Option<u32>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Dns {
    #[prost(string, repeated, tag = "1")]
    pub servers: Vec<String>,
    #[prost(string, repeated, tag = "2")]
    pub search: Vec<String>,
}

/// Entries of `/etc/hosts` beside those of the guest itself.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Hosts {
    #[prost(message, repeated, tag = "1")]
    pub entries: Vec<HostsEntry>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct HostsEntry {
    #[prost(string, tag = "1")]
    pub address: String,
    #[prost(string, repeated, tag = "2")]
    pub names: Vec<String>,
}

/// A tool layer: a read-only erofs file system on the layers device, with a `usr` in it.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Layer {
    /// Names the layer in messages.
    #[prost(string, tag = "1")]
    pub name: String,
    /// In bytes, on the layers device.
    #[prost(uint64, tag = "2")]
    pub offset: u64,
    #[prost(uint64, tag = "3")]
    pub length: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Configured {
    /// What could not be done and does not keep the guest from working, one line each.
    #[prost(string, repeated, tag = "1")]
    pub warnings: Vec<String>,
    /// The guest's boot id from now on. Empty from an agent that knows neither a new token nor a
    /// restored guest.
    #[prost(string, tag = "2")]
    pub boot_id: String,
    /// The tool layers that the guest has now. An agent that knows none says zero.
    #[prost(uint32, tag = "3")]
    pub layers: u32,
    /// The connection takes another hello and request, like one that was just made: a restored
    /// guest is spared the end of this one and the beginning of the next.
    #[prost(bool, tag = "4")]
    pub kept_open: bool,
}
