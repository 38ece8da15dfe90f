use std::{
    os::unix::{fs::PermissionsExt as _, net::UnixDatagram},
    process::Stdio,
    time::Duration,
};

use rustix::process::Signal;

use crate::rig::{Rig, command};

#[test]
fn the_first_start_makes_a_key_and_the_next_ones_keep_it() {
    let mut rig = Rig::start();
    let file = rig.data().join("admin-key");
    let key = std::fs::read_to_string(&file).unwrap();
    assert!(rig.said().iter().any(|line| line.trim() == key.trim()), "{:?}", rig.said());
    for private in [&file, &rig.data().join("auth-secret"), &rig.data().join("aether.db")] {
        let mode = std::fs::metadata(private).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{}", private.display());
    }
    rig.ok(&["vm", "create", "--name", "web"]);

    let (status, took) = rig.end(Signal::TERM);
    assert!(status.success(), "{status}");
    assert!(took < Duration::from_secs(10), "{took:?}");
    assert!(!rig.data().join("listen").exists());
    let (status, text) = rig.fails(&["vm", "list"]);
    assert_eq!(status, 6, "{text}");

    rig.restart();
    assert!(!rig.said().iter().any(|line| line.contains("aeth_")), "{:?}", rig.said());
    assert_eq!(std::fs::read_to_string(&file).unwrap(), key);
    assert!(rig.ok(&["vm", "list"]).contains("web"));
}

#[test]
fn a_key_that_was_lost_is_made_anew() {
    let mut rig = Rig::start();
    let old = std::fs::read_to_string(rig.data().join("admin-key")).unwrap();
    rig.end(Signal::TERM);
    std::fs::remove_file(rig.data().join("admin-key")).unwrap();
    rig.restart();
    let new = std::fs::read_to_string(rig.data().join("admin-key")).unwrap();
    assert_ne!(old, new);
    rig.ok(&["vm", "list"]);
    rig.ok(&["--key", old.trim(), "vm", "list"]);
}

#[test]
fn a_data_directory_has_one_platform() {
    let rig = Rig::start();
    let (status, text) = rig.fails(&["up", "--driver", "sim", "--listen", "127.0.0.1:0"]);
    assert_eq!(status, 4, "{text}");
    assert!(text.contains("[data_dir_in_use]"), "{text}");
    assert!(text.contains(&rig.pid().to_string()), "{text}");
}

#[test]
fn clear_text_beyond_this_machine_must_be_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let output = command(folder.path())
        .args(["up", "--driver", "sim", "--listen", "0.0.0.0:0"])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("--insecure-http"));
    // Nothing was made.
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn the_service_manager_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let mut child = command(&folder.path().join("data"))
        .args(["up", "--driver", "sim", "--listen", "127.0.0.1:0"])
        .env("NOTIFY_SOCKET", &path)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut buffer = [0; 64];
    let count = socket.recv(&mut buffer).unwrap();
    assert_eq!(&buffer[..count], b"READY=1");
    rustix::process::kill_process(crate::rig::pid(&child), Signal::TERM).unwrap();
    let count = socket.recv(&mut buffer).unwrap();
    assert_eq!(&buffer[..count], b"STOPPING=1");
    assert!(child.wait().unwrap().success());
}
