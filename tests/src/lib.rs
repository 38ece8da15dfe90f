//! The platform as its users have it: the real program, started, used and killed from outside.

pub mod measure;
pub mod platform;
pub mod wire;

pub use platform::{Platform, Setup};
