//! The way to a Redis server: configuration, TLS, one connection that comes back by itself, and
//! what its errors mean. The queue is on it; this crate knows nothing of that.
//!
//! What it deliberately does not do: it reads no environment of ours (the program does, once), it
//! speaks to no cluster and no sentinel, and it hides no command.

mod config;
mod info;
mod link;
#[cfg(feature = "testing")]
pub mod testing;
mod trouble;

pub use config::{Config, ConfigError, Parts, Place};
pub use info::{Info, VERSION_MIN};
pub use link::{Link, Listener, OpenError};
pub use redis::{self, aio::MultiplexedConnection};
pub use trouble::{CallError, Trouble};
