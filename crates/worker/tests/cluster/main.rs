//! The worker on a simulated host: what users are promised, and what crashes must not break.

#![expect(clippy::unwrap_used, reason = "a failed step of a test is a failed test")]

mod crashes;
mod executions;
mod fleet;
mod forgetful;
mod interrupted;
mod memory;
mod rig;
mod snapshots;
mod templates;
mod vms;
