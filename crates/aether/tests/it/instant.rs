//! Snapshots, forks, templates and pools.

use insta::assert_snapshot;
use serde_json::Value;

use crate::{plain::session, rig::Rig};

const WITH_TEMPLATE: (&[&str], &str) = (&["--json", "--pool", "none"], "\"event\":\"template\"");

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

#[test]
fn a_snapshot_is_taken_used_and_removed() {
    let rig = Rig::start();
    assert_snapshot!(session(
        &rig,
        &[
            &["vm", "create", "--name", "web"],
            &["snapshot", "list"],
            &["snapshot", "create", "web", "--name", "one"],
            &["snapshot", "create", "web", "--name", "one"],
            &["snapshot", "list", "--vm", "web"],
            &["snapshot", "inspect", "one"],
            &["vm", "create", "--name", "two", "--snapshot", "one"],
            &["vm", "create", "--snapshot", "one", "--memory", "512"],
            &["vm", "create", "--snapshot", "nothing"],
            &["snapshot", "delete", "one", "nothing"],
            &["snapshot", "inspect", "one"],
        ]
    ));
    // A VM of it is not touched.
    assert_eq!(rig.ok(&["exec", "-n", "two", "echo", "there"]), "there\n");
}

#[test]
fn a_fork_is_told_by_its_clones() {
    let rig = Rig::start();
    assert_snapshot!(session(
        &rig,
        &[
            &["vm", "create", "--name", "web"],
            &["vm", "fork", "web", "--count", "2", "--name-prefix", "c", "--label", "a=b"],
            &["vm", "list", "--label", "a=b"],
            &["vm", "fork", "web", "--count", "65"],
            &["vm", "fork", "nothing"],
        ]
    ));
    let forked = json(&rig.ok(&["vm", "fork", "web", "--json"]));
    assert_eq!(forked["vms"][0]["start"]["kind"], "restore");
    let phases = forked["vms"][0]["start"]["phases"].as_array().unwrap();
    let sum: f64 = phases.iter().map(|phase| phase["ms"].as_f64().unwrap()).sum();
    let total = forked["vms"][0]["start"]["total_ms"].as_f64().unwrap();
    assert!((sum - total).abs() < 0.001, "{sum} is not {total}");
    let recorded = json(&rig.ok(&["vm", "fork", "web", "--json", "--no-wait"]));
    assert!(recorded["vms"][0]["task_id"].is_string(), "{recorded}");
}

#[test]
fn a_template_is_built_followed_used_and_removed() {
    let rig = Rig::start();
    std::fs::write(rig.folder.path().join("motd"), "hello\n").unwrap();
    let file = rig.folder.path().join("app.toml");
    let text = "name = \"app\"\nsteps = [\"echo one\", \"echo two >&2\"]\n\
                [[files]]\npath = \"/etc/motd\"\nsource = \"motd\"\n";
    std::fs::write(&file, text).unwrap();
    let file = file.display().to_string();
    let said = session(
        &rig,
        &[
            &["template", "list"],
            &["template", "build", "-f", &file, "--quiet"],
            &["template", "list"],
            &["template", "inspect", "app"],
            &["vm", "create", "--name", "web", "--template", "app"],
            &["exec", "-n", "web", "cat", "/etc/motd"],
            &["template", "build", "--name", "bad", "--run", "exit 3", "--quiet"],
            &["vm", "create", "--template", "bad"],
            &["vm", "create", "--template", "nothing:v1"],
            &["template", "delete", "app"],
            &["template", "inspect", "app"],
        ],
    );
    assert_snapshot!(said.replace(&file, "FILE"));
    // Who is not quiet sees what the steps say, as far as it is told before the end.
    let build = rig.run(&["template", "build", "-f", &file, "--tag", "v2", "--memory", "512"]);
    assert_eq!(build.status.code(), Some(2), "a file says all of it: {build:?}");
    let told = rig.run(&["template", "build", "--name", "loud", "--run", "echo from the step"]);
    let told = String::from_utf8(told.stderr).unwrap();
    assert!(told.contains("  from the step\n"), "{told}");
}

#[test]
fn programs_follow_a_build_by_its_events() {
    let rig = Rig::start();
    let build = ["template", "build", "--json", "--name", "a", "--run", "echo one"];
    let events: Vec<Value> = rig.ok(&build).lines().map(json).collect();
    let last = events.last().unwrap();
    assert_eq!((&last["event"], &last["template"]["state"]), (&"ready".into(), &"ready".into()));
    let recorded = json(&rig.ok(&["template", "build", "--json", "--no-wait", "--name", "b"]));
    assert!(recorded["template_id"].is_string(), "{recorded}");
    let list = json(&rig.ok(&["template", "list", "--json", "--name", "a"]));
    assert_eq!(list["items"].as_array().unwrap().len(), 1);
    let pools = json(&rig.ok(&["pool", "list", "--json"]));
    assert_eq!(pools["items"], Value::Array(Vec::new()));
}

#[test]
fn the_default_template_is_made_at_the_first_start_and_found_at_the_next() {
    let (options, ready) = WITH_TEMPLATE;
    let mut rig = Rig::with(options, ready);
    let told = |rig: &Rig| json(rig.said().last().unwrap());
    assert_eq!((&told(&rig)["name"], &told(&rig)["state"]), (&"default".into(), &"ready".into()));
    let first = json(&rig.ok(&["template", "inspect", "default", "--json"]));
    let vm = json(&rig.ok(&["vm", "create", "--name", "web", "--json"]));
    assert_eq!(vm["origin"]["template"], "default:latest");
    assert_eq!(vm["start"]["kind"], "restore");
    let other = json(&rig.ok(&["vm", "create", "--memory", "512", "--json"]));
    assert_eq!(other["origin"]["kind"], "image");

    rig.end(rustix::process::Signal::TERM);
    rig.restart();
    assert_eq!(told(&rig)["state"], "ready");
    let next = json(&rig.ok(&["template", "inspect", "default", "--json"]));
    assert_eq!(next["id"], first["id"]);
}

#[test]
fn past_the_configured_number_a_vm_is_refused_at_once() {
    let rig = Rig::with(
        &["--no-default-template", "--pool", "none", "--max-vms", "1"],
        "Aetherium is ready",
    );
    assert_snapshot!(session(
        &rig,
        &[
            &["vm", "create", "--name", "web"],
            &["vm", "create"],
            &["vm", "fork", "web"],
            &["vm", "delete", "web"],
            &["vm", "create", "--name", "next"],
        ]
    ));
}

#[test]
fn a_stop_can_keep_the_memory() {
    let rig = Rig::start();
    assert_snapshot!(session(
        &rig,
        &[
            &["vm", "create", "--name", "web"],
            &["vm", "stop", "--keep-memory", "web"],
            &["vm", "get", "web"],
            &["vm", "start", "web"],
        ]
    ));
}
