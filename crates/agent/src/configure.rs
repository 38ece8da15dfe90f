//! Making a booted or restored guest the VM that the host means.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::sync::PoisonError;

use aether_protocol::{Configure, Configured, Dns, ErrorCode, Hosts};
use rustix::time::{ClockId, Timespec, clock_settime};

use crate::error::Fail;
use crate::guest::Guest;
use crate::{net, sys};

/// Shortest text that credits the whole of the kernel's generator.
const ENTROPY_BYTES_MIN: usize = 32;

/// Linux `HOST_NAME_MAX`.
const HOSTNAME_BYTES_MAX: usize = 64;

const HOSTS_BEGIN: &str = "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n";

/// Applies what is there. Everything is checked before anything is changed.
pub(crate) fn configure(guest: &Guest, request: Configure) -> Result<Configured, Fail> {
    check(&request)?;
    let interfaces = net::Plan::of(&request.interfaces)?;
    let _one_at_a_time = guest.configuring.lock().unwrap_or_else(PoisonError::into_inner);
    let mut warnings = Vec::new();
    // First of all: a clone must not make one key with its siblings' state.
    if !request.entropy.is_empty() {
        let random = File::open("/dev/urandom").map_err(Fail::io("open /dev/urandom"))?;
        let seeded = sys::reseed(std::os::fd::AsFd::as_fd(&random), &request.entropy);
        seeded.map_err(Fail::io("reseed the random generator"))?;
    }
    if let Some(unix_time_ns) = request.unix_time_ns {
        set_clock(unix_time_ns)?;
    }
    net::apply(&interfaces)?;
    if let Some(env) = request.env {
        guest.set_env(env.vars);
    }
    let mut keep = |written: io::Result<()>, what: &str| {
        if let Err(error) = written {
            warnings.push(format!("{what}: {error}"));
        }
    };
    if let Some(machine_id) = &request.machine_id {
        keep(replace("/etc/machine-id", &format!("{machine_id}\n")), "write /etc/machine-id");
    }
    if let Some(hostname) = &request.hostname {
        let set = rustix::system::sethostname(hostname.as_bytes());
        set.map_err(Fail::sys("set the host name"))?;
        keep(replace("/etc/hostname", &format!("{hostname}\n")), "write /etc/hostname");
    }
    if request.hostname.is_some() || request.hosts.is_some() {
        let text = hosts_text(request.hostname.as_deref(), request.hosts.as_ref());
        keep(replace("/etc/hosts", &text), "write /etc/hosts");
    }
    if let Some(dns) = &request.dns {
        keep(replace("/etc/resolv.conf", &resolver_text(dns)), "write /etc/resolv.conf");
    }
    Ok(Configured { warnings })
}

fn check(request: &Configure) -> Result<(), Fail> {
    let invalid = |message: String| Err(Fail::new(ErrorCode::InvalidArgument, message));
    if let Some(hostname) = &request.hostname
        && !is_host_name(hostname)
    {
        return invalid(format!("{hostname:?} is not a host name"));
    }
    if let Some(id) = &request.machine_id
        && !(id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit()))
    {
        return invalid(format!("{id:?} is not a machine id"));
    }
    if !request.entropy.is_empty() && request.entropy.len() < ENTROPY_BYTES_MIN {
        return invalid(format!("entropy has fewer than {ENTROPY_BYTES_MIN} bytes"));
    }
    let dns = request.dns.iter();
    let names = dns.clone().flat_map(|dns| &dns.search);
    let hosts = request.hosts.iter().flat_map(|hosts| &hosts.entries);
    for name in names.chain(hosts.clone().flat_map(|entry| &entry.names)) {
        if !is_domain_name(name) {
            return invalid(format!("{name:?} is not a name"));
        }
    }
    for address in dns.flat_map(|dns| &dns.servers).chain(hosts.map(|entry| &entry.address)) {
        if address.parse::<IpAddr>().is_err() {
            return invalid(format!("{address:?} is not an address"));
        }
    }
    Ok(())
}

fn is_host_name(name: &str) -> bool {
    name.len() <= HOSTNAME_BYTES_MAX && is_domain_name(name)
}

fn is_domain_name(name: &str) -> bool {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    !name.is_empty() && name.len() <= 253 && name.bytes().all(is_allowed)
}

fn set_clock(unix_time_ns: u64) -> Result<(), Fail> {
    let part = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
    let time = Timespec {
        tv_sec: part(unix_time_ns / 1_000_000_000),
        tv_nsec: part(unix_time_ns % 1_000_000_000),
    };
    clock_settime(ClockId::Realtime, time).map_err(Fail::sys("set the clock"))
}

fn hosts_text(hostname: Option<&str>, hosts: Option<&Hosts>) -> String {
    let mut text = HOSTS_BEGIN.to_owned();
    let kept = || fs::read_to_string("/etc/hostname").unwrap_or_default().trim().to_owned();
    let hostname = hostname.map_or_else(kept, ToOwned::to_owned);
    if is_host_name(&hostname) {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "127.0.1.1 {hostname}");
    }
    for entry in hosts.iter().flat_map(|hosts| &hosts.entries) {
        let _ = writeln!(text, "{} {}", entry.address, entry.names.join(" "));
    }
    text
}

fn resolver_text(dns: &Dns) -> String {
    let mut text = String::new();
    for server in &dns.servers {
        let _ = writeln!(text, "nameserver {server}");
    }
    if !dns.search.is_empty() {
        let _ = writeln!(text, "search {}", dns.search.join(" "));
    }
    text
}

/// Replaces a file or a link; a reader sees the old text or the new.
fn replace(path: &str, text: &str) -> io::Result<()> {
    let path = Path::new(path);
    if fs::read_to_string(path).is_ok_and(|old| old == text) && !path.is_symlink() {
        return Ok(());
    }
    let temporary = path.with_extension("aether-new");
    fs::write(&temporary, text)?;
    fs::rename(&temporary, path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use aether_protocol::HostsEntry;

    #[test]
    fn hostile_names_never_reach_a_file() {
        let with_hostname =
            |name: &str| Configure { hostname: Some(name.into()), ..Default::default() };
        for name in ["", "a b", "a\nnameserver 1.1.1.1", &"x".repeat(65), "é"] {
            assert!(check(&with_hostname(name)).is_err(), "{name:?}");
        }
        assert!(check(&with_hostname("vm-1.example")).is_ok());
        let entry = HostsEntry { address: "1.2.3.4 evil".into(), names: vec!["a".into()] };
        let hosts = Some(Hosts { entries: vec![entry] });
        assert!(check(&Configure { hosts, ..Default::default() }).is_err());
    }

    #[test]
    fn resolver_and_hosts_are_written_as_the_library_reads_them() {
        let dns = Dns { servers: vec!["10.0.0.1".into()], search: vec!["a.b".into(), "c".into()] };
        assert_eq!(resolver_text(&dns), "nameserver 10.0.0.1\nsearch a.b c\n");
        let entry = HostsEntry { address: "10.0.0.9".into(), names: vec!["git".into()] };
        let text = hosts_text(Some("vm"), Some(&Hosts { entries: vec![entry] }));
        assert!(text.ends_with("127.0.1.1 vm\n10.0.0.9 git\n"));
    }
}
