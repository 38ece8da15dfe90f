//! The crate from outside: with sources of the test's own, and with the real ones.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(clippy::print_stdout, reason = "how a test says that it skipped, and what it does")]

mod builds;
mod caches;
mod chroot;
mod fake;
mod offline;
mod real;
mod script;
mod sources;
