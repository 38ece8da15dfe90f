use std::collections::BTreeMap;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use super::super::fault::{Fault, arm};
use super::*;

fn store() -> (tempfile::TempDir, SnapshotStore) {
    let folder = tempfile::tempdir().unwrap();
    let store = SnapshotStore::open(folder.path().join("snapshots")).unwrap();
    (folder, store)
}

/// A memory with holes, and two small files.
fn write_files(folder: &Path) {
    let memory = File::create_new(folder.join("memory")).unwrap();
    memory.set_len(64 << 20).unwrap();
    for offset in [0, 5 << 20, (64 << 20) - 4096] {
        memory.write_all_at(&[7; 4096], offset).unwrap();
    }
    fs::write(folder.join("state"), b"devices").unwrap();
    fs::write(folder.join("disk-0"), vec![3; 100_000]).unwrap();
}

fn seal(store: &SnapshotStore, id: &str) -> Result<SealedSnapshot, SnapshotError> {
    let draft = store.draft(id)?;
    write_files(draft.path());
    store.seal(draft, json!({"of": id}))
}

/// Names under the folders that must be empty when nothing is going on.
fn left_over(store: &SnapshotStore) -> Vec<PathBuf> {
    ["drafts", "trash"]
        .iter()
        .flat_map(|name| names(&store.folder(name)).unwrap())
        .map(|(_, path)| path)
        .collect()
}

