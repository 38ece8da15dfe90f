//! Times of the snapshot store, for `docs/performance.md`. Run by hand, in release.

#![expect(clippy::unwrap_used, reason = "helpers of a test")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use aether_images::{SealedSnapshot, SnapshotStore};

const MIB: u64 = 1 << 20;

/// As a guest of 256 MiB leaves it: 48 MiB of data in pieces of 64 KiB.
fn write_memory(path: &Path) {
    let memory = File::create_new(path).unwrap();
    memory.set_len(256 * MIB).unwrap();
    for piece in 0..768_u32 {
        let content: Vec<u8> =
            (0..65_536_u32).map(|at| (at ^ piece).to_le_bytes()[0] | 1).collect();
        memory.write_all_at(&content, u64::from(piece) * 5 * 65_536).unwrap();
    }
}

fn timed<T>(action: impl FnOnce() -> T) -> (Duration, T) {
    let start = Instant::now();
    let done = action();
    (start.elapsed(), done)
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

#[test]
#[ignore = "prints times; run by hand"]
fn sealing_and_checking() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("snapshots");
    let store = SnapshotStore::open(&root).unwrap();
    let (mut sealing, mut first, mut again, mut removing) = (vec![], vec![], vec![], vec![]);
    for _ in 0..10 {
        let draft = store.draft("one").unwrap();
        write_memory(&draft.path().join("memory"));
        File::open(draft.path().join("memory")).unwrap().sync_all().unwrap();
        std::fs::write(draft.path().join("state"), vec![1; 48 << 10]).unwrap();
        let (took, sealed) = timed(|| store.seal(draft, serde_json::Value::Null).unwrap());
        sealing.push(took);
        let fresh = SnapshotStore::open(&root).unwrap();
        first.push(timed(|| fresh.get("one").unwrap()).0);
        for _ in 0..100 {
            again.push(timed(|| -> SealedSnapshot { store.get("one").unwrap() }).0);
        }
        drop(sealed);
        removing.push(timed(|| store.remove("one").unwrap()).0);
    }
    println!("seal, its memory flushed already: {:?}", median(sealing));
    println!("first get in a process: {:?}", median(first));
    println!("get of what is verified: {:?}", median(again));
    println!("remove: {:?}", median(removing));
}
