//! The way to a PostgreSQL server: configuration, TLS, connections and their limits, migrations,
//! and what its errors mean. The store and the queue are on it; this crate knows neither.
//!
//! What it deliberately does not do: it reads no environment of ours (the program does, once), and
//! it hides no SQL.

mod config;
mod database;
mod listen;
mod migrate;
mod repeat;
#[cfg(feature = "testing")]
pub mod testing;
mod trouble;

/// The oldest version of the server that is tested.
pub const VERSION_MIN: u32 = 15;

pub use config::{Config, ConfigError, Limits, Parts, Place, TlsMode};
pub use database::{Database, Facts, OpenError};
pub use listen::{Listener, Listening};
pub use migrate::{Extent, MigrateError, Schema, Status, Step, check, status, up};
pub use repeat::repeated;
pub use trouble::{Trouble, trouble, violated};
