//! The poll loop of one run.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use aether_protocol::codec::DataHeader;
use aether_protocol::limits::{DATA_BYTES_MAX, DRAIN_LIMIT};
use aether_protocol::{
    Cause, ErrorCode, ExitStatus, Exited, Failed, Started, Stream, ToGuestBody, TtySize,
};
use bytes::Bytes;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::finished::Finished;
use super::input::Input;
use super::ring::Ring;
use super::stdio::{Pipes, resize};
use super::{Process, ending, reap};
use crate::conn::{Conn, Filled, timespec};
use crate::registry::{Attachment, Mailbox, Place};
use crate::server::Agent;
use crate::sys;

/// Output that is still taken from a descendant that writes on after the drain limit: what the
/// pipe can have held when the command ended.
const LATE_BYTES_MAX: u64 = 1024 * 1024;

/// How long the word that a command has started waits for its first output, to go in one packet. Who
/// sends input is told at once; for others it changes nothing but when they hear of the start.
const START_HOLD: Duration = Duration::from_millis(50);

/// The end-of-file character of a terminal in its usual mode.
const TERMINAL_EOF: &[u8] = &[4];

/// A run at its start.
pub(super) struct Start {
    pub(super) process: Process,
    pub(super) pipes: Pipes,
    pub(super) begun: Instant,
    pub(super) time_limit: Option<Duration>,
    pub(super) grace: Duration,
    pub(super) mailbox: Option<Arc<Mailbox>>,
}

pub(super) struct Watch<'a> {
    agent: &'a Agent,
    process: Process,
    pid: u32,
    begun: Instant,
    ended: Option<Instant>,
    grace: Duration,
    time_limit: Option<Instant>,
    cause: Cause,
    kill_at: Option<Instant>,
    /// Until then nothing is sent.
    hold_until: Option<Instant>,
    out: [Source; 2],
    input: Input,
    is_terminal: bool,
    conn: Option<Conn>,
    mailbox: Option<Arc<Mailbox>>,
}

/// One output stream.
struct Source {
    stream: Stream,
    pipe: Option<OwnedFd>,
    /// Only for a detached run: everything goes through it.
    ring: Option<Ring>,
    /// Next offset to read from the pipe, and to send.
    read: u64,
    sent: u64,
    /// Read after the drain limit.
    late: u64,
}

/// Which of the descriptors that were polled have something.
#[derive(Default)]
#[expect(clippy::struct_excessive_bools, reason = "one for each descriptor that is polled")]
struct Ready {
    socket_in: bool,
    socket_out: bool,
    out: [bool; 2],
    stdin: bool,
    exit: bool,
    bell: bool,
}

impl<'a> Watch<'a> {
    pub(super) fn new(agent: &'a Agent, start: Start) -> Self {
        let Start { process, pipes, begun, time_limit, grace, mailbox } = start;
        let ring = || mailbox.is_some().then(Ring::default);
        let source =
            |stream, pipe| Source { stream, pipe, ring: ring(), read: 0, sent: 0, late: 0 };
        let (pid, ended) = match &process {
            Process::Running(child) => (child.pid.unsigned_abs(), None),
            Process::Ended(_) => (0, Some(Instant::now())),
        };
        Self {
            agent,
            process,
            pid,
            begun,
            ended,
            grace,
            time_limit: time_limit.and_then(|limit| begun.checked_add(limit)),
            cause: Cause::Exited,
            kill_at: None,
            hold_until: None,
            out: [source(Stream::Stdout, Some(pipes.stdout)), source(Stream::Stderr, pipes.stderr)],
            input: Input::new(pipes.stdin),
            is_terminal: pipes.is_terminal,
            conn: None,
            mailbox,
        }
    }

