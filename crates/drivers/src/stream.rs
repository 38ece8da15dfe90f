//! Streams to guests: one that ends with its machine, and the way to one that is a Unix socket.
//!
//! A private link gives no word of a guest that is gone: without this, a reader would wait until
//! the kernel's own limits, which are minutes.

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd},
    pin::Pin,
    task::{Context, Poll},
};

use aether_protocol::host::BoxStream;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::UnixStream,
};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

/// Connects to a socket in an open directory: to that very socket, not to what a link leads to, and
/// however long the directory's path is.
pub(crate) async fn connect_in(directory: BorrowedFd<'_>, name: &str) -> io::Result<UnixStream> {
    use rustix::fs::{FileType, Mode, OFlags};
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let socket = rustix::fs::openat(directory, name, flags, Mode::empty())?;
    if FileType::from_raw_mode(rustix::fs::fstat(&socket)?.st_mode) != FileType::Socket {
        return Err(io::Error::other(format!("{name} is not a socket")));
    }
    UnixStream::connect(format!("/proc/self/fd/{}", socket.as_raw_fd())).await
}

pub(crate) struct GuestStream {
    inner: BoxStream,
    ended: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl GuestStream {
    pub(crate) fn new(inner: BoxStream, machine_ended: CancellationToken) -> Self {
        Self { inner, ended: Box::pin(machine_ended.cancelled_owned()) }
    }

    /// What has arrived is given first; only then does the end of the machine count.
    fn unless_ended<T>(
        &mut self,
        cx: &mut Context<'_>,
        polled: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if polled.is_pending() && self.ended.as_mut().poll(cx).is_ready() {
            let error = io::Error::new(io::ErrorKind::ConnectionReset, "the machine has ended");
            return Poll::Ready(Err(error));
        }
        polled
    }
}

impl AsyncRead for GuestStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.inner).poll_read(cx, buf);
        self.unless_ended(cx, polled)
    }
}

impl AsyncWrite for GuestStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.inner).poll_write(cx, buf);
        self.unless_ended(cx, polled)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.inner).poll_write_vectored(cx, bufs);
        self.unless_ended(cx, polled)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.inner).poll_flush(cx);
        self.unless_ended(cx, polled)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.inner).poll_shutdown(cx);
        self.unless_ended(cx, polled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    #[tokio::test]
    async fn what_has_arrived_is_read_before_the_end_is_seen() {
        let (ours, mut theirs) = tokio::io::duplex(64);
        let ended = CancellationToken::new();
        let mut stream = GuestStream::new(Box::new(ours), ended.clone());
        theirs.write_all(b"last").await.unwrap();
        ended.cancel();
        let mut word = [0; 4];
        stream.read_exact(&mut word).await.unwrap();
        assert_eq!(&word, b"last");
        let error = stream.read(&mut word).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }

    #[tokio::test]
    async fn a_link_is_not_followed_to_a_socket() {
        let folder = tempfile::tempdir().unwrap();
        let _listener = tokio::net::UnixListener::bind(folder.path().join("real")).unwrap();
        std::os::unix::fs::symlink("real", folder.path().join("link")).unwrap();
        let directory = crate::process::open_directory(folder.path()).unwrap();
        use std::os::fd::AsFd as _;
        connect_in(directory.as_fd(), "real").await.unwrap();
        connect_in(directory.as_fd(), "link").await.unwrap_err();
    }
}
