//! What is counted, read as Prometheus reads it.

use std::{
    collections::BTreeSet,
    io::{Read as _, Write as _},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use crate::rig::Rig;

const DEPLOY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy");

/// Prometheus' own tool, where `./dev test` has put it.
fn promtool() -> Option<PathBuf> {
    let path = std::env::var_os("AETHER_TEST_PROMTOOL").map(PathBuf::from);
    if path.is_none() {
        println!("skipped: promtool checks the metrics; set AETHER_TEST_PROMTOOL to where it is");
    }
    path
}

/// The head and the body of the answer to `GET /metrics`.
fn scrape(rig: &Rig, key: Option<&str>) -> (String, String) {
    let address = std::fs::read_to_string(rig.data().join("listen")).unwrap();
    let mut stream = TcpStream::connect(address.trim()).unwrap();
    let key = key.map(|key| format!("Authorization: Bearer {key}\r\n")).unwrap_or_default();
    let head = format!(
        "GET /metrics HTTP/1.1\r\nHost: {}\r\n{key}Connection: close\r\n\r\n",
        address.trim()
    );
    stream.write_all(head.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.to_owned(), body.to_owned())
}

/// The value of the one sample with this name and labels.
fn sample<'a>(text: &'a str, name: &str) -> &'a str {
    let mut found = text.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    found.next().unwrap_or_else(|| panic!("no {name} in\n{text}"))
}

fn check(arguments: &[&str], input: &str) {
    let Some(promtool) = promtool() else { return };
    let mut child = Command::new(promtool)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    // Of metrics it says what could be better, and succeeds.
    assert!(output.status.success(), "{said}");
    assert!(arguments[1] != "metrics" || said.is_empty(), "{said}");
}

/// Every name of ours in a text.
fn names(text: &str) -> BTreeSet<String> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let words = text.split(|c| !is_part(c)).filter(|word| word.starts_with("aether_"));
    let plain = words.map(|word| {
        let ends = ["_bucket", "_sum", "_count"];
        ends.iter().find_map(|end| word.strip_suffix(end)).unwrap_or(word).to_owned()
    });
    plain.collect()
}

fn deployed(path: &str) -> String {
    std::fs::read_to_string(Path::new(DEPLOY).join(path)).unwrap()
}

#[test]
fn what_is_counted_is_shown_to_who_has_a_key() {
    let rig = Rig::start();
    rig.ok(&["vm", "create", "--name", "web"]);
    rig.ok(&["exec", "-n", "web", "--", "echo", "hello"]);
    rig.fails(&["exec", "-n", "web", "--", "sh", "-c", "echo c > /proc/sysrq-trigger"]);
    rig.fails(&["exec", "-n", "none", "--", "true"]);

    let (head, _) = scrape(&rig, None);
    assert!(head.starts_with("HTTP/1.1 401"), "{head}");
    let key = std::fs::read_to_string(rig.data().join("admin-key")).unwrap();
    let (head, text) = scrape(&rig, Some(key.trim()));
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    assert!(head.contains("content-type: text/plain; version=0.0.4"), "{head}");

    assert_eq!(sample(&text, "aether_vm_start_seconds_count{start=\"boot\"}"), "1");
    let created = "aether_tasks_total{kind=\"vm:create\",state=\"completed\"}";
    assert_eq!(sample(&text, created), "1");
    assert_eq!(sample(&text, "aether_task_attempts_total{kind=\"vm:execute\"}"), "2");
    assert_eq!(sample(&text, "aether_vm_ends_total{reason=\"guest_panic\"}"), "1");
    assert_eq!(sample(&text, "aether_vms_running"), "0");
    assert_eq!(sample(&text, "aether_queue_up"), "1");
    // This request itself.
    assert_eq!(sample(&text, "aether_http_requests_in_hand"), "1");
    assert!(text.contains("route=\"/api/v1/vms/{vm}/terminal\",status=\"404\""), "{text}");
    assert!(!text.contains(key.trim()), "the key is shown");
    // Nothing that a client chose is a label.
    assert!(!text.contains("web") && !text.contains("none\","), "{text}");

    check(&["check", "metrics"], &text);
    // Without a pool there are no spares to count.
    let known = [aether_gateway::metrics::NAMES, aether_worker::metrics::NAMES].concat();
    let known: BTreeSet<_> = known.into_iter().map(str::to_owned).collect();
    let shown = names(&text);
    let hidden: Vec<_> = known.difference(&shown).collect();
    assert_eq!(hidden, ["aether_pool_spares"]);
    let there: BTreeSet<_> = known.union(&shown).cloned().collect();
    for path in ["prometheus/alerts.yml", "grafana/aetherium.json"] {
        let wanted = names(&deployed(path));
        assert!(wanted.len() > 3, "{path}: {wanted:?}");
        let missing: Vec<_> = wanted.difference(&there).collect();
        assert_eq!(missing, Vec::<&String>::new(), "{path}");
    }
    let dashboard: serde_json::Value =
        serde_json::from_str(&deployed("grafana/aetherium.json")).unwrap();
    assert!(dashboard["panels"].as_array().is_some_and(|panels| panels.len() > 5));
}

#[test]
fn the_alert_rules_are_rules() {
    check(&["check", "rules", &format!("{DEPLOY}/prometheus/alerts.yml")], "");
    check(&["test", "rules", &format!("{DEPLOY}/prometheus/alerts_test.yml")], "");
}