fn writable(path: &Path) -> File {
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
    File::options().read(true).write(true).open(path).unwrap()
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

#[test]
fn sealed_snapshot_is_listed_and_comes_back_in_another_process() {
    let (folder, store) = store();
    let sealed = seal(&store, "one").unwrap();
    assert_eq!(sealed.detail, json!({"of": "one"}));
    assert_eq!(sealed.directory, store.entry_path("one"));
    assert!(sealed.digest.starts_with("blake3:"));
    assert!((100_000..400_000).contains(&sealed.size_bytes), "{}", sealed.size_bytes);
    let listed = store.list().unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!((listed[0].id.as_str(), listed[0].size_bytes), ("one", sealed.size_bytes));
    let now = unix_ms(SystemTime::now());
    assert!(now - listed[0].created_unix_ms < 60_000 && now - listed[0].last_used_unix_ms < 60_000);

    let other = SnapshotStore::open(folder.path().join("snapshots")).unwrap();
    let found = other.get("one").unwrap();
    assert_eq!((found.digest, found.detail), (sealed.digest, sealed.detail));
    assert_eq!(left_over(&store), Vec::<PathBuf>::new());
}

#[test]
fn files_are_for_their_owner_only() {
    let (folder, store) = store();
    let sealed = seal(&store, "one").unwrap();
    let root = folder.path().join("snapshots");
    assert_eq!(mode(&root), 0o700);
    assert_eq!(mode(&root.join("entries")), 0o700);
    assert_eq!(mode(&root.join("key")), 0o600);
    assert_eq!(mode(&sealed.directory), 0o700);
    assert_eq!(mode(&sealed.directory.join("memory")), 0o444);
    assert_eq!(mode(&sealed.directory.join("manifest.json")), 0o400);
    let told = format!("{sealed:?} {store:?}");
    assert!(!told.contains("detail") && !told.contains("key"), "{told}");
}

#[test]
fn unknown_and_impossible_ids_are_refused() {
    let (_folder, store) = store();
    assert_eq!(store.get("one").unwrap_err().code(), "snapshot_not_found");
    assert!(!store.remove("one").unwrap());
    for id in ["", ".", "..", "a/b", "../drafts", "a b", "\u{e9}", &"a".repeat(129)] {
        assert_eq!(store.get(id).unwrap_err().code(), "snapshot_id_invalid", "{id}");
        assert_eq!(store.draft(id).unwrap_err().code(), "snapshot_id_invalid", "{id}");
        assert_eq!(store.remove(id).unwrap_err().code(), "snapshot_id_invalid", "{id}");
    }
}

#[test]
fn second_snapshot_of_an_id_is_dropped_for_the_first() {
    let (_folder, store) = store();
    let (early, late) = (store.draft("one").unwrap(), store.draft("one").unwrap());
    fs::write(late.path().join("file"), b"late").unwrap();
    let first = seal(&store, "one").unwrap();
    let second = store.seal(late, json!("late")).unwrap();
    assert_eq!((second.digest, second.detail), (first.digest, first.detail));
    drop(early);
    assert_eq!(left_over(&store), Vec::<PathBuf>::new());
}

#[test]
fn unsealed_draft_leaves_nothing() {
    let (_folder, store) = store();
    let draft = store.draft("one").unwrap();
    write_files(draft.path());
    assert_eq!(mode(draft.path()), 0o700);
    drop(draft);
    assert_eq!(left_over(&store), Vec::<PathBuf>::new());
    assert_eq!(store.list().unwrap(), vec![]);
}

#[test]
fn draft_of_a_living_process_is_not_swept() {
    let (folder, store) = store();
    let draft = store.draft("one").unwrap();
    write_files(draft.path());
    // Locks of two opens of a file are apart, as those of two processes.
    let other = SnapshotStore::open(folder.path().join("snapshots")).unwrap();
    assert_eq!(other.list().unwrap(), vec![]);
    store.seal(draft, Value::Null).unwrap();
    other.get("one").unwrap();
}

#[test]
fn only_plain_files_are_sealed() {
    let (_folder, store) = store();
    let attempt = |make: &dyn Fn(&Path)| {
        let draft = store.draft("one").unwrap();
        write_files(draft.path());
        make(&draft.path().join("odd"));
        store.seal(draft, Value::Null).unwrap_err()
    };
    let odd: [&dyn Fn(&Path); 4] = [
        &|path| symlink("/etc/passwd", path).unwrap(),
        &|path| fs::create_dir(path).unwrap(),
        &|path| drop(std::os::unix::net::UnixListener::bind(path).unwrap()),
        &|path| fs::write(path.with_file_name("manifest.json"), b"mine").unwrap(),
    ];
    for make in odd {
        let error = attempt(make);
        assert_eq!(error.code(), "snapshot_file_unfit");
        let text = error.to_string();
        assert!(text.contains("/odd") || text.contains("/manifest.json"), "{text}");
    }
    assert_eq!(left_over(&store), Vec::<PathBuf>::new());
}

#[test]
fn every_damaged_file_is_refused_by_its_name() {
    let (folder, store) = store();
    let entry = seal(&store, "one").unwrap().directory;
    type Damage<'a> = &'a dyn Fn(&Path);
    let cases: [(&str, Damage<'_>); 8] = [
        ("memory", &|path| writable(path).write_all_at(b"x", 9 << 20).unwrap()),
        ("memory", &|path| writable(path).write_all_at(&[8], 4095).unwrap()),
        ("memory", &|path| writable(path).set_len(63 << 20).unwrap()),
        ("state", &|path| fs::remove_file(path).unwrap()),
        ("state", &|path| {
            fs::rename(path, path.with_file_name("disk-1")).unwrap();
            symlink("disk-1", path).unwrap();
        }),
        ("disk-0", &|path| writable(path).write_all_at(b"x", 50_000).unwrap()),
        ("manifest.json", &|path| writable(path).write_all_at(b"x", 100).unwrap()),
        ("manifest.json", &|path| fs::remove_file(path).unwrap()),
    ];
    for (name, damage) in cases {
        store.get("one").unwrap();
        damage(&entry.join(name));
        for store in [&store, &SnapshotStore::open(folder.path().join("snapshots")).unwrap()] {
            let error = store.get("one").unwrap_err();
            assert_eq!(error.code(), "snapshot_damaged", "{name}");
            // The file that took the place of another is named where it is met first.
            let text = error.to_string();
            assert!(text.contains(name) || text.contains("disk-1"), "{name}: {text}");
        }
        assert_eq!(store.list().unwrap().len(), 1, "what is damaged can still be found");
        assert!(store.remove("one").unwrap());
        seal(&store, "one").unwrap();
    }
}

#[test]
fn what_was_added_to_a_snapshot_is_refused() {
    let (_folder, store) = store();
    let entry = seal(&store, "one").unwrap().directory;
    fs::write(entry.join("disk-1"), b"").unwrap();
    assert!(store.get("one").unwrap_err().to_string().contains("disk-1"));
}

#[test]
fn snapshot_of_another_store_or_name_is_foreign() {
    let (_folder, store) = store();
    let (_other_folder, other) = self::store();
    seal(&other, "one").unwrap();
    fs::rename(other.entry_path("one"), store.entry_path("one")).unwrap();
    let error = store.get("one").unwrap_err();
    assert!(
        matches!(&error, SnapshotError::Foreign { file, .. } if file.ends_with("manifest.json"))
    );
    assert_eq!(error.code(), "snapshot_damaged");

    seal(&store, "two").unwrap();
    fs::rename(store.entry_path("two"), store.entry_path("three")).unwrap();
    assert!(matches!(store.get("three").unwrap_err(), SnapshotError::Foreign { .. }));
}

#[test]
fn verified_file_is_hashed_again_only_when_it_changed() {
    let (folder, store) = store();
    let entry = seal(&store, "one").unwrap().directory;
    // A VM's hard link comes and goes: still the same file.
    let link = folder.path().join("link");
    fs::hard_link(entry.join("memory"), &link).unwrap();
    fs::remove_file(link).unwrap();
    // The content is taken away under an equal stamp: whoever looked would see it.
    let memory = writable(&entry.join("memory"));
    memory.write_all_at(b"x", 0).unwrap();
    let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
    let times = Timestamps { last_access: zero, last_modification: zero };
    rustix::fs::futimens(&memory, &times).unwrap();
    store.get("one").unwrap();
    let fresh = SnapshotStore::open(folder.path().join("snapshots")).unwrap();
    assert_eq!(fresh.get("one").unwrap_err().code(), "snapshot_damaged");
    // Any write by a program that does not set the time back is seen at once.
    memory.write_all_at(b"y", 0).unwrap();
    assert_eq!(store.get("one").unwrap_err().code(), "snapshot_damaged");
}

#[test]
fn file_that_is_linked_into_several_snapshots_stays_when_one_goes() {
    let (_folder, store) = store();
    let first = seal(&store, "one").unwrap();
    let draft = store.draft("two").unwrap();
    fs::hard_link(first.directory.join("memory"), draft.path().join("memory")).unwrap();
    let second = store.seal(draft, Value::Null).unwrap();
    store.remove("one").unwrap();
    store.get("two").unwrap();
    let memory = fs::read(second.directory.join("memory")).unwrap();
    assert_eq!((memory.len(), memory[5 << 20]), (64 << 20, 7));
}

#[test]
fn removing_again_is_harmless() {
    let (_folder, store) = store();
    seal(&store, "one").unwrap();
    assert!(store.remove("one").unwrap());
    assert!(!store.remove("one").unwrap());
    assert_eq!(store.list().unwrap(), vec![]);
    assert_eq!(left_over(&store), Vec::<PathBuf>::new());
}

fn set_used(store: &SnapshotStore, id: &str, age: Duration) {
    File::open(store.entry_path(id)).unwrap().set_modified(SystemTime::now() - age).unwrap();
}

fn prune(store: &SnapshotStore, bytes: Option<u64>, age: Option<u64>, keep: &str) -> Vec<String> {
    let max_age = age.map(Duration::from_secs);
    let budget = PruneBudget { max_bytes: bytes, max_age, keep: &|id| id == keep };
    store.prune(&budget).unwrap().into_iter().map(|entry| entry.id).collect()
}

#[test]
fn longest_unused_is_pruned_first_and_what_is_in_use_never() {
    // Between a fork and its exec by another test's thread, a copy of a lock lives for a moment.
    let output = child(&["env"], "child_that_prunes", "");
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{told}");
}

#[test]
#[ignore = "the child of the test before it, alone in its process"]
fn child_that_prunes() {
    let (folder, store) = store();
    let size = seal(&store, "a").unwrap().size_bytes;
    for id in ["b", "c", "d"] {
        drop(seal(&store, id).unwrap());
    }
    for (id, age) in [("c", 400), ("a", 300), ("d", 200), ("b", 100)] {
        set_used(&store, id, Duration::from_secs(age));
    }
    assert!(prune(&store, None, None, "").is_empty());
    assert!(prune(&store, Some(4 * size), Some(1000), "").is_empty());
    assert_eq!(prune(&store, Some(3 * size), None, ""), ["c"]);
    assert_eq!(prune(&store, Some(2 * size), None, "a"), ["d"]);
    assert_eq!(prune(&store, None, Some(250), ""), ["a"]);
    // Another process uses it.
    let other = SnapshotStore::open(folder.path().join("snapshots")).unwrap();
    let used = other.get("b").unwrap();
    assert!(prune(&store, Some(0), None, "").is_empty());
    let copy = used.clone();
    drop(used);
    assert!(prune(&store, Some(0), None, "").is_empty());
    drop(copy);
    assert_eq!(prune(&store, Some(0), None, ""), ["b"]);
}

#[test]
fn being_used_counts_as_new() {
    let (_folder, store) = store();
    drop(seal(&store, "a").unwrap());
    set_used(&store, "a", Duration::from_hours(1));
    drop(store.get("a").unwrap());
    assert!(prune(&store, None, Some(60), "").is_empty());
}

#[test]
fn many_processes_open_one_new_store() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("snapshots");
    let stores: Vec<_> = std::thread::scope(|scope| {
        let opening: Vec<_> = (0..8).map(|_| scope.spawn(|| SnapshotStore::open(&root))).collect();
        opening.into_iter().map(|handle| handle.join().unwrap().unwrap()).collect()
    });
    seal(&stores[0], "one").unwrap();
    for store in &stores {
        store.get("one").unwrap();
    }
}

#[test]
fn many_threads_make_use_and_remove_one_snapshot() {
    let (_folder, store) = store();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..20 {
                    // Where another thread removes it between the two steps of this one.
                    match seal(&store, "one") {
                        Ok(sealed) => assert_eq!(sealed.detail, json!({"of": "one"})),
                        Err(error) => expect_gone(&error),
                    }
                    if let Err(error) = store.get("one") {
                        expect_gone(&error);
                    }
                    store.remove("one").unwrap();
                }
            });
        }
    });
    assert_eq!(left_over(&store), Vec::<PathBuf>::new());
}

