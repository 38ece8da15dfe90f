//! The end of connections that belong to the guest that this one was copied from.
//!
//! To the far end they are the source's. Here they would only hang, or in the worst case mix two
//! guests' bytes. The kernel is asked for the list and told to abort each, so that whoever holds one
//! reads an error at once. A kernel without that is met in [`super::held`].
//!
//! Kept are connections within the guest, by loopback, and those of the channel's private link.
//! Nothing is sent to the far ends: at that time their addresses are not the guest's any more, or it
//! has kept its address and the far end rightly hears of a reset.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::thread;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::held;
use super::netlink::{Message, Netlink, number};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

const IPPROTO_TCP: u8 = 6;
const IPPROTO_UDP: u8 = 17;

/// Of TCP: every state but those without a far end, or without a socket.
const CONNECTING_OR_CONNECTED: u32 = {
    const ESTABLISHED: u32 = 1 << 1;
    const SYN_SENT: u32 = 1 << 2;
    const SYN_RECV: u32 = 1 << 3;
    const FIN_WAIT1: u32 = 1 << 4;
    const FIN_WAIT2: u32 = 1 << 5;
    const CLOSE_WAIT: u32 = 1 << 8;
    const LAST_ACK: u32 = 1 << 9;
    const CLOSING: u32 = 1 << 11;
    ESTABLISHED | SYN_SENT | SYN_RECV | FIN_WAIT1 | FIN_WAIT2 | CLOSE_WAIT | LAST_ACK | CLOSING
};
/// Of UDP, in the numbers of TCP.
const CONNECTED: u32 = 1 << 1;

/// `struct inet_diag_sockid`: ports, addresses, interface, cookie.
const SOCKET_ID_BYTES: usize = 48;

/// Aborted by one call to the kernel. The verdicts must fit the socket's buffer.
const BATCH: usize = 128;

/// Both ends, as the kernel's lists have them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ends {
    pub(super) local: IpAddr,
    pub(super) remote: IpAddr,
    /// Of the device that the socket is bound to, or 0.
    pub(super) device: u32,
}

impl Ends {
    pub(super) fn is_beyond_guest(&self, link: Option<u32>) -> bool {
        let is_loopback = |ip: IpAddr| ip.to_canonical().is_loopback();
        let is_channel = self.device != 0 && Some(self.device) == link;
        !is_loopback(self.local) && !is_loopback(self.remote) && !is_channel
    }
}

/// Ends what goes beyond the guest and its private link, which is the device `link`: of TCP, and of
/// UDP where a socket is connected. `has_made_up_devices` says that there may be other namespaces
/// with a way out: a container's is one end of a pair of devices that the kernel has made up.
pub(super) fn end_connections(link: Option<u32>, has_made_up_devices: bool) -> Result<(), Errno> {
    if abort_all(link).is_err() {
        held::disconnect_all("/proc/self", link)?;
    }
    if has_made_up_devices {
        for (directory, space) in other_spaces() {
            // A thread that has gone there is not used for anything else.
            let there = || {
                move_into_link_name_space(space.as_fd(), Some(LinkNameSpaceType::Network))?;
                abort_all(None)
            };
            let ended = thread::scope(|scope| scope.spawn(there).join());
            if !matches!(ended, Ok(Ok(()))) {
                held::disconnect_all(&directory, None)?;
            }
        }
    }
    Ok(())
}

/// In the namespace of this thread.
fn abort_all(link: Option<u32>) -> Result<(), Errno> {
    let mut netlink = Netlink::sockets()?;
    let mut aborts = Vec::new();
    for (protocol, states) in [(IPPROTO_TCP, CONNECTING_OR_CONNECTED), (IPPROTO_UDP, CONNECTED)] {
        for family in [AF_INET, AF_INET6] {
            let any = [0; SOCKET_ID_BYTES];
            let question = request(SOCK_DIAG_BY_FAMILY, family, protocol, states, &any);
            netlink.dump(&question, |body| {
                let found = read_socket(body).filter(|(_, ends)| ends.is_beyond_guest(link));
                aborts.extend(found.map(|(id, _)| {
                    // It may have ended by itself.
                    request(SOCK_DESTROY, family, protocol, 0, id).unless(Errno::NOENT)
                }));
            })?;
        }
    }
    let failed = |batch| netlink.batch(batch).map_err(|failure| failure.errno);
    aborts.chunks(BATCH).try_for_each(failed)
}

/// `struct inet_diag_req_v2`.
fn request(
    kind: u16,
    family: u8,
    protocol: u8,
    states: u32,
    id: &[u8; SOCKET_ID_BYTES],
) -> Message {
    let mut fixed = vec![family, protocol, 0, 0];
    fixed.extend_from_slice(&states.to_ne_bytes());
    fixed.extend_from_slice(id);
    Message::new("end a connection", kind, 0, &fixed)
}

/// The start of `struct inet_diag_msg`: family, three small numbers, and the id.
fn read_socket(body: &[u8]) -> Option<(&[u8; SOCKET_ID_BYTES], Ends)> {
    let id = body.get(4..)?.first_chunk::<SOCKET_ID_BYTES>()?;
    let ip = |at: usize| -> Option<IpAddr> {
        let octets: [u8; 16] = *id.get(at..)?.first_chunk()?;
        match body[0] {
            AF_INET => Some(Ipv4Addr::new(octets[0], octets[1], octets[2], octets[3]).into()),
            AF_INET6 => Some(Ipv6Addr::from(octets).into()),
            _ => None,
        }
    };
    Some((id, Ends { local: ip(4)?, remote: ip(20)?, device: number(id, 36)? }))
}

