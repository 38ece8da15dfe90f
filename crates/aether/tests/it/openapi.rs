//! Requests that are made from the document of the API, against the platform as it runs: no answer
//! that the document does not have, and none of the 5xx that say that something broke.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use crate::rig::Rig;

/// The folder of a virtual environment of Python that has schemathesis.
const FOLDER: &str = "AETHER_TEST_SCHEMATHESIS";

fn url(rig: &Rig) -> &str {
    let words = rig.said().iter().flat_map(|line| line.split(' '));
    words.rev().find(|word| word.starts_with("http://")).unwrap()
}

fn schemathesis(rig: &Rig, args: &[&str], key: Option<&str>) -> Option<Command> {
    let Some(folder) = std::env::var_os(FOLDER).map(PathBuf::from) else {
        println!("skipped: {FOLDER} names no folder with schemathesis");
        return None;
    };
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/schemathesis.toml");
    let mut command = Command::new(folder.join("bin/st"));
    command.arg("--config-file").arg(config).arg("run").arg(format!("{}/openapi.json", url(rig)));
    // The same cases each time.
    command.args(["--seed", "1", "--continue-on-failure", "--no-color"]).args(args);
    if let Some(key) = key {
        command.args(["--header", &format!("Authorization: Bearer {key}")]);
    }
    command.current_dir(rig.folder.path()).env("PYTHONHASHSEED", "1");
    Some(command)
}

fn well(command: Option<Command>) {
    let Some(mut command) = command else { return };
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let cases = said.lines().find(|line| line.contains(" generated")).unwrap_or_default();
    println!("{}", cases.trim());
}

#[test]
fn no_answer_is_beyond_the_document() {
    let rig = Rig::start();
    rig.ok(&["vm", "create", "--name", "a"]);
    let key = std::fs::read_to_string(rig.data().join("admin-key")).unwrap();
    well(schemathesis(&rig, &["--phases", "examples,fuzzing", "-n", "2"], Some(key.trim())));
}

#[test]
fn without_a_key_there_is_the_document_and_the_health_and_else_a_refusal() {
    let rig = Rig::start();
    let args = ["--phases", "fuzzing", "--mode", "positive", "-n", "1"];
    well(schemathesis(&rig, &args, None));
}
