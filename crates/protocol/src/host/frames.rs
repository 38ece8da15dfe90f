//! Frames over tokio, for either side.

use std::collections::VecDeque;
use std::io::{self, IoSlice};

use bytes::{Buf as _, Bytes};
use prost::Message;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use super::error::ClientError;
use crate::codec::{CodecError, Decoder, frame};

/// Room for a read while frames are small.
const SMALL_READ_BYTES: usize = 8 * 1024;
/// Room for a read once frames have filled it: several full data frames for each system call.
const LARGE_READ_BYTES: usize = 256 * 1024;
/// Slices in one vectored write.
const SLICES_MAX: usize = 16;

/// Reads messages of type `M`.
#[derive(Debug)]
pub struct FrameReader<R, M> {
    stream: R,
    decoder: Decoder<M>,
    read_bytes: usize,
}

impl<R: AsyncRead + Unpin, M: Message + Default> FrameReader<R, M> {
    pub fn new(stream: R) -> Self {
        Self { stream, decoder: Decoder::new(), read_bytes: SMALL_READ_BYTES }
    }

    /// The stream, where no byte of a further message was read from it.
    pub(super) fn into_stream(self) -> Option<R> {
        self.decoder.is_at_boundary().then_some(self.stream)
    }

    pub fn set_limit(&mut self, limit: usize) {
        self.decoder.set_limit(limit);
    }

    /// The next message; `None` where the peer closed between two frames.
    ///
    /// Cancel-safe: bytes that were read stay in the decoder.
    pub async fn next(&mut self) -> Result<Option<M>, ClientError> {
        loop {
            if let Some(message) = self.decoder.next_message()? {
                return Ok(Some(message));
            }
            let buffer = self.decoder.buffer(self.read_bytes);
            let read =
                self.stream.read_buf(buffer).await.map_err(ClientError::io("read a frame"))?;
            if read == 0 {
                return if self.decoder.is_at_boundary() {
                    Ok(None)
                } else {
                    Err(ClientError::Closed { context: "read a frame" })
                };
            }
            if read >= SMALL_READ_BYTES {
                self.read_bytes = LARGE_READ_BYTES;
            }
        }
    }
}

/// Writes messages. What was queued is written in order and whole, whatever futures are dropped.
#[derive(Debug)]
pub struct FrameWriter<W> {
    stream: W,
    queue: VecDeque<Bytes>,
}

impl<W: AsyncWrite + Unpin> FrameWriter<W> {
    pub fn new(stream: W) -> Self {
        Self { stream, queue: VecDeque::new() }
    }

    /// The stream, where everything was written.
    pub(super) fn into_stream(self) -> Option<W> {
        self.queue.is_empty().then_some(self.stream)
    }

    /// Queues a message; [`Self::flush`] sends it. Callers flush before they queue more, which
    /// bounds the queue.
    pub fn queue<M: Message>(&mut self, message: &M) -> Result<(), CodecError> {
        self.queue.push_back(frame(message)?);
        Ok(())
    }

    /// Queues bytes of a frame that the caller has made.
    pub(super) fn queue_bytes(&mut self, bytes: Bytes) {
        self.queue.push_back(bytes);
    }

    /// Cancel-safe: what was not written stays queued.
    pub async fn flush(&mut self) -> io::Result<()> {
        while !self.queue.is_empty() {
            let mut slices = [IoSlice::new(&[]); SLICES_MAX];
            let filled = slices.iter_mut().zip(&self.queue).map(|(slice, bytes)| {
                *slice = IoSlice::new(bytes);
            });
            let count = filled.count();
            let written = self.stream.write_vectored(&slices[..count]).await?;
            if written == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            self.advance(written);
        }
        self.stream.flush().await
    }

    /// Queues and flushes. Cancel-safe in that a message is never torn: a call that was dropped has
    /// queued it whole or not at all, and the next call sends what is queued first.
    pub async fn send<M: Message>(&mut self, message: &M) -> Result<(), ClientError> {
        self.flush().await.map_err(ClientError::io("write a frame"))?;
        self.queue(message)?;
        self.flush().await.map_err(ClientError::io("write a frame"))
    }

    fn advance(&mut self, mut written: usize) {
        while let Some(first) = self.queue.front_mut() {
            if first.len() > written {
                first.advance(written);
                return;
            }
            written -= first.len();
            self.queue.pop_front();
        }
    }
}
