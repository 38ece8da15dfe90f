//! What an image is made of, and what a VMM is given of it.

use std::path::PathBuf;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::Digest;

/// A file of the store, by content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blob {
    pub digest: Digest,
    pub size_bytes: u64,
}

/// Which kernel an image has, which is what a driver's command line depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KernelFlavour {
    /// Debian's cloud kernel: drivers are modules in the initramfs, devices are found by ACPI.
    Debian,
    /// The small test kernel: all built in, no ACPI, no PCI; devices come on the command line.
    FirecrackerTest,
}

/// The kernel of an image, as an uncompressed ELF file (PVH and direct 64-bit boot).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kernel {
    #[serde(flatten)]
    pub blob: Blob,
    pub flavour: KernelFlavour,
    /// As `uname -r` says in the guest.
    pub version: String,
    /// Whether drivers come as modules, to be loaded by init.
    pub modular: bool,
    /// Whether the kernel finds its devices, and powers off, by ACPI.
    pub acpi: bool,
}

/// One image: the manifest, and its digest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// The digest of the manifest itself; `name@digest` names this very image for ever.
    #[serde(skip_serializing, default = "unset_digest")]
    pub digest: Digest,
    pub name: String,
    pub created_at: Timestamp,
    pub kernel: Kernel,
    pub initrd: Blob,
    pub rootfs: Blob,
    /// The agent that is `/init` of the initramfs.
    pub guest_agent: Digest,
    /// The driver modules, kept to make the initramfs again when only the agent changes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub modules: Option<Blob>,
    /// All of the kernel's modules as a layer of `/usr`, for VMs with a tool that needs more of the
    /// kernel than a guest starts with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub module_layer: Option<Blob>,
    /// The distribution's suite, such as `bookworm`.
    pub suite: String,
    /// Every package of the root file system, as `name=version`.
    pub packages: Vec<String>,
    /// What the image was built from; the same key means that building again changes nothing.
    pub build_key: Digest,
}

impl Image {
    /// Every blob that the image is made of, the manifest excepted.
    pub(crate) fn blobs(&self) -> impl Iterator<Item = &Blob> {
        [&self.kernel.blob, &self.initrd, &self.rootfs]
            .into_iter()
            .chain(&self.modules)
            .chain(&self.module_layer)
    }
}

/// What a VMM needs of an image, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootSet {
    /// The image's name.
    pub image: String,
    /// The manifest's digest, `blake3:…`.
    pub digest: String,
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    pub rootfs: PathBuf,
    pub kernel_flavour: KernelFlavour,
}

fn unset_digest() -> Digest {
    Digest::of_bytes(b"")
}
