use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::{Blob, Kernel, KernelFlavour};

fn fake_image(store: &ImageStore, name: &str, rootfs: &[u8]) -> Image {
    let blob = |bytes: &[u8]| store.blobs.put_bytes(bytes).unwrap();
    let kernel: Blob = blob(b"kernel");
    let image = Image {
        digest: kernel.digest.clone(),
        name: name.to_owned(),
        created_at: "2026-01-02T03:04:05Z".parse().unwrap(),
        kernel: Kernel {
            blob: kernel,
            flavour: KernelFlavour::Debian,
            version: "6.1.0".to_owned(),
            modular: true,
            acpi: true,
        },
        initrd: blob(b"initrd"),
        rootfs: blob(rootfs),
        guest_agent: Digest::of_bytes(b"agent"),
        module_layer: None,
        modules: Some(blob(b"modules")),
        suite: "bookworm".to_owned(),
        packages: vec!["git=1".to_owned()],
        build_key: Digest::of_bytes(name.as_bytes()),
    };
    store.publish(&image).unwrap()
}

fn store() -> (tempfile::TempDir, ImageStore) {
    let folder = tempfile::tempdir().unwrap();
    let store = ImageStore::open(folder.path().join("images")).unwrap();
    (folder, store)
}

fn overwrite(path: &Path, bytes: &[u8]) {
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
    fs::write(path, bytes).unwrap();
}

#[test]
fn unknown_image_is_refused_with_the_known_names() {
    let (_folder, store) = store();
    assert!(store.get("debian").unwrap_err().to_string().contains("none has been built"));
    fake_image(&store, "debian", b"root");
    for name in ["ubuntu", "../images/debian", "", ".", "debian.json/", "a/b"] {
        let error = store.get(name).unwrap_err();
        assert_eq!(error.code(), "image_unknown", "{name}");
        assert!(error.to_string().contains("debian"), "{error}");
    }
}

#[test]
fn what_is_published_is_listed_and_resolved() {
    let (_folder, store) = store();
    let image = fake_image(&store, "debian", b"root");
    assert_eq!(store.list().unwrap(), vec![image.clone()]);
    let set = store.resolve("debian").unwrap();
    assert_eq!(fs::read(&set.rootfs).unwrap(), b"root");
    assert_eq!(fs::read(&set.kernel).unwrap(), b"kernel");
    assert_eq!(set.digest, image.digest.to_string());
    assert_eq!(fs::metadata(&set.rootfs).unwrap().permissions().mode() & 0o777, 0o444);
}

#[test]
fn damaged_blob_is_refused_and_named() {
    let (_folder, store) = store();
    let image = fake_image(&store, "debian", b"root");
    let path = store.resolve("debian").unwrap().rootfs;
    // Same length, and after a check that was remembered.
    overwrite(&path, b"rOot");
    let error = store.resolve("debian").unwrap_err();
    assert_eq!(error.code(), "image_blob_damaged");
    assert!(error.to_string().contains(image.rootfs.digest.hex()), "{error}");
    overwrite(&path, b"root");
    store.resolve("debian").unwrap();
    fs::remove_file(&path).unwrap();
    assert_eq!(store.resolve("debian").unwrap_err().code(), "image_blob_missing");
}

#[test]
fn unreadable_manifest_is_an_error_that_names_the_file() {
    let (_folder, store) = store();
    fs::write(store.manifest_path("debian"), "{").unwrap();
    let error = store.get("debian").unwrap_err();
    assert_eq!(error.code(), "image_manifest_unreadable");
    assert!(error.to_string().contains("debian.json"), "{error}");
}

#[test]
fn older_image_stays_reachable_by_digest_while_it_is_kept() {
    let (_folder, store) = store();
    let old = fake_image(&store, "debian", b"old root");
    let new = fake_image(&store, "debian", b"new root");
    assert_ne!(old.digest, new.digest);
    let pinned = format!("debian@{}", old.digest);
    assert_eq!(fs::read(store.resolve(&pinned).unwrap().rootfs).unwrap(), b"old root");

    assert_eq!(store.prune(std::slice::from_ref(&old.digest)).unwrap(), Pruned::default());
    store.resolve(&pinned).unwrap();

    let pruned = store.prune(&[]).unwrap();
    let mut expected = vec![old.rootfs.digest, old.digest];
    expected.sort();
    let mut removed = pruned.blobs.clone();
    removed.sort();
    assert_eq!(removed, expected);
    assert_eq!(store.get(&pinned).unwrap_err().code(), "image_unknown");
    assert_eq!(fs::read(store.resolve("debian").unwrap().rootfs).unwrap(), b"new root");
}

#[test]
fn pinned_image_stays_while_its_holder_exists() {
    let (folder, store) = store();
    let old = fake_image(&store, "debian", b"old root");
    fake_image(&store, "debian", b"new root");
    let name = format!("debian@{}", old.digest);
    let holder = folder.path().join("snapshot");
    store.pin(&holder, &old.digest).unwrap();
    // It is about to be made.
    assert_eq!(store.prune(&[]).unwrap(), Pruned::default());

    let pin = fs::read_dir(store.folder("pins"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.extension().is_some())
        .unwrap();
    let long_ago = std::time::SystemTime::now() - std::time::Duration::from_hours(2);
    File::open(&pin).unwrap().set_modified(long_ago).unwrap();
    fs::create_dir(&holder).unwrap();
    let half_written = store.folder("pins").join("file-1-1");
    fs::write(&half_written, "{").unwrap();
    assert_eq!(store.prune(&[]).unwrap(), Pruned::default());
    store.resolve(&name).unwrap();
    assert!(!half_written.exists());

    fs::remove_dir(&holder).unwrap();
    assert_eq!(store.prune(&[]).unwrap().blobs.len(), 2);
    assert!(!pin.exists());
    assert_eq!(store.get(&name).unwrap_err().code(), "image_unknown");
    let error = store.pin(&holder, &old.digest).unwrap_err();
    assert_eq!(error.code(), "image_blob_missing");
}

#[test]
fn one_builder_at_a_time() {
    let (_folder, store) = store();
    let lock = store.lock(&|_| ()).unwrap();
    let (told, waiting) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let other = scope.spawn(|| {
            let told = told;
            let other = ImageStore::open(store.root.clone()).unwrap();
            let _lock = other.lock(&|text| told.send(text.to_owned()).unwrap()).unwrap();
        });
        assert_eq!(waiting.recv().unwrap(), "wait for another builder");
        assert!(!other.is_finished());
        drop(lock);
    });
}

#[test]
fn prune_removes_what_a_dead_builder_left() {
    let (_folder, store) = store();
    fake_image(&store, "debian", b"root");
    let stale = store.folder("tmp").join("rootfs-1-1");
    fs::create_dir_all(stale.join("etc")).unwrap();
    fs::write(store.folder("tmp").join("blob-1-2"), "half").unwrap();
    store.prune(&[]).unwrap();
    assert_eq!(file_names(&store.folder("tmp")).unwrap(), Vec::<String>::new());
}
