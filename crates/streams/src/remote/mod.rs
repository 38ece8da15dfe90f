//! The same two meeting points between processes: HTTP/2 over mutual TLS, from the gateway to the
//! worker that has the VM.
//!
//! ```text
//!   gateway ── Links ──┬── here ─────────────────────────────► Sessions, GuestLink of this process
//!                      └── elsewhere ──► one connection for each worker
//!                                           POST /sessions/EXECUTION   messages, both ways
//!                                           POST /guests/VM            the agent's own bytes
//! ```
//!
//! Invariants
//! - Both sides show a certificate of the platform's authority. Who calls is a gateway; who is
//!   called is the very worker that the store says has the VM.
//! - One stream for each session or transfer, with a window of its own. The connection's window
//!   holds those of all its streams together, so that a reader that stands still holds up nobody else.
//! - A stream that is dropped is reset, and the other side lets go of what it has for it.
//! - A connection takes no new streams once either side's certificate has run out or was replaced;
//!   streams that live on it go on.

mod client;
mod io;
mod server;
mod wire;

#[cfg(test)]
mod tests;

use std::{future::Future, time::Duration};

use aether_types::{ErrorCode, Fault, Timestamp};
use h2::{Ping, PingPong};
use tokio::time::{sleep, timeout};

pub use client::{Links, Place, Whereabouts};
pub use server::{StreamServer, StreamServerParts};

/// On one connection at once. A gateway has as many for each worker; more are refused.
const STREAMS_MAX: u32 = 256;
/// What may be on its way in one stream before it is read.
const STREAM_WINDOW_BYTES: u32 = 256 * 1024;
const CONNECTION_WINDOW_BYTES: u32 = STREAMS_MAX * STREAM_WINDOW_BYTES;
/// What one stream may have written that is not on the network yet.
const SEND_BUFFER_BYTES: usize = STREAM_WINDOW_BYTES as usize;
/// Ours are a few hundred bytes.
const HEADER_BYTES_MAX: u32 = 4 * 1024;

/// From the connection to the end of both handshakes.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);
/// From a request to its answer: the worker opens a way to the guest in between, within its own.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);
/// A peer that does not answer for so long is gone, whatever the network says.
const PING_INTERVAL: Duration = Duration::from_secs(5);
const PING_LIMIT: Duration = Duration::from_secs(10);

/// Completes when the peer does not answer any more.
async fn silence(pings: Option<PingPong>) {
    let Some(mut pings) = pings else { return std::future::pending().await };
    loop {
        sleep(PING_INTERVAL).await;
        match timeout(PING_LIMIT, pings.ping(Ping::opaque())).await {
            Ok(Ok(_)) => {}
            Ok(Err(_)) | Err(_) => return,
        }
    }
}

/// Within the limit, or the fault.
async fn within<T>(
    limit: Duration,
    work: impl Future<Output = Result<T, Fault>>,
    late: impl FnOnce() -> Fault,
) -> Result<T, Fault> {
    timeout(limit, work).await.unwrap_or_else(|_| Err(late()))
}

fn unreachable() -> Fault {
    Fault::new(ErrorCode::WorkerUnreachable, "the worker that has the VM cannot be reached")
}

fn now() -> Timestamp {
    Timestamp::now()
}
