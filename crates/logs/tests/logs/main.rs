//! The log stores: the embedded one on real files, killed and filled, and Loki's with an HTTP
//! peer that holds it to Loki's push contract.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod crash;
mod embedded;
mod grammar;
mod loki;
mod peer;
mod sink;
mod support;
