//! Frames: a big-endian `u32` length, then that many bytes of one protobuf message.
//!
//! Nothing here does I/O. A decoder takes bytes as they come and gives messages; the first thing
//! that is wrong poisons it, because after it nothing says where the next frame begins.

use std::marker::PhantomData;

use bytes::{Buf as _, BufMut, Bytes, BytesMut};
use prost::Message;

use crate::limits::{DATA_BYTES_MAX, FRAME_BYTES_MAX};
use crate::message::Stream;

/// Bytes of the length before each frame.
pub const LENGTH_BYTES: usize = 4;

#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum CodecError {
    #[error("a frame of {length} bytes is past the limit of {limit}")]
    FrameTooLarge { length: usize, limit: usize },
    #[error("a frame is no message")]
    Malformed(#[source] prost::DecodeError),
    #[error("an earlier frame was wrong")]
    Poisoned,
}

/// Appends one frame.
pub fn encode<M: Message>(message: &M, out: &mut impl BufMut) -> Result<(), CodecError> {
    let length = message.encoded_len();
    let too_large = CodecError::FrameTooLarge { length, limit: FRAME_BYTES_MAX };
    if length > FRAME_BYTES_MAX {
        return Err(too_large);
    }
    out.put_u32(u32::try_from(length).map_err(|_| too_large.clone())?);
    message.encode(out).map_err(|_| too_large)
}

/// One frame on its own.
pub fn frame<M: Message>(message: &M) -> Result<Bytes, CodecError> {
    let mut out = BytesMut::with_capacity(LENGTH_BYTES + message.encoded_len());
    encode(message, &mut out)?;
    Ok(out.freeze())
}

/// Frames that wait to be written, for peers that write what fits and come back.
#[derive(Debug, Default)]
pub struct Encoder {
    buffer: BytesMut,
}

impl Encoder {
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a message whole, or not at all.
    pub fn push<M: Message>(&mut self, message: &M) -> Result<(), CodecError> {
        encode(message, &mut self.buffer)
    }

    /// What is still to be written.
    pub fn pending(&self) -> &[u8] {
        &self.buffer
    }

    pub fn is_empty(&self) -> bool {
        self.buffer.is_empty()
    }

    /// The first `written` bytes of [`Self::pending`] are on their way.
    pub fn advance(&mut self, written: usize) {
        self.buffer.advance(written);
    }
}

/// Takes bytes, gives messages.
#[derive(Debug)]
pub struct Decoder<M> {
    buffer: BytesMut,
    limit: usize,
    poisoned: bool,
    message: PhantomData<fn() -> M>,
}

impl<M: Message + Default> Default for Decoder<M> {
    fn default() -> Self {
        Self::new()
    }
}

impl<M: Message + Default> Decoder<M> {
    pub fn new() -> Self {
        Self::with_limit(FRAME_BYTES_MAX)
    }

    /// A decoder for a peer that is not trusted yet.
    pub fn with_limit(limit: usize) -> Self {
        let limit = limit.min(FRAME_BYTES_MAX);
        Self { buffer: BytesMut::new(), limit, poisoned: false, message: PhantomData }
    }

    /// Changes the limit for frames that were not given out yet.
    pub fn set_limit(&mut self, limit: usize) {
        self.limit = limit.min(FRAME_BYTES_MAX);
    }

    /// Adds bytes from the peer.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// Where bytes from the peer are to be appended, with room for at least `room` of them and for
    /// the rest of a frame that has begun. Saves the copy of [`Self::push`].
    pub fn buffer(&mut self, room: usize) -> &mut BytesMut {
        let missing = match self.announced() {
            Some(length) if length <= self.limit => {
                (LENGTH_BYTES + length).saturating_sub(self.buffer.len())
            }
            _ => 0,
        };
        self.buffer.reserve(room.max(missing));
        &mut self.buffer
    }

    /// The next whole message, or `None` until more bytes have come.
    pub fn next_message(&mut self) -> Result<Option<M>, CodecError> {
        if self.poisoned {
            return Err(CodecError::Poisoned);
        }
        let Some(length) = self.announced() else { return Ok(None) };
        if length > self.limit {
            return Err(self.poison(CodecError::FrameTooLarge { length, limit: self.limit }));
        }
        if self.buffer.len() < LENGTH_BYTES + length {
            return Ok(None);
        }
        self.buffer.advance(LENGTH_BYTES);
        // Frozen, so that `Bytes` fields of the message share it instead of being copied.
        let body = self.buffer.split_to(length).freeze();
        M::decode(body).map(Some).map_err(|error| self.poison(CodecError::Malformed(error)))
    }

    /// Whether the bytes so far end where a frame ends.
    pub fn is_at_boundary(&self) -> bool {
        self.buffer.is_empty() && !self.poisoned
    }

