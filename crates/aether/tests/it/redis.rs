//! The platform with its queue in Redis.

use aether_redis::testing::{self, Server};
use rustix::process::Signal;

use crate::rig::{Rig, command};

const OPTIONS: &[&str] = &["--no-default-template", "--pool", "none"];

fn address(server: &Server) -> String {
    format!("127.0.0.1:{}", server.port())
}

fn platform(server: &Server) -> Rig {
    Rig::with_env(OPTIONS, &[("REDIS_ADDR", &address(server))], "Aetherium is ready")
}

#[test]
fn work_goes_through_redis_and_over_a_restart_of_it_that_forgets_all() {
    if !testing::available() {
        return;
    }
    let mut server = Server::forgetful();
    let mut rig = platform(&server);
    rig.ok(&["vm", "create", "--name", "before"]);
    assert_eq!(rig.ok(&["exec", "-n", "before", "--", "echo", "here"]), "here\n");
    assert!(!rig.data().join("queue.db").exists());

    server.stop();
    // Accepted, since the store has it; done when the queue is back.
    std::thread::scope(|scope| {
        let creation = scope.spawn(|| rig.ok(&["vm", "create", "--name", "meanwhile"]));
        while !rig.ok(&["vm", "list"]).contains("meanwhile") {
            std::thread::yield_now();
        }
        assert!(!creation.is_finished());
        server.start_again();
        creation.join().unwrap();
    });
    assert_eq!(rig.ok(&["exec", "-n", "meanwhile", "--", "echo", "here"]), "here\n");
    rig.ok(&["vm", "delete", "before", "meanwhile"]);
    let (status, _) = rig.end(Signal::TERM);
    assert!(status.success());
    assert_eq!(server.ask(&["HLEN", "{aetherium}:queue:e"]), "0");
}

#[test]
fn a_full_redis_takes_no_task_and_none_is_lost() {
    if !testing::available() {
        return;
    }
    let server = Server::forgetful();
    let rig = platform(&server);
    assert_eq!(server.ask(&["CONFIG", "SET", "maxmemory", "1mb"]), "OK");
    std::thread::scope(|scope| {
        let creation = scope.spawn(|| rig.ok(&["vm", "create", "--name", "later"]));
        while !rig.ok(&["vm", "list"]).contains("later") {
            std::thread::yield_now();
        }
        assert!(!creation.is_finished());
        assert_eq!(server.ask(&["CONFIG", "SET", "maxmemory", "0"]), "OK");
        creation.join().unwrap();
    });
    assert!(rig.ok(&["vm", "list"]).contains("running"));
}

/// How many commands of clients the server has seen; those of scripts are not sent.
fn sent(server: &Server) -> u64 {
    const SENT: &[&str] = &["evalsha", "script|load", "hscan", "ping", "subscribe", "hello"];
    let stats = server.ask(&["INFO", "commandstats"]);
    let calls = |line: &str| {
        let (name, rest) = line.trim().strip_prefix("cmdstat_")?.split_once(":calls=")?;
        let calls = rest.split(',').next()?.parse::<u64>().ok()?;
        SENT.contains(&name).then_some(calls)
    };
    stats.lines().filter_map(calls).sum()
}

#[test]
fn an_idle_platform_asks_redis_at_most_once_a_second() {
    const WINDOW: u64 = 6;
    if !testing::available() {
        return;
    }
    let server = Server::forgetful();
    let rig = platform(&server);
    rig.ok(&["vm", "create", "--name", "web"]);
    assert_eq!(rig.ok(&["exec", "-n", "web", "--", "echo", "here"]), "here\n");
    let before = sent(&server);
    // A window: the server answers when it is over.
    server.ask(&["BLPOP", "nothing", &WINDOW.to_string()]);
    let sent = sent(&server) - before;
    assert!((1..=WINDOW).contains(&sent), "{sent} commands in {WINDOW} s");
}

#[test]
fn another_installation_is_refused_until_it_has_a_prefix_of_its_own() {
    if !testing::available() {
        return;
    }
    let server = Server::forgetful();
    let mut rig = platform(&server);
    let folder = tempfile::tempdir().unwrap();
    let up = ["up", "--driver", "sim", "--listen", "127.0.0.1:0"];
    let other = command(folder.path()).args(up).env("REDIS_ADDR", address(&server)).output();
    let other = other.unwrap();
    let said = String::from_utf8(other.stderr).unwrap();
    assert_eq!(other.status.code(), Some(4), "{said}");
    assert!(said.contains("[redis_of_another]") && said.contains("--redis-prefix"), "{said}");
    let env = [("REDIS_ADDR", address(&server)), ("REDIS_PREFIX", "second".to_owned())];
    let env: Vec<_> = env.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let second = Rig::with_env(OPTIONS, &env, "Aetherium is ready");
    second.ok(&["vm", "create", "--name", "web"]);
    // The first is known again by its store.
    rig.end(Signal::KILL);
    rig.restart();
}

#[test]
fn what_is_wrong_with_redis_is_said_without_its_password() {
    let folder = tempfile::tempdir().unwrap();
    let fails = |url: &str, args: &[&str]| {
        let output = command(folder.path()).args(args).env("REDIS_URL", url).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!said.contains("hunter2"), "{said}");
        (output.status.code().unwrap(), said)
    };
    let up = ["up", "--driver", "sim", "--listen", "127.0.0.1:0", "--log-level", "trace"];
    let (status, said) = fails("redis://u:hunter2@127.0.0.1:1", &up);
    assert_eq!(status, 6, "{said}");
    assert!(said.contains("[redis_unreachable]") && said.contains("127.0.0.1:1"), "{said}");
    let (status, said) = fails("http://u:hunter2@h", &up);
    assert_eq!(status, 2, "{said}");
    assert!(said.contains("[redis_misconfigured]"), "{said}");
}

#[test]
fn the_doctor_looks_at_the_redis_that_is_configured() {
    if !testing::available() {
        return;
    }
    let mut server = Server::start(&["--appendonly", "yes", "--requirepass", "hunter2"]);
    let doctor = |url: String| {
        let folder = tempfile::tempdir().unwrap();
        let output = command(folder.path())
            .args(["doctor", "--driver", "sim"])
            .env("REDIS_URL", url)
            .output()
            .unwrap();
        (output.status.code().unwrap(), String::from_utf8(output.stdout).unwrap())
    };
    let url = format!("redis://:hunter2@{}", address(&server));
    let (status, said) = doctor(url.clone());
    assert_eq!(status, 0, "{said}");
    assert!(said.contains("redis       Redis 7") && !said.contains("warning  redis"), "{said}");
    let (status, said) = doctor(format!("redis://:wrong@{}", address(&server)));
    assert_eq!(status, 1, "{said}");
    assert!(said.contains("[redis_refused]") && said.contains("command     ran"), "{said}");
    server.stop();
    let (status, said) = doctor(url);
    assert_eq!(status, 1, "{said}");
    assert!(said.contains("[redis_unreachable]") && !said.contains("hunter2"), "{said}");
}
