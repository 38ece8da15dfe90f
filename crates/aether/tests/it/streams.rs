//! Live streams between processes: every gateway serves the VMs of every worker.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    path::Path,
    process::Stdio,
    time::{Duration, Instant},
};

use aether_redis::testing as redis;
use rustix::process::{Signal, kill_process};

use crate::{
    postgres::Server,
    rig::{Rig, command, pid},
};

/// A platform of a fleet whose processes reach each other. The first has made the authority.
fn member(server: &Server, name: &str, first: Option<&Rig>, more: &[(&str, &str)]) -> Rig {
    let options = ["--no-default-template", "--pool", "none", "--migrate"];
    let folder = first.map(|first| first.data().join("authority").display().to_string());
    let mut env = vec![
        ("DATABASE_URL", server.url.as_str()),
        ("AETHER_WORKER_HOST", name),
        ("AETHER_WORKER_ZONE", name),
        ("AETHER_STREAM_LISTEN", "127.0.0.1:0"),
    ];
    env.extend(folder.as_ref().map(|folder| ("AETHER_AUTHORITY_DIR", folder.as_str())));
    env.extend(more);
    Rig::with_env(&options, &env, "Aetherium is ready")
}

/// Two of them, with a VM on each: `one` and `two`.
fn fleet(server: &Server, more: &[(&str, &str)]) -> [Rig; 2] {
    let one = member(server, "one", None, more);
    let two = member(server, "two", Some(&one), more);
    for name in ["one", "two"] {
        one.ok(&["vm", "create", "--name", name, "--zone", name]);
    }
    [one, two]
}

fn bytes(count: u32) -> Vec<u8> {
    (0..count).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

/// Everything that is live, of a VM, through a gateway.
fn is_served(rig: &Rig, vm: &str) {
    let data = bytes(3_000_000);
    let output = rig.feed(&["exec", vm, "cat"], &data);
    assert!(output.status.success(), "{vm}: {}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stdout == data, "{vm}: {} bytes", output.stdout.len());
    let script = "echo out; echo err >&2; exit 3";
    let output = rig.run(&["exec", "-n", vm, "--", "sh", "-c", script]);
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert_eq!((output.stdout, output.stderr), (b"out\n".to_vec(), b"err\n".to_vec()));

    let folder = tempfile::tempdir().unwrap();
    let (there, back) = (folder.path().join("there"), folder.path().join("back"));
    std::fs::write(&there, &data).unwrap();
    let inside = format!("{vm}:/tmp/file");
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    rig.ok(&["cp", &text(&there), &inside]);
    rig.ok(&["cp", &inside, &text(&back)]);
    assert!(std::fs::read(&back).unwrap() == data, "{vm}");

    let mut child = rig.command(&["exec", "-n", vm, "--", "sh", "-c", "echo begun; sleep 600"]);
    let mut child = child.spawn().unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    assert_eq!(line, "begun\n");
    kill_process(pid(&child), Signal::TERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(143));
}

#[test]
fn every_gateway_serves_the_vms_of_every_worker() {
    let Some(server) = Server::start() else { return };
    let rigs = fleet(&server, &[]);
    for rig in &rigs {
        for vm in ["one", "two"] {
            is_served(rig, vm);
        }
    }
    // A worker that has restarted is found at its new address.
    let [one, mut two] = rigs;
    assert!(two.end(Signal::TERM).0.success());
    two.restart();
    two.ok(&["vm", "start", "two"]);
    is_served(&one, "two");
    let secrets = server.test.execute("select encode(value, 'escape') from secrets");
    assert!(!secrets.contains("PRIVATE"), "no key is in the store");
}

#[test]
fn so_it_is_with_the_queue_in_redis() {
    let Some(server) = Server::start() else { return };
    if !redis::available() {
        return;
    }
    let queue = redis::Server::forgetful();
    let address = format!("127.0.0.1:{}", queue.port());
    let [one, two] = fleet(&server, &[("REDIS_ADDR", &address)]);
    is_served(&one, "two");
    is_served(&two, "one");
}

#[test]
fn a_worker_that_is_killed_ends_its_streams_with_a_reason() {
    let Some(server) = Server::start() else { return };
    let lease = [("AETHER_WORKER_HEARTBEAT", "1s"), ("AETHER_WORKER_LEASE", "10s")];
    let [one, mut two] = fleet(&server, &lease);
    let mut child = one.command(&["exec", "-n", "two", "--", "sh", "-c", "echo begun; sleep 600"]);
    let mut child = child.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "begun\n");
    let start = Instant::now();
    two.end(Signal::KILL);
    // Not lost yet: nobody knows more than that it is not there.
    let (status, said) = one.fails(&["cp", "two:/etc/passwd", "/dev/null"]);
    assert!(status == 6 && said.contains("[worker_unreachable]"), "{status} {said}");
    assert!(start.elapsed() < Duration::from_secs(9), "{:?}", start.elapsed());
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(125), "{said}");
    assert!(said.contains("[execution_lost]") || said.contains("[worker_lost]"), "{said}");
    assert!(start.elapsed() < Duration::from_secs(25), "{:?}", start.elapsed());
}

#[test]
fn certificates_are_replaced_under_streams_that_live() {
    let Some(server) = Server::start() else { return };
    let lifetime = Duration::from_secs(2);
    let [one, _two] = fleet(&server, &[("AETHER_STREAM_CERTIFICATE_LIFETIME", "2s")]);
    let mut child = one.command(&["exec", "two", "cat"]).stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let start = Instant::now();
    while start.elapsed() < 3 * lifetime {
        stdin.write_all(b"still here\n").unwrap();
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        assert_eq!(line, "still here\n");
        assert_eq!(one.ok(&["exec", "-n", "two", "--", "echo", "new"]), "new\n");
    }
    drop(stdin);
    assert!(child.wait().unwrap().success());
}

#[test]
fn without_the_right_authority_there_are_no_streams() {
    let Some(server) = Server::start() else { return };
    let _one = member(&server, "one", None, &[]);
    let folder = tempfile::tempdir().unwrap();
    let up = |more: &[&str]| {
        let output = command(&folder.path().join("data"))
            .args(["up", "--driver", "sim", "--listen", "127.0.0.1:0"])
            .args(more)
            .env("DATABASE_URL", &server.url)
            .output()
            .unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let listen = ["--stream-listen", "127.0.0.1:0"];
    let (status, said) = up(&listen);
    assert_eq!(status, Some(1), "{said}");
    assert!(said.contains("[authority_elsewhere]") && said.contains("--authority-dir"), "{said}");
    for more in [
        &["--stream-advertise", "host:1"][..],
        &["--stream-advertise", "host", listen[0], listen[1]],
        &["--stream-certificate-lifetime", "1ms", listen[0], listen[1]],
    ] {
        let (status, said) = up(more);
        assert_eq!(status, Some(2), "{more:?}: {said}");
    }
}
