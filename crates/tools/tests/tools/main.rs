//! The crate from outside: with sources of the test's own, and with the real ones.

mod builds;
mod caches;
mod chroot;
mod fake;
mod offline;
mod real;
mod sources;
