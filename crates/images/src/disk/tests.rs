use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use super::*;

const MIB: u64 = 1 << 20;

fn sparse(path: &Path, size: u64, parts: &[(u64, &[u8])]) {
    let file = File::create_new(path).unwrap();
    file.set_len(size).unwrap();
    for (offset, bytes) in parts {
        file.write_all_at(bytes, *offset).unwrap();
    }
}

fn allocated(path: &Path) -> u64 {
    // Before that, blocks that are only in memory may not be counted.
    File::open(path).unwrap().sync_all().unwrap();
    fs::metadata(path).unwrap().blocks() * 512
}

#[test]
fn copy_has_the_content_and_the_holes() {
    let folder = tempfile::tempdir().unwrap();
    let (from, to) = (folder.path().join("from"), folder.path().join("to"));
    for (size, parts) in [
        (0, vec![]),
        (10, vec![(0, b"0123456789".as_slice())]),
        (40 * MIB, vec![]),
        (40 * MIB, vec![(0, b"a"), (7 * MIB + 5, &vec![1; 10_000]), (40 * MIB - 1, b"z")]),
        (3 * MIB + 77, vec![(0, &vec![5; 3 << 20])]),
    ] {
        sparse(&from, size, &parts);
        let cloned = clone_sparse(&from, &to).unwrap();
        assert!(fs::read(&from).unwrap() == fs::read(&to).unwrap(), "{size} {}", parts.len());
        assert!(allocated(&to) <= allocated(&from), "{size} {}", parts.len());
        assert!(cloned.reflinked || cloned.copied_bytes <= allocated(&from), "{cloned:?}");
        assert_eq!(fs::metadata(&to).unwrap().permissions().mode() & 0o777, 0o600);
        fs::remove_file(&from).unwrap();
        fs::remove_file(&to).unwrap();
    }
}

#[test]
fn copy_goes_from_one_file_system_to_another() {
    let (folder, shm) = (tempfile::tempdir().unwrap(), tempfile::tempdir_in("/dev/shm").unwrap());
    let from = folder.path().join("from");
    sparse(&from, 9 * MIB, &[(MIB, &vec![3; 300_000])]);
    let to = shm.path().join("to");
    clone_sparse(&from, &to).unwrap();
    assert!(fs::read(&from).unwrap() == fs::read(&to).unwrap());
    assert!(allocated(&to) <= 304 << 10);
}

#[test]
fn parts_are_put_together_at_their_places() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let content: Vec<u8> = (0..200_000_u32).map(|i| (i / 3).to_le_bytes()[0]).collect();
    fs::write(path("part"), &content).unwrap();
    let part = |offset, bytes| (File::open(path("part")).unwrap(), offset, bytes);
    compose(&path("all"), 64 << 30, &[part(MIB, 4096), part(3 * MIB, 200_000)]).unwrap();
    let all = File::open(path("all")).unwrap();
    assert_eq!(all.metadata().unwrap().len(), 64 << 30);
    let read = |offset, length| {
        let mut bytes = vec![1; length];
        all.read_exact_at(&mut bytes, offset).unwrap();
        bytes
    };
    assert!(read(0, 4096) == [0; 4096] && read(MIB, 4096) == content[..4096]);
    assert!(read(MIB + 4096, 4096) == [0; 4096] && read(3 * MIB, 200_000) == content);
    assert!(compose(&path("all"), MIB, &[]).is_err(), "it is there");
}

#[test]
fn copy_by_hand_is_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let (from, to) = (folder.path().join("from"), folder.path().join("to"));
    sparse(&from, MIB, &[(0, &vec![9; 1 << 20])]);
    sparse(&to, MIB, &[]);
    let target = File::options().write(true).open(&to).unwrap();
    copy_by_hand(&File::open(&from).unwrap(), &target, (4096, MIB - 1), 4096).unwrap();
    let copied = fs::read(&to).unwrap();
    let range = 4096..copied.len() - 1;
    assert!(copied[range.clone()].iter().all(|byte| *byte == 9));
    assert!(copied[..range.start].iter().chain(&copied[range.end..]).all(|byte| *byte == 0));
}

#[test]
fn existing_file_is_not_touched() {
    let folder = tempfile::tempdir().unwrap();
    let (from, to) = (folder.path().join("from"), folder.path().join("to"));
    fs::write(&from, "new").unwrap();
    fs::write(&to, "old").unwrap();
    assert_eq!(clone_sparse(&from, &to).unwrap_err().code(), "image_io");
    assert_eq!(write_qcow2_overlay(&to, MIB).unwrap_err().code(), "image_io");
    assert_eq!(fs::read(&to).unwrap(), b"old");
    assert!(clone_sparse(&folder.path().join("none"), &folder.path().join("x")).is_err());
    assert!(!folder.path().join("x").exists());
}

