//! Building an image, in stages that are each reused while their inputs stay the same:
//!
//! ```text
//!   suite, mirror ───────────▶ kernel (vmlinux, modules) ─┐
//!   suite, mirror, packages,                              ├─▶ manifest debian
//!   CA certificates ─────────▶ root file system ──────────┤
//!   agent, modules ──────────▶ initramfs ─────────────────┘
//!   test kernel ─────────────▶ kernel, initramfs without modules ─▶ manifest debian-fctest
//! ```
//!
//! So a new agent costs an initramfs and no download.

mod apt;
mod initramfs;
mod kernel;
mod modules;
mod rootfs;
mod stage;

use std::path::PathBuf;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::blobs::sweep;
use crate::manifest::{Blob, Image, Kernel, KernelFlavour};
use crate::store::ImageStore;
use crate::{DEFAULT_IMAGE, Digest, ImageError, TEST_KERNEL_IMAGE};

pub use initramfs::agent_in;
pub(crate) use stage::forget as forget_stages;

/// Part of every key: raised when a recipe changes, so that what the old one made is not reused.
const RECIPE: u32 = 5;

/// Where packages come from, as in a `sources.list`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mirror {
    /// Such as `http://deb.debian.org/debian`.
    pub archive: String,
    /// Such as `http://deb.debian.org/debian-security`.
    pub security: String,
}

/// What to build an image from.
#[derive(Clone, Debug)]
pub struct BuildRequest {
    /// The guest agent: a static x86_64 executable, which becomes `/init`.
    pub agent: PathBuf,
    /// The test kernel, `vmlinux` or `vmlinux.xz`, where the image for it is wanted too.
    pub test_kernel: Option<PathBuf>,
    /// Debian's suite.
    pub suite: String,
    /// Without one, what the host's apt uses for the suite, else Debian's own.
    pub mirror: Option<Mirror>,
    /// Packages besides the usual.
    pub packages: Vec<String>,
    /// Fetch packages again though nothing that was asked for has changed: for security updates.
    pub refresh: bool,
}

impl BuildRequest {
    #[must_use]
    pub fn new(agent: impl Into<PathBuf>) -> Self {
        Self {
            agent: agent.into(),
            test_kernel: None,
            suite: "bookworm".to_owned(),
            mirror: None,
            packages: Vec::new(),
            refresh: false,
        }
    }

    /// These go into files that apt reads and onto command lines.
    fn check(&self) -> Result<(), ImageError> {
        let plain = |extra: &'static [u8]| {
            move |text: &str| {
                text.starts_with(|c: char| c.is_ascii_alphanumeric())
                    && text.bytes().all(|b| b.is_ascii_alphanumeric() || extra.contains(&b))
            }
        };
        if !plain(b"-")(&self.suite) {
            let reason = format!("{:?} is not the name of a suite", self.suite);
            return Err(ImageError::InvalidRequest { field: "suite", reason });
        }
        if let Some(name) = self.packages.iter().find(|name| !plain(b"+-.:=~")(name)) {
            let reason = format!("{name:?} is not the name of a package");
            return Err(ImageError::InvalidRequest { field: "packages", reason });
        }
        if let Some(mirror) = &self.mirror {
            for uri in [&mirror.archive, &mirror.security] {
                if !uri.contains("://") || uri.contains(|c: char| c.is_whitespace() || c == ']') {
                    let reason = format!("{uri:?} is not the address of a mirror");
                    return Err(ImageError::InvalidRequest { field: "mirror", reason });
                }
            }
        }
        Ok(())
    }
}

pub(crate) fn build(
    store: &ImageStore,
    request: &BuildRequest,
    progress: &dyn Fn(&str),
) -> Result<Image, ImageError> {
    if !cfg!(target_arch = "x86_64") {
        return Err(ImageError::UnsupportedHost { found: std::env::consts::ARCH });
    }
    request.check()?;
    let agent = initramfs::read_agent(&request.agent)?;
    let _lock = store.lock(progress)?;
    sweep(&store.folder("tmp"));

    let sources = apt::Sources::find(request)?;
    let kernel = kernel::debian(store, request, &sources, progress)?;
    let rootfs = rootfs::build(store, request, &sources, progress)?;
    let parts = Parts { store, request, agent: &agent, rootfs: &rootfs, progress };
    let image = parts.assemble(DEFAULT_IMAGE, &kernel)?;
    if let Some(path) = &request.test_kernel {
        let kernel = kernel::test(store, path, progress)?;
        parts.assemble(TEST_KERNEL_IMAGE, &kernel)?;
    }
    Ok(image)
}

/// A kernel and what it needs to find its devices.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct KernelParts {
    vmlinux: Blob,
    flavour: KernelFlavour,
    version: String,
    modules: Option<Blob>,
    /// See [`Image::module_layer`].
    #[serde(default)]
    module_layer: Option<Blob>,
}

/// What the images of one build share.
struct Parts<'a> {
    store: &'a ImageStore,
    request: &'a BuildRequest,
    agent: &'a [u8],
    rootfs: &'a rootfs::Rootfs,
    progress: &'a dyn Fn(&str),
}

impl Parts<'_> {
    /// Makes the initramfs and the manifest, or keeps the image that there is.
    fn assemble(&self, name: &str, kernel: &KernelParts) -> Result<Image, ImageError> {
        let guest_agent = Digest::of_bytes(self.agent);
        let build_key = stage::key(&(
            RECIPE,
            name,
            &kernel.vmlinux.digest,
            &kernel.modules,
            &kernel.module_layer,
            &self.rootfs.blob.digest,
            &guest_agent,
        ))?;
        match self.store.get(name) {
            Ok(image)
                if image.build_key == build_key
                    && image.blobs().all(|blob| self.store.blobs.has(blob)) =>
            {
                return Ok(image);
            }
            // A manifest that cannot be read is replaced, as is one of other parts.
            Ok(_) | Err(ImageError::Unknown { .. } | ImageError::Manifest { .. }) => {}
            Err(error) => return Err(error),
        }
        (self.progress)(&format!("assemble image {name}"));
        let modules = match &kernel.modules {
            Some(blob) => {
                let path = self.store.blobs.checked_path(name, &blob.digest)?;
                Some(crate::program::read(&path)?)
            }
            None => None,
        };
        let initrd =
            self.store.blobs.put_bytes(&initramfs::make(self.agent, modules.as_deref()))?;
        self.store.publish(&Image {
            digest: build_key.clone(),
            name: name.to_owned(),
            created_at: Timestamp::now(),
            kernel: Kernel {
                blob: kernel.vmlinux.clone(),
                flavour: kernel.flavour,
                version: kernel.version.clone(),
                modular: kernel.modules.is_some(),
                acpi: matches!(kernel.flavour, KernelFlavour::Debian),
            },
            initrd,
            rootfs: self.rootfs.blob.clone(),
            guest_agent,
            modules: kernel.modules.clone(),
            module_layer: kernel.module_layer.clone(),
            suite: self.request.suite.clone(),
            packages: self.rootfs.packages.clone(),
            build_key,
        })
    }
}

#[cfg(test)]
mod tests;
