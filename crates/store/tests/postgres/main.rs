//! What only a server can go through: its schema beside SQLite's, two processes that migrate, a
//! restart, no connection left, a connection that goes while it commits.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../contract/engines.rs"]
mod engines;
#[path = "../contract/support.rs"]
#[expect(dead_code, reason = "shared with the contract suite, which uses all of it")]
mod support;

mod contention;
mod doubt;
mod migrations;
mod proxy;
mod schema;
mod server;
