//! An HTTP/2 stream as bytes. Its windows are given back as bytes are taken, never ahead.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, Bytes};
use h2::{RecvStream, SendStream};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::OwnedSemaphorePermit,
};

/// In one frame at most.
const CHUNK_BYTES: usize = 64 * 1024;

/// Dropped before both sides have ended, it is reset.
#[derive(Debug)]
pub(super) struct H2Stream {
    send: SendStream<Bytes>,
    receive: RecvStream,
    received: Bytes,
    /// Among the streams of its connection.
    _place: Option<OwnedSemaphorePermit>,
}

impl H2Stream {
    pub(super) fn new(
        send: SendStream<Bytes>,
        receive: RecvStream,
        place: Option<OwnedSemaphorePermit>,
    ) -> Self {
        Self { send, receive, received: Bytes::new(), _place: place }
    }
}

fn broken(error: h2::Error) -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, error)
}

impl AsyncRead for H2Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // A frame may be empty, which is no end.
        while self.received.is_empty() {
            match ready!(self.receive.poll_data(cx)) {
                Some(Ok(data)) => self.received = data,
                // A server that has sent its end wants no more of us.
                Some(Err(error)) if error.reason() == Some(h2::Reason::NO_ERROR) => {
                    return Poll::Ready(Ok(()));
                }
                Some(Err(error)) => return Poll::Ready(Err(broken(error))),
                None => return Poll::Ready(Ok(())),
            }
        }
        let count = self.received.len().min(out.remaining());
        out.put_slice(&self.received[..count]);
        self.received.advance(count);
        self.receive.flow_control().release_capacity(count).map_err(broken)?;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for H2Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        if data.is_empty() {
            return Poll::Ready(Ok(0));
        }
        self.send.reserve_capacity(data.len().min(CHUNK_BYTES));
        while self.send.capacity() == 0 {
            match ready!(self.send.poll_capacity(cx)) {
                Some(capacity) => drop(capacity.map_err(broken)?),
                None => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
            }
        }
        let count = self.send.capacity().min(data.len()).min(CHUNK_BYTES);
        let chunk = Bytes::copy_from_slice(&data[..count]);
        self.send.send_data(chunk, false).map_err(broken)?;
        Poll::Ready(Ok(count))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The connection's own task sends what it was given.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.send.send_data(Bytes::new(), true) {
            Ok(()) => Poll::Ready(Ok(())),
            Err(error) => Poll::Ready(Err(broken(error))),
        }
    }
}
