//! A file instead of options.

use crate::rig::{Rig, command};

#[test]
fn a_platform_is_configured_by_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("aetherium.yaml");
    std::fs::write(&file, "vms: {max: 1}\nlogging: {keep_mb: 5}\n").unwrap();
    let file = file.to_str().unwrap().to_owned();
    let rig = Rig::with_env(
        &["--no-default-template", "--pool", "none"],
        &[("AETHER_CONFIG", &file)],
        "Aetherium is ready",
    );
    rig.ok(&["vm", "create", "--name", "one"]);
    let (status, text) = rig.fails(&["vm", "create", "--name", "two"]);
    assert_eq!(status, 6, "{text}");

    let checked = rig.ok(&["config", "check", "--config", &file]);
    assert!(checked.contains("2 keys"), "{checked}");
    let shown = rig.ok(&["config", "show", "--config", &file]);
    let max = shown.lines().find(|line| line.starts_with("vms.max ")).unwrap();
    assert_eq!(max.split_whitespace().collect::<Vec<_>>(), ["vms.max", "1", "file"]);
    let shown = rig.ok(&["--json", "config", "show", "--config", &file]);
    let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
    assert!(shown.as_array().unwrap().iter().any(|setting| setting["source"] == "default"));
}

#[test]
fn a_wrong_file_stops_the_start_with_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("aetherium.yaml");
    std::fs::write(&file, "loging: {keep_mb: 5}\n").unwrap();
    for args in [&["up"][..], &["doctor"], &["config", "check"]] {
        let output = command(&folder.path().join("data"))
            .args(args)
            .args(["--config", file.to_str().unwrap()])
            .output()
            .unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}: {text}");
        assert!(
            text.contains("there is no key loging") && text.contains("did you mean logging?"),
            "{text}"
        );
    }
}
