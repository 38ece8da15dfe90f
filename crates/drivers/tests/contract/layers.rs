//! The contract of tools: layers on boots, restores and machines that run, and builders' output.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use aether_drivers::{
    AfterSnapshot::GoOn, DriverError, LayerFile, MachineSpec, MachineState, SnapshotDisk::Include,
    Start, layer_places,
};
use aether_protocol::{Configure, Configured, ExitStatus, host};

use crate::{
    rig::{Kind, Rig, Vm},
    suite::ParseToken as _,
};

/// Layers as tools are: one `usr`, made by `mkfs.erofs`.
pub(crate) struct Tools {
    folder: tempfile::TempDir,
}

impl Tools {
    pub(crate) fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    /// A tool of this name that says a word; with `bytes` of its own besides.
    pub(crate) fn layer(&self, name: &str, word: &str, bytes: usize) -> LayerFile {
        let tree = self.path().join(format!("{name}-{word}"));
        let bin = tree.join("usr/bin");
        std::fs::create_dir_all(&bin).unwrap();
        let script = bin.join(name);
        std::fs::write(&script, format!("#!/bin/sh\necho {name} {word}\n")).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(script, mode).unwrap();
        let own = tree.join("usr/lib/tools").join(name);
        std::fs::create_dir_all(&own).unwrap();
        let noise: Vec<u8> =
            (0..bytes).map(|i| u8::try_from(((i * i) >> 7) % 256).unwrap()).collect();
        std::fs::write(own.join("data"), noise).unwrap();
        let path = self.path().join(format!("{name}-{word}.erofs"));
        let made = Command::new("mkfs.erofs").arg("-T0").arg(&path).arg(&tree).output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let bytes = std::fs::metadata(&path).unwrap().len();
        LayerFile { name: format!("{name}@{word}"), path, digest: format!("{name}-{word}"), bytes }
    }
}

/// Tells a guest of its layers, as a worker does.
async fn tell(rig: &Rig, vm: &Vm, layers: &[LayerFile]) -> Configured {
    let layers = layer_places(layers).unwrap();
    let words = Configure { layers, ..Configure::default() };
    let stream = rig.connect(vm).await;
    host::configure(stream, &vm.token, words, rig.guest_limit()).await.expect("configure")
}

async fn says(rig: &Rig, vm: &Vm, script: &str) -> String {
    let (out, end) = rig.sh(vm, script).await;
    assert_eq!(end.status(), ExitStatus::Code(0), "{script}: {}", String::from_utf8_lossy(&out));
    String::from_utf8(out).unwrap()
}

pub(crate) async fn boot(rig: &Rig, spec: MachineSpec) -> Vm {
    let vm = Vm { id: spec.id, token: spec.token.parse_token() };
    let layers = spec.layers.clone();
    rig.driver().create(spec).await.expect("create");
    rig.driver().start(vm.id, Start::Boot, rig.boot_limit()).await.expect("start");
    let configured = tell(rig, &vm, &layers).await;
    assert_eq!(usize::try_from(configured.layers).unwrap(), layers.len());
    vm
}

/// More, over a machine that runs, which goes on.
async fn add_to_running(rig: &Rig, source: &Vm, have: &[LayerFile], more: &[LayerFile]) {
    let driver = rig.driver();
    let all: Vec<LayerFile> = have.iter().chain(&more[..1]).cloned().collect();
    driver.add_layers(source.id, &all).await.expect("add a layer");
    driver.add_layers(source.id, &all).await.expect("add it again");
    assert_eq!(tell(rig, source, &all).await.layers, 3);
    assert_eq!(tell(rig, source, &all).await.layers, 3);
    assert_eq!(
        says(rig, source, "three; one; cat /usr/bin/own /usr/bin/two").await,
        "three 1\none 1\nmine\na\n"
    );
    assert!(matches!(driver.add_layers(source.id, &all[..1]).await, Err(DriverError::Layers(_))));
    let others: Vec<LayerFile> = all[1..].iter().chain(more).cloned().collect();
    assert!(matches!(driver.add_layers(source.id, &others).await, Err(DriverError::Layers(_))));
}

