//! A host, an internet and guests for the tests, each a network namespace: nothing touches the
//! machine that the tests run on.
//!
//! ```text
//!   world ── eth0 ── host ── (the network under test) ── TAP ⇄ pump ⇄ TAP ── guest
//! ```
//!
//! A guest's end is a real network stack: a thread carries frames between the TAP under test and
//! one in the guest's namespace.

use std::{
    fs::File,
    io,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, UdpSocket},
    os::fd::{AsFd as _, OwnedFd},
    process::Command,
    thread::{self, JoinHandle},
    time::Duration,
};

use aether_types::{MachineId, NetworkPolicy};
use rustix::{
    event::{PollFd, PollFlags, poll},
    thread::{UnshareFlags, unshare_unsafe},
};

use super::super::{Attachment, Network, NetworkConfig, lane::Lane, leftovers, link};
use crate::{DriverError, journal::Journal};

pub(super) const PUBLIC: Ipv4Addr = Ipv4Addr::new(8, 8, 8, 8);
/// The host's address on the world's side, which is a public one.
pub(super) const HOST: Ipv4Addr = Ipv4Addr::new(8, 8, 4, 2);
pub(super) const RESOLVER: Ipv4Addr = Ipv4Addr::new(10, 255, 0, 53);
/// Answering from ranges that are closed by default.
pub(super) const CLOSED: &[Ipv4Addr] = &[
    Ipv4Addr::new(10, 9, 9, 9),
    Ipv4Addr::new(100, 64, 0, 1),
    Ipv4Addr::new(169, 254, 169, 254),
    Ipv4Addr::new(172, 16, 0, 1),
    Ipv4Addr::new(192, 0, 0, 8),
    Ipv4Addr::new(192, 0, 2, 9),
    Ipv4Addr::new(192, 168, 7, 7),
    Ipv4Addr::new(198, 18, 0, 1),
    Ipv4Addr::new(198, 51, 100, 7),
    Ipv4Addr::new(203, 0, 113, 80),
    Ipv4Addr::new(240, 0, 0, 1),
];
/// Served by the world and by the host, on every address, over TCP; UDP is echoed.
pub(super) const PORTS: [u16; 3] = [53, 80, 8080];
/// Longer than any answer here takes, on a loaded machine as well.
const SILENCE: Duration = Duration::from_millis(1500);

/// Runs a test as the host, in a new network namespace and a runtime of its own.
pub(super) fn as_host<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send) {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: network namespaces need root");
        return;
    }
    thread::scope(|scope| {
        let run = scope.spawn(|| {
            unshare_network();
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(test());
        });
        if let Err(panic) = run.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

#[expect(unsafe_code, reason = "the call is unsafe for what other flags do")]
fn unshare_network() {
    // SAFETY: a new network namespace for this thread shares no memory or descriptor anew.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
}

fn new_namespace() -> OwnedFd {
    let made = thread::spawn(|| {
        unshare_network();
        File::open("/proc/thread-self/ns/net").unwrap().into()
    });
    made.join().unwrap()
}

/// In the namespace of this thread.
pub(super) fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split_whitespace()).output().unwrap();
    assert!(status.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&status.stderr));
}

pub(super) fn nft(text: &str) -> String {
    super::super::rules::run_nft(&["-f", "-"], text).unwrap()
}

async fn ip_in(lane: &Lane, commands: Vec<String>) {
    let run = lane.run(move || {
        for command in &commands {
            ip(command);
        }
        Ok(())
    });
    run.await.unwrap();
}

/// Answers on [`PORTS`] on every address of the namespace of this thread, until the process ends.
fn serve() -> Result<(), DriverError> {
    serve_on(&[Ipv4Addr::UNSPECIFIED])
}

