//! The host's side of a session, on tokio.
//!
//! ```no_run
//! # async fn example(stream: tokio::net::UnixStream) -> Result<(), aether_protocol::host::ClientError> {
//! use aether_protocol::{Run, Token, host};
//! use std::time::Duration;
//!
//! let token = Token::from_bytes([7; 32]);
//! let run = Run { command: "uname".into(), args: vec!["-a".into()], ..Run::default() };
//! let mut session = host::run(stream, &token, run, Duration::from_secs(5)).await?;
//! loop {
//!     match session.next().await? {
//!         host::RunEvent::Output { data, .. } => println!("{}", String::from_utf8_lossy(&data)),
//!         host::RunEvent::Exited(exited) => break println!("{:?}", exited.status()),
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! The guest is hostile: memory is bounded by one frame, offsets must follow one another, and
//! anything that has no place in the session is [`ClientError::Protocol`].

mod client;
mod error;
mod files;
mod frames;
mod guest;
mod run;

pub use client::{
    BoxStream, GuestClient, GuestStream, configure, configure_and_keep, forget, list, list_runs,
    mkdir, move_, ping, remove, shutdown, stat,
};
pub use error::{ClientError, ProtocolError};
pub use files::{FileReader, FileWriter, read_file, write_file};
pub use frames::{FrameReader, FrameWriter};
pub use guest::{GuestAcceptor, GuestSession};
pub use run::{RunEvent, RunInput, RunOutput, RunSession, attach, run};
