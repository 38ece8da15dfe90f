//! The wire between a worker and the agent in a guest.
//!
//! One connection is one session with one purpose: a command, a terminal, a transfer, a question.
//! Flow control is then the socket's, and nothing waits behind anything else.
//!
//! ```text
//! host                                   guest
//!  │ Hello{generations, token}             │
//!  │ Request{Run | ReadFile | ...}    ───► │   both at once: one round trip, not two
//!  │                                       │
//!  │ ◄───  Welcome{generation, boot id}    │   or Refused{code}: nothing was done
//!  │                                       │
//!  │  Run, Attach:    ◄─── Started, Output*, StdinTaken*, Exited
//!  │                  ───► Stdin*, StdinEof, Signal, Resize, Cancel
//!  │  ReadFile:       ◄─── FileStat, Data*, End
//!  │  WriteFile:      ───► Data*, End        ◄─── Done
//!  │  anything else:  ◄─── one answer
//!  │                                       │
//!  │ ◄───  Failed{code} at any place after Welcome ends the session
//! ```
//!
//! The host keeps its side open until it has the last answer: an end of file from the host means
//! that the host is gone, which kills a run that is not detached and discards a file that is not
//! whole.
//!
//! # Frames
//! A big-endian `u32` length and a protobuf message, [`ToGuest`] or [`FromGuest`]; see [`codec`].
//! Limits are in [`limits`]. Either side treats the other as hostile: sizes are checked before
//! memory is taken, and the first thing that is wrong ends the session.
//!
//! # Generations
//! Images outlive host upgrades, so both ends say which generations they speak and take the newest
//! that both know. Within a generation fields may be added, and a field that is not known is
//! ignored. A request that is not known is refused with `unknown_request`. A change that an older
//! peer would misread is a new generation. `tests/schema.txt` freezes every name, tag and type.
//!
//! # Detached runs
//! A detached run belongs to the guest, not to a connection. The guest retains the last
//! [`limits::RETAINED_BYTES_MAX`] bytes of each stream. Output that was never sent is never
//! dropped: with nobody attached a full buffer blocks the command on its pipe. Output that was sent
//! makes room for newer output, so that an attachment may start later than asked for, and
//! [`Started`] says where.
//!
//! This crate does no I/O, except for the feature `host`: the client in [`host`].

pub mod check;
pub mod codec;
pub mod handshake;
#[cfg(feature = "host")]
pub mod host;
pub mod limits;
mod message;
mod token;

pub use check::{RequestError, check_request};
pub use codec::{CodecError, Decoder, Encoder};
pub use message::*;
pub use token::{TOKEN_BYTES, Token, TokenParseError};

/// Newest generation that this crate speaks.
pub const GENERATION: u32 = 1;

/// Oldest generation that this crate speaks.
pub const GENERATION_MIN: u32 = 1;

/// Port of the agent, on vsock and on the private link.
pub const AGENT_PORT: u32 = 1024;

/// Port of the host to which a guest says that it is ready: a vsock connection that carries the
/// boot id and ends, or on the private link one UDP datagram. A hint: it may be lost or forged, and
/// only a `Ping` with the token proves anything.
pub const READY_PORT: u32 = 1025;
