//! One output stream of a simulated run: what was written, what was sent, and the bound on both.

use std::sync::{Mutex, PoisonError};

use aether_protocol::limits::RETAINED_BYTES_MAX;
use bytes::Bytes;
use tokio::sync::Notify;

use super::saved::SavedOutput;

#[derive(Debug, Default)]
struct State {
    /// Offset of the first byte kept.
    base: u64,
    kept: Vec<u8>,
    /// Offset after the last byte that some connection has sent.
    sent: u64,
}

impl State {
    fn end(&self) -> u64 {
        self.base + self.kept.len() as u64
    }
}

/// Output that was never sent is never dropped: a writer waits for room.
#[derive(Debug, Default)]
pub(super) struct OutputStream {
    state: Mutex<State>,
    room: Notify,
}

impl OutputStream {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn save(&self) -> SavedOutput {
        let state = self.lock();
        SavedOutput { base: state.base, kept: state.kept.clone(), sent: state.sent }
    }

    pub(super) fn restore(saved: SavedOutput) -> Self {
        let state = State { base: saved.base, kept: saved.kept, sent: saved.sent };
        Self { state: Mutex::new(state), room: Notify::new() }
    }

    /// Completes when there may be room again, if made before there was none.
    pub(super) fn room(&self) -> tokio::sync::futures::Notified<'_> {
        self.room.notified()
    }

    /// Appends what fits now; the rest is returned.
    pub(super) fn push<'a>(&self, data: &'a [u8]) -> &'a [u8] {
        let mut state = self.lock();
        let unsent = usize::try_from(state.end() - state.sent).unwrap_or(usize::MAX);
        let take = RETAINED_BYTES_MAX.saturating_sub(unsent).min(data.len());
        state.kept.extend_from_slice(&data[..take]);
        // What was sent makes room for what is newer.
        let excess = state.kept.len().saturating_sub(RETAINED_BYTES_MAX);
        state.kept.drain(..excess);
        state.base += excess as u64;
        &data[take..]
    }

    /// Where a reader that wants `offset` can begin.
    pub(super) fn start_at(&self, offset: u64) -> u64 {
        let state = self.lock();
        offset.clamp(state.base, state.end())
    }

    /// Bytes from `offset` on, at most `max`; empty at the end.
    pub(super) fn read(&self, offset: u64, max: usize) -> Bytes {
        let state = self.lock();
        let from = usize::try_from(offset.saturating_sub(state.base)).unwrap_or(usize::MAX);
        let from = from.min(state.kept.len());
        let to = from.saturating_add(max).min(state.kept.len());
        Bytes::copy_from_slice(&state.kept[from..to])
    }

    pub(super) fn mark_sent(&self, offset: u64) {
        let mut state = self.lock();
        state.sent = state.sent.max(offset);
        drop(state);
        self.room.notify_waiters();
    }

    pub(super) fn end(&self) -> u64 {
        self.lock().end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn unsent_output_blocks_its_writer_and_sent_output_makes_room() {
        let stream = OutputStream::default();
        assert!(stream.push(&vec![7; RETAINED_BYTES_MAX]).is_empty());
        let room = stream.room();
        assert_eq!(stream.push(b"more"), b"more");
        stream.mark_sent(4);
        room.await;
        assert!(stream.push(b"more").is_empty());
        let stream = OutputStream::restore(stream.save());
        assert_eq!(stream.start_at(0), 4);
        assert_eq!(stream.read(RETAINED_BYTES_MAX as u64, 100), &b"more"[..]);
    }
}
