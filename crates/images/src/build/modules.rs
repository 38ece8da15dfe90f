//! The driver modules that the guest needs before it has a root file system.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use super::initramfs::MODULE_ORDER;
use super::kernel::decompress_file;
use super::rootfs::EPOCH;
use crate::ImageError;
use crate::cpio::Segment;
use crate::program::{Program, read};

/// What is wanted; what these depend on comes by itself, and what is built in is left out.
///
/// `virtio-rng` comes early: without it the guest's first read of random bytes waits for a second
/// under emulation. `pvpanic-mmio` tells QEMU of a guest's panic. By the two last the agent ends the
/// connections that a clone has from its source.
pub(super) const WANTED: [&str; 11] = [
    "virtio_mmio",
    "virtio-rng",
    "pvpanic-mmio",
    "virtio_blk",
    "virtio_net",
    "vmw_vsock_virtio_transport",
    "overlay",
    "erofs",
    "ext4",
    "tcp_diag",
    "udp_diag",
];

/// Of the layer with all modules: equal modules give equal bytes.
const UUID: &str = "ae7e0000-0000-4000-8000-0000000000f7";

const SIGNATURE_MARK: &[u8] = b"~Module signature appended~\n";
/// The block between signature and mark; its last four bytes are the signature's length.
const SIGNATURE_BLOCK: usize = 12;

/// The part of the initramfs with the modules in the order to load them.
pub(crate) fn segment(tree: &Path, scratch: &Path) -> Result<Vec<u8>, ImageError> {
    let built_in = fs::read_to_string(tree.join("modules.builtin"))
        .map_err(ImageError::io("read", tree.join("modules.builtin")))?;
    let mut modules = Modules {
        scratch,
        files: files(&tree.join("kernel"))?,
        built_in: built_in.lines().map(|line| module_name(Path::new(line))).collect(),
        ordered: Vec::new(),
        seen: BTreeSet::new(),
    };
    for name in WANTED {
        modules.add(&key(name), tree)?;
    }
    let mut segment = Segment::default();
    segment.directory("modules", 0o755);
    let mut order = String::new();
    for (index, (name, bytes)) in modules.ordered.iter().enumerate() {
        let file = format!("{index:02}-{name}.ko");
        segment.file(&format!("modules/{file}"), 0o644, bytes);
        order.push_str(&file);
        order.push('\n');
    }
    segment.file(MODULE_ORDER, 0o644, order.as_bytes());
    Ok(segment.into_bytes())
}

/// Packs all modules of a tree as a layer of `/usr`; returns its file, in the scratch folder.
///
/// Compressed, it takes 33 MiB instead of 88, and a guest reads few of them.
pub(crate) fn layer(tree: &Path, version: &str, scratch: &Path) -> Result<PathBuf, ImageError> {
    let usr = scratch.join("module-layer/usr");
    let folder = usr.join("lib/modules").join(version);
    fs::create_dir_all(&folder).map_err(ImageError::io("make the folder", &folder))?;
    for name in ["modules.builtin", "modules.builtin.modinfo", "modules.order"] {
        let (from, to) = (tree.join(name), folder.join(name));
        match fs::copy(&from, to) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(ImageError::io("copy", from)(error));
            }
            Ok(_) | Err(_) => {}
        }
    }
    for path in files(&tree.join("kernel"))?.values() {
        let bytes = match path.extension().and_then(|extension| extension.to_str()) {
            Some("ko") => read(path)?,
            _ => decompress_file(path, scratch)?,
        };
        let mut module = without_signature(&bytes).to_vec();
        hide_types(&mut module);
        let inside = path.strip_prefix(tree).unwrap_or(path);
        // `name.ko.xz` is `name.ko` now, and `name.ko` is itself.
        let inside = match inside.extension() {
            Some(extension) if extension != "ko" => folder.join(inside).with_extension(""),
            Some(_) | None => folder.join(inside),
        };
        if let Some(parent) = inside.parent() {
            fs::create_dir_all(parent).map_err(ImageError::io("make the folder", parent))?;
        }
        fs::write(&inside, module).map_err(ImageError::io("write", &inside))?;
    }
    Program::new("depmod", "kmod")?.arg("-b").arg(&usr).arg(version).output()?;
    let file = scratch.join("modules.erofs");
    Program::new("mkfs.erofs", "erofs-utils")?
        .env("SOURCE_DATE_EPOCH", EPOCH)
        .args(["-T", EPOCH, "-U", UUID, "-zlz4hc", "--all-root"])
        .arg(&file)
        .arg(scratch.join("module-layer"))
        .output()?;
    Ok(file)
}

struct Modules<'a> {
    scratch: &'a Path,
    files: BTreeMap<String, PathBuf>,
    built_in: BTreeSet<String>,
    /// Name and content, dependencies first.
    ordered: Vec<(String, Vec<u8>)>,
    seen: BTreeSet<String>,
}

