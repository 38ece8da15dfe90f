//! Standard input of a run: what has come, what the command has taken, and the host's credit.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;

use aether_protocol::StdinTaken;
use aether_protocol::limits::STDIN_WINDOW_BYTES;
use bytes::{Buf as _, Bytes};
use rustix::io::Errno;

use crate::conn::Conn;

/// Standard input that was taken and not reported yet, at most.
const REPORT_BYTES: u64 = STDIN_WINDOW_BYTES as u64 / 4;

/// Standard input.
pub(super) struct Input {
    pub(super) pipe: Option<OwnedFd>,
    pub(super) pending: VecDeque<Bytes>,
    pub(super) pending_bytes: usize,
    pub(super) is_at_end: bool,
    /// Counted over the present connection.
    pub(super) received: u64,
    pub(super) taken: u64,
    pub(super) reported: u64,
    pub(super) window: u64,
}

impl Input {
    pub(super) fn new(pipe: Option<OwnedFd>) -> Self {
        Self {
            pipe,
            pending: VecDeque::new(),
            pending_bytes: 0,
            is_at_end: false,
            received: 0,
            taken: 0,
            reported: 0,
            window: 0,
        }
    }

    /// Counts from zero for a new connection; gives its window.
    pub(super) fn restart(&mut self) -> u32 {
        (self.received, self.taken, self.reported) = (0, 0, 0);
        let pending = u32::try_from(self.pending_bytes).unwrap_or(u32::MAX);
        let window = STDIN_WINDOW_BYTES.saturating_sub(pending);
        // What still waits of an earlier connection earns this one its credit as it is taken.
        self.window = window.into();
        window
    }

    /// Whether the host has kept to its window.
    pub(super) fn receive(&mut self, data: Bytes) -> bool {
        self.received += data.len() as u64;
        self.pending_bytes += data.len();
        if !self.is_at_end && !data.is_empty() {
            self.pending.push_back(data);
        } else {
            self.pending_bytes -= data.len();
            self.taken += data.len() as u64;
        }
        self.received <= self.window + self.taken
    }

    /// Writes to the terminal, or to the command's pipe.
    pub(super) fn write_to(&mut self, terminal: Option<&OwnedFd>) -> Result<(), Errno> {
        let mut written = 0;
        let result = match terminal.or(self.pipe.as_ref()) {
            Some(target) => write_pending(target, &mut self.pending, &mut written),
            // The command does not want it; the host must not wait for it.
            None => Err(Errno::PIPE),
        };
        self.count(written);
        result
    }

    pub(super) fn count(&mut self, taken: usize) {
        self.taken += taken as u64;
        self.pending_bytes = self.pending_bytes.saturating_sub(taken);
    }

    pub(super) fn discard(&mut self) {
        self.count(self.pending_bytes);
        self.pending.clear();
    }

    pub(super) fn close(&mut self) {
        self.pipe = None;
        self.discard();
    }

    pub(super) fn report(&mut self, conn: &mut Conn) {
        if self.taken - self.reported >= REPORT_BYTES {
            self.reported = self.taken;
            conn.queue(StdinTaken { bytes: self.taken });
        }
    }
}

fn write_pending(
    target: &OwnedFd,
    pending: &mut VecDeque<Bytes>,
    total: &mut usize,
) -> Result<(), Errno> {
    while let Some(first) = pending.front_mut() {
        match rustix::io::write(target, first) {
            Ok(written) => {
                *total += written;
                first.advance(written);
                if first.is_empty() {
                    pending.pop_front();
                }
            }
            Err(Errno::AGAIN) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}
