//! Tools, from a catalogue of the test's own and a server with its files.

use std::{
    fmt::Write as _,
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener},
    path::Path,
};

use insta::assert_snapshot;
use serde_json::Value;

use crate::{plain::session, rig::Rig};

/// What every path of the server has, and its SHA-256.
const ARTEFACT: &str = "hello\n";
const DIGEST: &str = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";

/// Serves the artefact until the process ends.
fn serve() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let _ = stream.read(&mut [0; 4096]);
            let length = ARTEFACT.len();
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n");
            let _ = write!(stream, "{head}connection: close\r\n\r\n{ARTEFACT}");
        }
    });
    address
}

/// Tools with the versions 1.0.0 and 2.0.0; those of `torn` have another digest than they should.
/// The address of their files.
fn catalogue(folder: &Path) -> SocketAddr {
    let address = serve();
    for (name, digest) in [("alpha", DIGEST), ("beta", DIGEST), ("torn", &"0".repeat(64))] {
        let mut text = format!(
            "name = \"{name}\"\naliases = [\"{name}-tool\"]\nsummary = \"says its version\"\n\
             commands = [\"{name}\"]\ninstall = \"true\"\nverify = \"{name}\"\nexpect = [\"{{version}}\"]\n\
             [source]\nkind = \"archive\"\nurl = \"http://{address}/{name}-{{version}}\"\n"
        );
        for version in ["1.0.0", "2.0.0"] {
            let digest = format!("digest = \"sha256:{digest}\"");
            write!(text, "[[source.releases]]\nversion = \"{version}\"\n{digest}\n").unwrap();
        }
        fs::write(folder.join(format!("{name}.toml")), text).unwrap();
    }
    address
}

