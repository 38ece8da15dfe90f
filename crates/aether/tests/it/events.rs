//! `aether events`, `aether audit`, and the forms that results have.

use std::{
    io::{BufRead as _, BufReader},
    process::Stdio,
};

use rustix::process::{Signal, kill_process};

use crate::rig::{Rig, pid};

/// A value of a command's environment, which no event and no entry may have.
const SECRET: &str = "s3cret-of-the-command";

#[test]
fn what_happens_is_told_and_found_again() {
    let rig = Rig::start();
    let mut follower = rig
        .command(&["events", "-f", "vm.*", "execution.completed", "--since", "1h"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    rig.ok(&["vm", "create", "--name", "web"]);
    let secret = format!("TOKEN={SECRET}");
    rig.ok(&["exec", "-n", "-e", &secret, "web", "--", "echo", SECRET]);
    rig.ok(&["vm", "delete", "web"]);
    let mut lines = Vec::new();
    for line in BufReader::new(follower.stdout.take().unwrap()).lines() {
        lines.push(line.unwrap());
        if lines.len() == 5 {
            kill_process(pid(&follower), Signal::TERM).unwrap();
            break;
        }
    }
    follower.wait().unwrap();
    let topics: Vec<_> = lines.iter().filter_map(|line| line.split(' ').nth(1)).collect();
    let wanted = ["vm.created", "vm.running", "execution.completed", "vm.deleting", "vm.deleted"];
    assert_eq!(topics, wanted, "{lines:?}");
    assert!(lines[0].ends_with("name=web"), "{lines:?}");

    assert_eq!(rig.ok(&["events", "vm.*", "execution.completed"]).lines().count(), 5);
    let told = rig.ok(&["events", "--json", "task.completed"]);
    let told: Vec<serde_json::Value> =
        told.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let kinds: Vec<_> = told.iter().map(|event| event["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["vm:create", "vm:execute", "vm:delete"]);
    let after = told[1]["sequence"].to_string();
    assert_eq!(rig.ok(&["events", "task.completed", "--after", &after]).lines().count(), 1);
    let workers = rig.ok(&["events", "--all", "worker.*"]);
    assert!(workers.contains("worker.registered"), "{workers}");
    assert_eq!(rig.ok(&["events", "worker.*"]), "");

    for line in
        [&["events", "--all"][..], &["events", "--all", "-o", "yaml"], &["audit", "-o", "json"]]
    {
        assert!(!rig.ok(line).contains(SECRET), "{line:?}");
    }
    let (status, error) = rig.fails(&["events", "pods.*"]);
    assert_eq!(status, 2, "{error}");
}

#[test]
fn who_did_what_is_shown() {
    let rig = Rig::start();
    rig.ok(&["vm", "create", "--name", "web"]);
    rig.fails(&["vm", "stop", "nothing"]);
    let all = rig.ok(&["audit"]);
    assert!(all.contains("/vms"), "{all}");
    let failed = rig.ok(&["audit", "--outcome", "failed"]);
    assert!(failed.contains("/vms/nothing/stop") && failed.contains("failed [vm_not_found]"));
    let one: serde_json::Value =
        serde_json::from_str(&rig.ok(&["audit", "-n", "1", "-o", "json"])).unwrap();
    assert_eq!(one["items"].as_array().unwrap().len(), 1);
    assert_eq!(one["items"][0]["path"], "/vms/nothing/stop");
}

#[test]
fn a_result_is_a_table_json_or_yaml() {
    let rig = Rig::start();
    rig.ok(&["vm", "create", "--name", "web"]);
    let table = rig.ok(&["vm", "list"]);
    assert!(table.starts_with("NAME") || table.contains("web"), "{table}");
    let json: serde_json::Value =
        serde_json::from_str(&rig.ok(&["-o", "json", "vm", "get", "web"])).unwrap();
    let yaml = rig.ok(&["vm", "get", "web", "--output", "yaml"]);
    let settings = config::Config::builder()
        .add_source(config::File::from_str(&yaml, config::FileFormat::Yaml))
        .build()
        .unwrap();
    for field in ["id", "name", "state"] {
        assert_eq!(settings.get_string(field).unwrap(), json[field].as_str().unwrap());
    }
    let many = rig.ok(&["events", "vm.*", "-o", "yaml"]);
    assert_eq!(many.lines().filter(|line| *line == "---").count(), 2, "{many}");
    let (status, error) = rig.fails(&["-o", "json", "vm", "get", "nothing"]);
    let error: serde_json::Value = serde_json::from_str(&error).unwrap();
    assert_eq!((status, &error["code"]), (3, &"vm_not_found".into()));
    assert_eq!(rig.fails(&["--json", "-o", "yaml", "vm", "list"]).0, 2);
}

#[test]
fn every_command_has_a_manual_page() {
    let folder = tempfile::tempdir().unwrap();
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_aether"))
        .arg("man")
        .arg(folder.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    for page in ["aether.1", "aether-vm-create.1", "aether-events.1"] {
        let text = std::fs::read_to_string(folder.path().join(page)).unwrap();
        assert!(text.contains(".SH NAME") && text.contains(".SH OPTIONS"), "{page}");
    }
}
