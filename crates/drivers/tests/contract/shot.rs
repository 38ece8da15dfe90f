//! Snapshots in tests: taken, sealed as the worker does it, and restored as its VMs.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use aether_drivers::{
    AfterSnapshot, DriverError, MachineSpec, SnapshotDisk, SnapshotFiles, SnapshotMachine,
    SnapshotTaken, Start,
};
use aether_images::{SealedSnapshot, SnapshotStore};
use aether_protocol::{AGENT_PORT, Attach, Configure, ErrorCode, Interface, Run, Token, host};
use aether_types::MachineId;
use bytes::Bytes;

use crate::rig::{Kind, Rig, Vm};

/// A snapshot that was taken and sealed.
#[derive(Clone)]
pub(crate) struct Shot {
    pub(crate) files: SnapshotFiles,
    /// Of the guest at that moment.
    pub(crate) token: Token,
    pub(crate) taken: SnapshotTaken,
    /// Keeps the files from being pruned, as a worker does.
    _sealed: Option<SealedSnapshot>,
}

impl Shot {
    /// Writes down how to use it, for a worker that is another process.
    pub(crate) fn save(&self, path: &Path) {
        let saved = (&self.files, self.token.to_hex());
        std::fs::write(path, serde_json::to_vec(&saved).unwrap()).unwrap();
    }

    pub(crate) fn load(path: &Path) -> Self {
        let saved = std::fs::read(path).unwrap();
        let (files, token): (SnapshotFiles, String) = serde_json::from_slice(&saved).unwrap();
        let paused = Duration::ZERO;
        let taken = SnapshotTaken { machine: files.machine.clone(), paused };
        Self { files, token: Token::from_hex(&token).unwrap(), taken, _sealed: None }
    }

    pub(crate) fn of(sealed: SealedSnapshot, machine: SnapshotMachine, token: Token) -> Self {
        let files = SnapshotFiles { directory: sealed.directory.clone(), machine };
        let taken = SnapshotTaken { machine: files.machine.clone(), paused: Duration::ZERO };
        Self { files, token, taken, _sealed: Some(sealed) }
    }

    pub(crate) fn start(&self) -> Start {
        Start::Restore(self.files.clone())
    }
}

impl Rig {
    fn store(&self) -> SnapshotStore {
        SnapshotStore::open(self.snapshots()).expect("a store of snapshots")
    }

    pub(crate) async fn shoot(
        &self,
        vm: &Vm,
        disk: SnapshotDisk,
        after: AfterSnapshot,
    ) -> Result<Shot, DriverError> {
        let store = self.store();
        let id = MachineId::new().to_string();
        let draft = store.draft(&id).expect("a draft");
        let taken = self.driver().snapshot(vm.id, draft.path(), disk, after).await?;
        let detail = serde_json::to_value(&taken.machine).unwrap();
        let sealed = tokio::task::spawn_blocking(move || store.seal(draft, detail));
        let sealed = sealed.await.unwrap().expect("what a driver wrote can be sealed");
        let machine = serde_json::from_value(sealed.detail.clone()).unwrap();
        let files = SnapshotFiles { directory: sealed.directory.clone(), machine };
        Ok(Shot { files, token: vm.token.clone(), taken, _sealed: Some(sealed) })
    }

    pub(crate) fn remove_snapshot(&self, shot: &Shot) {
        let id = shot.files.directory.file_name().unwrap().to_str().unwrap().to_owned();
        assert!(self.store().remove(&id).expect("remove a snapshot"));
        assert!(!shot.files.directory.exists());
    }

    /// Of a machine that is to be restored from it.
    pub(crate) fn clone_spec(&self, shot: &Shot) -> MachineSpec {
        let layers = shot.files.layers();
        MachineSpec { disk_from: Some(shot.files.clone()), layers, ..self.spec() }
    }

    /// Makes a machine go on from a snapshot, and itself.
    pub(crate) async fn restore(&self, shot: &Shot) -> Vm {
        self.restore_as(shot, self.clone_spec(shot)).await
    }

    /// The same with a specification of its own.
    pub(crate) async fn restore_as(&self, shot: &Shot, spec: MachineSpec) -> Vm {
        let vm = Vm { id: spec.id, token: Token::from_hex(&spec.token).unwrap() };
        self.driver().create(spec).await.expect("create a clone");
        self.driver().start(vm.id, shot.start(), self.boot_limit()).await.expect("restore");
        self.make_itself(&vm, shot).await;
        vm
    }