/// A platform whose VMs have `alpha` 1.0.0 and boot.
fn rig(more: &[&'static str]) -> Here {
    let folder = tempfile::tempdir().unwrap();
    let source = catalogue(folder.path());
    let path: &'static str = folder.path().display().to_string().leak();
    let mut options = vec!["--pool", "none", "--tools-catalogue", path];
    options.extend(["--default-tool", "alpha-tool@1.0.0"]);
    options.extend(more);
    let ready = if more.contains(&"--json") { "\"event\":\"template\"" } else { "is ready at" };
    Here { rig: Rig::with(&options, ready), source, _catalogue: folder }
}

struct Here {
    rig: Rig,
    source: SocketAddr,
    _catalogue: tempfile::TempDir,
}

impl Here {
    fn session(&self, lines: &[&[&str]]) -> String {
        session(&self.rig, lines).replace(&self.source.to_string(), "SOURCE")
    }
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

#[test]
fn tools_are_asked_for_seen_built_and_removed() {
    let here = rig(&["--no-default-template"]);
    let rig = &here.rig;
    assert_snapshot!(here.session(&[
        &["tools", "versions", "alpha"],
        &["tools", "lock"],
        &["vm", "create", "--name", "plain"],
        &["vm", "get", "plain"],
        &["vm", "create", "--name", "more", "--tool", "beta@1", "--tool", "alpha=2.0.0"],
        &["vm", "get", "more"],
        &["vm", "create", "--name", "bare", "--no-default-tools"],
        &["vm", "get", "bare"],
        &["tools", "build", "--quiet", "beta", "alpha@2"],
        &["tools", "prune"],
    ]));
    let listed = json(&rig.ok(&["tools", "list", "--json"]));
    let tools = listed["items"].as_array().unwrap();
    let alpha = tools.iter().find(|tool| tool["name"] == "alpha").unwrap();
    assert_eq!(
        (&alpha["default"], alpha["cached"].as_array().unwrap().len()),
        (&"1.0.0".into(), 2)
    );
    // What comes with the program is there beside it.
    assert!(tools.iter().any(|tool| tool["name"] == "claude-code"));
    let lock = json(&rig.ok(&["tools", "lock", "--json"]));
    assert!(lock["items"].as_array().unwrap().iter().all(|lock| lock["cached"] == true));

    let pruned = json(&rig.ok(&["tools", "prune", "--keep-mb", "0", "--json"]));
    assert_eq!(pruned["kept_bytes"], 0, "{pruned}");
    // A VM keeps what it has, and the next one waits for a build.
    rig.ok(&["vm", "stop", "more"]);
    assert!(rig.ok(&["vm", "start", "more"]).contains("more is running"));
    rig.ok(&["vm", "create", "--tool", "beta"]);
}

#[test]
fn what_there_is_not_or_is_broken_is_refused_and_leaves_nothing() {
    let here = rig(&["--no-default-template"]);
    let rig = &here.rig;
    assert_snapshot!(here.session(&[
        &["vm", "create", "--tool", "alpa"],
        &["vm", "create", "--tool", "../x"],
        &["vm", "create", "--tool", "alpha@1", "--tool", "alpha-tool@2"],
        &["vm", "create", "--name", "a", "--tool", "beta@3"],
        &["tools", "versions", "alpa"],
        &["tools", "build", "beta@3"],
        &["tools", "build", "alpa"],
        &["template", "build", "--name", "t", "--tool", "alpa"],
    ]));
    for line in [&["vm", "create", "--tool", "torn"][..], &["tools", "build", "torn"]] {
        let output = rig.run(line);
        let complaint = String::from_utf8(output.stderr).unwrap();
        assert!(complaint.contains("torn 2.0.0") && complaint.contains("sha256"), "{complaint}");
    }
    let tasks = json(&rig.ok(&["task", "list", "--kind", "tool:build", "--json"]));
    assert!(tasks["items"].as_array().unwrap().iter().all(|task| task["status"] == "failed"));
    rig.ok(&["vm", "create", "--tool", "beta"]);
}

#[test]
fn templates_have_the_defaults_and_their_own() {
    let here = rig(&["--json"]);
    let rig = &here.rig;
    let create = |more: &[&str]| {
        let line: Vec<&str> = ["vm", "create", "--json"].iter().chain(more).copied().collect();
        let vm = json(&rig.ok(&line));
        let tools = vm["tools"].as_array().unwrap().iter();
        let said = |tool: &Value| format!("{} {}", tool["name"], tool["got"]).replace('"', "");
        let tools: Vec<String> = tools.map(said).collect();
        (vm["origin"]["kind"].as_str().unwrap().to_owned(), tools.join(", "))
    };
    let (template, image) = ("template".to_owned(), "image".to_owned());
    assert_eq!(create(&[]), (template.clone(), "alpha 1.0.0".into()));
    assert_eq!(create(&["--tool", "alpha@2"]), (template.clone(), "alpha 2.0.0".into()));
    assert_eq!(create(&["--no-default-tools"]), (image, String::new()));
    rig.ok(&["template", "build", "--name", "t", "--tool", "beta@1"]);
    let of = create(&["--template", "t"]);
    assert_eq!(of, (template, "alpha 1.0.0, beta 1.0.0".into()));
    assert!(rig.ok(&["template", "inspect", "t"]).contains("alpha@1.0.0, beta@1"));
}

#[test]
fn a_build_is_followed_as_events_or_left() {
    let here = rig(&["--no-default-template"]);
    let rig = &here.rig;
    let said = rig.ok(&["tools", "build", "beta", "--json"]);
    let last = json(said.lines().last().unwrap());
    assert_eq!(last["event"], "ready");
    assert_eq!(
        (&last["task"]["kind"], &last["task"]["vm_id"]),
        (&"tool:build".into(), &Value::Null)
    );
    assert_eq!(last["task"]["tools"][0]["got"], "2.0.0");
    let left = json(&rig.ok(&["tools", "build", "beta@1", "--no-wait", "--json"]));
    let id = left["task_id"].as_str().unwrap();
    assert!(rig.ok(&["task", "get", id]).contains("beta 1"));
}

#[test]
fn defaults_that_cannot_be_are_refused_at_the_start() {
    let folder = tempfile::tempdir().unwrap();
    for (options, code) in [
        (&["--default-tool", "no-such-tool"][..], "tool_not_found"),
        (&["--default-tool", "node@20", "--default-tool", "nodejs@22"], "usage"),
    ] {
        let output = crate::rig::command(folder.path())
            .args(["--json", "up", "--driver", "sim", "--listen", "127.0.0.1:0"])
            .args(options)
            .output()
            .unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert!(text.contains(code), "{text}");
    }
}
