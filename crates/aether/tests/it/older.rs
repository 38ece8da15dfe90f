//! Called as `aether-cli`.

use std::process::Command;

use crate::rig::Rig;

#[test]
fn the_older_command_lines_work_as_written() {
    let rig = Rig::start();
    let folder = tempfile::tempdir().unwrap();
    let cli = folder.path().join("aether-cli");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_aether"), &cli).unwrap();
    let run = |words: &[&str]| {
        let mut command = Command::new(&cli);
        command.args(words).env("AETHER_DATA_DIR", rig.data());
        for name in ["AETHER_URL", "AETHER_KEY"] {
            command.env_remove(name);
        }
        let output = command.output().unwrap();
        assert!(output.status.success(), "{words:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    run(&["-type", "vm:create", "-name", "my-vm"]);
    let said = run(&["-type", "vm:execute", "-vm-id", "my-vm", "-cmd", "echo", "-args", "a,b"]);
    assert_eq!(said, "a b\n");
    run(&["-type", "vm:delete", "-vm-id", "my-vm"]);
    let list = run(&["--json", "vm", "list"]);
    assert!(!list.contains("my-vm"), "{list}");
}