    pub(super) fn serve(mut self, mut place: Place<'_>, first: Attachment) {
        let takes_input = self.is_terminal || self.input.pipe.is_some();
        if !takes_input && matches!(self.process, Process::Running(_)) {
            self.hold_until = Instant::now().checked_add(START_HOLD);
        }
        self.attach(first);
        if self.hold_until.is_some() {
            let ready = self.wait();
            self.hold_until = None;
            self.react(&ready);
        }
        loop {
            self.pump();
            while !self.is_over() {
                let ready = self.wait();
                self.react(&ready);
                self.pump();
            }
            let exited = self.exited();
            if let Some(mut conn) = self.conn.take() {
                conn.queue(exited.clone());
                self.conn = Some(conn);
            }
            // The registry first: the run is over there before the host can know that it is.
            let Some(mailbox) = self.mailbox.clone() else {
                drop(place);
                return self.say_goodbye();
            };
            match place.finish(&mailbox, self.finished(exited)) {
                Ok(()) => return self.say_goodbye(),
                // Somebody came in the last moment; they are served like any other.
                Err(again) => place = again,
            }
            if let Some(attachment) = mailbox.take() {
                self.attach(attachment);
            }
        }
    }

    fn say_goodbye(mut self) {
        let conn = self.conn.take();
        // Pipes and buffers are given back before the host is waited for.
        drop(self);
        if let Some(conn) = conn {
            conn.finish();
        }
    }

    fn finished(&self, exited: Exited) -> Finished {
        let [stdout, stderr] = &self.out;
        let ring = |source: &Source| source.ring.clone().unwrap_or_default();
        Finished { pid: self.pid, stdout: ring(stdout), stderr: ring(stderr), exited }
    }

    fn exited(&self) -> Exited {
        let status = match &self.process {
            Process::Ended(status) => *status,
            // Not reached: a run is over when its process has ended.
            Process::Running(_) => ExitStatus::Signal(libc::SIGKILL),
        };
        let (exit_code, signal) = match status {
            ExitStatus::Code(code) => (Some(code), None),
            ExitStatus::Signal(signal) => (None, Some(signal)),
        };
        let duration = self.ended.unwrap_or_else(Instant::now).duration_since(self.begun);
        Exited {
            exit_code,
            signal,
            cause: self.cause.into(),
            duration_us: u64::try_from(duration.as_micros()).unwrap_or(u64::MAX),
            stdout_bytes: self.out[0].read,
            stderr_bytes: self.out[1].read,
        }
    }

    /// Puts a connection in the place of the present one.
    fn attach(&mut self, attachment: Attachment) {
        let Attachment { mut conn, generation, attach } = attachment;
        if let Some(mut old) = self.conn.take() {
            old.queue(Failed::new(ErrorCode::Replaced, "another connection has attached"));
            // Whoever does not read is not waited for.
            drop(old.flush());
        }
        for (source, asked) in self.out.iter_mut().zip([attach.stdout_offset, attach.stderr_offset])
        {
            if let Some(ring) = &source.ring {
                source.sent = asked.clamp(ring.start(), ring.end());
            }
        }
        conn.queue(self.agent.welcome(generation));
        conn.queue(Started {
            pid: self.pid,
            stdout_offset: self.out[0].sent,
            stderr_offset: self.out[1].sent,
            stdin_window: self.input.restart(),
        });
        self.conn = Some(conn);
        if self.hold_until.is_none() {
            self.flush();
        }
        // Frames that came right behind the request.
        self.take_messages();
    }

    fn is_over(&self) -> bool {
        let Process::Ended(_) = self.process else { return false };
        let is_sent = |source: &Source| self.conn.is_none() || source.sent == source.read;
        let is_done = self.out.iter().all(|source| source.pipe.is_none() && is_sent(source));
        // A run that lost its only reader has nobody to drain for.
        is_done || (self.conn.is_none() && self.mailbox.is_none())
    }

