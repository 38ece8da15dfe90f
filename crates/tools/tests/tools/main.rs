//! The crate from outside: with sources of the test's own, and with the real ones.

mod chroot;
mod real;
