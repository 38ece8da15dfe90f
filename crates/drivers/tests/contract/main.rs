//! What every driver promises, tried on every driver that this host can run.
//!
//! The simulated one always; QEMU and Firecracker with real guests where the host can, else the
//! test prints a line that begins with `skipped:` and says why.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(clippy::print_stdout, reason = "skipped tests and figures are for people")]

mod booted;
mod docker;
mod firecracker;
mod layers;
mod real_guest;
mod rig;
mod shot;
mod sim;
mod snapshots;
mod suite;
