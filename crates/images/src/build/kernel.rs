//! Kernels, as uncompressed ELF files: that is what boots fastest, and what Firecracker takes.

use std::fs::{self, File};
use std::path::Path;

use super::apt::{Apt, Sources};
use super::{BuildRequest, KernelParts, RECIPE, modules, stage};
use crate::blobs::remove_tree;
use crate::manifest::KernelFlavour;
use crate::program::{Program, read};
use crate::store::{ImageStore, file_names};
use crate::{Digest, ImageError};

/// Depends on the newest kernel of the suite that is made for virtual machines.
const META_PACKAGE: &str = "linux-image-cloud-amd64";
/// Longest kernel that is unpacked; Debian's has 51 MiB.
const VMLINUX_BYTES_MAX: usize = 512 << 20;

const LZ4_LEGACY: &[u8] = &[0x02, 0x21, 0x4c, 0x18];
const LZ4_BLOCK_MAX: usize = 8 << 20;

/// Debian's kernel with the modules that a guest starts with.
pub(crate) fn debian(
    store: &ImageStore,
    request: &BuildRequest,
    sources: &Sources,
    progress: &dyn Fn(&str),
) -> Result<KernelParts, ImageError> {
    let wanted = (META_PACKAGE, modules::WANTED);
    let key = stage::key(&(RECIPE, "kernel", &sources.suite, &sources.mirror, wanted))?;
    if !request.refresh
        && let Some(parts) = stage::find::<KernelParts>(store, "kernel", &key)?
    {
        return Ok(parts);
    }
    progress("fetch the kernel package");
    let scratch = store.blobs.scratch("kernel");
    let tree = scratch.join("tree");
    fs::create_dir_all(&tree).map_err(ImageError::io("make the folder", &tree))?;
    let apt = Apt::update(sources, scratch.join("apt"))?;
    let package = apt.dependency(META_PACKAGE, "linux-image-")?;
    apt.unpack(&package, &tree)?;

    progress("unpack the kernel");
    let boot = tree.join("boot");
    let name = file_names(&boot)?.into_iter().find(|name| name.starts_with("vmlinuz-"));
    let Some(name) = name else {
        return Err(ImageError::Kernel { path: boot, reason: "there is no vmlinuz".to_owned() });
    };
    let path = boot.join(&name);
    let version = name.trim_start_matches("vmlinuz-").to_owned();
    let vmlinux = extract(&path, &scratch)?;
    let folder = ["lib/modules", "usr/lib/modules"]
        .map(|folder| tree.join(folder).join(&version))
        .into_iter()
        .find(|folder| folder.is_dir())
        .unwrap_or_else(|| tree.join("lib/modules"));
    let segment = modules::segment(&folder, &scratch)?;
    progress("pack the kernel's modules");
    let module_layer = modules::layer(&folder, &version, &scratch)?;

    let parts = KernelParts {
        vmlinux: store.blobs.put_bytes(&vmlinux)?,
        flavour: KernelFlavour::Debian,
        version,
        modules: Some(store.blobs.put_bytes(&segment)?),
        module_layer: Some(store.blobs.put_file(&module_layer)?),
    };
    let blobs: Vec<_> =
        [&parts.vmlinux].into_iter().chain(&parts.modules).chain(&parts.module_layer).collect();
    stage::keep(store, "kernel", &key, &blobs, &parts)?;
    remove(&scratch)?;
    Ok(parts)
}

