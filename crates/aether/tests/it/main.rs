//! The program as its users have it, on simulated machines.

mod client;
mod exec;
mod rig;
mod up;