/// UDP on each address by itself, so that answers come from where the question went.
#[expect(clippy::unnecessary_wraps, reason = "as a lane's job")]
fn serve_on(addresses: &[Ipv4Addr]) -> Result<(), DriverError> {
    for port in PORTS {
        for any in ["0.0.0.0", "[::]"] {
            // The one for IPv6 takes IPv4 too where that is not taken.
            let Ok(listener) = TcpListener::bind(format!("{any}:{port}")) else { continue };
            thread::spawn(move || while listener.accept().is_ok() {});
        }
        for address in addresses {
            let socket = UdpSocket::bind((*address, port)).unwrap();
            thread::spawn(move || {
                let mut bytes = [0; 512];
                while let Ok((length, from)) = socket.recv_from(&mut bytes) {
                    let _ = socket.send_to(&bytes[..length], from);
                }
            });
        }
    }
    Ok(())
}

pub(super) struct Rig {
    world: Lane,
    pub(super) directory: tempfile::TempDir,
    pub(super) config: NetworkConfig,
}

impl Rig {
    pub(super) async fn new() -> Self {
        let world_namespace = new_namespace();
        let world = Lane::spawn("world", Some(world_namespace.as_fd())).unwrap();
        let mut socket = super::super::instance::route_socket().unwrap();
        socket.send_all(vec![link::new_veth("eth0", 1400, "w0", world_namespace.as_fd())]).unwrap();
        // Taken over from the machine otherwise.
        super::super::namespace::set("ipv4/ip_forward", "0").unwrap();
        ip("link set lo up");
        ip("link set eth0 up");
        ip(&format!("addr add {HOST}/24 dev eth0"));
        ip("-6 addr add fd00::2/64 dev eth0 nodad");
        ip("route add default via 8.8.4.1");
        let mut commands: Vec<String> =
            ["link set lo up", "link set w0 up", "addr add 8.8.4.1/24 dev w0"]
                .map(ToOwned::to_owned)
                .to_vec();
        let addresses: Vec<Ipv4Addr> = [CLOSED, &[PUBLIC, RESOLVER]].concat();
        for address in &addresses {
            commands.push(format!("addr add {address}/32 dev lo"));
        }
        ip_in(&world, commands).await;
        world.run(move || serve_on(&addresses)).await.unwrap();
        serve().unwrap();
        let config = NetworkConfig { dns: vec![RESOLVER.into()], ..NetworkConfig::default() };
        Self { world, directory: tempfile::tempdir().unwrap(), config }
    }

    pub(super) fn journal(&self) -> Journal {
        Journal::open(self.directory.path().join("journal")).unwrap()
    }

    pub(super) async fn open(&self) -> Network {
        Network::open(self.config.clone(), self.journal()).await.unwrap()
    }

    /// A connection from the world's public address.
    pub(super) async fn tcp_from_world(&self, to: Ipv4Addr, via: Ipv4Addr) -> Outcome {
        let command = format!("route replace {to}/32 via {via}");
        ip_in(&self.world, vec![command]).await;
        tcp(&self.world, Some(Ipv4Addr::new(8, 8, 4, 1)), (to, 80).into()).await
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        // Namespaces have names on the machine itself; a test that fails must not leave them.
        if !thread::panicking() {
            return;
        }
        let journal = self.directory.path().join("journal");
        let text = std::fs::read_to_string(journal).unwrap_or_default();
        for name in text.split('"').filter(|word| word.starts_with("aether-")) {
            let _ = super::super::namespace::remove(name);
        }
    }
}

/// Removes everything, and sees that nothing is left.
pub(super) async fn finish(network: Network) {
    let instance = network.instance();
    network.remove_all().await.unwrap();
    assert_eq!(leftovers(instance.as_deref()), Vec::<String>::new());
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    Open,
    /// Refused or unreachable: told, at once.
    Refused,
    /// No answer.
    Silent,
}

impl Outcome {
    pub(super) fn is_closed(self) -> bool {
        self != Self::Open
    }
}

