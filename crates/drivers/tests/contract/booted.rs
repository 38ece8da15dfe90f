//! A guest that has booted, for tests that are not about booting: taken once for a driver, kernel and
//! root file system, and shared by all tests through the cache.

use std::{fs::File, time::Duration};

use aether_drivers::{AfterSnapshot, SnapshotDisk, SnapshotMachine};
use aether_images::{PruneBudget, SnapshotError, SnapshotStore};
use aether_protocol::Token;

use crate::{
    rig::{Rig, setting},
    shot::Shot,
};

/// Raised when what a guest is taken as has changed.
const FORMAT: u32 = 1;
/// Since the last use.
const AGE_MAX: Duration = Duration::from_hours(7 * 24);

pub(crate) async fn shot(rig: &Rig) -> Shot {
    let folder = setting("AETHER_CACHE");
    let folder = folder.map_or_else(|| rig.snapshots(), |cache| cache.join("booted"));
    std::fs::create_dir_all(&folder).expect("a folder for booted guests");
    let entry = entry(rig);
    let lock = File::create(folder.join(format!("{entry}.lock"))).expect("a lock file");
    // One test boots it, and the others wait.
    let lock = tokio::task::spawn_blocking(move || lock.lock().map(|()| lock));
    let _lock = lock.await.unwrap().expect("lock the booted guest");
    let store = SnapshotStore::open(folder.join("guests")).expect("a store of booted guests");
    match store.get(&entry) {
        Ok(sealed) => {
            let detail = sealed.detail.clone();
            let (machine, token) = serde_json::from_value::<(SnapshotMachine, String)>(detail)
                .expect("what this test wrote");
            Shot::of(sealed, machine, Token::from_hex(&token).unwrap())
        }
        Err(SnapshotError::Unknown { .. }) => take(rig, store, &entry).await,
        Err(error) => panic!("the booted guest in the cache: {error:?}"),
    }
}

/// By what it is taken of: files of images are named by their content.
fn entry(rig: &Rig) -> String {
    let spec = rig.spec();
    let format = rig.driver().capabilities().snapshot_format.expect("it takes snapshots");
    let made_of = (FORMAT, format, spec.boot, spec.memory_mb, spec.disk_mb, spec.vcpus);
    let digest = blake3::hash(format!("{made_of:?}").as_bytes()).to_hex();
    format!("{:?}-{}", rig.kind(), &digest[..32]).to_lowercase()
}

async fn take(rig: &Rig, store: SnapshotStore, entry: &str) -> Shot {
    // Those of images that are not built any more.
    let budget = PruneBudget { max_bytes: None, max_age: Some(AGE_MAX), keep: &|_| false };
    store.prune(&budget).expect("prune the booted guests");
    let vm = rig.boot_anew().await;
    // The agent has answered, and more is not to be waited for.
    rig.sh(&vm, "true").await;
    let draft = store.draft(entry).expect("a draft");
    let taken = rig
        .driver()
        .snapshot(vm.id, draft.path(), SnapshotDisk::Include, AfterSnapshot::End)
        .await
        .expect("a snapshot of the booted guest");
    rig.driver().delete(vm.id).await.expect("delete");
    let detail = serde_json::to_value((&taken.machine, vm.token.to_hex())).unwrap();
    let sealed = tokio::task::spawn_blocking(move || store.seal(draft, detail));
    let sealed = sealed.await.unwrap().expect("what a driver wrote can be sealed");
    Shot::of(sealed, taken.machine, vm.token)
}