/// What the user of a snapshot that is removed under him may be told.
fn expect_gone(error: &SnapshotError) {
    let code = error.code();
    assert!(matches!(code, "snapshot_not_found" | "snapshot_damaged" | "snapshot_io"), "{error}");
}

#[test]
fn full_disk_at_any_step_leaves_nothing() {
    let mut failed = 0;
    for step in 0.. {
        let (_folder, store) = store();
        arm(step, Fault::DiskFull);
        let result = seal(&store, "one");
        arm(u32::MAX, Fault::DiskFull);
        match result {
            Ok(_) => break,
            Err(error) => {
                assert_eq!(error.code(), "no_space", "{error}");
                failed += 1;
            }
        }
        assert_eq!(store.list().unwrap(), vec![]);
        assert_eq!(left_over(&store), Vec::<PathBuf>::new());
        seal(&store, "one").unwrap();
    }
    assert!(failed > 10, "{failed} steps");
}

/// Runs a test of this file in a process of its own, with a line for its input.
fn child(wrapper: &[&str], test: &str, input: &str) -> std::process::Output {
    let test = format!("{}::{test}", module_path!().split_once("::").unwrap().1);
    let binary = std::env::current_exe().unwrap();
    let mut words: Vec<_> = wrapper.iter().map(std::ffi::OsStr::new).collect();
    words.push(binary.as_os_str());
    let mut child = Command::new(words[0])
        .args(&words[1..])
        .args(["--exact", &test, "--ignored", "--nocapture", "--test-threads=1"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

fn input_line() -> String {
    let mut line = String::new();
    io::stdin().read_line(&mut line).unwrap();
    line.trim_end().to_owned()
}

#[test]
#[ignore = "the child of the next test; does nothing by itself"]
fn child_that_dies() {
    let line = input_line();
    let Some((step, root)) = line.split_once(' ') else { return };
    arm(step.parse().unwrap(), Fault::Kill);
    let store = SnapshotStore::open(root).unwrap();
    seal(&store, "one").unwrap();
    seal(&store, "two").unwrap();
    store.remove("one").unwrap();
}

#[test]
fn death_at_any_step_leaves_a_whole_snapshot_or_none() {
    let mut seen = BTreeMap::new();
    for step in 0..100 {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("snapshots");
        let output = child(&["env"], "child_that_dies", &format!("{step} {}\n", root.display()));
        let store = SnapshotStore::open(&root).unwrap();
        let ids: Vec<_> = store.list().unwrap().into_iter().map(|entry| entry.id).collect();
        for id in &ids {
            assert_eq!(store.get(id).unwrap().detail, json!({"of": id}), "step {step}");
        }
        assert_eq!(left_over(&store), Vec::<PathBuf>::new(), "step {step}");
        seal(&store, "three").unwrap();
        *seen.entry(ids).or_insert(0) += 1;
        if output.status.success() {
            break;
        }
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.to_string().contains("signal: 9"), "{} {told}", output.status);
    }
    // Before the first, between the two, with both, and when the first was removed.
    let names = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
    let states: Vec<_> = seen.keys().cloned().collect();
    assert_eq!(states, [names(&[]), names(&["one"]), names(&["one", "two"]), names(&["two"])]);
    assert!(seen[&names(&[])] > 10, "{seen:?}");
}

#[test]
#[ignore = "the child of the next test; does nothing by itself"]
fn child_with_a_small_disk() {
    let line = input_line();
    let Some((kind, root)) = line.split_once(' ') else { return };
    let disk = Path::new(root).join("disk");
    let mount = if kind == "tmpfs" {
        ["-t", "tmpfs", "-o", "size=4m", "none"].map(str::to_owned).to_vec()
    } else {
        let image = Path::new(root).join("image").display().to_string();
        File::create_new(&image).unwrap().set_len(4 << 20).unwrap();
        let made = Command::new("/usr/sbin/mkfs.ext4").args(["-q", &image]).status().unwrap();
        assert!(made.success());
        ["-o", "loop", &image].map(str::to_owned).to_vec()
    };
    fs::create_dir(&disk).unwrap();
    assert!(Command::new("mount").args(mount).arg(&disk).status().unwrap().success());
    fill_and_seal(&disk);
}

fn fill_and_seal(disk: &Path) {
    let store = SnapshotStore::open(disk.join("snapshots")).unwrap();
    for round in 0..3 {
        let draft = store.draft("one").unwrap();
        let file = File::create_new(draft.path().join("memory")).unwrap();
        let mut offset = 0;
        let error = loop {
            match file.write_at(&[1; 512], offset) {
                Ok(count) => offset += count as u64,
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        let error = store.seal(draft, json!("x".repeat(200_000))).unwrap_err();
        assert_eq!(error.code(), "no_space", "{round}: {error}");
        assert_eq!(left_over(&store), Vec::<PathBuf>::new());
        assert_eq!(store.list().unwrap(), vec![]);
    }
    let draft = store.draft("one").unwrap();
    fs::write(draft.path().join("memory"), b"fits").unwrap();
    store.seal(draft, Value::Null).unwrap();
}

#[test]
fn full_disk_is_told_and_leaves_nothing() {
    for kind in ["tmpfs", "ext4"] {
        let folder = tempfile::tempdir().unwrap();
        // The mount is the child's own, and ends with it.
        let wrapper = ["unshare", "--mount", "--propagation", "private"];
        if !Command::new(wrapper[0]).args(&wrapper[1..]).arg("true").status().unwrap().success() {
            println!("skipped: mounts of its own need root");
            return;
        }
        let input = format!("{kind} {}\n", folder.path().display());
        let output = child(&wrapper, "child_with_a_small_disk", &input);
        let told = String::from_utf8_lossy(&output.stderr).into_owned()
            + &String::from_utf8_lossy(&output.stdout);
        if told.contains("failed to setup loop device") {
            println!("skipped: no loop device on this host");
            continue;
        }
        assert!(output.status.success() && told.contains("1 passed"), "{kind}: {told}");
    }
}
