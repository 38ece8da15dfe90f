//! The guest's channel: vsock, which Firecracker shows as Unix sockets in the VM's directory.
//!
//! `vsock.sock` leads into the guest after `CONNECT port`; the guest's connection to port N of the
//! host comes to `vsock.sock_N`.

use std::{
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    time::Duration,
};

use aether_protocol::{AGENT_PORT, READY_PORT};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
};

use crate::{DriverError, host::file_error, process, stream::connect_in};

pub(super) const SOCKET: &str = "vsock.sock";
/// One attempt to reach the agent.
const ASK_LIMIT: Duration = Duration::from_secs(2);
/// Between attempts, where nobody listens yet.
const ASK_INTERVAL: Duration = Duration::from_millis(20);
/// For a connection to end that is told nonsense.
const END_LIMIT: Duration = Duration::from_secs(2);
const NONSENSE_INTERVAL: Duration = Duration::from_millis(5);
/// `OK 4294967295` and a line feed.
const ANSWER_BYTES_MAX: usize = 16;
/// The hint is a few bytes; more is cut.
const HINT_BYTES_MAX: u64 = 2048;

/// Where the guest's connection to the ready port arrives.
pub(super) fn ready_socket() -> String {
    format!("{SOCKET}_{READY_PORT}")
}

pub(super) fn listen_ready(directory: BorrowedFd<'_>) -> Result<UnixListener, DriverError> {
    let name = ready_socket();
    UnixListener::bind(process::short_path(directory, &name))
        .map_err(|e| file_error("listen at", name.as_ref(), e))
}

/// Waits for the guest's hint, whatever it says: a guest writes it, so it is a hint only.
pub(super) async fn wait_ready(listener: &UnixListener) -> Result<Vec<u8>, DriverError> {
    let failed =
        |source| DriverError::Io { action: "receive the guest's ready hint".to_owned(), source };
    let (stream, _) = listener.accept().await.map_err(failed)?;
    let mut hint = Vec::new();
    stream.take(HINT_BYTES_MAX).read_to_end(&mut hint).await.map_err(failed)?;
    Ok(hint)
}

/// A stream to a port in the guest.
pub(super) async fn connect(
    directory: &OwnedFd,
    port: u32,
    limit: Duration,
) -> Result<UnixStream, DriverError> {
    let dial = async {
        let stream = connect_in(directory.as_fd(), SOCKET).await?;
        shake_hands(stream, port).await
    };
    match tokio::time::timeout(limit, dial).await {
        Ok(Ok(Some(stream))) => Ok(stream),
        Ok(Ok(None)) => Err(DriverError::ConnectRefused { port }),
        Ok(Err(source)) => {
            Err(DriverError::Io { action: format!("connect to port {port} of the guest"), source })
        }
        Err(_) => Err(DriverError::ConnectTimeout { port, limit_ms: limit.as_millis() }),
    }
}

/// Connects until the agent accepts. The caller bounds it.
pub(super) async fn reach_agent(directory: &OwnedFd) -> Result<UnixStream, DriverError> {
    loop {
        match connect(directory, AGENT_PORT, ASK_LIMIT).await {
            Err(DriverError::ConnectTimeout { .. } | DriverError::ConnectRefused { .. }) => {
                tokio::time::sleep(ASK_INTERVAL).await;
            }
            reached => return reached,
        }
    }
}

/// After a snapshot and after a restore the guest's kernel resets all its connections, when it comes
/// to it: also one that was accepted before, and of which the host then hears no more. So one is
/// made for that fate. It is over when the agent has hung up on the nonsense that it is told, or
/// the kernel has on what it does not know any more. The caller bounds it.
pub(super) async fn outlast_reset(directory: &OwnedFd) -> Result<(), DriverError> {
    loop {
        let stream = reach_agent(directory).await?;
        if tokio::time::timeout(END_LIMIT, tell_nonsense(stream)).await.is_ok() {
            return Ok(());
        }
    }
}

async fn tell_nonsense(mut stream: UnixStream) {
    // Longer than a frame can be.
    let mut nonsense = [0xff; 4].as_slice();
    let mut answer = [0; 64];
    loop {
        if stream.write_all(nonsense).await.is_err() {
            return;
        }
        // A byte of it for the case that it was lost.
        nonsense = &[0xff];
        if tokio::time::timeout(NONSENSE_INTERVAL, stream.read(&mut answer)).await.is_ok() {
            return;
        }
    }
}

/// `None`: nobody in the guest listens.
async fn shake_hands(mut stream: UnixStream, port: u32) -> io::Result<Option<UnixStream>> {
    let refused = |e: &io::Error| {
        matches!(e.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe)
    };
    if let Err(error) = stream.write_all(format!("CONNECT {port}\n").as_bytes()).await {
        return if refused(&error) { Ok(None) } else { Err(error) };
    }
    match read_answer(&mut stream).await {
        Ok(true) => Ok(Some(stream)),
        Ok(false) => Ok(None),
        Err(error) if refused(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Reads the line and not a byte more: what follows is the guest's. `false`: it hung up.
async fn read_answer(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<bool> {
    let strange = || io::Error::new(io::ErrorKind::InvalidData, "not the answer of a vsock");
    let mut answer = [0; ANSWER_BYTES_MAX];
    for at in 0..ANSWER_BYTES_MAX {
        if stream.read(&mut answer[at..=at]).await? == 0 {
            return if at == 0 { Ok(false) } else { Err(strange()) };
        }
        if answer[at] == b'\n' {
            let number = answer[..at].strip_prefix(b"OK ").ok_or_else(strange)?;
            let is_number = !number.is_empty() && number.iter().all(u8::is_ascii_digit);
            return if is_number { Ok(true) } else { Err(strange()) };
        }
    }
    Err(strange())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_answer_ends_at_its_line_and_has_a_bound() {
        let mut bytes = &b"OK 1073741824\nguest"[..];
        assert!(read_answer(&mut bytes).await.unwrap());
        assert_eq!(bytes, b"guest");
        assert!(!read_answer(&mut &b""[..]).await.unwrap());
        for bad in [&b"OK"[..], b"OK \n", b"NO 1\n", b"OK 1x\n", b"OK 11111111111111111111\n"] {
            assert!(read_answer(&mut &*bad).await.is_err(), "{bad:?}");
        }
    }

    #[tokio::test]
    async fn a_guest_is_reached_refused_or_late() {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join(SOCKET)).unwrap();
        let directory = process::open_directory(folder.path()).unwrap();
        let peer = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut line = [0; 13];
            stream.read_exact(&mut line).await.unwrap();
            assert_eq!(&line, b"CONNECT 1024\n");
            stream.write_all(b"OK 7\nhello").await.unwrap();
        };
        let limit = Duration::from_secs(10);
        let (stream, ()) = tokio::join!(connect(&directory, 1024, limit), peer);
        let mut text = String::new();
        stream.unwrap().read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "hello");

        let peer = async { drop(listener.accept().await.unwrap()) };
        let (refused, ()) = tokio::join!(connect(&directory, 1024, limit), peer);
        assert!(matches!(refused, Err(DriverError::ConnectRefused { port: 1024 })), "{refused:?}");

        let late = connect(&directory, 1024, Duration::from_millis(20)).await;
        assert!(matches!(late, Err(DriverError::ConnectTimeout { .. })), "{late:?}");
    }
}