fn outcome<T>(result: Result<io::Result<T>, tokio::time::error::Elapsed>) -> Outcome {
    match result {
        Ok(Ok(_)) => Outcome::Open,
        Ok(Err(error)) if error.kind() == io::ErrorKind::TimedOut => Outcome::Silent,
        Ok(Err(_)) => Outcome::Refused,
        Err(_) => Outcome::Silent,
    }
}

pub(super) async fn tcp(lane: &Lane, from: Option<Ipv4Addr>, to: SocketAddr) -> Outcome {
    let socket = lane.run(move || {
        let v4 = to.is_ipv4();
        let made =
            if v4 { tokio::net::TcpSocket::new_v4() } else { tokio::net::TcpSocket::new_v6() };
        let socket = made.unwrap();
        if let Some(from) = from {
            socket.bind(SocketAddrV4::new(from, 0).into()).unwrap();
        }
        Ok(socket)
    });
    let connecting = socket.await.unwrap().connect(to);
    outcome(tokio::time::timeout(SILENCE, connecting).await)
}

/// One datagram there and one back.
pub(super) async fn exchange(socket: &tokio::net::UdpSocket, to: Ipv4Addr, port: u16) -> Outcome {
    let exchange = async {
        socket.connect((to, port)).await?;
        socket.send(b"?").await?;
        socket.recv(&mut [0; 16]).await
    };
    outcome(tokio::time::timeout(SILENCE, exchange).await)
}

pub(super) struct Guest {
    pub(super) vm: MachineId,
    pub(super) attachment: Attachment,
    pub(super) address: Ipv4Addr,
    pub(super) lane: Lane,
    stop: OwnedFd,
    pumps: Vec<JoinHandle<()>>,
}

impl Guest {
    pub(super) async fn new(network: &Network, policy: &NetworkPolicy) -> Self {
        let vm = MachineId::new();
        let attachment = network.attach(vm, policy, 0, true).await.unwrap();
        Self::over(network, vm, attachment).await
    }

    /// One in a namespace of its own, as a container is, at the end of a veth pair.
    pub(super) async fn plugged(network: &Network, policy: &NetworkPolicy) -> Self {
        let vm = MachineId::new();
        let attachment = network.attach_veth(vm, policy).await.unwrap();
        let namespace = new_namespace();
        // Twice: a container that starts again has another namespace, or the same.
        for _ in 0..2 {
            network.plug(vm, namespace.try_clone().unwrap()).await.unwrap();
        }
        let lane = Lane::spawn("guest", Some(namespace.as_fd())).unwrap();
        let (_, stop) = rustix::pipe::pipe().unwrap();
        let std::net::IpAddr::V4(address) = attachment.guest.addresses[0].0 else { unreachable!() };
        Self { vm, attachment, address, lane, stop, pumps: Vec::new() }
    }

    /// Boots a guest on links that are there.
    pub(super) async fn over(network: &Network, vm: MachineId, attachment: Attachment) -> Self {
        let namespace = new_namespace();
        let lane = Lane::spawn("guest", Some(namespace.as_fd())).unwrap();
        let (stop, stopped) = rustix::pipe::pipe().map(|(r, w)| (w, r)).unwrap();
        let taps = [(Some(attachment.tap.clone()), "g0"), (attachment.channel_tap.clone(), "c0")];
        let mut pumps = Vec::new();
        for (outer, inner) in taps {
            let Some(outer) = outer else { continue };
            let outer = File::from(network.open_tap(&outer).await.unwrap());
            let inner = lane.run(move || Ok(link::open_tap(inner, None).unwrap())).await.unwrap();
            let stopped = stopped.try_clone().unwrap();
            pumps.push(thread::spawn(move || pump(&outer, &inner, &stopped)));
        }
        let (address, prefix) = attachment.guest.addresses[0];
        let mac = &attachment.guest.mac;
        let mut commands = vec![
            "link set lo up".to_owned(),
            format!("link set g0 address {mac} mtu {} up", attachment.guest.mtu),
            format!("addr add {address}/{prefix} dev g0"),
            format!("route add default via {}", attachment.guest.gateways[0]),
        ];
        if attachment.channel_tap.is_some() {
            commands.push("link set c0 address 02:ae:00:00:00:02 addrgenmode none up".to_owned());
            commands.push("-6 addr add fe80::2/64 dev c0 nodad".to_owned());
            // As the agent does.
            let host = "fe80::1 lladdr 02:ae:00:00:00:01";
            commands.push(format!("-6 neigh replace {host} dev c0 nud permanent"));
        }
        ip_in(&lane, commands).await;
        let std::net::IpAddr::V4(address) = address else { unreachable!() };
        Self { vm, attachment, address, lane, stop, pumps }
    }

