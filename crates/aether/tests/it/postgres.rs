//! The platform on PostgreSQL.

use std::process::Output;

use aether_postgres::{Place, testing, testing::TestDatabase};
use rustix::process::Signal;

use crate::rig::{Rig, command};

/// An empty database on a real server, as an operator names it.
pub(crate) struct Server {
    pub(crate) test: TestDatabase,
    pub(crate) url: String,
}

impl Server {
    pub(crate) fn start() -> Option<Self> {
        if !testing::available() {
            return None;
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let test = runtime.block_on(testing::empty_database());
        let name = test.execute("select current_database()");
        let Place::Socket { folder, .. } = test.config.place() else { panic!("not a socket") };
        let url = format!("postgres://postgres:hunter2@/{}?host={}", name.trim(), folder.display());
        Some(Self { test, url })
    }

    fn run(&self, args: &[&str]) -> Output {
        let folder = tempfile::tempdir().unwrap();
        command(folder.path()).args(args).env("DATABASE_URL", &self.url).output().unwrap()
    }

    fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn platform(&self, migrate: bool) -> Rig {
        let mut options = vec!["--no-default-template", "--pool", "none"];
        options.extend(migrate.then_some("--migrate"));
        Rig::with_env(&options, &[("DATABASE_URL", &self.url)], "Aetherium is ready")
    }
}

#[test]
fn tables_are_migrated_first_and_then_the_platform_keeps_everything_there() {
    let Some(server) = Server::start() else { return };
    let status: serde_json::Value =
        serde_json::from_str(&server.ok(&["--json", "migrate", "status"])).unwrap();
    assert_eq!(status["ready"], false);
    assert_eq!(status["pending"].as_array().unwrap().len(), 11);
    let refused = server.run(&["up", "--driver", "sim", "--listen", "127.0.0.1:0"]);
    let said = String::from_utf8(refused.stderr).unwrap();
    assert_eq!(refused.status.code(), Some(4), "{said}");
    assert!(said.contains("[schema_behind]") && said.contains("aether migrate up"), "{said}");

    let doctor = server.run(&["doctor", "--driver", "sim"]);
    let said = String::from_utf8(doctor.stdout).unwrap();
    assert_eq!(doctor.status.code(), Some(1), "{said}");
    assert!(said.contains("[schema_behind]") && said.contains("aether migrate up"), "{said}");
    assert!(said.contains("command     ran"), "the host is checked all the same: {said}");

    let applied = " applied  store 0004 initial\n applied  store 0005 secrets\n \
                   applied  store 0006 keys\n \
                   applied  store 0007 projects\n \
                   applied  store 0008 quotas\n \
                   applied  store 0009 audit\n \
                   applied  store 0010 workers\n \
                   applied  store 0011 events\n \
                   applied  store 0012 registrations\n \
                   applied  store 0013 streams\n applied  queue 0001 initial\n";
    assert_eq!(server.ok(&["migrate", "up"]), applied);
    assert_eq!(server.ok(&["migrate", "up"]), "up to date\n");
    let said = server.ok(&["doctor", "--driver", "sim"]);
    assert!(said.contains("database    PostgreSQL 1"), "{said}");
    assert!(said.contains("its tables are those of this program"), "{said}");
    let can = "programs of this version can start\n";
    assert_eq!(server.ok(&["migrate", "status"]), format!("{applied}{can}"));

    let mut rig = server.platform(false);
    rig.ok(&["vm", "create", "--name", "web"]);
    assert_eq!(rig.ok(&["exec", "-n", "web", "--", "echo", "here"]), "here\n");
    assert_eq!(server.test.execute("select name, state from vms").trim(), "web|running");
    for file in ["aether.db", "queue.db"] {
        assert!(!rig.data().join(file).exists(), "{file}");
    }
    // Killed, so that nothing is said on the way out.
    rig.end(Signal::KILL);
    rig.restart();
    assert!(rig.ok(&["vm", "list"]).contains("web"));
    rig.ok(&["vm", "delete", "web"]);
    let (status, _) = rig.end(Signal::TERM);
    assert!(status.success());
    assert_eq!(server.test.execute("select count(*) from queue_entries").trim(), "0");
}

#[test]
fn a_platform_migrates_when_it_is_told_to() {
    let Some(server) = Server::start() else { return };
    let rig = server.platform(true);
    rig.ok(&["vm", "create", "--name", "web"]);
    assert_eq!(server.test.execute("select count(*) from vms").trim(), "1");
}

/// Two processes with a data directory each: one installation.
#[test]
fn several_platforms_on_one_database_accept_the_keys_of_all() {
    let Some(server) = Server::start() else { return };
    let one = server.platform(true);
    one.ok(&["vm", "create", "--name", "first"]);
    let mut two = server.platform(false);
    let key = |rig: &Rig| std::fs::read_to_string(rig.data().join("admin-key")).unwrap();
    assert_ne!(key(&one), key(&two));
    // The key of the second was made after the first had read them.
    for (rig, key) in [(&one, key(&two)), (&two, key(&one))] {
        let listed = rig.ok(&["--key", key.trim(), "vm", "list"]);
        assert!(listed.contains("first"), "{listed}");
    }
    assert_eq!(one.fails(&["--key", "ae_wrong", "vm", "list"]).0, 5);
    // Its own VMs are a worker's business when it starts, and another's are not.
    two.end(Signal::KILL);
    two.restart();
    let state = server.test.execute("select state from vms where name = 'first'");
    assert_eq!(state.trim(), "running");
    assert!(!one.data().join("auth-secret").exists());
}

#[test]
fn what_is_wrong_with_the_database_is_said_without_its_password() {
    let folder = tempfile::tempdir().unwrap();
    let fails = |url: &str, args: &[&str]| {
        let output = command(folder.path()).args(args).env("DATABASE_URL", url).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!said.contains("hunter2"), "{said}");
        (output.status.code().unwrap(), said)
    };
    let nowhere = "postgres://u:hunter2@127.0.0.1:1/x";
    let (status, said) = fails(nowhere, &["migrate", "status"]);
    assert_eq!(status, 6, "{said}");
    assert!(said.contains("[database_unreachable]") && said.contains("127.0.0.1:1"), "{said}");
    let up = ["up", "--driver", "sim", "--listen", "127.0.0.1:0", "--log-level", "trace"];
    assert_eq!(fails(nowhere, &up).0, 6);
    for wrong in [
        "mysql://u:hunter2@h/x",
        "postgres://u:hunter2@h/x?sslmode=prefer",
        "postgres://u:hunter2@h/x?sslmode=verify-ca",
    ] {
        let (status, said) = fails(wrong, &["migrate", "up"]);
        assert_eq!(status, 2, "{said}");
        assert!(said.contains("[database_misconfigured]"), "{said}");
    }
    let output = command(folder.path()).args(["migrate", "up"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
}
