//! The program as its users have it, on simulated machines.

#[cfg(test)]
mod client;
#[cfg(test)]
mod config;
#[cfg(test)]
mod events;
#[cfg(test)]
mod exec;
#[cfg(test)]
mod fleet;
#[cfg(test)]
mod instant;
mod keys;
#[cfg(test)]
mod logs;
#[cfg(test)]
mod metrics;
#[cfg(test)]
mod older;
#[cfg(test)]
mod openapi;
#[cfg(test)]
mod plain;
#[cfg(test)]
mod postgres;
#[cfg(test)]
mod redis;
#[cfg(test)]
mod rig;
#[cfg(test)]
mod streams;
#[cfg(test)]
mod tls;
#[cfg(test)]
mod tools;
#[cfg(test)]
mod up;
