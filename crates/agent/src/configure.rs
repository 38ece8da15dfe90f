//! Making a booted or restored guest the VM that the host means.

use std::net::IpAddr;
use std::sync::PoisonError;

use aether_protocol::{Configure, Configured, ErrorCode, Token};
use rustix::time::{ClockId, Timespec, clock_settime};

use crate::connections::Socket;
use crate::error::Fail;
use crate::server::{Agent, Place};
use crate::{etc, net};

/// Shortest text that credits the whole of the kernel's generator.
const ENTROPY_BYTES_MIN: usize = 32;

/// Linux `HOST_NAME_MAX`.
const HOSTNAME_BYTES_MAX: usize = 64;

/// Applies what is there. Everything is checked before anything is changed.
///
/// A restored guest is another from the moment that this returns: until then only the caller, over
/// the connection `own`, knows that it runs. Each step here is paid for by every clone, in system
/// calls that run for the first time since the restore.
pub(crate) fn configure(
    agent: &Agent,
    own: &Socket,
    request: &Configure,
) -> Result<Configured, Fail> {
    check(request)?;
    let interfaces = net::Plan::of(&request.interfaces)?;
    let guest = &agent.guest;
    let mut known = guest.known.lock().unwrap_or_else(PoisonError::into_inner);
    if own.is_ended() {
        let message = "the guest was restored by another connection meanwhile";
        return Err(Fail::new(ErrorCode::Unauthorized, message));
    }
    let mut warnings = Vec::new();
    let state = guest.begin_configuration(|| agent.registry.active() == 0 && guest.is_alone());
    if agent.place == Place::Machine {
        // First of all: a clone must not make one key with its siblings' state.
        if !request.entropy.is_empty() {
            let seeded = guest.reseed(&request.entropy);
            seeded.map_err(Fail::io("reseed the random generator"))?;
        }
        // Wakes who waits for a time of the day that has come.
        if let Some(unix_time_ns) = request.unix_time_ns {
            set_clock(unix_time_ns)?;
        }
        let how = net::How { is_restored: request.restored, is_known: state.is_as_configured };
        net::apply(&interfaces, how, &mut known.devices)?;
    }
    // Nobody but a process can hold a connection.
    if request.restored
        && !state.is_alone
        && let Err(errno) = net::end_connections(agent.link())
    {
        warnings.push(format!("end connections: {errno}"));
    }
    match &request.env {
        Some(env) => guest.set_env(env.vars.clone()),
        // What the source was given is not the clone's.
        None if request.restored => guest.set_env(Vec::new()),
        None => {}
    }
    name(agent.place, request, |path, text| {
        if let Err(error) = known.texts.write(path, text, state.is_as_configured) {
            warnings.push(format!("write {path}: {error}"));
        }
    })?;
    let layers = apply_layers(agent, request)?;
    if let Some(token) = request.new_token.as_deref().and_then(Token::from_slice) {
        agent.set_token(token);
    }
    if request.restored {
        let boot_id = guest.new_boot_id().map_err(Fail::io("read random bytes"))?;
        agent.become_another(boot_id, own);
    }
    Ok(Configured { warnings, boot_id: agent.boot_id(), layers, kept_open: true })
}

/// How many layers the guest has then. A container's were put on its `/usr` before it began.
fn apply_layers(agent: &Agent, request: &Configure) -> Result<u32, Fail> {
    let count = match agent.place {
        Place::Container => request.layers.len(),
        Place::Machine => {
            let mut layers = agent.guest.layers.lock().unwrap_or_else(PoisonError::into_inner);
            layers.apply(&request.layers)?;
            layers.count()
        }
    };
    Ok(u32::try_from(count).unwrap_or(u32::MAX))
}

/// Names and addresses in the kernel and in `/etc`.
fn name(place: Place, request: &Configure, mut write: impl FnMut(&str, &str)) -> Result<(), Fail> {
    if let Some(machine_id) = &request.machine_id {
        write("/etc/machine-id", &format!("{machine_id}\n"));
    }
    if let Some(hostname) = &request.hostname {
        // A container's was given to it as it was made.
        if place == Place::Machine {
            let set = rustix::system::sethostname(hostname.as_bytes());
            set.map_err(Fail::sys("set the host name"))?;
        }
        write("/etc/hostname", &format!("{hostname}\n"));
    }
    if request.hostname.is_some() || request.hosts.is_some() {
        let text = etc::hosts_text(request.hostname.as_deref(), request.hosts.as_ref());
        write("/etc/hosts", &text);
    }
    if let Some(dns) = &request.dns {
        write("/etc/resolv.conf", &etc::resolver_text(dns));
    }
    Ok(())
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

pub(crate) fn is_host_name(name: &str) -> bool {
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

#[cfg(test)]
mod tests {
    use super::*;
    use aether_protocol::{Hosts, HostsEntry};

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
}
