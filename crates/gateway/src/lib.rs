//! The front door: REST and WebSocket, on axum.
//!
//! ```text
//!   edge (id, host, bound, panic) → authenticate → route found → authorize → handler
//!     route: validate → Store records task and outbox → Queue::enqueue → EventBus
//!                                        └─ if that fails: Dispatcher, later
//!     wait:   subscribe → record → event → read the store
//!     follow: SessionLink::follow → record → live output → end, or what the store kept
//! ```
//!
//! Invariants
//! - What was answered with 202 is in the store, with its dispatch owed. No step after that can
//!   lose it, and none is cut short because the client went away.
//! - Nothing but health and the document of the API is answered without a key, unknown paths included; and no route without the
//!   right that the table of routes names.
//! - Every error is a problem document, made in `problem.rs` alone.
//! - Nothing waits by polling, and everything that waits has a bound.
//!
//! What this crate does not do: it never carries out work on a VM, never reads configuration and
//! names no back end.

mod admission;
mod audit;
mod auth;
mod catalogue;
mod cors;
mod dispatch;
mod edge;
mod extract;
mod fleet;
mod follow;
mod health;
mod history;
mod hosts;
mod limit;
pub mod metrics;
mod openapi;
mod parts;
mod problem;
mod routes;
mod serve;
mod strict;
mod submit;
mod tail;
mod templates;
mod tools;
mod wait;

pub use auth::{
    AuthSecret, CreateKeyError, JWT_LEEWAY_MAX, JWT_SECRET_BYTES_MIN, JwksTimes, JwksUrlError,
    JwtRules, JwtVerifier, KeyRing, NewKey,
};
pub use catalogue::{Catalogue, DriverInfo, HostLimits};
pub use cors::Origins;
pub use health::Probe;
pub use hosts::HostCheck;
pub use limit::{LocalLimiter, Rate, RateLimiter, RateLimits, Sender, Verdict};
pub use parts::{Gateway, GatewayConfig, GatewayParts};
pub use tools::ToolCatalogue;
