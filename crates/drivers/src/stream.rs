//! A stream to a guest that ends with its machine.
//!
//! A private link gives no word of a guest that is gone: without this, a reader would wait until
//! the kernel's own limits, which are minutes.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use aether_protocol::host::BoxStream;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

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
}
