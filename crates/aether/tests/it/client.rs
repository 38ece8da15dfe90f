use std::{fs, os::unix::fs::PermissionsExt as _};

use insta::assert_snapshot;

use crate::{plain::plain, rig::Rig};

#[test]
fn a_vm_is_made_seen_and_ended() {
    let rig = Rig::start();
    let mut said = String::new();
    for line in [
        &["vm", "create", "--name", "web", "--label", "a=b", "--env", "SECRET=hidden"][..],
        &["vm", "list"],
        &["vm", "list", "--label", "a=c"],
        &["vm", "get", "web"],
        &["vm", "pause", "web"],
        &["vm", "resume", "web"],
        &["vm", "stop", "web"],
        &["vm", "start", "web"],
        &["vm", "create", "--name", "two"],
        &["vm", "delete", "web", "two"],
        &["vm", "list"],
        &["vm", "list", "--all"],
    ] {
        let answer = rig.ok(line);
        // Values of the environment are never shown again.
        assert!(!answer.contains("hidden"), "{answer}");
        said.extend(["$ aether ", &line.join(" "), "\n", &plain(&answer), "\n"]);
    }
    assert_snapshot!(said);
}

#[test]
fn refusals_have_a_code_a_status_and_a_way_on() {
    let rig = Rig::start();
    rig.ok(&["vm", "create", "--name", "web"]);
    let mut said = String::new();
    for line in [
        &["vm", "get", "nothing"][..],
        &["vm", "create", "--name", "web"],
        &["vm", "create", "--name", "Not A Name"],
        &["vm", "create", "--vcpus", "0"],
        &["vm", "create", "--image", "nothing"],
        &["vm", "resume", "web"],
        &["vm", "delete", "nothing", "nowhere"],
        &["--key", "ae_wrong", "vm", "list"],
        &["--url", "http://127.0.0.1:1", "vm", "list"],
        &["--url", "nonsense", "vm", "list"],
        &["task", "get", "00000000-0000-7000-8000-000000000000"],
        &["cp", "a", "b"],
        &["cp", "web:relative", "b"],
        &["cp", "web:/nothing", "b"],
        &["shell", "web"],
        &["--json", "vm", "get", "nothing"],
    ] {
        let output = rig.run(line);
        assert!(output.stdout.is_empty(), "{line:?}");
        let complaint = plain(&String::from_utf8_lossy(&output.stderr));
        let status = output.status.code().unwrap().to_string();
        said.extend(["$ aether ", &line.join(" "), "\n", &complaint, "\n→ ", &status, "\n"]);
    }
    assert_snapshot!(said);
}

#[test]
fn programs_get_the_interfaces_own_shapes() {
    let rig = Rig::start();
    let vm: serde_json::Value =
        serde_json::from_str(&rig.ok(&["--json", "vm", "create", "--name", "web"])).unwrap();
    assert_eq!(vm["state"], "running");
    let list: serde_json::Value = serde_json::from_str(&rig.ok(&["vm", "list", "--json"])).unwrap();
    assert_eq!(list["items"][0]["id"], vm["id"]);
    let tasks: serde_json::Value =
        serde_json::from_str(&rig.ok(&["task", "list", "--json", "--vm", "web"])).unwrap();
    assert_eq!(tasks["items"][0]["kind"], "vm:create");
    let ended = rig.ok(&["--json", "exec", "-n", "web", "echo", "hi"]);
    let last: serde_json::Value = serde_json::from_str(ended.lines().last().unwrap()).unwrap();
    assert_eq!((&last["type"], &last["exit_code"]), (&"end".into(), &0.into()));
    let accepted: serde_json::Value =
        serde_json::from_str(&rig.ok(&["vm", "delete", "--no-wait", "web", "--json"])).unwrap();
    assert!(accepted["task_id"].is_string(), "{accepted}");
}

#[test]
fn files_go_both_ways() {
    let rig = Rig::start();
    rig.ok(&["vm", "create", "--name", "web"]);
    let here = |name: &str| rig.folder.path().join(name);
    let text = |name: &str| here(name).display().to_string();
    let data: Vec<u8> = (0..1_000_000_u32).map(|n| (n % 251) as u8).collect();
    fs::create_dir_all(here("tree/sub")).unwrap();
    fs::write(here("tree/sub/data"), &data).unwrap();
    fs::set_permissions(here("tree/sub/data"), fs::Permissions::from_mode(0o750)).unwrap();

    let (status, _) = rig.fails(&["cp", &text("tree"), "web:/root/tree"]);
    assert_eq!(status, 2);
    rig.ok(&["cp", "-r", &text("tree"), "web:/root/tree"]);
    rig.ok(&["cp", "web:/root/tree/sub/data", &text("back")]);
    assert!(fs::read(here("back")).unwrap() == data);
    assert_eq!(fs::metadata(here("back")).unwrap().permissions().mode() & 0o777, 0o750);
    rig.ok(&["cp", "-r", "web:/root/tree", &text("again")]);
    assert!(fs::read(here("again/sub/data")).unwrap() == data);

    assert!(rig.feed(&["cp", "-", "web:/root/in"], b"piped").status.success());
    assert_eq!(rig.ok(&["cp", "web:/root/in", "-"]), "piped");
}

#[test]
fn the_doctor_finds_a_simulated_host_well() {
    let folder = tempfile::tempdir().unwrap();
    let output = crate::rig::command(folder.path())
        .args(["--json", "doctor", "--driver", "sim"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["healthy"], true, "{report}");
}
