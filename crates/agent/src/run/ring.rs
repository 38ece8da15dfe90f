//! The retained end of one output stream.

use std::collections::VecDeque;
use std::mem::MaybeUninit;

use aether_protocol::limits::RETAINED_BYTES_MAX;

/// Bytes `start..end` of a stream. Takes memory as it fills.
#[derive(Debug, Clone, Default)]
pub(super) struct Ring {
    bytes: VecDeque<u8>,
    start: u64,
}

impl Ring {
    pub(super) fn start(&self) -> u64 {
        self.start
    }

    pub(super) fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    /// How much may be added so that nothing from `sent` on is dropped.
    pub(super) fn room(&self, sent: u64) -> usize {
        let unsent = self.end().saturating_sub(sent.max(self.start));
        RETAINED_BYTES_MAX.saturating_sub(usize::try_from(unsent).unwrap_or(usize::MAX))
    }

    /// Adds bytes and drops the oldest past the limit.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        let excess = (self.bytes.len() + bytes.len()).saturating_sub(RETAINED_BYTES_MAX);
        let dropped = excess.min(self.bytes.len());
        self.bytes.drain(..dropped);
        self.start += dropped as u64;
        self.bytes.extend(bytes);
    }

    /// Copies what is retained from `offset` on, as far as there is space; gives the number.
    pub(super) fn copy_from(&self, offset: u64, space: &mut [MaybeUninit<u8>]) -> usize {
        let skipped = usize::try_from(offset.saturating_sub(self.start)).unwrap_or(usize::MAX);
        let skipped = skipped.min(self.bytes.len());
        let length = space.len().min(self.bytes.len() - skipped);
        let (first, second) = self.bytes.as_slices();
        let from_first = first.get(skipped..).unwrap_or_default();
        let from_second = &second[skipped.saturating_sub(first.len())..];
        let head = from_first.len().min(length);
        space[..head].write_copy_of_slice(&from_first[..head]);
        space[head..length].write_copy_of_slice(&from_second[..length - head]);
        length
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn copied(ring: &Ring, offset: u64, length: usize) -> Vec<u8> {
        let mut out = Vec::with_capacity(length);
        let copied = ring.copy_from(offset, &mut out.spare_capacity_mut()[..length]);
        #[expect(unsafe_code, reason = "the ring has just written them")]
        // SAFETY: `copied` bytes were written.
        unsafe {
            out.set_len(copied);
        }
        out
    }

    #[test]
    fn ring_keeps_the_newest_bytes_and_says_where_they_begin() {
        let mut ring = Ring::default();
        let byte = |at: usize| u8::try_from(at % 251).unwrap();
        let all: Vec<u8> = (0..RETAINED_BYTES_MAX * 3).map(byte).collect();
        for chunk in all.chunks(1000) {
            ring.push(chunk);
        }
        assert_eq!(ring.end(), all.len() as u64);
        assert_eq!(ring.start(), (all.len() - RETAINED_BYTES_MAX) as u64);
        for offset in [ring.start(), ring.start() + 70_000, ring.end() - 1, ring.end()] {
            let at = usize::try_from(offset).unwrap();
            let until = all.len().min(at + 100_000);
            assert_eq!(copied(&ring, offset, 100_000), all[at..until]);
        }
    }

    #[test]
    fn room_never_costs_what_was_not_sent() {
        let mut ring = Ring::default();
        ring.push(&vec![1; RETAINED_BYTES_MAX]);
        assert_eq!(ring.room(0), 0);
        assert_eq!(ring.room(1000), 1000);
        assert_eq!(ring.room(ring.end()), RETAINED_BYTES_MAX);
    }
}