/// The test kernel, from its file.
pub(crate) fn test(
    store: &ImageStore,
    path: &Path,
    progress: &dyn Fn(&str),
) -> Result<KernelParts, ImageError> {
    let file = File::open(path).map_err(ImageError::io("open", path))?;
    let digest = Digest::of_file(&file).map_err(ImageError::io("read", path))?;
    let key = stage::key(&(RECIPE, "test-kernel", digest))?;
    if let Some(parts) = stage::find::<KernelParts>(store, "test-kernel", &key)? {
        return Ok(parts);
    }
    progress("unpack the test kernel");
    let scratch = store.blobs.scratch("test-kernel");
    fs::create_dir_all(&scratch).map_err(ImageError::io("make the folder", &scratch))?;
    let bytes = read(path)?;
    let vmlinux = if is_elf(&bytes) { bytes } else { decompress_file(path, &scratch)? };
    let unusable = |reason: &str| ImageError::Kernel { path: path.into(), reason: reason.into() };
    if !is_elf(&vmlinux) {
        return Err(unusable("it is not an ELF file, compressed or not"));
    }
    let version = banner_version(&vmlinux).ok_or_else(|| unusable("it has no version in it"))?;
    let parts = KernelParts {
        vmlinux: store.blobs.put_bytes(&vmlinux)?,
        flavour: KernelFlavour::FirecrackerTest,
        version,
        modules: None,
        module_layer: None,
    };
    stage::keep(store, "test-kernel", &key, &[&parts.vmlinux], &parts)?;
    remove(&scratch)?;
    Ok(parts)
}

/// Unpacks a file by the program that its first bytes ask for.
pub(crate) fn decompress_file(path: &Path, scratch: &Path) -> Result<Vec<u8>, ImageError> {
    decompress(&read(path)?, path, scratch)
}

/// The ELF file in a bzImage.
fn extract(path: &Path, scratch: &Path) -> Result<Vec<u8>, ImageError> {
    let image = read(path)?;
    let unusable = |reason: &str| ImageError::Kernel { path: path.into(), reason: reason.into() };
    let payload = payload(&image).ok_or_else(|| unusable("it is not a bzImage"))?;
    // All but gzip, which has it itself, are followed by the length of the unpacked kernel.
    let sized = payload.split_last_chunk::<4>().map(|(compressed, _)| compressed);
    let compressed = match payload {
        [0x1f, 0x8b, ..] => payload,
        _ => sized.ok_or_else(|| unusable("its kernel is cut off"))?,
    };
    let vmlinux = decompress(compressed, path, scratch)?;
    if is_elf(&vmlinux) { Ok(vmlinux) } else { Err(unusable("there is no ELF file in it")) }
}