/// The network namespaces of processes, but for this one's: a process's directory and the namespace.
fn other_spaces() -> Vec<(String, OwnedFd)> {
    let space_of = |path: &str| fs::metadata(path).map(|space| (space.dev(), space.ino()));
    let own = space_of("/proc/self/ns/net").ok();
    let mut found = BTreeMap::new();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    for directory in pids.map(|pid| format!("/proc/{pid}")) {
        let path = format!("{directory}/ns/net");
        if let Ok(id) = space_of(&path)
            && Some(id) != own
            && !found.contains_key(&id)
            && let Ok(space) =
                rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        {
            found.insert(id, (directory, space));
        }
    }
    found.into_values().collect()
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read as _, Write as _};
    use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};

    use super::super::link::{Links, new_address};
    use super::super::plan::Network;
    use super::*;

    #[test]
    fn what_stays_in_the_guest_or_on_the_link_is_kept() {
        let ends = |local: &str, remote: &str, device| Ends {
            local: local.parse().unwrap(),
            remote: remote.parse().unwrap(),
            device,
        };
        let link = Some(3);
        assert!(ends("10.0.0.2", "1.1.1.1", 0).is_beyond_guest(link));
        assert!(ends("10.0.0.2", "10.0.0.2", 0).is_beyond_guest(link));
        assert!(ends("::ffff:10.0.0.2", "::ffff:1.1.1.1", 2).is_beyond_guest(link));
        assert!(ends("fe80::2", "fe80::1", 0).is_beyond_guest(None));
        for (local, remote, device) in [
            ("127.0.0.1", "127.0.0.1", 0),
            ("::ffff:127.0.0.1", "::ffff:127.0.0.2", 0),
            ("::1", "::1", 0),
            ("fe80::2", "fe80::1", 3),
        ] {
            assert!(!ends(local, remote, device).is_beyond_guest(link), "{local}");
        }
    }

    const OUTSIDE: [&str; 2] = ["10.9.0.2", "fd09::2"];

    /// A thread in a network of its own, where nothing but the test's connections can end.
    fn in_new_network(test: fn()) {
        #[expect(unsafe_code, reason = "no safe form")]
        let in_thread = move || {
            // SAFETY: changes the namespace of this thread alone, which ends with the test.
            if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
                println!("skipped: a network namespace of its own takes the rights of root");
                return;
            }
            let mut links = Links::open().unwrap();
            let device = links.named("lo").unwrap().clone();
            links.bring_up(&device).unwrap();
            let networks = OUTSIDE.map(|ip| Network { ip: ip.parse().unwrap(), prefix: 32 });
            let messages = networks.map(|network| new_address(device.index, network));
            Netlink::route().unwrap().batch(&messages).unwrap();
            test();
        };
        thread::spawn(in_thread).join().unwrap();
    }

    /// The kernel makes the route to a new address of IPv6 a moment after the address.
    fn connect(to: SocketAddr) -> TcpStream {
        loop {
            match TcpStream::connect(to) {
                Err(error) if error.kind() == ErrorKind::NetworkUnreachable => thread::yield_now(),
                result => return result.unwrap(),
            }
        }
    }

    /// Has connections ended, and sees who hears of it.
    fn check_ending(end: fn()) {
        let pair = |ip: &str| {
            let listener = TcpListener::bind((ip, 0)).unwrap();
            let near = connect(listener.local_addr().unwrap());
            (near, listener.accept().unwrap().0, listener)
        };
        let mut outside = OUTSIDE.map(pair);
        let (mut inside, mut inside_far, _listener) = pair("127.0.0.1");
        let datagrams = UdpSocket::bind((OUTSIDE[0], 0)).unwrap();
        datagrams.connect((OUTSIDE[0], 9)).unwrap();
        // One of them is in the middle of a call.
        let mut waiting = outside[0].0.try_clone().unwrap();
        let waiting = thread::spawn(move || waiting.read(&mut [0]));
        end();
        for (near, far, _) in &mut outside {
            for socket in [near, far] {
                assert!(matches!(socket.read(&mut [0]), Err(_) | Ok(0)));
                assert!(socket.write_all(b"x").is_err());
            }
        }
        assert!(matches!(waiting.join().unwrap(), Err(_) | Ok(0)));
        assert!(datagrams.peer_addr().is_err());
        inside.write_all(b"x").unwrap();
        inside_far.read_exact(&mut [0]).unwrap();
    }

    #[test]
    fn connections_beyond_the_guest_are_aborted() {
        in_new_network(|| match abort_all(None) {
            Ok(()) => check_ending(|| abort_all(None).unwrap()),
            Err(errno) => println!("skipped: this kernel cannot abort connections: {errno}"),
        });
    }

    #[test]
    fn connections_are_ended_through_who_holds_them_where_the_kernel_has_no_other_way() {
        in_new_network(|| {
            check_ending(|| held::disconnect_all("/proc/thread-self", None).unwrap());
        });
    }
}
