//! Warm pools on a simulated host: from the template to the VM that was there already.

#![expect(clippy::unwrap_used, reason = "a failed step of a test is a failed test")]

#[path = "../cluster/rig.rs"]
#[expect(dead_code, reason = "shared with the tests of the cluster")]
mod rig;

mod claims;
mod house;
mod keeping;
