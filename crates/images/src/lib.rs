//! Images that VMs boot: kernel, initramfs and read-only root file system, as one
//! content-addressed unit, built on the machine that uses them.
//!
//! ```text
//!   BuildRequest ──build──▶ blobs/<digest>          kernel, initrd, root file system, manifest
//!                           images/<name>.json      what a name means now
//!   name ────────resolve──▶ BootSet                 paths for a VMM, digests checked
//!   disk_mb ─────seed─────▶ DiskSeed ──write_layer──▶ a VM's own writable ext4 file
//! ```
//!
//! Invariants:
//! - A blob's name is the BLAKE3 digest of its content, and a blob is never written in place:
//!   it is made under `tmp/`, flushed and renamed. A crash leaves either all of it or none.
//! - A manifest names only blobs that were complete before the manifest was.
//! - One builder runs at a time (`flock` on `lock`), whichever process it is in; only its holder
//!   sweeps `tmp/` and removes blobs.
//! - Nothing is handed out unchecked: [`ImageStore::resolve`] hashes a blob when it first sees it
//!   in this process and again whenever the file's identity or times have changed.
//!
//! Beside them: the writable disks of machines ([`DiskSeed`], [`write_qcow2_overlay`],
//! [`clone_sparse`]), and snapshots of machines, in stores of their own ([`SnapshotStore`]).
//!
//! All calls block. What this crate does not do: it starts no VM, keeps no per-VM files, and knows
//! nothing of tools; those are layers of their own.

mod blobs;
mod build;
mod cpio;
mod digest;
mod disk;
mod error;
mod manifest;
mod pins;
mod program;
mod seed;
mod snapshots;
mod store;

pub use build::{BuildRequest, Mirror, agent_in};
pub use digest::Digest;
pub use disk::{Cloned, Placement, clone_sparse, compose, write_placement, write_qcow2_overlay};
pub use error::ImageError;
pub use manifest::{Blob, BootSet, Image, Kernel, KernelFlavour};
pub use seed::DiskSeed;
pub use snapshots::{
    Draft, PruneBudget, SealedSnapshot, SnapshotEntry, SnapshotError, SnapshotStore,
};
pub use store::{ImageStore, Pruned};

/// The image every VM gets unless it asks for another.
pub const DEFAULT_IMAGE: &str = "debian";

/// The same root file system and agent on the small kernel that an emulated Firecracker can run.
pub const TEST_KERNEL_IMAGE: &str = "debian-fctest";
