//! The platform as its users have it: the real program, started, used and killed from outside.

pub mod bare;
pub mod bare_firecracker;
pub mod chaos;
pub mod engine;
pub mod floor;
pub mod measure;
pub mod platform;
mod qmp;
pub mod random;
pub mod wire;

pub use platform::{Platform, Setup};
pub use random::Random;
