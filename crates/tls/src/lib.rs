//! Certificates: the platform's own authority, what it issues, and what servers and clients show.
//!
//! ```text
//!   Authority ──issues──► Credentials (a chain and its key) ──► Holder ──► rustls, both sides
//!        │                        ▲                               ▲
//!        └── Fingerprint          └── files of an operator        └── replaced while it is in use
//! ```
//!
//! Invariants
//! - No private key is printed, and none leaves the process that made it but into a file of its own.
//! - What an authority signs says what it itself decides; of a request only the public key counts.
//!
//! What this crate does not do: it opens no connection and decides no rights.

mod authority;
mod credentials;
mod error;
mod peer;

pub use authority::{Authority, Fingerprint, Request, read_authorities};
pub use credentials::{Credentials, Holder, client_config, provider, server_config};
pub use error::TlsError;
pub use peer::{Peer, link_client_config, link_server_config, server_name, valid_until};
