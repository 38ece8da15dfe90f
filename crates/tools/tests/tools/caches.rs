//! The folder of layers: room, use, damage, other processes.

use std::fs::{self, File, FileTimes};
use std::time::{Duration, SystemTime};

use aether_tools::Tools;

use crate::fake::Rig;

/// Makes all records and artefacts that old, so that the order of use is certain.
fn age(rig: &Rig, by: Duration) {
    for folder in ["records", "artefacts"] {
        for entry in fs::read_dir(rig.path("tools").join(folder)).unwrap() {
            let file = File::open(entry.unwrap().path()).unwrap();
            let time = file.metadata().unwrap().modified().unwrap() - by;
            file.set_times(FileTimes::new().set_modified(time)).unwrap();
        }
    }
}

#[tokio::test]
async fn what_was_not_used_for_longest_goes_first_and_what_is_in_use_stays() {
    let rig = Rig::new().await;
    let tools = rig.tools();
    let hour = Duration::from_hours(1);
    let oldest = rig.ensure(&tools, "hello@1.1.0").await.unwrap();
    age(&rig, hour);
    let older = rig.ensure(&tools, "hello@1.2.0").await.unwrap();
    age(&rig, hour);
    let newest = rig.ensure(&tools, "world").await.unwrap();
    age(&rig, hour);
    drop(rig.ensure(&tools, "hello@1.2.0").await.unwrap());
    let all = tools.size_bytes().await.unwrap();
    assert_eq!(tools.prune(None).await.unwrap().size_bytes, 0, "there is no budget");
    assert_eq!(tools.prune(Some(all)).await.unwrap().size_bytes, 0, "it fits");

    let (kept, oldest_digest) = (older.path.clone(), oldest.digest.clone());
    let pruned = tools.prune(Some(8192)).await.unwrap();
    assert!(pruned.layers.is_empty(), "all are in use: {pruned:?}");
    assert_eq!((pruned.artefacts, pruned.kept_bytes), (3, 3 * 8192));
    let linked = rig.path("linked");
    fs::hard_link(&newest.path, &linked).unwrap();
    drop((oldest, older));
    let pruned = tools.prune(Some(2 * 8192)).await.unwrap();
    assert_eq!(pruned.layers, [oldest_digest]);
    drop(newest);
    let pruned = tools.prune(Some(8192)).await.unwrap();
    assert_eq!((pruned.layers.len(), pruned.kept_bytes), (1, 8192));
    assert!(kept.exists() && linked.exists(), "who has a link has it for good");
    rig.assert_only(1);
    assert_eq!(tools.prune(Some(0)).await.unwrap().kept_bytes, 0);
    rig.ensure(&tools, "hello@1.1.0").await.unwrap();
}

#[tokio::test]
async fn budget_is_held_after_every_build() {
    let rig = Rig::new().await;
    let mut config = rig.config();
    config.budget_bytes = Some(8192);
    let tools = Tools::open(config).unwrap();
    for asked in ["hello@1.1.0", "hello@1.2.0", "world"] {
        drop(rig.ensure(&tools, asked).await.unwrap());
    }
    tools.prune(None).await.unwrap();
    assert!(tools.size_bytes().await.unwrap() <= 8192);
}

#[tokio::test]
async fn damaged_layer_is_found_and_built_again() {
    let rig = Rig::new().await;
    let layer = rig.ensure(&rig.tools(), "hello").await.unwrap();
    let good = fs::read(&layer.path).unwrap();
    let tools = rig.tools();
    rig.ensure(&tools, "hello").await.unwrap();
    // In place, with its time set back, as a failing disk would.
    let mut bad = good.clone();
    bad[5000] = 1;
    fs::remove_file(&layer.path).unwrap();
    fs::write(&layer.path, bad).unwrap();
    let file = File::open(&layer.path).unwrap();
    file.set_times(FileTimes::new().set_modified(SystemTime::UNIX_EPOCH)).unwrap();
    let again = rig.ensure(&tools, "hello").await.unwrap();
    assert_eq!((again.digest, rig.builder.builds()), (layer.digest, 2));
    assert_eq!(fs::read(again.path).unwrap(), good);
}

#[tokio::test]
async fn what_a_dead_process_left_is_removed_and_what_a_live_one_has_is_not() {
    let rig = Rig::new().await;
    let live = rig.tools();
    let tmp = rig.path("tools/tmp");
    fs::write(tmp.join("dead.lock"), "").unwrap();
    fs::create_dir(tmp.join("dead")).unwrap();
    fs::write(tmp.join("dead/layer-1-1"), "half").unwrap();
    let other = rig.tools();
    assert!(!tmp.join("dead").exists() && !tmp.join("dead.lock").exists());
    assert_eq!(fs::read_dir(&tmp).unwrap().count(), 4, "two that live, and their locks");
    rig.ensure(&live, "hello").await.unwrap();
    rig.ensure(&other, "world").await.unwrap();
    drop((live, other));
    assert_eq!(fs::read_dir(&tmp).unwrap().count(), 0);
}
