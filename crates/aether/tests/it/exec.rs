use std::{
    io::{BufRead as _, BufReader, Read as _},
    process::{ChildStdin, Stdio},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Signal, kill_process},
};

use crate::rig::{Rig, pid};

fn rig() -> Rig {
    let rig = Rig::start();
    rig.ok(&["vm", "create", "--name", "web"]);
    rig
}

#[test]
fn the_status_is_the_commands_own() {
    let rig = rig();
    let status = |args: &[&str]| {
        let mut all = vec!["exec", "-n"];
        all.extend(args);
        rig.run(&all).status.code().unwrap()
    };
    assert_eq!(status(&["web", "--", "true"]), 0);
    assert_eq!(status(&["web", "--", "sh", "-c", "exit 3"]), 3);
    assert_eq!(status(&["web", "no-such-command"]), 127);
    assert_eq!(status(&["--timeout", "1s", "web", "sleep", "60"]), 124);
    // What the platform could not do is never taken for the command's status.
    assert_eq!(status(&["nothing", "true"]), 125);
    assert_eq!(status(&["web"]), 2);
    rig.ok(&["vm", "stop", "web"]);
    let (status, text) = rig.fails(&["exec", "-n", "web", "true"]);
    assert_eq!(status, 125);
    assert!(text.contains("[vm_state_conflict]"), "{text}");
}

#[test]
fn bytes_go_through_unchanged() {
    let rig = rig();
    let data: Vec<u8> =
        (0..3_000_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let output = rig.feed(&["exec", "web", "cat"], &data);
    assert!(output.status.success());
    assert!(output.stdout == data, "{} of {} bytes", output.stdout.len(), data.len());
    assert!(output.stderr.is_empty());

    let output = rig.run(&["exec", "-n", "web", "--", "sh", "-c", "echo out; echo err >&2"]);
    assert_eq!((output.stdout, output.stderr), (b"out\n".to_vec(), b"err\n".to_vec()));
}

#[test]
fn signals_reach_the_command() {
    let rig = rig();
    for (signal, status) in [(Signal::INT, 130), (Signal::TERM, 143), (Signal::HUP, 129)] {
        let mut child =
            rig.command(&["--json", "exec", "-n", "web", "sleep", "600"]).spawn().unwrap();
        wait_until_started(&mut child);
        kill_process(pid(&child), signal).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(status), "{signal:?}");
    }
}

/// The whole way is full of input that nobody reads; a signal passes it.
#[test]
fn a_signal_passes_input_that_nobody_reads() {
    let rig = rig();
    let mut child = rig
        .command(&["--json", "exec", "web", "sleep", "600"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    wait_until_started(&mut child);
    let stdin = child.stdin.take().unwrap();
    fill(&stdin);
    kill_process(pid(&child), Signal::INT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
}

/// Writes until nothing has been taken for a while.
fn fill(stdin: &ChildStdin) {
    rustix::io::ioctl_fionbio(stdin, true).unwrap();
    let a_while = Timespec { tv_sec: 1, tv_nsec: 0 };
    let mut watched = [PollFd::new(stdin, PollFlags::OUT)];
    while poll(&mut watched, Some(&a_while)).unwrap() > 0 {
        // It may take less than all, and then none until it is asked again.
        let _ = rustix::io::write(stdin, &[b'y'; 8192]);
    }
}

#[test]
fn a_reader_that_goes_ends_the_command() {
    let rig = rig();
    let mut child = rig.command(&["exec", "-n", "web", "yes"]).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let mut some = [0; 4096];
    stdout.read_exact(&mut some).unwrap();
    drop(stdout);
    assert_eq!(child.wait().unwrap().code(), Some(141));
}

fn wait_until_started(child: &mut std::process::Child) {
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains("\"started\"") {
        line.clear();
        assert_ne!(stdout.read_line(&mut line).unwrap(), 0, "it ended");
    }
    // Kept open: a closed one would end the command.
    std::thread::spawn(move || std::io::copy(&mut stdout, &mut std::io::sink()));
}