/// Tools on a boot, on a machine that runs, on clones with the same and with more, and on a boot
/// again; each whatever becomes of the files that they came from.
pub(crate) async fn tools(rig: Rig) {
    let tools = Tools::new();
    let driver = rig.driver();
    let (one, two) = (tools.layer("one", "1", 3_000_000), tools.layer("two", "1", 10));
    let (newer, three) = (tools.layer("one", "2", 70_000), tools.layer("three", "1", 200_000));
    let kept = MachineSpec { layers: vec![one.clone(), two.clone()], ..rig.spec() };
    let source = boot(&rig, kept).await;
    std::fs::remove_file(&one.path).unwrap();
    assert_eq!(says(&rig, &source, "one; two").await, "one 1\ntwo 1\n");
    let sum = "cat /usr/lib/tools/one/data | wc -c; echo mine >/usr/bin/own; echo a >/usr/bin/two";
    assert_eq!(says(&rig, &source, sum).await, "3000000\n");

    let shot = rig.shoot(&source, Include, GoOn).await.expect("a snapshot");
    let names: Vec<&str> = shot.files.machine.layers.iter().map(|l| l.name.as_str()).collect();
    assert_eq!(names, ["one@1", "two@1"]);

    let is_added = !matches!(rig.kind(), Kind::Firecracker | Kind::FirecrackerJailed);
    if is_added {
        add_to_running(&rig, &source, &shot.files.layers(), &[three.clone(), newer.clone()]).await;
    } else {
        let mut all = shot.files.layers();
        all.push(three.clone());
        assert!(driver.add_layers(source.id, &all).await.is_err(), "it cannot");
    }

    // The same on a clone, and another version over it on the other.
    let same = MachineSpec { layers: shot.files.layers(), ..rig.clone_spec(&shot) };
    let mut more = shot.files.layers();
    more.extend([newer.clone(), three.clone()]);
    let other = MachineSpec { layers: more.clone(), ..rig.clone_spec(&shot) };
    let (same, other) = (rig.restore_as(&shot, same).await, rig.restore_as(&shot, other).await);
    assert_eq!(tell(&rig, &same, &shot.files.layers()).await.layers, 2);
    assert_eq!(tell(&rig, &other, &more).await.layers, 4);
    let ask = "one; cat /usr/bin/own /usr/bin/two; wc -c </usr/lib/tools/one/data";
    assert_eq!(says(&rig, &same, ask).await, "one 1\nmine\na\n3000000\n");
    assert_eq!(says(&rig, &other, ask).await, "one 2\nmine\na\n70000\n");
    assert_eq!(says(&rig, &other, "three").await, "three 1\n");
    // Without what the snapshot's guest has mounted there is no restore.
    let lacking = MachineSpec { layers: vec![two.clone()], ..rig.clone_spec(&shot) };
    let id = lacking.id;
    driver.create(lacking).await.expect("create");
    let refused = driver.start(id, shot.start(), rig.boot_limit()).await;
    assert!(matches!(refused, Err(DriverError::Incompatible { .. })), "{refused:?}");
    driver.delete(id).await.unwrap();

    // Nobody needs the snapshot; what was written stays over a boot, with the layers.
    rig.remove_snapshot(&shot);
    says(&rig, &other, "echo later >/usr/bin/later; sync").await;
    driver.kill(other.id).await.unwrap();
    driver.start(other.id, Start::Boot, rig.boot_limit()).await.expect("boot a clone's disk");
    assert_eq!(tell(&rig, &other, &more).await.layers, 4);
    assert_eq!(says(&rig, &other, "cat /usr/bin/later").await, "later\n");
    assert_eq!(says(&rig, &other, ask).await, "one 2\nmine\na\n70000\n");
    // Its agent ends, and another one finds what is mounted.
    if rig.kind() != Kind::Sim {
        rig.sh_last(&other, "kill -9 $(cat /proc/1/task/1/children)").await;
        let answers = async {
            while rig.opens(&other, &other.token).await != Some(true) {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(rig.guest_limit(), answers).await.expect("another agent");
        assert_eq!(tell(&rig, &other, &more).await.layers, 4);
        assert_eq!(says(&rig, &other, "grep -c ' /usr ' /proc/mounts; one").await, "1\none 2\n");
    }
    if is_added {
        // A snapshot of a machine that was given layers while it ran.
        let late = rig.shoot(&source, Include, GoOn).await.expect("a snapshot with three");
        let spec = MachineSpec { layers: late.files.layers(), ..rig.clone_spec(&late) };
        let clone = rig.restore_as(&late, spec).await;
        assert_eq!(tell(&rig, &clone, &late.files.layers()).await.layers, 3);
        assert_eq!(says(&rig, &clone, "three").await, "three 1\n");
        driver.delete(clone.id).await.unwrap();
    }
    for vm in [&source, &same, &other] {
        driver.delete(vm.id).await.unwrap();
    }
    rig.close().await;
}

/// As many as a VM may ask for, and what is refused.
pub(crate) async fn many_and_wrong(rig: Rig) {
    let tools = Tools::new();
    let layers: Vec<LayerFile> =
        (0..32).map(|n| tools.layer(&format!("t{n}"), "1", n * 100_000)).collect();
    let vm = boot(&rig, MachineSpec { layers: layers.clone(), ..rig.spec() }).await;
    let script = "for n in $(seq 0 31); do t$n && wc -c </usr/lib/tools/t$n/data; done";
    let expected: Vec<String> = (0..32).map(|n| format!("t{n} 1\n{}\n", n * 100_000)).collect();
    let expected = expected.concat();
    assert_eq!(says(&rig, &vm, script).await, expected);
    rig.driver().delete(vm.id).await.unwrap();

    let missing = LayerFile { path: PathBuf::from("/nowhere/layer"), ..layers[0].clone() };
    let shorter = LayerFile { bytes: 4096, ..layers[31].clone() };
    let too_long = LayerFile { bytes: 65 << 30, ..layers[0].clone() };
    for wrong in [missing, shorter, too_long] {
        let spec = MachineSpec { layers: vec![layers[1].clone(), wrong.clone()], ..rig.spec() };
        let error = rig.driver().create(spec).await.expect_err("no such layer");
        let text = format!("{error:?}");
        let name = wrong.path.display().to_string();
        assert!(text.contains(&wrong.name) || text.contains(&name), "{text}");
    }
    rig.close().await;
}

/// A builder's result is taken when its machine has ended.
pub(crate) async fn output(rig: Rig) {
    let tools = Tools::new();
    let vm = boot(&rig, MachineSpec { output_mb: Some(64), ..rig.spec() }).await;
    says(&rig, &vm, "printf result >/dev/vdd; sync").await;
    let into = tools.path().join("taken");
    let driver = rig.driver();
    let early = driver.take_output(vm.id, &into, 6).await;
    assert!(matches!(early, Err(DriverError::WrongState { .. })), "{early:?}");
    driver.kill(vm.id).await.unwrap();
    assert!(matches!(
        rig.driver().inspect(vm.id).await.unwrap().unwrap().state,
        MachineState::Exited(_)
    ));
    assert!(driver.take_output(vm.id, &into, 65 << 20).await.is_err());
    driver.take_output(vm.id, &into, 6).await.expect("take the output");
    assert_eq!(std::fs::read(&into).unwrap(), b"result");
    driver.delete(vm.id).await.unwrap();
    rig.close().await;
}
