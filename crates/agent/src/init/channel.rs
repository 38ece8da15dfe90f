//! Where the host connects: vsock, or a private link.

use std::io;
use std::net::{Ipv6Addr, SocketAddrV6};
use std::os::fd::OwnedFd;

use aether_protocol::limits::HANDSHAKE_LIMIT;
use aether_protocol::{AGENT_PORT, READY_PORT};
use rustix::net::{
    AddressFamily, SendFlags, SocketFlags, SocketType, bind, listen as listen_on, sendto,
    socket_with, sockopt,
};

use super::command_line::Channel;
use crate::net::{Device, find_device, prepare_link};
use crate::server::{Listener, ListenerKind};
use crate::sys;

const GUEST: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);
const HOST: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// Connections that wait to be accepted: 64 commands at once must not be turned away.
const BACKLOG: i32 = 256;

pub(super) fn listen(channel: &Channel) -> io::Result<Listener> {
    match channel {
        Channel::Vsock => {
            let socket = sys::listen_vsock(AGENT_PORT, BACKLOG)?;
            Ok(Listener { socket, kind: ListenerKind::Vsock })
        }
        Channel::Link { mac, host_mac } => {
            let device = device(channel)?;
            prepare_link(&device, GUEST, HOST, *host_mac)
                .map_err(|error| io::Error::other(format!("prepare link {mac}: {error}")))?;
            let socket = link_socket(&device, SocketType::STREAM)?;
            sockopt::set_socket_reuseaddr(&socket, true)?;
            // Connections take these from their listener. Small frames must not wait for the
            // acknowledgement of earlier ones.
            sockopt::set_tcp_nodelay(&socket, true)?;
            // The host's first bytes come right behind its connection: who accepts it need not be
            // woken twice.
            sys::defer_accept(&socket, HANDSHAKE_LIMIT)?;
            // No buffer size is set: the kernel's own tuning was measured to be 2.3 times as fast.
            bind(&socket, &address(GUEST, port(AGENT_PORT)?, &device))?;
            listen_on(&socket, BACKLOG)?;
            Ok(Listener { socket, kind: ListenerKind::Link(device.index) })
        }
    }
}

/// Tells the host, which may wait for it instead of asking again and again.
pub(super) fn say_ready(channel: &Channel, boot_id: &str) -> io::Result<()> {
    match channel {
        Channel::Vsock => {
            let socket = sys::connect_to_host(READY_PORT)?;
            rustix::io::write(&socket, boot_id.as_bytes())?;
        }
        Channel::Link { .. } => {
            let device = device(channel)?;
            let socket = link_socket(&device, SocketType::DGRAM)?;
            bind(&socket, &address(GUEST, 0, &device))?;
            let host = address(HOST, port(READY_PORT)?, &device);
            sendto(&socket, boot_id.as_bytes(), SendFlags::empty(), &host)?;
        }
    }
    Ok(())
}

fn device(channel: &Channel) -> io::Result<Device> {
    let Channel::Link { mac, .. } = channel else {
        return Err(io::Error::other("vsock has no network device"));
    };
    find_device(*mac).ok_or_else(|| io::Error::other(format!("no interface has the MAC {mac}")))
}

/// A socket that neither hears nor speaks on any other device.
fn link_socket(device: &Device, kind: SocketType) -> io::Result<OwnedFd> {
    let socket = socket_with(AddressFamily::INET6, kind, SocketFlags::CLOEXEC, None)?;
    sys::bind_to_device(&socket, &device.name)?;
    Ok(socket)
}

fn address(ip: Ipv6Addr, port: u16, device: &Device) -> SocketAddrV6 {
    SocketAddrV6::new(ip, port, 0, device.index)
}

fn port(port: u32) -> io::Result<u16> {
    port.try_into().map_err(io::Error::other)
}
