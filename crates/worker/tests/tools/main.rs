//! Tools of VMs: asked for, built, attached; on simulated machines, and on real ones where this host
//! can.

#![expect(clippy::unwrap_used, reason = "a failed step of a test is a failed test")]
#![expect(clippy::print_stdout, reason = "skipped tests and figures are for people")]

#[path = "../cluster/rig.rs"]
#[expect(dead_code, reason = "shared with the tests of the cluster")]
mod rig;

mod real_guest;
mod recipes;
mod simulated;
