//! A connection to the host: frames over a stream socket, with blocking and non-blocking calls.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use aether_protocol::codec::{DataHeader, encode};
use aether_protocol::limits::{FRAME_BYTES_MAX, HELLO_BYTES_MAX};
use aether_protocol::{Decoder, FromGuest, ToGuest};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::sendfile;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};

use crate::connections::Socket;
use crate::sys;

/// Room for a read: one of small frames, or several data frames.
const READ_BYTES_MIN: usize = 4 * 1024;
const READ_BYTES_MAX: usize = 256 * 1024;

/// How long a session's end waits for the host to close.
const LINGER: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub(crate) struct Conn {
    socket: Arc<Socket>,
    decoder: Decoder<ToGuest>,
    read_bytes: usize,
    /// Frames that are not written yet, from `sent` on.
    out: Vec<u8>,
    sent: usize,
}

/// What a non-blocking read brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Filled {
    Bytes,
    Nothing,
    /// The host is gone.
    Eof,
}

impl Conn {
    pub(crate) fn new(socket: Arc<Socket>) -> Self {
        let decoder = Decoder::with_limit(HELLO_BYTES_MAX);
        Self { socket, decoder, read_bytes: READ_BYTES_MIN, out: Vec::new(), sent: 0 }
    }

    /// The peer has the token: frames may have their full length.
    pub(crate) fn trust(&mut self) {
        self.decoder.set_limit(FRAME_BYTES_MAX);
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    pub(crate) fn socket(&self) -> &Socket {
        &self.socket
    }

    /// Reads what is there.
    pub(crate) fn fill(&mut self) -> io::Result<Filled> {
        if self.socket.is_ended() {
            return Ok(Filled::Eof);
        }
        let buffer = self.decoder.buffer(self.read_bytes);
        let socket = self.socket.as_fd();
        let read = sys::append(buffer, |space| {
            recv(socket, space, RecvFlags::DONTWAIT).map(|(_, length)| length)
        });
        match read {
            Ok(0) => Ok(Filled::Eof),
            Ok(length) => {
                if length == self.read_bytes {
                    self.read_bytes = READ_BYTES_MAX;
                }
                Ok(Filled::Bytes)
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(Filled::Nothing),
            Err(errno) => Err(errno.into()),
        }
    }

    /// The next frame among the bytes that were read.
    pub(crate) fn decoded(&mut self) -> io::Result<Option<ToGuest>> {
        self.decoder.next_message().map_err(io::Error::other)
    }

    /// Waits for the next frame; `None` where the host closed, or the deadline passed.
    pub(crate) fn receive(&mut self, deadline: Option<Instant>) -> io::Result<Option<ToGuest>> {
        loop {
            if let Some(message) = self.decoded()? {
                return Ok(Some(message));
            }
            // Frames of a request are mostly there already: read first, wait second.
            match self.fill()? {
                Filled::Bytes => {}
                Filled::Eof => return Ok(None),
                Filled::Nothing => {
                    if !self.wait(PollFlags::IN, deadline)? {
                        return Ok(None);
                    }
                }
            }
        }
    }

    /// Adds a frame to what [`Self::flush`] writes.
    pub(crate) fn queue(&mut self, message: impl Into<FromGuest>) {
        self.reclaim();
        // Every message that the agent builds is bounded well below a frame.
        if let Err(error) = encode(&message.into(), &mut self.out) {
            crate::kmsg!("drop a message: {error}");
        }
    }

    /// Adds a data frame. `fill` gets the space for the payload, of at most `limit` bytes, and says
    /// how much it used; nothing is added where that is nothing.
    pub(crate) fn queue_data<E>(
        &mut self,
        limit: usize,
        header: impl FnOnce(usize) -> DataHeader,
        fill: impl FnOnce(&mut [std::mem::MaybeUninit<u8>]) -> Result<usize, E>,
    ) -> Result<usize, E> {
        self.reclaim();
        let (length, padding) = sys::append_with_header(&mut self.out, limit, header, fill)?;
        self.sent += padding;
        Ok(length)
    }

    /// Sends a data frame whose payload comes straight from a file, however long the host takes.
    /// Gives how much of it the file had; the rest of the frame is then zeros.
    pub(crate) fn send_from_file(
        &mut self,
        header: DataHeader,
        file: &File,
        at: u64,
        length: usize,
    ) -> io::Result<usize> {
        self.reclaim();
        self.out.extend_from_slice(header.as_slice());
        while self.unsent() > 0 {
            // The payload follows at once and belongs into the same packet.
            let flags = SendFlags::MORE | SendFlags::NOSIGNAL;
            match send(self.fd(), &self.out[self.sent..], flags) {
                Ok(written) => self.sent += written,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        let (mut at, mut left) = (at, length);
        while left > 0 {
            match sendfile(self.fd(), file, Some(&mut at), left) {
                Ok(0) => break,
                Ok(sent) => left -= sent,
                Err(Errno::INTR) => {}
                // Of the file or of the socket: either way the frame cannot be completed.
                Err(errno) => return Err(errno.into()),
            }
        }
        self.reclaim();
        self.out.resize(left, 0);
        self.flush_all()?;
        Ok(length - left)
    }

    pub(crate) fn unsent(&self) -> usize {
        self.out.len() - self.sent
    }

    /// Writes what the socket takes; whether everything is gone.
    pub(crate) fn flush(&mut self) -> io::Result<bool> {
        self.flush_with(SendFlags::empty())
    }

    fn flush_with(&mut self, flags: SendFlags) -> io::Result<bool> {
        let flags = flags | SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        while self.unsent() > 0 {
            match send(self.fd(), &self.out[self.sent..], flags) {
                Ok(written) => self.sent += written,
                Err(Errno::AGAIN) => return Ok(false),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(true)
    }

    /// Writes everything, however long the host takes.
    pub(crate) fn flush_all(&mut self) -> io::Result<()> {
        self.flush_all_with(SendFlags::empty())
    }

    fn flush_all_with(&mut self, flags: SendFlags) -> io::Result<()> {
        while !self.flush_with(flags)? {
            self.wait(PollFlags::OUT, None)?;
        }
        Ok(())
    }

    pub(crate) fn send(&mut self, message: impl Into<FromGuest>) -> io::Result<()> {
        self.queue(message);
        self.flush_all()
    }

    /// Ends the session once the host has read the last answer.
    ///
    /// Closing a TCP socket with unread input resets the connection, and the reset overtakes the
    /// answer. So the agent closes its half and reads to the end of the other.
    pub(crate) fn finish(mut self) {
        // The end follows at once and belongs into the same packet.
        let is_sent = self.flush_all_with(SendFlags::MORE);
        if is_sent.is_err() || shutdown(self.fd(), Shutdown::Write).is_err() {
            return;
        }
        let deadline = Instant::now() + LINGER;
        let mut scratch = [0; 4096];
        loop {
            match recv(self.fd(), &mut scratch, RecvFlags::DONTWAIT) {
                Ok((_, 0)) => return,
                Ok(_) if Instant::now() >= deadline => return,
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => match self.wait(PollFlags::IN, Some(deadline)) {
                    Ok(true) => {}
                    Ok(false) | Err(_) => return,
                },
                Err(_) => return,
            }
        }
    }

    /// Whether the event came before the deadline.
    fn wait(&self, event: PollFlags, deadline: Option<Instant>) -> io::Result<bool> {
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let timeout = left.map(timespec);
            let mut fds = [PollFd::from_borrowed_fd(self.fd(), event)];
            match poll(&mut fds, timeout.as_ref()) {
                Ok(0) => return Ok(false),
                Ok(_) => return Ok(true),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    fn reclaim(&mut self) {
        if self.sent == self.out.len() {
            self.out.clear();
            self.sent = 0;
        }
    }
}

/// Rounded up, so that a wait never ends just before its deadline and spins.
pub(crate) fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: duration.subsec_nanos().into(),
    }
}
