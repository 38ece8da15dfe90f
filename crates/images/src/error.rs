use std::io;
use std::path::PathBuf;

use crate::Digest;

/// Why an image could not be listed, checked, built or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    #[error("no image is called {name}; {}", known_names(.known))]
    Unknown { name: String, known: Vec<String> },

    #[error("image {image} needs blob {digest}, which is not at {}", path.display())]
    MissingBlob { image: String, digest: Digest, path: PathBuf },

    #[error(
        "blob {digest} of image {image} is damaged: {} has digest {found}; build the image again",
        path.display()
    )]
    DamagedBlob { image: String, digest: Digest, found: Digest, path: PathBuf },

    #[error("the manifest at {} is not readable", path.display())]
    Manifest { path: PathBuf, source: serde_json::Error },

    #[error("{text:?} is not a digest: blake3: and 64 lower-case hexadecimal digits are expected")]
    InvalidDigest { text: String },

    #[error("{action} {}", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },

    #[error("{action} {}: the disk is full; free some room and try again", path.display())]
    NoSpace { action: &'static str, path: PathBuf, source: io::Error },

    #[error("images are built by root only: file owners and device nodes have to be kept")]
    NotRoot,

    #[error("building needs {what}; install the package {package}")]
    MissingTool { what: String, package: &'static str },

    #[error("images are built for x86_64 only; this host is {found}")]
    UnsupportedHost { found: &'static str },

    #[error("{program} ended with {status}: {last_lines}")]
    Program { program: String, status: String, last_lines: String },

    #[error("{package} is not offered by {mirror} for {suite}")]
    MissingPackage { package: String, suite: String, mirror: String },

    #[error("{field} is not usable: {reason}")]
    InvalidRequest { field: &'static str, reason: String },

    #[error("the guest agent at {} cannot be used as init: {reason}", path.display())]
    Agent { path: PathBuf, reason: &'static str },

    #[error("the kernel at {} cannot be used: {reason}", path.display())]
    Kernel { path: PathBuf, reason: String },

    #[error("a disk of {disk_mb} MiB cannot be made; {min} to {max} MiB can")]
    DiskSize { disk_mb: u32, min: u32, max: u32 },
}

impl ImageError {
    /// A name for the kind of failure that does not change between versions.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Unknown { .. } => "image_unknown",
            Self::MissingBlob { .. } => "image_blob_missing",
            Self::DamagedBlob { .. } => "image_blob_damaged",
            Self::Manifest { .. } => "image_manifest_unreadable",
            Self::InvalidDigest { .. } => "image_digest_invalid",
            Self::Io { .. } => "image_io",
            Self::NoSpace { .. } => "no_space",
            Self::NotRoot => "image_build_needs_root",
            Self::MissingTool { .. } => "image_build_tool_missing",
            Self::UnsupportedHost { .. } => "image_build_host_unsupported",
            Self::Program { .. } => "image_build_program_failed",
            Self::MissingPackage { .. } => "image_build_package_missing",
            Self::InvalidRequest { .. } => "image_build_request_invalid",
            Self::Agent { .. } => "image_agent_unusable",
            Self::Kernel { .. } => "image_kernel_unusable",
            Self::DiskSize { .. } => "image_disk_size",
        }
    }

    /// Puts the step and the file to an I/O error, for `map_err`. A full disk is told apart.
    pub(crate) fn io(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source: io::Error| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::NoSpace { action, path, source }
            }
            _ => Self::Io { action, path, source },
        }
    }
}

fn known_names(known: &[String]) -> String {
    if known.is_empty() {
        "none has been built yet".to_owned()
    } else {
        format!("there are: {}", known.join(", "))
    }
}