    fn announced(&self) -> Option<usize> {
        let length = self.buffer.first_chunk::<LENGTH_BYTES>()?;
        // A `u32` that does not fit is past every limit.
        Some(usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX))
    }

    fn poison(&mut self, error: CodecError) -> CodecError {
        self.poisoned = true;
        self.buffer = BytesMut::new();
        error
    }
}

/// Longest [`DataHeader`].
pub const DATA_HEADER_BYTES_MAX: usize = 40;

/// All of a data frame that comes before its payload, so that a payload can be sent from where it
/// is. The payload is the last field of the message, which makes this possible.
#[derive(Debug, Clone, Copy)]
pub struct DataHeader {
    bytes: [u8; DATA_HEADER_BYTES_MAX],
    start: usize,
}

impl DataHeader {
    /// For `ToGuest` or `FromGuest` with `Data`; `payload` bytes follow.
    ///
    /// # Panics
    /// If the payload is empty or past [`DATA_BYTES_MAX`].
    pub fn data(payload: usize) -> Self {
        // Tag 8 in both envelopes, by design.
        Self::build(8, 1, payload, &[])
    }

    /// For `FromGuest` with `Output`.
    ///
    /// # Panics
    /// If the payload is empty or past [`DATA_BYTES_MAX`].
    pub fn output(stream: Stream, offset: u64, payload: usize) -> Self {
        let stream = u64::from((stream as i32).unsigned_abs());
        Self::build(5, 3, payload, &[(1, stream), (2, offset)])
    }

    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[self.start..]
    }

    fn build(body_tag: u8, data_tag: u8, payload: usize, varints: &[(u8, u64)]) -> Self {
        assert!(payload > 0 && payload <= DATA_BYTES_MAX, "a data frame is not empty or oversize");
        let mut header = Self { bytes: [0; DATA_HEADER_BYTES_MAX], start: DATA_HEADER_BYTES_MAX };
        // Written from its end, as every length counts what comes after it.
        let total = |header: &Self| header.as_slice().len() + payload;
        header.prepend_varint(payload as u64);
        header.prepend(&[data_tag << 3 | LENGTH_DELIMITED]);
        for &(tag, value) in varints.iter().rev().filter(|(_, value)| *value != 0) {
            header.prepend_varint(value);
            header.prepend(&[tag << 3]);
        }
        header.prepend_varint(total(&header) as u64);
        header.prepend(&[body_tag << 3 | LENGTH_DELIMITED]);
        #[expect(
            clippy::cast_possible_truncation,
            reason = "payload and header are far below 4 GiB"
        )]
        let length = total(&header) as u32;
        header.prepend(&length.to_be_bytes());
        header
    }

    fn prepend(&mut self, bytes: &[u8]) {
        let start = self.start - bytes.len();
        self.bytes[start..self.start].copy_from_slice(bytes);
        self.start = start;
    }

    fn prepend_varint(&mut self, value: u64) {
        let mut encoded = [0; 10];
        let mut rest = &mut encoded[..];
        prost::encoding::encode_varint(value, &mut rest);
        let length = 10 - rest.len();
        self.prepend(&encoded[..length]);
    }
}

const LENGTH_DELIMITED: u8 = 2;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{Data, FromGuest, FromGuestBody, Output, ToGuest, ToGuestBody};

    #[test]
    fn data_headers_are_what_prost_would_write() {
        for payload in [1, 100, 127, 128, 16_000, DATA_BYTES_MAX] {
            let data = Bytes::from(vec![7; payload]);
            for offset in [0, 1, 300, u64::MAX] {
                let stream = Stream::Stderr;
                let output = Output { stream: stream.into(), offset, data: data.clone() };
                let expected = frame(&FromGuest { body: Some(FromGuestBody::Output(output)) });
                let header = DataHeader::output(stream, offset, payload);
                assert_eq!([header.as_slice(), &data].concat(), expected.unwrap());
            }
            let both = Data { data: data.clone() };
            let up = frame(&ToGuest { body: Some(ToGuestBody::Data(both.clone())) }).unwrap();
            let down = frame(&FromGuest { body: Some(FromGuestBody::Data(both)) }).unwrap();
            assert_eq!([DataHeader::data(payload).as_slice(), &data].concat(), up);
            assert_eq!(up, down);
        }
    }

    #[test]
    fn a_wrong_frame_poisons_the_decoder() {
        let mut decoder = Decoder::<ToGuest>::with_limit(10);
        decoder.push(&[0, 0, 0, 11]);
        let too_large = CodecError::FrameTooLarge { length: 11, limit: 10 };
        assert_eq!(decoder.next_message(), Err(too_large));
        decoder.push(&[0, 0, 0, 0]);
        assert_eq!(decoder.next_message(), Err(CodecError::Poisoned));
        assert!(!decoder.is_at_boundary());
    }

    #[test]
    fn an_announced_length_reserves_no_more_than_the_limit() {
        let mut decoder = Decoder::<ToGuest>::new();
        decoder.push(&[0xff, 0xff, 0xff, 0xff]);
        assert!(decoder.buffer(16).capacity() < 1024);
    }
}
