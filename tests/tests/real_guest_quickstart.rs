//! The quickstart, typed line by line as written, against a real guest.

use std::{
    fs,
    os::unix::fs::symlink,
    path::Path,
    process::{Command, Stdio},
};

use aether_tests::{
    Platform, Setup,
    platform::{can_run_guests, program},
};
use anyhow::{Context, Result, ensure};

/// What lines that begin so, or have this path in them, must print.
const SHOWS: &[(&str, &str)] = &[
    ("aether worker list", "active"),
    ("aether exec web -- uname -a", "Linux"),
    ("aether exec web -- cat /tmp/hello", "hello from outside"),
    ("aether exec web -- sh -c", "the command's own status: 3"),
    ("aether exec web -- ls -l /root/project", "main.py"),
    ("aether cp web:/root/project/main.py -", "print(\"hi\")"),
    ("aether exec again -- ls /root/project", "main.py"),
    ("aether vm list", "try-2"),
    ("aether task list --vm web", "vm:execute"),
    ("aether logs web --since 1h", "hello from outside"),
    ("aether events 'vm.*' --since 1h", "vm.running"),
    ("aether audit -n 5", "/vms"),
    ("/execute?wait=30s", "Linux"),
    ("/api/v1/events?follow=false", "\"topic\":\"vm.running\""),
];

/// Lines that are to be typed, with the section that they stand in.
fn lines(document: &str) -> Vec<(String, String)> {
    let (mut section, mut typed, mut lines) = (String::new(), false, Vec::new());
    for line in document.lines() {
        if let Some(title) = line.strip_prefix("## ") {
            title.clone_into(&mut section);
        } else if line.starts_with("```") {
            typed = line == "```sh";
        } else if typed {
            lines.push((section.clone(), line.to_owned()));
        }
    }
    lines
}

fn is_of(line: &str, part: &str) -> bool {
    line.starts_with(part) || (part.starts_with('/') && line.contains(part))
}

#[tokio::test]
async fn the_quickstart_works_as_written() -> Result<()> {
    if !can_run_guests() {
        return Ok(());
    }
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let document = fs::read_to_string(folder.join("docs/quickstart.md"))?;
    let lines = lines(&document);
    ensure!(lines.len() > 25, "{lines:?}");

    let platform = Platform::start(Setup::qemu())?;
    platform.await_default_template().await?;
    let bin = tempfile::tempdir()?;
    symlink(program()?, bin.path().join("aether"))?;
    // One shell for all, which says where each line's output ends.
    let first = format!("PATH={}:$PATH", bin.path().display());
    let typed = lines.iter().enumerate();
    let typed = typed.map(|(n, (_, line))| format!("{line}\necho '=== {n}'"));
    let script: Vec<_> = std::iter::once(first).chain(typed).collect();
    let shell = Command::new("bash")
        .args(["-euo", "pipefail", "-c", &script.join("\n")])
        .env("AETHER_DATA_DIR", platform.data_dir())
        .env("AETHER_URL", platform.url()?)
        .env_remove("AETHER_KEY")
        .stdin(Stdio::null())
        .output()
        .context("run the quickstart")?;
    let said = String::from_utf8_lossy(&shell.stdout);
    let errors = String::from_utf8_lossy(&shell.stderr);
    let mut rest = &*said;
    for (n, (section, line)) in lines.iter().enumerate() {
        let end = format!("=== {n}\n");
        let (output, after) = rest.split_once(&end).with_context(|| {
            format!("{section}: `{line}` failed:\n{rest}\n{errors}\n{}", platform.log())
        })?;
        rest = after;
        for (_, wanted) in SHOWS.iter().filter(|(part, _)| is_of(line, part)) {
            ensure!(output.contains(wanted), "`{line}` does not say `{wanted}`: {output}");
        }
    }
    for (part, _) in SHOWS {
        ensure!(lines.iter().any(|(_, line)| is_of(line, part)), "no line has `{part}`");
    }
    ensure!(shell.status.success(), "{errors}");
    platform.finish()
}
