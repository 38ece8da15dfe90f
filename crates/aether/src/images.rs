//! Where the worker's boot files come from.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use aether_drivers::{BootSource, KernelFlavour, LayerFile};
use aether_images::{ImageError, ImageStore};
use aether_tools::BaseImage;
use aether_types::{ErrorCode, Fault};
use aether_worker::ImageSource;

use crate::failure::chain;

/// The images of this machine, checked at use.
#[derive(Debug)]
pub(crate) struct StoredImages(pub(crate) Arc<ImageStore>);

impl ImageSource for StoredImages {
    fn pin(&self, image: &str, holder: &Path) -> Result<(), Fault> {
        let found = self.0.get(image).and_then(|found| self.0.pin(holder, &found.digest));
        found.map_err(|error| unusable(image, &error))
    }

    fn digest(&self, image: &str) -> Result<String, Fault> {
        self.0.get(image).map(|found| found.digest.to_string()).map_err(|e| unusable(image, &e))
    }

    fn base(&self, image: &str) -> Result<BaseImage, Fault> {
        let found = self.0.get(image).map_err(|error| unusable(image, &error))?;
        Ok(BaseImage {
            image: format!("{}@{}", found.name, found.digest),
            digest: found.rootfs.digest.to_string(),
            suite: found.suite,
            packages: found.packages,
        })
    }

    fn module_layer(&self, image: &str) -> Result<Option<LayerFile>, Fault> {
        let found = self.0.get(image).map_err(|error| unusable(image, &error))?;
        let layer = self.0.module_layer(image).map_err(|error| unusable(image, &error))?;
        Ok(layer.map(|(blob, path)| LayerFile {
            name: format!("kernel-modules@{}", found.kernel.version),
            path,
            digest: blob.digest.to_string(),
            bytes: blob.size_bytes,
        }))
    }

    fn resolve(&self, image: &str) -> Result<BootSource, Fault> {
        let set = self.0.resolve(image).map_err(|error| unusable(image, &error))?;
        Ok(BootSource {
            kernel: set.kernel,
            initrd: set.initrd,
            rootfs: set.rootfs,
            kernel_flavour: match set.kernel_flavour {
                aether_images::KernelFlavour::Debian => KernelFlavour::Debian,
                aether_images::KernelFlavour::FirecrackerTest => KernelFlavour::FirecrackerTest,
            },
        })
    }
}

fn unusable(image: &str, error: &ImageError) -> Fault {
    if let ImageError::Unknown { .. } = error {
        return Fault::new(ErrorCode::ImageNotFound, error.to_string());
    }
    tracing::error!(image, error = chain(error), "the image cannot be used");
    let text = format!("the image {image} cannot be used; the server's log says why");
    Fault::new(ErrorCode::VmStartFailed, text)
}

/// For machines that are none: any of these names will do.
#[derive(Debug)]
pub(crate) struct SimulatedImages(pub(crate) Vec<String>);

impl ImageSource for SimulatedImages {
    fn pin(&self, _image: &str, _holder: &Path) -> Result<(), Fault> {
        Ok(())
    }

    fn digest(&self, _image: &str) -> Result<String, Fault> {
        Ok(format!("blake3:{}", "0".repeat(64)))
    }

    fn base(&self, image: &str) -> Result<BaseImage, Fault> {
        Ok(BaseImage {
            image: image.to_owned(),
            digest: self.digest(image)?,
            suite: "bookworm".to_owned(),
            packages: Vec::new(),
        })
    }

    fn module_layer(&self, _image: &str) -> Result<Option<LayerFile>, Fault> {
        Ok(None)
    }

    fn resolve(&self, image: &str) -> Result<BootSource, Fault> {
        // A pinned name means the same.
        let image = image.split('@').next().unwrap_or_default();
        if !self.0.iter().any(|name| name == image) {
            let known = self.0.join(", ");
            let text = format!("no image is called {image}; there are: {known}");
            return Err(Fault::new(ErrorCode::ImageNotFound, text));
        }
        Ok(BootSource {
            kernel: PathBuf::new(),
            initrd: PathBuf::new(),
            rootfs: PathBuf::new(),
            kernel_flavour: KernelFlavour::Debian,
        })
    }
}
