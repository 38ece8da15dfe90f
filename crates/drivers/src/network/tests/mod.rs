mod rig;

use std::{
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use aether_types::{Egress, MachineId, NetworkPolicy};

use self::rig::{
    CLOSED, Guest, HOST, Outcome, PUBLIC, RESOLVER, Rig, as_host, exchange, finish, ip, tcp,
};
use super::{Network, NetworkConfig, leftovers};
use crate::{DriverError, fault::FaultPoints, journal::Owner};

fn policy(egress: Egress, rules: &[&str]) -> NetworkPolicy {
    NetworkPolicy { egress, allow: rules.iter().map(|r| r.parse().unwrap()).collect() }
}

const LIMIT: Duration = Duration::from_secs(3);

#[test]
fn the_public_internet_is_open_and_all_else_is_closed() {
    as_host(async || {
        let rig = Rig::new().await;
        let network = rig.open().await;
        let guest = Guest::new(&network, &policy(Egress::Public, &[])).await;
        let other = Guest::new(&network, &policy(Egress::Public, &[])).await;
        other.serve().await;
        assert_eq!(guest.tcp(PUBLIC, 80).await, Outcome::Open);
        assert_eq!(guest.udp(PUBLIC, 80).await, Outcome::Open);
        assert_eq!(guest.ping(PUBLIC).await, Outcome::Open);
        // The resolver, in a closed range, at its port alone.
        assert_eq!(guest.udp(RESOLVER, 53).await, Outcome::Open);
        assert_eq!(guest.tcp(RESOLVER, 53).await, Outcome::Open);
        assert_eq!(guest.tcp(RESOLVER, 80).await, Outcome::Refused);
        for closed in CLOSED {
            assert_eq!(guest.tcp(*closed, 80).await, Outcome::Refused, "{closed}");
        }
        for closed in [CLOSED[0], CLOSED[2]] {
            assert!(guest.udp(closed, 80).await.is_closed(), "{closed}");
            assert!(guest.ping(closed).await.is_closed(), "{closed}");
        }
        let range = network.range().unwrap();
        let here = [HOST, range.uplink_host(), range.uplink_inner(), range.gateway()];
        for host in here.into_iter().chain([other.address, Ipv4Addr::new(10, 213, 99, 99)]) {
            for port in [53, 80] {
                assert_eq!(guest.tcp(host, port).await, Outcome::Refused, "{host}");
            }
            assert!(guest.udp(host, 53).await.is_closed(), "{host}");
            assert!(guest.ping(host).await.is_closed(), "{host}");
        }
        // And inwards: from the host, and from a neighbour of the host that routes through it.
        assert!(tcp_from_host(other.address).await.is_closed());
        assert!(rig.tcp_from_world(other.address, HOST).await.is_closed());
        drop((guest, other));
        finish(network).await;
    });
}

async fn tcp_from_host(to: Ipv4Addr) -> Outcome {
    let lane = super::lane::Lane::spawn("host", None).unwrap();
    tcp(&lane, None, (to, 80).into()).await
}

#[test]
fn a_veth_pair_is_under_the_rules_of_a_tap() {
    as_host(async || {
        let rig = Rig::new().await;
        let network = rig.open().await;
        let guest = Guest::plugged(&network, &policy(Egress::Public, &[])).await;
        let other = Guest::plugged(&network, &policy(Egress::None, &[])).await;
        other.serve().await;
        assert_eq!(guest.tcp(PUBLIC, 80).await, Outcome::Open);
        assert_eq!(guest.udp(RESOLVER, 53).await, Outcome::Open);
        assert_eq!(guest.ping(PUBLIC).await, Outcome::Open);
        assert_eq!(other.tcp(PUBLIC, 80).await, Outcome::Refused);
        let range = network.range().unwrap();
        for host in [HOST, range.uplink_host(), range.gateway(), other.address] {
            assert_eq!(guest.tcp(host, 80).await, Outcome::Refused, "{host}");
        }
        for closed in CLOSED {
            assert_eq!(guest.tcp(*closed, 80).await, Outcome::Refused, "{closed}");
        }
        // The policy changes under a guest that goes on.
        network.attach_veth(guest.vm, &policy(Egress::None, &[])).await.unwrap();
        assert_eq!(guest.tcp(PUBLIC, 80).await, Outcome::Refused);
        network.attach_veth(guest.vm, &policy(Egress::Public, &[])).await.unwrap();
        assert_eq!(guest.tcp(PUBLIC, 80).await, Outcome::Open);
        // Another's address, and another MAC.
        guest.ip("addr flush dev eth0").await;
        guest.ip(&format!("addr add {}/16 dev eth0", other.address)).await;
        guest.ip(&format!("route add default via {}", range.gateway())).await;
        assert!(guest.tcp(PUBLIC, 80).await.is_closed());
        let (vm, gone) = (guest.vm, guest.address);
        drop(guest);
        network.detach(vm).await.unwrap();
        assert!(network.attachment(vm).is_none());
        assert!(tcp_from_host(gone).await.is_closed());
        drop(other);
        finish(network).await;
    });
}

#[test]
fn a_host_whose_table_is_flushed_is_still_closed() {
    as_host(async || {
        let rig = Rig::new().await;
        let network = rig.open().await;
        let guest = Guest::new(&network, &policy(Egress::Public, &[])).await;
        rig::nft("flush ruleset");
        assert!(guest.tcp(HOST, 80).await.is_closed());
        assert!(guest.tcp(network.range().unwrap().uplink_host(), 80).await.is_closed());
        assert!(guest.tcp(PUBLIC, 80).await.is_closed(), "there is no translation");
        network.reconcile(&[guest.vm]).await.unwrap();
        assert_eq!(guest.tcp(PUBLIC, 80).await, Outcome::Open);
        drop(guest);
        finish(network).await;
    });
}

#[test]
fn an_allow_rule_opens_just_what_it_says() {
    as_host(async || {
        let rig = Rig::new().await;
        let network = rig.open().await;
        let private = CLOSED[0];
        let other = Guest::new(&network, &policy(Egress::Public, &[])).await;
        other.serve().await;
        let host = network.range().unwrap().uplink_host();
        let rules = [
            format!("{private}:80/tcp"),
            format!("{host}:8080"),
            format!("{}:80", other.address),
            "192.168.0.0/16".to_owned(),
        ];
        let rules = rules.each_ref().map(String::as_str);
        let guest = Guest::new(&network, &policy(Egress::None, &rules)).await;
        assert_eq!(guest.tcp(private, 80).await, Outcome::Open);
        assert!(guest.tcp(private, 8080).await.is_closed());
        assert!(guest.udp(private, 80).await.is_closed());
        assert!(guest.ping(private).await.is_closed());
        assert_eq!(guest.tcp(host, 8080).await, Outcome::Open);
        assert_eq!(guest.udp(host, 8080).await, Outcome::Open);
        assert!(guest.tcp(host, 80).await.is_closed());
        assert!(guest.tcp(HOST, 8080).await.is_closed());
        assert_eq!(guest.tcp(other.address, 80).await, Outcome::Open);
        assert!(guest.tcp(other.address, 8080).await.is_closed());
        assert!(other.tcp(guest.address, 80).await.is_closed());
        assert_eq!(guest.ping(Ipv4Addr::new(192, 168, 7, 7)).await, Outcome::Open);
        assert_eq!(guest.tcp(Ipv4Addr::new(192, 168, 7, 7), 53).await, Outcome::Open);
        // Nothing else.
        assert!(guest.tcp(PUBLIC, 80).await.is_closed());
        assert!(guest.udp(RESOLVER, 53).await.is_closed());
        drop((guest, other));
        finish(network).await;
    });
}

#[test]
fn a_policy_can_be_changed_and_ends_what_it_closes() {
    as_host(async || {
        let rig = Rig::new().await;
        let network = rig.open().await;
        let guest = Guest::new(&network, &policy(Egress::Public, &[])).await;
        assert_eq!(guest.tcp(PUBLIC, 80).await, Outcome::Open);
        let flow = guest.udp_socket().await;
        assert_eq!(exchange(&flow, PUBLIC, 80).await, Outcome::Open);
        let rules = ["10.9.9.9:80", "10.0.0.0/8:50-100/tcp", "10.9.0.0/16"];
        let before = guest.attachment.clone();
        let after = network.attach(guest.vm, &policy(Egress::None, &rules), 0, true).await.unwrap();
        assert_eq!(before, after);
        assert!(network.open_tap("aeu9999").await.is_err());
        assert!(exchange(&flow, PUBLIC, 80).await.is_closed());
        assert!(guest.tcp(PUBLIC, 80).await.is_closed());
        assert_eq!(guest.tcp(CLOSED[0], 8080).await, Outcome::Open);
        network.attach(guest.vm, &policy(Egress::Public, &[]), 0, true).await.unwrap();
        assert_eq!(guest.tcp(PUBLIC, 80).await, Outcome::Open);
        assert!(guest.tcp(CLOSED[0], 80).await.is_closed());
        drop(guest);
        finish(network).await;
    });
}

#[test]
fn a_guest_cannot_pose_as_another() {
    as_host(async || {
        let rig = Rig::new().await;
        let network = rig.open().await;
        let guest = Guest::new(&network, &policy(Egress::Public, &[])).await;
        let other = Guest::new(&network, &policy(Egress::Public, &[])).await;
        // Another's address, and one that nobody has.
        for forged in [other.address, Ipv4Addr::new(10, 213, 77, 7), Ipv4Addr::new(8, 8, 4, 99)] {
            guest.ip(&format!("addr add {forged}/32 dev g0")).await;
            let outcome = tcp(&guest.lane, Some(forged), (PUBLIC, 80).into()).await;
            assert!(outcome.is_closed(), "{forged}");
        }
        // Having claimed it by ARP takes nothing from its owner.
        assert_eq!(other.tcp(PUBLIC, 80).await, Outcome::Open);
        assert_eq!(guest.tcp(PUBLIC, 80).await, Outcome::Open);
        // Another's Ethernet address.
        guest.ip(&format!("link set g0 address {}", other.attachment.guest.mac)).await;
        assert!(guest.tcp(PUBLIC, 80).await.is_closed());
        drop((guest, other));
        finish(network).await;
    });
}

#[test]
fn guests_have_no_ipv6() {
    as_host(async || {
        let rig = Rig::new().await;
        let network = rig.open().await;
        let guest = Guest::new(&network, &policy(Egress::Public, &[])).await;
        guest.ip("-6 addr add fd00:1::5/64 dev g0 nodad").await;
        guest.ip("-6 neigh replace fe80::1 lladdr 02:ae:00:00:00:01 dev g0 nud permanent").await;
        guest.ip("-6 route add default via fe80::1 dev g0").await;
        for to in ["[fd00::2]:80", "[fd00:1::1]:80"] {
            assert!(tcp(&guest.lane, None, to.parse().unwrap()).await.is_closed(), "{to}");
        }
        let error = network
            .attach(MachineId::new(), &policy(Egress::Public, &["2001:db8::1"]), 0, false)
            .await
            .unwrap_err();
        assert!(error.to_string().contains("IPv6"), "{error}");
        drop(guest);
        finish(network).await;
    });
}

#[test]
fn the_private_link_leads_to_the_agent_and_nowhere_else() {
    as_host(async || {
        let rig = Rig::new().await;
        let network = rig.open().await;
        // Two, since all links have the same addresses.
        let guests = [
            Guest::new(&network, &policy(Egress::Public, &[])).await,
            Guest::new(&network, &policy(Egress::None, &[])).await,
        ];
        for (name, guest) in ["first", "second"].into_iter().zip(&guests) {
            let mut listener = network.ready_listener(guest.vm).await.unwrap();
            let refused = network.dial(guest.vm, 1024, LIMIT).await.unwrap_err();
            assert!(matches!(refused, DriverError::ConnectRefused { port: 1024 }), "{refused}");
            let agent = guest.lane.run(move || {
                let listener = std::net::TcpListener::bind("[::]:1024").unwrap();
                std::thread::spawn(move || {
                    use std::io::Write as _;
                    for stream in listener.incoming() {
                        stream.unwrap().write_all(name.as_bytes()).unwrap();
                    }
                });
                let socket = std::net::UdpSocket::bind("[::]:0").unwrap();
                let to =
                    std::net::SocketAddrV6::new(super::link::CHANNEL_HOST, 1025, 0, scope("c0"));
                socket.send_to(b"ready", to).unwrap();
                Ok(())
            });
            agent.await.unwrap();
            let hint = tokio::time::timeout(LIMIT, listener.wait()).await.unwrap().unwrap();
            assert_eq!(hint, b"ready");
        }
        // At once, and each reaches its own.
        let mut dials = Vec::new();
        for _ in 0..20 {
            for (name, guest) in ["first", "second"].into_iter().zip(&guests) {
                let network = &network;
                dials.push(async move {
                    use tokio::io::AsyncReadExt as _;
                    let mut stream = network.dial(guest.vm, 1024, LIMIT).await.unwrap();
                    let mut said = String::new();
                    stream.read_to_string(&mut said).await.unwrap();
                    assert_eq!(said, name);
                });
            }
        }
        for dial in dials {
            dial.await;
        }
        // From the guest: no connection to the host's end, and nothing beyond it.
        let host_side = super::lane::Lane::spawn(
            "x",
            Some(std::os::fd::AsFd::as_fd(&network.namespace().unwrap())),
        )
        .unwrap();
        let served = host_side.run(|| Ok(std::net::TcpListener::bind("[::]:80").unwrap())).await;
        let to = std::net::SocketAddrV6::new(super::link::CHANNEL_HOST, 80, 0, 0);
        for guest in &guests {
            let scope = guest.lane.run(|| Ok(scope("c0"))).await.unwrap();
            let to = std::net::SocketAddrV6::new(*to.ip(), 80, 0, scope);
            assert_eq!(tcp(&guest.lane, None, to.into()).await, Outcome::Silent);
            guest.ip("route replace default dev c0").await;
            assert!(guest.tcp(PUBLIC, 80).await.is_closed());
        }
        drop(served);
        drop(guests);
        finish(network).await;
    });
}

fn scope(name: &str) -> u32 {
    let path = format!("/proc/thread-self/net/dev_snmp6/{name}");
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().find_map(|l| l.strip_prefix("ifIndex")).unwrap().trim().parse().unwrap()
}

#[test]
fn a_restart_takes_over_what_is_there() {
    as_host(async || {
        let rig = Rig::new().await;
        let network = rig.open().await;
        let rules = policy(Egress::Public, &["10.9.9.9:80"]);
        let guest = Guest::new(&network, &rules).await;
        let unknown = MachineId::new();
        network.attach(unknown, &rules, 0, false).await.unwrap();
        let instance = network.instance();
        // As after SIGKILL: nothing is closed.
        drop(network);
        let network = rig.open().await;
        assert_eq!(network.instance(), instance);
        assert_eq!(network.attachment(guest.vm).unwrap(), guest.attachment);
        assert_eq!(guest.tcp(PUBLIC, 80).await, Outcome::Open);
        assert_eq!(guest.tcp(CLOSED[0], 80).await, Outcome::Open);
        assert!(!network.close_if_empty().await.unwrap());
        let removed = network.reconcile(&[guest.vm]).await.unwrap();
        assert_eq!(removed, [format!("network of VM {unknown}")]);
        assert_eq!(network.attachment(unknown), None);
        // A stopped VM keeps nothing; a start after that makes all of it again.
        let vm = guest.vm;
        drop(guest);
        network.detach(vm).await.unwrap();
        network.detach(vm).await.unwrap();
        assert!(network.close_if_empty().await.unwrap());
        assert_eq!(leftovers(instance.as_deref()), Vec::<String>::new());
        assert!(network.namespace().is_err());
        let attachment = network.attach(vm, &rules, 0, true).await.unwrap();
        let guest = Guest::over(&network, vm, attachment).await;
        assert_eq!(guest.tcp(PUBLIC, 80).await, Outcome::Open);
        drop(guest);
        finish(network).await;
    });
}

#[test]
fn what_was_lost_is_mended_when_opened_again() {
    as_host(async || {
        let rig = Rig::new().await;
        let network = rig.open().await;
        let rules = policy(Egress::Public, &[]);
        let guest = Guest::new(&network, &rules).await;
        let (vm, instance) = (guest.vm, network.instance().unwrap());
        drop((guest, network));
        // As after a reboot.
        ip(&format!("link delete ae{instance}h"));
        super::namespace::remove(&format!("aether-{instance}")).unwrap();
        rig::nft("flush ruleset");
        let network = rig.open().await;
        let attachment = network.attach(vm, &rules, 0, true).await.unwrap();
        let guest = Guest::over(&network, vm, attachment).await;
        assert_eq!(guest.tcp(PUBLIC, 80).await, Outcome::Open);
        drop(guest);
        finish(network).await;
    });
}

#[test]
fn a_range_that_something_else_has_is_refused_by_name() {
    as_host(async || {
        let mut rig = Rig::new().await;
        ip("route add 10.213.64.0/18 via 8.8.4.1");
        let network = rig.open().await;
        assert_eq!(network.range().unwrap().to_string(), "10.214.0.0/16");
        finish(network).await;
        rig.config.range = Some("10.213.0.0/16".parse().unwrap());
        let error = Network::open(rig.config.clone(), rig.journal()).await.unwrap_err();
        assert!(
            matches!(&error, DriverError::RangeOverlaps { with, .. }
            if with.contains("10.213.64.0/18") && with.contains("eth0")),
            "{error}"
        );
        rig.config.range = Some("10.255.0.0/24".parse().unwrap());
        let error = Network::open(rig.config.clone(), rig.journal()).await.unwrap_err();
        assert!(error.to_string().contains("the resolver 10.255.0.53"), "{error}");
    });
}

#[test]
fn instances_of_one_host_live_side_by_side() {
    as_host(async || {
        let rig = Rig::new().await;
        let second = tempfile::tempdir().unwrap();
        let journal = crate::journal::Journal::open(second.path().join("journal")).unwrap();
        let (a, b) = tokio::join!(rig.open(), Network::open(rig.config.clone(), journal));
        let b = b.unwrap();
        assert_ne!(a.range(), b.range());
        let from_a = Guest::new(&a, &policy(Egress::Public, &[])).await;
        let from_b = Guest::new(&b, &policy(Egress::Public, &[])).await;
        from_b.serve().await;
        assert!(from_a.tcp(from_b.address, 80).await.is_closed());
        assert_eq!(from_a.tcp(PUBLIC, 80).await, Outcome::Open);
        drop(from_a);
        finish(a).await;
        assert_eq!(from_b.tcp(PUBLIC, 80).await, Outcome::Open);
        drop(from_b);
        finish(b).await;
        assert_eq!(super::namespace::get("ipv4/ip_forward").as_deref(), Some("0"));
    });
}

#[test]
fn a_range_without_a_free_address_says_so() {
    as_host(async || {
        let mut rig = Rig::new().await;
        rig.config.range = Some("10.213.0.0/28".parse().unwrap());
        let network = rig.open().await;
        let rules = policy(Egress::Public, &[]);
        let vms: Vec<MachineId> = (0..7).map(|_| MachineId::new()).collect();
        for vm in &vms {
            network.attach(*vm, &rules, 0, false).await.unwrap();
        }
        let error = network.attach(MachineId::new(), &rules, 0, false).await.unwrap_err();
        assert!(matches!(error, DriverError::NoAddress { .. }), "{error}");
        network.detach(vms[3]).await.unwrap();
        network.attach(MachineId::new(), &rules, 0, false).await.unwrap();
        finish(network).await;
    });
}

#[test]
fn a_host_that_drops_forwarded_packets_lets_ours_pass() {
    as_host(async || {
        let rig = Rig::new().await;
        rig::nft(
            "table ip filter {\n chain FORWARD {\n\
             type filter hook forward priority 0; policy drop;\n }\n }\n",
        );
        let network = rig.open().await;
        let guest = Guest::new(&network, &policy(Egress::Public, &[])).await;
        assert_eq!(guest.tcp(PUBLIC, 80).await, Outcome::Open);
        network.reconcile(&[guest.vm]).await.unwrap();
        let text =
            super::rules::run_nft(&["list", "chain", "ip", "filter", "FORWARD"], "").unwrap();
        assert_eq!(text.matches("comment").count(), 2, "{text}");
        drop(guest);
        finish(network).await;
        // Someone filters by it: forwarding stays on.
        assert_eq!(super::namespace::get("ipv4/ip_forward").as_deref(), Some("1"));
    });
}

#[test]
fn a_failure_at_any_step_leaves_nothing() {
    as_host(async || {
        let mut rig = Rig::new().await;
        let fault = FaultPoints::recording();
        rig.config = NetworkConfig { fault: fault.clone(), ..rig.config.clone() };
        let rules = policy(Egress::Public, &["10.9.9.9:80"]);
        let network = rig.open().await;
        network.attach(MachineId::new(), &rules, 0, true).await.unwrap();
        finish(network).await;
        let points = fault.seen();
        assert!(points.len() >= 20, "{points:?}");
        let journal = rig.journal();
        for point in points {
            fault.arm(point);
            let vm = MachineId::new();
            let result = async {
                let network = Network::open(rig.config.clone(), journal.clone()).await?;
                let attached = network.attach(vm, &rules, 0, true).await;
                assert_eq!(network.attachment(vm), None, "{point}");
                assert_eq!(journal.machines(), [], "{point}");
                // Once more, without the failure.
                network.attach(vm, &rules, 0, true).await?;
                network.detach(vm).await?;
                let namespace = network.namespace()?;
                let lane =
                    super::lane::Lane::spawn("x", Some(std::os::fd::AsFd::as_fd(&namespace)))?;
                let inside = lane.run(|| {
                    let links = super::link::links(&mut super::instance::route_socket()?).unwrap();
                    let set = super::rules::run_nft(&["list", "ruleset"], "")?;
                    Ok((links.into_iter().map(|l| l.name).collect::<Vec<_>>(), set))
                });
                let (links, set) = inside.await?;
                assert!(
                    !links.iter().any(|l| l.starts_with("aeu") || l.starts_with("aec")),
                    "{links:?}"
                );
                assert!(!set.contains("10.9.9.9"), "{set}");
                assert!(network.close_if_empty().await?);
                attached.map(drop)
            };
            let error = result.await.unwrap_err();
            assert!(matches!(&error, DriverError::Injected(p) if p == point), "{point}: {error}");
            assert_eq!(
                leftovers(None).iter().filter(|l| !l.starts_with("namespace")).count(),
                0,
                "{point}"
            );
            assert_eq!(journal.resources(Owner::Host), [], "{point}");
        }
    });
}

/// As SIGKILL at each step: no undo runs, and whoever comes next has the journal alone.
#[test]
fn a_crash_at_any_step_leaves_nothing_that_the_next_does_not_find() {
    as_host(async || {
        let mut rig = Rig::new().await;
        let fault = FaultPoints::recording();
        rig.config = NetworkConfig { fault: fault.clone(), ..rig.config.clone() };
        let rules = policy(Egress::Public, &["10.9.9.9:80"]);
        let network = rig.open().await;
        network.attach(MachineId::new(), &rules, 0, true).await.unwrap();
        finish(network).await;
        for point in fault.seen() {
            fault.arm_crash(point);
            let (kept, lost) = (MachineId::new(), MachineId::new());
            if let Ok(network) = Network::open(rig.config.clone(), rig.journal()).await {
                assert!(network.attach(lost, &rules, 0, true).await.is_err(), "{point}");
            }
            assert!(!fault.disarm(), "{point}");
            let network = rig.open().await;
            network.attach(kept, &rules, 0, true).await.unwrap();
            network.reconcile(&[kept]).await.unwrap();
            assert_eq!(network.attachment(lost), None, "{point}");
            let guest = Guest::over(&network, kept, network.attachment(kept).unwrap()).await;
            assert_eq!(guest.tcp(PUBLIC, 80).await, Outcome::Open, "{point}");
            drop(guest);
            finish(network).await;
            let journal = rig.journal();
            assert_eq!(journal.machines(), [], "{point}");
            assert_eq!(journal.resources(Owner::Host), [], "{point}");
        }
    });
}

/// Prints what an attachment and a connection cost; figures, not bounds.
#[test]
fn attaching_and_dialling_are_measured() {
    as_host(async || {
        let rig = Rig::new().await;
        let start = Instant::now();
        let network = rig.open().await;
        println!("open {:?}", start.elapsed());
        for (name, rules) in [("public", &[][..]), ("one allow rule", &["10.9.9.9:80"][..])] {
            let rules = policy(Egress::Public, rules);
            let (mut attach, mut again, mut detach) = (Vec::new(), Vec::new(), Vec::new());
            for _ in 0..20 {
                let vm = MachineId::new();
                attach.push(timed(network.attach(vm, &rules, 0, true)).await);
                again.push(timed(network.attach(vm, &rules, 0, true)).await);
                detach.push(timed(network.detach(vm)).await);
            }
            report(&format!("attach, {name}"), attach);
            report(&format!("attach again, {name}"), again);
            report(&format!("detach, {name}"), detach);
        }
        let guest = Guest::new(&network, &policy(Egress::None, &[])).await;
        let listening = guest.lane.run(|| {
            let listener = std::net::TcpListener::bind("[::]:1024").unwrap();
            std::thread::spawn(move || while listener.accept().is_ok() {});
            Ok(())
        });
        listening.await.unwrap();
        let mut dial = Vec::new();
        for _ in 0..200 {
            dial.push(timed(network.dial(guest.vm, 1024, LIMIT)).await);
        }
        println!("first dial {:?}", dial.remove(0));
        report("dial", dial);
        drop(guest);
        let start = Instant::now();
        finish(network).await;
        println!("remove all {:?}", start.elapsed());
    });
}

async fn timed<T>(action: impl Future<Output = Result<T, DriverError>>) -> Duration {
    let start = Instant::now();
    action.await.unwrap();
    start.elapsed()
}

fn report(name: &str, mut times: Vec<Duration>) {
    times.sort();
    println!("{name}: median {:?}, most {:?}", times[times.len() / 2], times[times.len() - 1]);
}
