use std::os::unix::fs::MetadataExt;
use std::{fs, io};

use super::*;
use crate::KernelFlavour;

/// Parts with nothing in them. A whole build takes root, the network and a minute: it is tried with
/// `examples/build-image.rs`, and by the tests with real guests.
fn parts_of(store: &ImageStore) -> (KernelParts, rootfs::Rootfs) {
    let blob = |bytes: &[u8]| store.blobs.put_bytes(bytes).unwrap();
    let kernel = KernelParts {
        vmlinux: blob(b"vmlinux"),
        flavour: KernelFlavour::Debian,
        version: "6.1".to_owned(),
        modules: Some(blob(b"")),
        module_layer: None,
    };
    (kernel, rootfs::Rootfs { blob: blob(b"rootfs"), packages: vec!["git=1".to_owned()] })
}

#[test]
fn same_parts_give_the_image_that_there_is_and_a_new_agent_a_new_one() {
    let folder = tempfile::tempdir().unwrap();
    let store = ImageStore::open(folder.path()).unwrap();
    let (kernel, rootfs) = parts_of(&store);
    let request = BuildRequest::new("agent");
    let assemble = |agent: &[u8]| {
        let progress = &|_: &str| ();
        let parts = Parts { store: &store, request: &request, agent, rootfs: &rootfs, progress };
        parts.assemble("debian", &kernel).unwrap()
    };
    let first = assemble(b"one");
    assert_eq!(assemble(b"one"), first);
    let second = assemble(b"two");
    assert_ne!(second.initrd, first.initrd);
    assert_eq!(second.rootfs, first.rootfs);
    assert_eq!(store.get("debian").unwrap(), second);
    // A blob that went away is made again.
    fs::remove_file(store.resolve("debian").unwrap().initrd).unwrap();
    assemble(b"two");
    store.resolve("debian").unwrap();
}

#[test]
fn stage_is_made_again_when_its_blob_is_damaged() {
    let folder = tempfile::tempdir().unwrap();
    let store = ImageStore::open(folder.path()).unwrap();
    let key = stage::key(&(1, "x")).unwrap();
    assert_eq!(stage::find::<String>(&store, "kernel", &key).unwrap(), None);
    let blob = store.blobs.put_bytes(b"content").unwrap();
    stage::keep(&store, "kernel", &key, &[&blob], &"made").unwrap();
    assert_eq!(stage::find::<String>(&store, "kernel", &key).unwrap().as_deref(), Some("made"));
    let other = stage::key(&(2, "x")).unwrap();
    assert_eq!(stage::find::<String>(&store, "kernel", &other).unwrap(), None);

    let path = store.blobs.path(&blob.digest);
    fs::remove_file(&path).unwrap();
    fs::write(&path, b"cOntent").unwrap();
    assert_eq!(stage::find::<String>(&store, "kernel", &key).unwrap(), None);
    // Made again, it takes the place of the damaged one.
    store.blobs.put_bytes(b"content").unwrap();
    assert!(stage::find::<String>(&store, "kernel", &key).unwrap().is_some());

    store.prune(&[]).unwrap();
    assert_eq!(crate::store::file_names(&store.folder("stages")).unwrap(), Vec::<String>::new());
}

#[test]
fn requests_that_would_be_read_as_something_else_are_refused() {
    let good = BuildRequest::new("agent");
    good.check().unwrap();
    let bad = [
        BuildRequest { suite: "--help".to_owned(), ..good.clone() },
        BuildRequest { suite: "a b".to_owned(), ..good.clone() },
        BuildRequest { packages: vec!["git,curl".to_owned()], ..good.clone() },
        BuildRequest { packages: vec![String::new()], ..good.clone() },
        BuildRequest {
            mirror: Some(Mirror { archive: "http://a b".to_owned(), security: "x://y".to_owned() }),
            ..good
        },
    ];
    for request in bad {
        assert_eq!(request.check().unwrap_err().code(), "image_build_request_invalid");
    }
}

#[test]
fn agent_that_is_missing_or_no_executable_is_refused_before_anything_is_done() {
    let folder = tempfile::tempdir().unwrap();
    let store = ImageStore::open(folder.path().join("store")).unwrap();
    let agent = folder.path().join("agent");
    let error = store.build(&BuildRequest::new(&agent), &|_| ()).unwrap_err();
    assert!(
        matches!(&error, ImageError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    );
    fs::write(&agent, "#!/bin/sh\n").unwrap();
    let error = store.build(&BuildRequest::new(&agent), &|_| ()).unwrap_err();
    assert_eq!(error.code(), "image_agent_unusable");
    assert_eq!(fs::metadata(store.folder("lock")).unwrap().size(), 0);
}
