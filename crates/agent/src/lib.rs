//! The agent: PID 1 of a guest, and the guest's end of the wire in `aether-protocol`.
//!
//! ```text
//! kernel ── /init ── init: modules, disks, overlay, switch root        (once)
//!                      │ forks, reaps orphans, replaces a dead agent   (for ever)
//!                      └─ agent: channel, listener, a thread for each connection
//!                            ├─ run: one poll loop for socket, pipes and pidfd
//!                            └─ file, configuration, question: blocking calls
//! ```
//!
//! It has no async runtime, looks up no names through NSS or DNS, and depends on the protocol alone;
//! it is one static file of less than 2 MB. Build it with
//!
//! ```text
//! CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS="-C target-feature=+crt-static" \
//!   cargo build -p aether-agent --profile agent --target x86_64-unknown-linux-gnu --target-dir target/agent
//! ```
//!
//! # Invariants
//! - A thread serves one connection at a time; a detached run keeps the thread that began it. One that
//!   has taken the rights of a user ends with its connection.
//! - Memory for each connection is bounded by the frame limit and, for a detached run, by the
//!   retained output.
//! - A run that is not detached never outlives its connection.
//! - Whoever holds the token has root in this guest; the agent defends itself against everybody
//!   else, and against mistakes of the host.

pub mod container;
pub mod init;
pub mod log;
pub mod server;

mod configure;
mod conn;
mod connections;
mod error;
mod etc;
mod files;
mod guest;
mod layers;
mod net;
mod power;
mod registry;
mod run;
mod sys;
mod users;

use std::ffi::OsString;
use std::io;
use std::os::unix::net::UnixListener;

use aether_protocol::Token;

/// `--serve-unix PATH --token HEX`: the agent without a guest around it.
pub fn serve_for_tests(mut args: impl Iterator<Item = OsString>) -> io::Result<()> {
    let usage = || io::Error::other("usage: aether-agent --serve-unix PATH --token HEX");
    let mut text = || args.next().and_then(|arg| arg.into_string().ok()).ok_or_else(usage);
    let (flag, path) = (text()?, text()?);
    let (token_flag, token) = (text()?, text()?);
    if flag != "--serve-unix" || token_flag != "--token" {
        return Err(usage());
    }
    let token = Token::from_hex(&token).map_err(io::Error::other)?;
    let listener = UnixListener::bind(path)?;
    let agent = server::Agent::new(token, "test.1".to_owned());
    let Err(error) = server::serve(&agent, server::Listener::unix(listener));
    Err(error)
}