#[test]
fn full_disk_is_told_and_leaves_no_half_file() {
    let full = Path::new("/dev/full");
    let file = File::options().write(true).open(full).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    let error = make_file(&path, "copy the disk to", |_| (&file).write_all(b"x")).unwrap_err();
    assert_eq!(error.code(), "no_space");
    assert!(!path.exists());
}

#[test]
fn overlay_of_an_impossible_size_is_refused() {
    let path = Path::new("/nowhere/overlay");
    for size in [0, 511, 513, (64 << 40) + 512, u64::MAX] {
        let error = write_qcow2_overlay(path, size).unwrap_err();
        assert_eq!(error.code(), "image_build_request_invalid", "{size}");
    }
}

#[test]
fn overlay_takes_a_few_blocks() {
    let folder = tempfile::tempdir().unwrap();
    for (index, size) in [64 * MIB, 10 << 30, 64 << 40].into_iter().enumerate() {
        let path = folder.path().join(index.to_string());
        write_qcow2_overlay(&path, size).unwrap();
        assert!(allocated(&path) <= 16 << 10, "{size}: {}", allocated(&path));
    }
}

#[test]
fn overlay_passes_the_check_of_qemu() {
    let Some(qemu_img) = find("qemu-img") else {
        println!("skipped: qemu-img is not installed (package qemu-utils)");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    for (index, size) in
        [512, 64 * MIB, 512 * MIB + 512, 10 << 30, 2 << 40, 64 << 40].into_iter().enumerate()
    {
        let path = folder.path().join(index.to_string());
        write_qcow2_overlay(&path, size).unwrap();
        let run = |words: &[&str]| {
            let output = Command::new(&qemu_img).args(words).arg(&path).output().unwrap();
            let told =
                String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
            assert!(output.status.success(), "{size}: {told}");
            told
        };
        let told = run(&["check", "--output=json"]);
        assert!(!told.contains("leaks\"") && told.contains("\"check-errors\": 0"), "{told}");
        let told = run(&["info", "--output=json"]);
        assert!(told.contains(&format!("\"virtual-size\": {size}")), "{told}");
        assert!(told.contains("\"compat\": \"1.1\"") && !told.contains("backing"), "{told}");
    }
}

/// QEMU itself, without a machine: what a VM reads and writes through an overlay over a disk that
/// is named on the command line alone.
#[test]
fn qemu_reads_through_the_overlay_and_writes_into_it() {
    let Some(qemu) = find("qemu-system-x86_64") else {
        println!("skipped: qemu-system-x86_64 is not installed");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let (base, overlay) = (folder.path().join("base"), folder.path().join("overlay"));
    sparse(&base, 600 * MIB, &[(MIB, &vec![0x11; 1 << 20]), (590 * MIB, &vec![0x22; 65_536])]);
    let before = fs::read(&base).unwrap();
    write_qcow2_overlay(&overlay, 600 * MIB).unwrap();
    let first = [
        "read -P 0x11 1M 1M",
        "read -P 0 2M 64k",
        "read -P 0x22 590M 64k",
        "write -P 0x33 1052672 4096",
        "write -P 0x44 595M 64k",
    ];
    drive(&qemu, &base, &overlay, &first);
    let second = [
        "read -P 0x11 1M 4k",
        "read -P 0x33 1052672 4096",
        "read -P 0x11 1056768 4096",
        "read -P 0x44 595M 64k",
        "read -P 0x22 590M 64k",
        "read -P 0 599M 1M",
    ];
    drive(&qemu, &base, &overlay, &second);
    assert!(fs::read(&base).unwrap() == before, "the disk below is as it was");
    if let Some(qemu_img) = find("qemu-img") {
        let check = Command::new(qemu_img).arg("check").arg(&overlay).output().unwrap();
        assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
    }
}

fn drive(qemu: &Path, base: &Path, overlay: &Path, commands: &[&str]) {
    let mut child = Command::new("timeout")
        .arg("60")
        .arg(qemu)
        .args(["-M", "none", "-nodefaults", "-display", "none", "-monitor", "stdio"])
        .arg("-blockdev")
        .arg(format!(
            "driver=raw,node-name=base,read-only=on,file.driver=file,file.filename={}",
            base.display()
        ))
        .arg("-blockdev")
        .arg(format!(
            "driver=qcow2,node-name=top,backing=base,file.driver=file,file.filename={}",
            overlay.display()
        ))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    for command in commands {
        writeln!(input, "qemu-io top \"{command}\"").unwrap();
    }
    writeln!(input, "quit").unwrap();
    let output = child.wait_with_output().unwrap();
    let told = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success() && !told.contains("failed"), "{told}");
    let done = told.matches(" ops; ").count();
    assert_eq!(done, commands.len(), "{told}");
}

fn find(name: &str) -> Option<PathBuf> {
    ["/usr/bin", "/usr/local/bin"]
        .iter()
        .map(|folder| Path::new(folder).join(name))
        .find(|p| p.exists())
}
