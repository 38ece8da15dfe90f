//! The tools of a machine, whatever its VMM: where their layers are on the layers device, and the
//! links to their files that make the machine independent of where they came from.
//!
//! ```text
//!   DATA/layers/ID/tool.0.erofs   links; of the worker's user, so that no VMM can reach them
//!   DATA/layers/ID/tool.1.erofs
//!   device   1 MiB │ tool.0 ... │ tool.1 ... │ zeros to 64 GiB
//! ```
//!
//! A layer's place follows from the lengths of those before it alone. So it is the same for a
//! machine, its snapshot and every clone, and layers that are added later do not move it.

use std::{
    fs::{self, File},
    io::{self, Read as _},
    os::{
        fd::OwnedFd,
        unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use aether_protocol::{
    Layer,
    limits::{LAYER_ALIGN_BYTES, LAYER_NAME_BYTES_MAX, LAYERS_DEVICE_BYTES, LAYERS_MAX},
};
use aether_types::MachineId;

use crate::{
    DriverError, LayerFile,
    host::{Host, Record, file_error, remove_file},
    links::keep_file,
};

/// One set is made at a time, and linked before it could be taken for unused.
static COMPOSING: Mutex<()> = Mutex::new(());

/// Of erofs, and what every kernel asks of a partition.
const BLOCK_BYTES: u64 = 4096;
/// A builder's result, in its machine's directory: its user writes it.
pub(crate) const OUTPUT_FILE: &str = "output.img";

/// Where each layer is on the layers device, from the lowest to the highest: what the guest is
/// told.
pub fn layer_places(layers: &[LayerFile]) -> Result<Vec<Layer>, DriverError> {
    if layers.len() > LAYERS_MAX {
        let detail = format!("{} layers; at most {LAYERS_MAX} can be attached", layers.len());
        return Err(DriverError::Layers(detail));
    }
    // Nothing is before the first: there the guest's kernel looks for a table of partitions.
    let mut offset = LAYER_ALIGN_BYTES;
    let mut places = Vec::with_capacity(layers.len());
    for LayerFile { name, bytes, .. } in layers {
        let end = offset.checked_add(*bytes).filter(|end| *end <= LAYERS_DEVICE_BYTES);
        let Some(end) = end else {
            let detail = format!("{name}: all layers have more than {LAYERS_DEVICE_BYTES} bytes");
            return Err(DriverError::Layers(detail));
        };
        if *bytes == 0 || !bytes.is_multiple_of(BLOCK_BYTES) {
            return Err(DriverError::Layers(format!("{name}: {bytes} bytes are no layer")));
        }
        let name: String = name.chars().take(LAYER_NAME_BYTES_MAX / 4).collect();
        places.push(Layer { name, offset, length: *bytes });
        offset = end.next_multiple_of(LAYER_ALIGN_BYTES);
    }
    Ok(places)
}

/// Whether these are the beginning of those, whatever their paths.
pub(crate) fn begin_with(layers: &[LayerFile], first: &[LayerFile]) -> bool {
    let is_same = |(a, b): (&LayerFile, &LayerFile)| a.digest == b.digest && a.bytes == b.bytes;
    layers.len() >= first.len() && layers.iter().zip(first).all(is_same)
}

pub(crate) fn file_name(number: usize) -> String {
    format!("tool.{number}.erofs")
}

fn path_of(host: &Host, id: MachineId, number: usize) -> PathBuf {
    host.layers(id).join(file_name(number))
}

/// Makes links to layers, the first of which has the number `first`.
pub(crate) fn keep(
    host: &Host,
    id: MachineId,
    first: usize,
    layers: &[LayerFile],
) -> Result<(), DriverError> {
    if layers.is_empty() {
        return Ok(());
    }
    host.make_layers_folder(id)?;
    for (number, layer) in layers.iter().enumerate() {
        let to = path_of(host, id, first + number);
        // Of an attempt that did not come to use it: it may be of another layer.
        remove_file(&to)?;
        keep_file(&layer.path, &to)?;
        drop(open_whole(&to, layer)?);
    }
    Ok(())
}

/// Puts links to all layers of a machine into a snapshot.
pub(crate) fn keep_in_snapshot(
    host: &Host,
    id: MachineId,
    count: usize,
    into: &Path,
) -> Result<(), DriverError> {
    (0..count)
        .try_for_each(|number| keep_file(&path_of(host, id, number), &into.join(file_name(number))))
}

/// What a snapshot's description says of its layers.
pub(crate) fn in_snapshot(layers: &[LayerFile]) -> Vec<LayerFile> {
    let named = |(number, layer): (usize, &LayerFile)| LayerFile {
        path: file_name(number).into(),
        ..layer.clone()
    };
    layers.iter().enumerate().map(named).collect()
}

/// All layers of a machine as the one file that some VMMs want: made once for a list of layers,
/// shared where the file system can, else a copy that all machines with the list have links to.
pub(crate) fn compose(host: &Host, record: &Record) -> Result<(), DriverError> {
    let (id, layers) = (record.spec.id, &record.spec.layers);
    let mut list = blake3::Hasher::new();
    for layer in layers {
        list.update(&layer.bytes.to_le_bytes()).update(layer.digest.as_bytes()).update(b"\n");
    }
    let set = host.toolsets().join(format!("{}.img", list.finalize().to_hex()));
    // Nothing panics while the lock is held, but for the whole program's sake.
    let _one = COMPOSING.lock().unwrap_or_else(PoisonError::into_inner);
    if !set.exists() {
        remove_unused_sets(host)?;
        let places = layer_places(layers)?;
        let parts = layers.iter().zip(&places).enumerate().map(|(number, (layer, at))| {
            Ok((open(host, id, number, layer)?, at.offset, at.length))
        });
        let parts = parts.collect::<Result<Vec<_>, DriverError>>()?;
        let half = set.with_extension("part");
        let failed = |error| DriverError::Io {
            action: "put the layers of tools together".to_owned(),
            source: io::Error::other(error),
        };
        aether_images::compose(&half, LAYERS_DEVICE_BYTES, &parts).map_err(failed)?;
        let done = fs::set_permissions(&half, fs::Permissions::from_mode(0o444))
            .and_then(|()| fs::rename(&half, &set));
        done.map_err(|e| file_error("make", &set, e))?;
    }
    let to = composed(host, id);
    remove_file(&to)?;
    host.make_layers_folder(id)?;
    keep_file(&set, &to)
}

/// Where a machine has its layers as one file.
pub(crate) fn composed(host: &Host, id: MachineId) -> PathBuf {
    host.layers(id).join("tools.img")
}

/// Removes what no machine has a link to, and what was never whole, while nothing is being made.
pub(crate) fn remove_unused_sets(host: &Host) -> Result<(), DriverError> {
    use std::os::unix::fs::MetadataExt as _;
    let folder = host.toolsets();
    for entry in fs::read_dir(&folder).map_err(|e| file_error("read", &folder, e))? {
        let path = entry.map_err(|e| file_error("read", &folder, e))?.path();
        let links = fs::symlink_metadata(&path).map_or(0, |meta| meta.nlink());
        let is_whole = path.extension().is_some_and(|extension| extension == "img");
        if links < 2 || !is_whole {
            remove_file(&path)?;
        }
    }
    Ok(())
}

/// Opens a machine's own link to a layer, for a VMM to read.
pub(crate) fn open(
    host: &Host,
    id: MachineId,
    number: usize,
    layer: &LayerFile,
) -> Result<File, DriverError> {
    open_whole(&path_of(host, id, number), layer)
}

fn open_whole(path: &Path, layer: &LayerFile) -> Result<File, DriverError> {
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
        .map_err(|e| file_error("open the layer", path, e))?;
    let length = file.metadata().map_err(|e| file_error("look at", path, e))?.len();
    if length == layer.bytes {
        return Ok(file);
    }
    Err(DriverError::Layers(format!(
        "{}: its file {} has {length} bytes and not {}",
        layer.name,
        path.display(),
        layer.bytes
    )))
}

/// Makes a builder's output disk, for its user.
pub(crate) fn make_output(host: &Host, record: &Record) -> Result<(), DriverError> {
    let Some(mb) = record.spec.output_mb else { return Ok(()) };
    let path = host.directory(record.spec.id).join(OUTPUT_FILE);
    remove_file(&path)?;
    File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)
        .and_then(|file| file.set_len(u64::from(mb) << 20))
        .map_err(|e| file_error("make the output disk", &path, e))?;
    host.give(&path, record)
}

/// Copies what a builder made. Its VMM's user may have put anything in the place of the file.
pub(crate) fn take_output(from: &Path, into: &Path, bytes: u64) -> Result<(), DriverError> {
    let source = File::options()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(from)
        .map_err(|e| file_error("open", from, e))?;
    let meta = source.metadata().map_err(|e| file_error("look at", from, e))?;
    if !meta.is_file() || meta.len() < bytes {
        let detail = "it is not the file that it was, or shorter than said".to_owned();
        return Err(DriverError::Damaged { path: from.to_owned(), detail });
    }
    let mut target = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(into)
        .map_err(|e| file_error("make", into, e))?;
    let copied = io::copy(&mut source.take(bytes), &mut target).and_then(|copied| {
        if copied == bytes { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    });
    copied.map_err(|error| {
        // Half of a layer is worse than none.
        let _ = fs::remove_file(into);
        file_error("copy the output disk to", into, error)
    })
}

/// A file in memory, written by `write` and then by nobody, opened for reading.
pub(crate) fn frozen_memory(
    write: impl FnOnce(&File) -> io::Result<()>,
) -> Result<OwnedFd, DriverError> {
    use rustix::fs::{MemfdFlags, SealFlags};
    let make = || -> io::Result<OwnedFd> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(rustix::fs::memfd_create(c"vmm-layers", flags)?);
        write(&file)?;
        // The VMM's user is not ours: it opens what it is given, and no more.
        file.set_permissions(fs::Permissions::from_mode(0o444))?;
        let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&file, seals)?;
        use std::os::fd::AsRawFd as _;
        Ok(File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?.into())
    };
    make().map_err(|source| DriverError::Io {
        action: "make a file in memory for the places of layers".to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use std::slice::from_ref;

    use super::*;

    fn layer(digest: &str, bytes: u64) -> LayerFile {
        LayerFile {
            name: format!("{digest}@1"),
            path: "/none".into(),
            digest: digest.into(),
            bytes,
        }
    }

    #[test]
    fn a_place_hangs_on_the_layers_before_it_alone() {
        let mib = LAYER_ALIGN_BYTES;
        let few = [layer("a", 4096), layer("b", mib), layer("c", mib + 4096)];
        let places = layer_places(&few).unwrap();
        let offsets: Vec<u64> = places.iter().map(|place| place.offset).collect();
        assert_eq!(offsets, [mib, 2 * mib, 3 * mib]);
        let more: Vec<_> = few.iter().cloned().chain([layer("d", 4096)]).collect();
        let more = layer_places(&more).unwrap();
        assert_eq!(more[..3], places);
        assert_eq!(more[3].offset, 5 * mib);
    }

    #[test]
    fn what_does_not_fit_the_device_is_refused() {
        for layers in [
            vec![layer("a", 0)],
            vec![layer("a", 100)],
            vec![layer("a", LAYERS_DEVICE_BYTES)],
            vec![layer("a", u64::MAX - 4095)],
            vec![layer("a", 4096); LAYERS_MAX + 1],
        ] {
            assert!(matches!(layer_places(&layers), Err(DriverError::Layers(_))), "{layers:?}");
        }
    }

    #[test]
    fn layers_are_what_their_digests_say() {
        let (a, b) = (layer("a", 4096), layer("b", 4096));
        let elsewhere = LayerFile { path: "/other".into(), ..a.clone() };
        assert!(begin_with(&[a.clone(), b.clone()], &[elsewhere]));
        assert!(begin_with(from_ref(&a), &[]));
        assert!(!begin_with(from_ref(&a), &[a.clone(), b.clone()]));
        assert!(!begin_with(&[a.clone(), b.clone()], &[b]));
        assert!(!begin_with(from_ref(&a), &[LayerFile { bytes: 8192, ..a.clone() }]));
    }

    #[test]
    fn output_is_copied_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path("output"), b"layer and rest").unwrap();
        take_output(&path("output"), &path("copy"), 5).unwrap();
        assert_eq!(fs::read(path("copy")).unwrap(), b"layer");
        assert!(take_output(&path("output"), &path("copy"), 5).is_err(), "it is there");
        assert!(take_output(&path("output"), &path("other"), 50).is_err(), "too short");
        std::os::unix::fs::symlink(path("output"), path("link")).unwrap();
        assert!(take_output(&path("link"), &path("other"), 5).is_err(), "a link");
        assert!(!path("other").exists());
    }
}