    /// Gives a restored guest its own token, name and addresses; returns its new boot id.
    pub(crate) async fn make_itself(&self, vm: &Vm, shot: &Shot) -> String {
        let network = self.driver().inspect(vm.id).await.unwrap().unwrap().network.unwrap();
        let configure = Configure {
            hostname: Some(name_of(vm)),
            entropy: Bytes::from(vm.token.as_bytes().repeat(2)),
            new_token: Some(Bytes::copy_from_slice(vm.token.as_bytes())),
            restored: true,
            interfaces: vec![Interface {
                mac: shot.files.machine.mac.clone(),
                new_mac: Some(network.mac),
                addresses: network
                    .addresses
                    .iter()
                    .map(|(ip, size)| format!("{ip}/{size}"))
                    .collect(),
                gateways: network.gateways.iter().map(ToString::to_string).collect(),
                mtu: Some(network.mtu),
            }],
            ..Configure::default()
        };
        // As a worker does: the first exchange after a load may hang, and one whose answer was
        // lost may have given the guest its token.
        let early = Duration::from_secs(8);
        let tries = [(&shot.token, early), (&vm.token, early)].into_iter().cycle().take(12);
        for (index, (token, limit)) in tries.enumerate() {
            let stream = self.connect(vm).await;
            match host::configure(stream, token, configure.clone(), limit).await {
                Ok(configured) => {
                    assert_eq!(configured.warnings, Vec::<String>::new());
                    return configured.boot_id;
                }
                Err(error) if index == 11 => panic!("configure a clone: {error:?}"),
                Err(_) => {}
            }
        }
        unreachable!("the last try returns")
    }

    /// Starts a process that counts for ever, and sees it count.
    pub(crate) async fn start_counting(&self, vm: &Vm) {
        // Starts no processes, which are what costs most in a guest.
        let perl = "$| = 1; while () { print ++$i, qq(\n); select undef, undef, undef, 0.05 }";
        let (command, args) = match self.kind() {
            Kind::Sim => ("count", vec!["0.002".to_owned()]),
            _ => ("perl", vec!["-e".to_owned(), perl.to_owned()]),
        };
        let run = Run {
            run_id: COUNTER.to_owned(),
            detached: true,
            command: command.to_owned(),
            args,
            ..Run::default()
        };
        let stream = self.connect(vm).await;
        drop(host::run(stream, &vm.token, run, self.guest_limit()).await.expect("count"));
        self.counts_beyond(vm, 2).await;
    }

    /// Waits until the process has counted beyond a number; how far it is.
    pub(crate) async fn counts_beyond(&self, vm: &Vm, than: u64) -> u64 {
        let limit = self.guest_limit();
        let attach = Attach { run_id: COUNTER.to_owned(), ..Attach::default() };
        let stream = self.connect(vm).await;
        let mut session = host::attach(stream, &vm.token, attach, limit).await.expect("attach");
        let mut text = Vec::new();
        let counting = async {
            loop {
                match session.next().await.expect("the process counts") {
                    host::RunEvent::Output { data, .. } => text.extend_from_slice(&data),
                    host::RunEvent::Exited(exited) => panic!("it counts no more: {exited:?}"),
                }
                let whole = text.iter().rposition(|b| *b == b'\n').unwrap_or(0);
                let last = str::from_utf8(&text[..whole]).unwrap().lines().last();
                let reached = last.map_or(0, |line| line.parse().expect("a number"));
                if reached > than {
                    return reached;
                }
            }
        };
        tokio::time::timeout(limit, counting).await.expect("the process counts on")
    }

    /// Whether a guest answers to a token; `None` where it does not answer at all. A worker that
    /// died just after a restore has left a guest whose first connection may be lost.
    pub(crate) async fn opens(&self, vm: &Vm, token: &Token) -> Option<bool> {
        for limit in [self.guest_limit() / 6, self.guest_limit()] {
            let stream = self.driver().connect(vm.id, AGENT_PORT, self.guest_limit()).await.ok()?;
            match host::ping(stream, token, limit).await {
                Ok(_) => return Some(true),
                Err(error) if error.code() == Some(ErrorCode::Unauthorized) => return Some(false),
                Err(_) => {}
            }
        }
        None
    }
}

const COUNTER: &str = "counter";

pub(crate) fn name_of(vm: &Vm) -> String {
    format!("vm-{}", &vm.id.to_string()[..8])
}

/// Where a crashing worker finds the snapshot that it works with.
pub(crate) fn shot_file(folder: &Path) -> PathBuf {
    folder.join("shot.json")
}
