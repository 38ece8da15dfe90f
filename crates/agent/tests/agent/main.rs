//! The agent over a Unix socket, driven by the true host client.

#![expect(clippy::unwrap_used, reason = "in a test a panic is the message")]

mod clones;
mod detached;
mod files;
mod harness;
mod hostile;
mod runs;