impl Modules<'_> {
    fn add(&mut self, name: &str, tree: &Path) -> Result<(), ImageError> {
        if self.built_in.contains(name) || !self.seen.insert(name.to_owned()) {
            return Ok(());
        }
        let Some(path) = self.files.get(name).cloned() else {
            let reason = format!("it has no module {name}, built in or not");
            return Err(ImageError::Kernel { path: tree.to_owned(), reason });
        };
        let bytes = match path.extension().and_then(|extension| extension.to_str()) {
            Some("ko") => read(&path)?,
            _ => decompress_file(&path, self.scratch)?,
        };
        let Some(depends) = dependencies(&bytes) else {
            let reason = "it is not an ELF file that says what it depends on".to_owned();
            return Err(ImageError::Kernel { path, reason });
        };
        for depend in depends {
            self.add(&key(&depend), tree)?;
        }
        let mut module = without_signature(&bytes).to_vec();
        hide_types(&mut module);
        self.ordered.push((name.to_owned(), module));
        Ok(())
    }
}

/// The modules of a tree by name.
fn files(folder: &Path) -> Result<BTreeMap<String, PathBuf>, ImageError> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        let entries = fs::read_dir(&folder).map_err(ImageError::io("list", &folder))?;
        for entry in entries {
            let entry = entry.map_err(ImageError::io("list", &folder))?;
            let kind = entry.file_type().map_err(ImageError::io("examine", entry.path()))?;
            let path = entry.path();
            if kind.is_dir() {
                folders.push(path);
            } else if path.file_name().is_some_and(|name| name.to_string_lossy().contains(".ko")) {
                found.insert(module_name(&path), path);
            }
        }
    }
    Ok(found)
}

/// `drivers/char/hw_random/virtio-rng.ko.xz` is `virtio_rng`, as the kernel itself calls it.
fn module_name(path: &Path) -> String {
    let file = path.file_name().unwrap_or_default().to_string_lossy();
    key(file.split_once(".ko").map_or(&*file, |(name, _)| name))
}

fn key(name: &str) -> String {
    name.replace('-', "_")
}

/// Nothing is gained by the kernel's check of the signature: the initramfs itself is what is
/// trusted, and it has the program that runs as init.
fn without_signature(bytes: &[u8]) -> &[u8] {
    let Some(rest) = bytes.strip_suffix(SIGNATURE_MARK) else { return bytes };
    let Some((_, length)) = rest.split_last_chunk::<4>() else { return bytes };
    usize::try_from(u32::from_be_bytes(*length))
        .ok()
        .and_then(|length| rest.len().checked_sub(SIGNATURE_BLOCK + length))
        .map_or(bytes, |end| &rest[..end])
}

/// Renames the section with type data, so that the kernel does not look for it. Emulated guests
/// skip the kernel's own type data to boot faster, and each module with some would then print a
/// warning with a stack trace.
fn hide_types(module: &mut [u8]) {
    // A linker lets it share the end of a longer name, such as that of its relocations.
    const NAME: &[u8] = b".BTF\0";
    let Some(names) = section(module, b".shstrtab") else { return };
    let Some(at) = names.windows(NAME.len()).position(|name| name == NAME) else { return };
    let start = names.as_ptr().addr() - module.as_ptr().addr();
    module[start + at..][..NAME.len() - 1].copy_from_slice(b".btf");
}

/// What the `.modinfo` section says after `depends=`.
fn dependencies(module: &[u8]) -> Option<Vec<String>> {
    let info = section(module, b".modinfo")?;
    let depends =
        info.split(|byte| *byte == 0).find_map(|entry| entry.strip_prefix(b"depends="))?;
    let names = str::from_utf8(depends).ok()?;
    Some(names.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect())
}