    fn wait(&self) -> Ready {
        let mut fds = Vec::with_capacity(7);
        let mut socket_flags = PollFlags::IN;
        let has_unsent = self.conn.as_ref().is_some_and(|conn| conn.unsent() > 0);
        if has_unsent && self.hold_until.is_none() {
            socket_flags |= PollFlags::OUT;
        }
        let socket = add(&mut fds, self.conn.as_ref().map(Conn::fd), socket_flags);
        let out = [0, 1].map(|index| {
            let source = &self.out[index];
            let pipe = source.pipe.as_ref().filter(|_| self.may_read(source));
            add(&mut fds, pipe.map(OwnedFd::as_fd), PollFlags::IN)
        });
        let target = if self.is_terminal { &self.out[0].pipe } else { &self.input.pipe };
        let target = target.as_ref().filter(|_| !self.input.pending.is_empty());
        let stdin = add(&mut fds, target.map(OwnedFd::as_fd), PollFlags::OUT);
        let exit = match &self.process {
            Process::Running(child) => add(&mut fds, Some(child.pidfd.as_fd()), PollFlags::IN),
            Process::Ended(_) => None,
        };
        let bell = self.mailbox.as_ref().map(|mailbox| mailbox.bell());
        let bell = add(&mut fds, bell, PollFlags::IN);

        let left = |at: Instant| timespec(at.saturating_duration_since(Instant::now()));
        if poll(&mut fds, self.deadline().map(left).as_ref()).is_err() {
            // Interrupted; the caller comes back.
            return Ready::default();
        }
        let events = |index: Option<usize>| index.map_or(PollFlags::empty(), |i| fds[i].revents());
        let any = |index| !events(index).is_empty();
        Ready {
            socket_in: events(socket).intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR),
            socket_out: events(socket).contains(PollFlags::OUT),
            out: out.map(any),
            stdin: any(stdin),
            exit: any(exit),
            bell: any(bell),
        }
    }

    fn deadline(&self) -> Option<Instant> {
        let is_running = matches!(self.process, Process::Running(_));
        let drain = self.drain_deadline().filter(|_| {
            // Past it nothing more is waited for than what a stalled reader holds up.
            self.out.iter().any(|source| source.pipe.is_some() && self.may_read(source))
        });
        let limit = self.time_limit.filter(|_| is_running && self.cause == Cause::Exited);
        [limit, self.kill_at.filter(|_| is_running), drain, self.hold_until]
            .into_iter()
            .flatten()
            .min()
    }

    fn drain_deadline(&self) -> Option<Instant> {
        self.ended.map(|ended| ended + DRAIN_LIMIT)
    }

    fn react(&mut self, ready: &Ready) {
        if ready.bell
            && let Some(attachment) = self.mailbox.as_ref().and_then(|mailbox| mailbox.take())
        {
            self.attach(attachment);
            return;
        }
        if ready.socket_out {
            self.flush();
        }
        if ready.socket_in {
            self.read_socket();
        }
        if ready.stdin {
            self.feed();
        }
        // Output first: the exit must not overtake it, and mostly both are there.
        for index in [0, 1] {
            if ready.out[index] {
                self.read_output(index);
            }
        }
        if ready.exit {
            self.collect();
        }
        self.check_deadlines();
    }

    fn check_deadlines(&mut self) {
        let now = Instant::now();
        let is_past = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        if let Process::Running(child) = &self.process {
            if is_past(self.kill_at) {
                ending::kill_all(child.pid);
                self.kill_at = None;
            }
            if is_past(self.time_limit) {
                self.end(Cause::TimedOut);
            }
        }
        if is_past(self.drain_deadline()) {
            for index in [0, 1] {
                self.read_last(index);
            }
        }
    }

    /// Asks the process group to end, and sets when it is made to.
    fn end(&mut self, cause: Cause) {
        let Process::Running(child) = &self.process else { return };
        if self.cause != Cause::Exited {
            return;
        }
        self.cause = cause;
        if cause == Cause::ConnectionLost {
            ending::kill_all(child.pid);
            return;
        }
        sys::kill(-child.pid, libc::SIGTERM);
        // A stopped process would sleep through it.
        sys::kill(-child.pid, libc::SIGCONT);
        self.kill_at = Instant::now().checked_add(self.grace);
    }

    fn collect(&mut self) {
        let Process::Running(child) = &self.process else { return };
        if self.cause != Cause::Exited {
            // While the process is not collected its id cannot be another's.
            ending::kill_all(child.pid);
        }
        let status = reap(child);
        self.process = Process::Ended(status);
        self.ended = Some(Instant::now());
        self.input.close();
        for index in [0, 1] {
            self.read_output(index);
        }
    }

    // --- the socket ---

    fn lose_connection(&mut self) {
        self.conn = None;
        if self.mailbox.is_none() {
            self.end(Cause::ConnectionLost);
        }
    }

    fn flush(&mut self) {
        if let Some(conn) = &mut self.conn
            && conn.flush().is_err()
        {
            self.lose_connection();
        }
    }

    fn read_socket(&mut self) {
        let Some(conn) = &mut self.conn else { return };
        match conn.fill() {
            Ok(Filled::Bytes) => self.take_messages(),
            Ok(Filled::Nothing) => {}
            Ok(Filled::Eof) | Err(_) => self.lose_connection(),
        }
    }

    fn take_messages(&mut self) {
        while let Some(conn) = &mut self.conn {
            let is_fine = match conn.decoded() {
                Ok(None) => return,
                Ok(Some(message)) => self.take_message(message.body),
                Err(_) => false,
            };
            if !is_fine {
                if let Some(conn) = &mut self.conn {
                    conn.queue(Failed::new(ErrorCode::BadMessage, "not a message of a run"));
                    drop(conn.flush());
                }
                self.lose_connection();
            }
        }
    }

    /// Whether the message has a place in a run.
    fn take_message(&mut self, body: Option<ToGuestBody>) -> bool {
        match body {
            Some(ToGuestBody::Stdin(stdin)) => {
                let is_within = self.input.receive(stdin.data);
                self.feed();
                return is_within;
            }
            Some(ToGuestBody::StdinEof(_)) => {
                // To a terminal the end is a key like any other, and more may follow.
                if self.is_terminal {
                    self.input.pending.push_back(Bytes::from_static(TERMINAL_EOF));
                } else {
                    self.input.is_at_end = true;
                }
                self.feed();
            }
            Some(ToGuestBody::Signal(signal)) => self.signal(signal.number),
            Some(ToGuestBody::Resize(size)) => {
                if let Some(master) = self.out[0].pipe.as_ref().filter(|_| self.is_terminal) {
                    resize(master, TtySize { rows: size.rows, cols: size.cols });
                }
            }
            Some(ToGuestBody::Cancel(_)) => self.end(Cause::Cancelled),
            Some(
                ToGuestBody::Hello(_)
                | ToGuestBody::Request(_)
                | ToGuestBody::Data(_)
                | ToGuestBody::End(_),
            )
            | None => return false,
        }
        true
    }

    fn signal(&self, number: i32) {
        let Process::Running(child) = &self.process else { return };
        if !(1..=64).contains(&number) {
            return;
        }
        // In a terminal the group in the foreground, as a key would.
        let master = self.out[0].pipe.as_ref().filter(|_| self.is_terminal);
        let foreground = master.and_then(|master| rustix::termios::tcgetpgrp(master).ok());
        let group = foreground.map_or(child.pid, |group| group.as_raw_nonzero().get());
        sys::kill(-group, number);
    }

    // --- output ---

    /// Whether there is a place for more of this stream.
    fn may_read(&self, source: &Source) -> bool {
        match (&source.ring, &self.conn) {
            (Some(ring), _) => ring.room(source.sent) > 0,
            // One frame of each stream may wait; a reader that stalls holds back its own command.
            (None, Some(conn)) => conn.unsent() < DATA_BYTES_MAX,
            // Nobody will read it, and the command is being killed.
            (None, None) => false,
        }
    }

    fn read_output(&mut self, index: usize) {
        if !self.may_read(&self.out[index]) {
            return;
        }
        let source = &mut self.out[index];
        let Some(pipe) = &source.pipe else { return };
        let read = match (&mut source.ring, &mut self.conn) {
            (Some(ring), _) => read_to_ring(pipe, ring, source.sent),
            (None, Some(conn)) => {
                let header = |length| DataHeader::output(source.stream, source.read, length);
                let fill = |space: &mut [MaybeUninit<u8>]| {
                    rustix::io::read(pipe, space).map(|(got, _)| got.len())
                };
                let read = conn.queue_data(DATA_BYTES_MAX, header, fill);
                source.sent += *read.as_ref().unwrap_or(&0) as u64;
                read
            }
            (None, None) => return,
        };
        match read {
            Ok(0) => source.pipe = None,
            Ok(length) => {
                source.read += length as u64;
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            // A terminal reports its end as an error.
            Err(_) => source.pipe = None,
        }
    }

    /// After the drain limit: takes what is there and waits for nothing more.
    fn read_last(&mut self, index: usize) {
        let before = self.out[index].read;
        if self.out[index].pipe.is_none() || !self.may_read(&self.out[index]) {
            return;
        }
        self.read_output(index);
        let source = &mut self.out[index];
        source.late += source.read - before;
        if source.read == before || source.late > LATE_BYTES_MAX {
            source.pipe = None;
        }
    }

    /// Moves retained output to the socket, and writes.
    fn pump(&mut self) {
        loop {
            let Some(conn) = &mut self.conn else { return };
            let before = conn.unsent();
            for source in &mut self.out {
                source.queue_retained(conn);
            }
            self.input.report(conn);
            let is_idle = before == 0 && conn.unsent() == 0;
            self.flush();
            // What was waiting may have gone just now and have made room: only a socket that is full,
            // or nothing left to send, ends this, as otherwise no event would ever continue it.
            if is_idle || self.conn.as_ref().is_none_or(|conn| conn.unsent() > 0) {
                return;
            }
        }
    }

    // --- input ---

    fn feed(&mut self) {
        let terminal = if self.is_terminal { self.out[0].pipe.as_ref() } else { None };
        if self.input.write_to(terminal).is_err() {
            self.input.close();
        }
        if self.input.is_at_end && self.input.pending.is_empty() {
            self.input.pipe = None;
        }
    }
}