    pub(super) async fn ip(&self, command: &str) {
        ip_in(&self.lane, vec![command.to_owned()]).await;
    }

    pub(super) async fn tcp(&self, to: Ipv4Addr, port: u16) -> Outcome {
        tcp(&self.lane, None, (to, port).into()).await
    }

    pub(super) async fn serve(&self) {
        self.lane.run(serve).await.unwrap();
    }

    pub(super) async fn udp(&self, to: Ipv4Addr, port: u16) -> Outcome {
        exchange(&self.udp_socket().await, to, port).await
    }

    pub(super) async fn udp_socket(&self) -> tokio::net::UdpSocket {
        let socket = self.lane.run(|| {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
            socket.set_nonblocking(true).unwrap();
            Ok(socket)
        });
        tokio::net::UdpSocket::from_std(socket.await.unwrap()).unwrap()
    }

    pub(super) async fn ping(&self, to: Ipv4Addr) -> Outcome {
        use rustix::net::{AddressFamily, SocketType, ipproto};
        let echo = self.lane.run(move || {
            let socket =
                rustix::net::socket(AddressFamily::INET, SocketType::RAW, Some(ipproto::ICMP));
            let socket = UdpSocket::from(socket.unwrap());
            socket.set_read_timeout(Some(SILENCE)).unwrap();
            // Type 8, code 0, checksum, and an identifier that makes the checksum this simple.
            socket.send_to(&[8, 0, 0xf7, 0xff, 0, 0, 0, 0], (to, 0)).unwrap();
            let mut bytes = [0; 256];
            let answer = socket.recv(&mut bytes);
            // After the header of IPv4: 0 is the echo's reply, 3 is unreachable.
            Ok(match (answer, bytes[20]) {
                (Ok(_), 0) => Outcome::Open,
                (Ok(_), _) => Outcome::Refused,
                (Err(_), _) => Outcome::Silent,
            })
        });
        echo.await.unwrap()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = rustix::io::write(&self.stop, b"x");
        for pump in self.pumps.drain(..) {
            let _ = pump.join();
        }
    }
}

/// Carries frames both ways until `stopped` can be read. Both sides have the same frame header.
fn pump(a: &File, b: &File, stopped: &OwnedFd) {
    let mut frame = vec![0; 65600];
    loop {
        let mut fds = [
            PollFd::new(a, PollFlags::IN),
            PollFd::new(b, PollFlags::IN),
            PollFd::new(stopped, PollFlags::IN),
        ];
        if poll(&mut fds, None).is_err() {
            continue;
        }
        let [from_a, from_b, stop] = fds.map(|fd| fd.revents());
        if !stop.is_empty() {
            return;
        }
        for (ready, from, to) in [(from_a, a, b), (from_b, b, a)] {
            if ready.intersects(PollFlags::ERR | PollFlags::HUP) {
                return;
            }
            if ready.contains(PollFlags::IN)
                && let Ok(length) = rustix::io::read(from, &mut *frame)
            {
                // A link that is down refuses the frame: lost, as on a wire.
                let _ = rustix::io::write(to, &frame[..length]);
            }
        }
    }
}