/// The compressed kernel of a bzImage, by the fields of the x86 boot protocol.
fn payload(image: &[u8]) -> Option<&[u8]> {
    let u32_at = |at: usize| {
        let bytes = image.get(at..at + 4)?.try_into().ok()?;
        usize::try_from(u32::from_le_bytes(bytes)).ok()
    };
    if image.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let setup_sectors = match *image.get(0x1f1)? {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = ((setup_sectors + 1) * 512).checked_add(u32_at(0x248)?)?;
    image.get(start..start.checked_add(u32_at(0x24c)?)?)
}

fn decompress(compressed: &[u8], path: &Path, scratch: &Path) -> Result<Vec<u8>, ImageError> {
    let unusable = |reason: String| ImageError::Kernel { path: path.to_owned(), reason };
    if let Some(blocks) = compressed.strip_prefix(LZ4_LEGACY) {
        return lz4_legacy(blocks).ok_or_else(|| unusable("its lz4 stream is damaged".to_owned()));
    }
    let program = match compressed {
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => {
            Program::new("xz", "xz-utils")?.args(["-dc", "--single-stream"])
        }
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Program::new("zstd", "zstd")?.args(["-dcq"]),
        [0x1f, 0x8b, ..] => Program::new("gzip", "gzip")?.args(["-dc"]),
        _ => {
            let start = compressed.get(..4).unwrap_or(compressed);
            return Err(unusable(format!("it is compressed in an unknown way ({start:02x?})")));
        }
    };
    let (packed, unpacked) = (scratch.join("packed"), scratch.join("unpacked"));
    fs::write(&packed, compressed).map_err(ImageError::io("write", &packed))?;
    let input = File::open(&packed).map_err(ImageError::io("open", &packed))?;
    let output = File::create(&unpacked).map_err(ImageError::io("create", &unpacked))?;
    program.stdin(input).output_to(output)?;
    read(&unpacked)
}

/// What the kernel's build makes with `lz4 -l`: blocks of 8 MiB, each with its packed length.
fn lz4_legacy(mut blocks: &[u8]) -> Option<Vec<u8>> {
    let mut unpacked = Vec::new();
    while let Some((length, rest)) = blocks.split_first_chunk::<4>() {
        let length = usize::try_from(u32::from_le_bytes(*length)).ok()?;
        let (block, rest) = rest.split_at_checked(length)?;
        unpacked.extend_from_slice(&lz4_flex::block::decompress(block, LZ4_BLOCK_MAX).ok()?);
        if unpacked.len() > VMLINUX_BYTES_MAX {
            return None;
        }
        blocks = rest;
    }
    blocks.is_empty().then_some(unpacked)
}

fn is_elf(bytes: &[u8]) -> bool {
    bytes.starts_with(b"\x7fELF\x02\x01")
}

/// The version in the line that a kernel starts its log with.
fn banner_version(vmlinux: &[u8]) -> Option<String> {
    const MARK: &[u8] = b"Linux version ";
    vmlinux.windows(MARK.len()).enumerate().filter(|(_, window)| *window == MARK).find_map(
        |(at, _)| {
            let text = vmlinux.get(at + MARK.len()..)?.split(|byte| *byte == b' ').next()?;
            let plain = text.len() < 128
                && text.first()?.is_ascii_digit()
                && text.iter().all(u8::is_ascii_graphic);
            plain.then(|| String::from_utf8_lossy(text).into_owned())
        },
    )
}

fn remove(folder: &Path) -> Result<(), ImageError> {
    remove_tree(folder).map_err(ImageError::io("remove", folder))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A bzImage with this payload after the smallest set-up part.
    fn bz_image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 1024 + 16];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248..0x24c].copy_from_slice(&16u32.to_le_bytes());
        let length = u32::try_from(payload.len()).unwrap();
        image[0x24c..0x250].copy_from_slice(&length.to_le_bytes());
        image.extend_from_slice(payload);
        image
    }

    const VMLINUX: &[u8] = b"\x7fELF\x02\x01 a kernel, Linux version 6.1.0-1 (x) ";

    fn pack(program: &str, args: &[&str], folder: &Path) -> Vec<u8> {
        let path = folder.join("plain");
        fs::write(&path, VMLINUX).unwrap();
        let output = std::process::Command::new(program)
            .args(args)
            .stdin(File::open(&path).unwrap())
            .output()
            .unwrap();
        assert!(output.status.success(), "{program}");
        output.stdout
    }

    #[test]
    fn kernel_is_found_in_a_bz_image_of_every_compression() {
        let folder = tempfile::tempdir().unwrap();
        let sized = |mut packed: Vec<u8>| {
            packed.extend_from_slice(&u32::try_from(VMLINUX.len()).unwrap().to_le_bytes());
            packed
        };
        let payloads = [
            sized(pack("xz", &["-c"], folder.path())),
            sized(pack("lz4", &["-lc"], folder.path())),
            pack("gzip", &["-c"], folder.path()),
        ];
        for payload in payloads {
            let path = folder.path().join("vmlinuz");
            fs::write(&path, bz_image(&payload)).unwrap();
            assert_eq!(extract(&path, folder.path()).unwrap(), VMLINUX, "{:02x?}", &payload[..4]);
        }
    }

    #[test]
    fn what_is_no_kernel_is_refused_with_the_reason() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vmlinuz");
        let cases: [(Vec<u8>, &str); 5] = [
            (b"MZ".to_vec(), "not a bzImage"),
            (bz_image(b"ab"), "cut off"),
            (bz_image(b"????????"), "unknown way"),
            (bz_image(&[LZ4_LEGACY, &[9, 0, 0, 0, 1, 2], &[0; 4]].concat()), "damaged"),
            (bz_image(b"x")[..1030].to_vec(), "not a bzImage"),
        ];
        for (bytes, reason) in cases {
            fs::write(&path, bytes).unwrap();
            let error = extract(&path, folder.path()).unwrap_err();
            assert_eq!(error.code(), "image_kernel_unusable");
            assert!(error.to_string().contains(reason), "{error}");
        }
    }

    #[test]
    fn version_is_read_from_the_banner() {
        assert_eq!(banner_version(VMLINUX).as_deref(), Some("6.1.0-1"));
        assert_eq!(banner_version(b"Linux version %s (x) Linux version 6.2 "), Some("6.2".into()));
        assert_eq!(banner_version(b"Linux version "), None);
    }
}