fn add<'fd>(
    fds: &mut Vec<PollFd<'fd>>,
    fd: Option<BorrowedFd<'fd>>,
    flags: PollFlags,
) -> Option<usize> {
    fds.push(PollFd::from_borrowed_fd(fd?, flags));
    Some(fds.len() - 1)
}

fn read_to_ring(pipe: &OwnedFd, ring: &mut Ring, sent: u64) -> Result<usize, Errno> {
    let mut scratch = Vec::with_capacity(ring.room(sent).min(DATA_BYTES_MAX));
    rustix::io::read(pipe, rustix::buffer::spare_capacity(&mut scratch))?;
    ring.push(&scratch);
    Ok(scratch.len())
}

impl Source {
    fn queue_retained(&mut self, conn: &mut Conn) {
        let Some(ring) = &self.ring else { return };
        if self.sent >= ring.end() || conn.unsent() >= DATA_BYTES_MAX {
            return;
        }
        let (stream, at) = (self.stream, self.sent);
        let header = |length| DataHeader::output(stream, at, length);
        let fill = |space: &mut [_]| Ok::<_, std::convert::Infallible>(ring.copy_from(at, space));
        let Ok(length) = conn.queue_data(DATA_BYTES_MAX, header, fill);
        self.sent += length as u64;
    }
}