/// A section of a little-endian 64-bit ELF file.
fn section<'a>(elf: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let number = |bytes: &[u8], at: usize, size: usize| -> Option<usize> {
        let mut wide = [0; 8];
        wide.get_mut(..size)?.copy_from_slice(bytes.get(at..at.checked_add(size)?)?);
        usize::try_from(u64::from_le_bytes(wide)).ok()
    };
    if elf.get(..6)? != b"\x7fELF\x02\x01" {
        return None;
    }
    let table = number(elf, 0x28, 8)?;
    let (size, count, names) =
        (number(elf, 0x3a, 2)?, number(elf, 0x3c, 2)?, number(elf, 0x3e, 2)?);
    let header = |index: usize| elf.get(table.checked_add(index * size)?..);
    let content = |header: &[u8]| {
        let start = number(header, 0x18, 8)?;
        elf.get(start..start.checked_add(number(header, 0x20, 8)?)?)
    };
    let names = content(header(names)?)?;
    (0..count).filter_map(header).find_map(|header| {
        let start = number(header, 0, 4)?;
        let found = names.get(start..)?.split(|byte| *byte == 0).next()?;
        if found == name { content(header) } else { None }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A module with nothing in it but its dependencies, and a signature.
    fn module(depends: &str) -> Vec<u8> {
        let info = format!("license=GPL\0depends={depends}\0");
        let names = b"\0.modinfo\0.shstrtab\0";
        let table = 64 + info.len() + names.len();
        let mut elf = vec![0; 64];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[0x28..0x30].copy_from_slice(&(table as u64).to_le_bytes());
        elf[0x3a] = 64;
        elf[0x3c] = 3;
        elf[0x3e] = 2;
        elf.extend_from_slice(info.as_bytes());
        elf.extend_from_slice(names);
        for (name, start, length) in
            [(0u32, 0, 0), (1, 64, info.len()), (10, 64 + info.len(), names.len())]
        {
            let mut header = [0; 64];
            header[..4].copy_from_slice(&name.to_le_bytes());
            header[0x18..0x20].copy_from_slice(&(start as u64).to_le_bytes());
            header[0x20..0x28].copy_from_slice(&(length as u64).to_le_bytes());
            elf.extend_from_slice(&header);
        }
        elf.extend_from_slice(b"SIGN");
        elf.extend_from_slice(&[0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 4]);
        elf.extend_from_slice(SIGNATURE_MARK);
        elf
    }

    fn tree(modules: &[(&str, &str)], built_in: &str) -> tempfile::TempDir {
        let tree = tempfile::tempdir().unwrap();
        fs::create_dir_all(tree.path().join("kernel/drivers")).unwrap();
        for (name, depends) in modules {
            let path = tree.path().join("kernel/drivers").join(format!("{name}.ko"));
            fs::write(path, module(depends)).unwrap();
        }
        fs::write(tree.path().join("modules.builtin"), built_in).unwrap();
        tree
    }

    const USUAL: [(&str, &str); 13] = [
        ("virtio_mmio", "virtio,virtio_ring"),
        ("virtio", "virtio_ring"),
        ("virtio_ring", ""),
        ("virtio-rng", "virtio"),
        ("pvpanic-mmio", ""),
        ("virtio_blk", "virtio"),
        ("virtio_net", "virtio"),
        ("vmw_vsock_virtio_transport", "virtio"),
        ("overlay", ""),
        ("erofs", ""),
        ("inet_diag", ""),
        ("tcp_diag", "inet_diag"),
        ("udp_diag", "inet_diag"),
    ];

    #[test]
    fn modules_come_after_what_they_depend_on() {
        let tree = tree(&USUAL, "kernel/fs/ext4/ext4.ko\n");
        let bytes = segment(tree.path(), tree.path()).unwrap();
        let text = String::from_utf8_lossy(&bytes);
        let order = text.rsplit_once("modules/order\0").unwrap().1.trim_matches('\0');
        assert_eq!(
            order,
            "00-virtio_ring.ko\n01-virtio.ko\n02-virtio_mmio.ko\n03-virtio_rng.ko\n\
             04-pvpanic_mmio.ko\n05-virtio_blk.ko\n06-virtio_net.ko\n\
             07-vmw_vsock_virtio_transport.ko\n08-overlay.ko\n09-erofs.ko\n\
             10-inet_diag.ko\n11-tcp_diag.ko\n12-udp_diag.ko\n"
        );
        assert!(!text.contains("Module signature"), "signatures are left out");
    }

    #[test]
    fn missing_module_is_named() {
        let tree = tree(&USUAL, "");
        let error = segment(tree.path(), tree.path()).unwrap_err();
        assert_eq!(error.code(), "image_kernel_unusable");
        assert!(error.to_string().contains("no module ext4"), "{error}");
    }

    #[test]
    fn type_data_is_hidden_and_the_rest_is_as_it_was() {
        let mut whole = module("virtio");
        let before = whole.clone();
        hide_types(&mut whole);
        assert_eq!(whole, before, "there is nothing to hide");
        // A module whose names have one more: in the place of `.modinfo`.
        let names = before.windows(10).position(|w| w == b"\0.modinfo\0").unwrap();
        whole[names + 1..names + 9].copy_from_slice(b".BTF\0abc");
        hide_types(&mut whole);
        assert!(section(&whole, b".BTF").is_none() && section(&whole, b".btf").is_some());
        for cut in 0..whole.len() {
            hide_types(&mut whole[..cut]);
        }
    }

    #[test]
    fn cut_module_does_not_panic() {
        let whole = module("virtio,virtio_ring");
        assert_eq!(dependencies(&whole).unwrap(), ["virtio", "virtio_ring"]);
        for cut in 0..whole.len() {
            let _ = dependencies(&whole[..cut]);
            let _ = without_signature(&whole[..cut]);
        }
        let lying = [&[0; 4], &u32::MAX.to_be_bytes()[..], SIGNATURE_MARK].concat();
        assert_eq!(without_signature(&lying), lying);
    }
}
