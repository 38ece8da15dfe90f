//! `aether logs`, on what guests and the platform really said.

use std::{
    io::{BufRead as _, BufReader},
    process::Stdio,
};

use rustix::process::{Signal, kill_process};

use crate::rig::{Rig, pid};

/// A value of a command's environment, which no line may have.
const SECRET: &str = "s3cret-of-the-command";

#[test]
fn what_a_command_said_is_found_and_followed() {
    let rig = Rig::start();
    rig.ok(&["vm", "create", "--name", "web"]);
    rig.ok(&["vm", "create", "--name", "other"]);
    let mut follower = rig
        .command(&["logs", "-f", "web", "--since", "1h", "--text", "told"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let secret = format!("TOKEN={SECRET}");
    let say = "echo told out; echo told err >&2";
    rig.ok(&["exec", "-n", "-e", &secret, "web", "--", "sh", "-c", say]);
    rig.ok(&["exec", "-n", "other", "--", "sh", "-c", "echo told elsewhere"]);
    rig.ok(&["exec", "-n", "web", "--", "sh", "-c", "echo told again"]);

    let mut lines = Vec::new();
    for line in BufReader::new(follower.stdout.take().unwrap()).lines() {
        lines.push(line.unwrap());
        if lines.len() == 3 {
            kill_process(pid(&follower), Signal::TERM).unwrap();
            break;
        }
    }
    follower.wait().unwrap();
    // The two streams of one command come in any order.
    lines[..2].sort_by_key(|line| line.contains("guest/stderr"));
    for (line, (stream, text)) in
        lines.iter().zip([("stdout", "told out"), ("stderr", "told err"), ("stdout", "told again")])
    {
        assert!(line.contains(&format!("guest/{stream}")), "{line}");
        assert!(line.ends_with(text), "{line}");
    }

    let found = rig.ok(&["--json", "logs", "web", "--text", "told"]);
    let found: serde_json::Value = serde_json::from_str(&found).unwrap();
    let items = found["items"].as_array().unwrap();
    assert_eq!(items.len(), 3);
    let task = items[0]["task_id"].as_str().unwrap();
    let of_task = rig.ok(&["logs", "--task", task]);
    assert!(of_task.contains("told out") && !of_task.contains("told again"), "{of_task}");

    // The platform's own lines are there too, and none has a secret.
    let all = rig.ok(&["logs", "-n", "5000"]);
    assert!(all.contains("told elsewhere"), "{all}");
    assert!(!all.contains(SECRET), "{all}");
    let (status, text) = rig.fails(&["logs", "nothing"]);
    assert_ne!(status, 0);
    assert!(text.contains("nothing"), "{text}");
}

#[test]
fn lines_outlive_a_platform_that_is_killed() {
    let mut rig = Rig::start();
    rig.ok(&["vm", "create", "--name", "web"]);
    rig.ok(&["exec", "-n", "web", "--", "sh", "-c", "echo kept for later"]);
    // What a follower is given is in the file.
    let follow = ["logs", "-f", "--since", "1h", "--text", "kept for later"];
    let mut follower = rig.command(&follow).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(follower.stdout.take().unwrap()).read_line(&mut line).unwrap();
    kill_process(pid(&follower), Signal::TERM).unwrap();
    follower.wait().unwrap();
    assert!(line.ends_with("kept for later\n"), "{line}");
    rig.end(Signal::KILL);
    rig.restart();
    let found = rig.ok(&["logs", "--text", "kept for later"]);
    assert_eq!(found.lines().count(), 1, "{found}");
}
