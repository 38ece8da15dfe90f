//! A command in a simulated guest, and the sessions that watch it.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use aether_protocol::{
    Cause, ErrorCode, Exited, Failed, FromGuestBody, Output, RunState, RunSummary, Started,
    StdinTaken, Stream, ToGuestBody, TtySize,
    host::{ClientError, GuestSession},
    limits::{DATA_BYTES_MAX, STDIN_WINDOW_BYTES},
};
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, watch};

use super::{
    command::Input,
    guest::Guest,
    output::OutputStream,
    saved::{Chunk, SavedEnd, SavedRun, SavedStdin},
};

const SIGTERM: i32 = 15;
const SIGKILL: i32 = 9;

/// What a run was asked to do.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Program {
    pub(super) words: Vec<String>,
    pub(super) env: BTreeMap<String, String>,
    pub(super) cwd: String,
}

/// How far a program is, so that a snapshot's clone goes on from there. It changes together with
/// what it tells of, as seen from [`Guest::effect`].
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Progress {
    /// For each script that is under way, the outermost first: its step, and the exit code of the
    /// step before.
    pub(super) frames: Vec<(usize, i32)>,
    /// What the innermost program has written (of its present piece of input, where it has one).
    pub(super) bytes: u64,
    /// When it wakes, where it sleeps.
    pub(super) wake_at: Option<Duration>,
}

pub(super) struct Run {
    pub(super) id: String,
    pub(super) is_detached: bool,
    pub(super) pid: u32,
    pub(super) program: Program,
    pub(super) progress: Mutex<Progress>,
    pub(super) stdout: OutputStream,
    pub(super) stderr: OutputStream,
    /// There is more output, input was taken, or the run has ended.
    pub(super) grown: Notify,
    pub(super) stdin: StdinQueue,
    started_at: Duration,
    timeout_at: Option<Duration>,
    tty: Mutex<TtySize>,
    end: watch::Sender<Option<Exited>>,
    doom: watch::Sender<Option<(i32, Cause)>>,
    /// Counts attachments; a session ends when it is no longer the newest.
    attachment: watch::Sender<u64>,
}

/// Input that a session was sent and the program has not read.
#[derive(Default)]
pub(super) struct StdinQueue {
    state: Mutex<StdinState>,
    changed: Notify,
}

#[derive(Default)]
struct StdinState {
    chunks: VecDeque<bytes::Bytes>,
    received: u64,
    taken: u64,
    is_closed: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl StdinQueue {
    fn restore(saved: SavedStdin) -> Self {
        let state = StdinState {
            chunks: saved.chunks.into_iter().map(|chunk| chunk.0.into()).collect(),
            received: saved.received,
            taken: saved.taken,
            is_closed: saved.is_closed,
        };
        Self { state: Mutex::new(state), changed: Notify::new() }
    }

    fn save(&self) -> SavedStdin {
        let state = lock(&self.state);
        SavedStdin {
            chunks: state.chunks.iter().map(|chunk| Chunk(chunk.to_vec())).collect(),
            received: state.received,
            taken: state.taken,
            is_closed: state.is_closed,
        }
    }

    /// The next bytes, which stay until [`StdinQueue::take`]; `None` at the end of input.
    pub(super) async fn next(&self) -> Input {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            {
                let state = lock(&self.state);
                if let Some(chunk) = state.chunks.front() {
                    return Some(chunk.clone());
                }
                if state.is_closed {
                    return None;
                }
            }
            changed.await;
        }
    }

    /// The program is done with what `next` gave.
    pub(super) fn take(&self) {
        let mut state = lock(&self.state);
        if let Some(chunk) = state.chunks.pop_front() {
            state.taken += chunk.len() as u64;
        }
    }

    fn taken(&self) -> u64 {
        lock(&self.state).taken
    }

    /// False where the host sends more than it was let.
    fn push(&self, data: &bytes::Bytes) -> bool {
        let mut state = lock(&self.state);
        state.received += data.len() as u64;
        if state.received > state.taken + u64::from(STDIN_WINDOW_BYTES) {
            return false;
        }
        if !state.is_closed {
            state.chunks.push_back(data.clone());
        }
        drop(state);
        self.changed.notify_waiters();
        true
    }

    fn close(&self) {
        lock(&self.state).is_closed = true;
        self.changed.notify_waiters();
    }
}

#[expect(clippy::large_enum_variant, reason = "one at a time, on the stack")]
enum Event {
    /// There may be something to send.
    Grown,
    /// `None`: the host has closed.
    Message(Option<ToGuestBody>),
    Replaced,
}

impl Run {
    pub(super) fn new(
        request: &aether_protocol::Run,
        pid: u32,
        program: Program,
        now: Duration,
    ) -> Self {
        let timeout = Duration::from_millis(request.timeout_ms);
        let run = Self {
            id: request.run_id.clone(),
            is_detached: request.detached,
            pid,
            program,
            progress: Mutex::default(),
            stdout: OutputStream::default(),
            stderr: OutputStream::default(),
            grown: Notify::new(),
            stdin: StdinQueue::default(),
            started_at: now,
            timeout_at: (!timeout.is_zero()).then(|| now + timeout),
            tty: Mutex::new(request.tty.unwrap_or_default()),
            end: watch::Sender::new(None),
            doom: watch::Sender::new(None),
            attachment: watch::Sender::new(0),
        };
        if !request.stdin && request.tty.is_none() {
            run.stdin.close();
        }
        run
    }

    pub(super) fn save(&self) -> SavedRun {
        let tty = self.tty_size();
        let end = self.end.borrow().clone();
        SavedRun {
            id: self.id.clone(),
            is_detached: self.is_detached,
            pid: self.pid,
            program: self.program.clone(),
            started_at: self.started_at,
            timeout_at: self.timeout_at,
            tty: (tty.rows, tty.cols),
            stdin: self.stdin.save(),
            stdout: self.stdout.save(),
            stderr: self.stderr.save(),
            progress: lock(&self.progress).clone(),
            doom: self.doom.borrow().map(|(signal, cause)| (signal, cause.into())),
            end: end.map(|end| SavedEnd {
                exit_code: end.exit_code,
                signal: end.signal,
                cause: end.cause,
                duration_us: end.duration_us,
            }),
        }
    }

    pub(super) fn restore(saved: SavedRun) -> Self {
        let stdout = OutputStream::restore(saved.stdout);
        let stderr = OutputStream::restore(saved.stderr);
        let end = saved.end.map(|end| Exited {
            exit_code: end.exit_code,
            signal: end.signal,
            cause: end.cause,
            duration_us: end.duration_us,
            stdout_bytes: stdout.end(),
            stderr_bytes: stderr.end(),
        });
        let doom = |(signal, cause)| (signal, Cause::try_from(cause).unwrap_or(Cause::Exited));
        Self {
            id: saved.id,
            is_detached: saved.is_detached,
            pid: saved.pid,
            program: saved.program,
            progress: Mutex::new(saved.progress),
            stdout,
            stderr,
            grown: Notify::new(),
            stdin: StdinQueue::restore(saved.stdin),
            started_at: saved.started_at,
            timeout_at: saved.timeout_at,
            tty: Mutex::new(TtySize { rows: saved.tty.0, cols: saved.tty.1 }),
            end: watch::Sender::new(end),
            doom: watch::Sender::new(saved.doom.map(doom)),
            attachment: watch::Sender::new(0),
        }
    }

    pub(super) fn tty_size(&self) -> TtySize {
        *lock(&self.tty)
    }

    pub(super) fn has_ended(&self) -> bool {
        self.end.borrow().is_some()
    }

    pub(super) fn summary(&self) -> RunSummary {
        let state = if self.has_ended() { RunState::Exited } else { RunState::Running };
        RunSummary {
            run_id: self.id.clone(),
            state: state.into(),
            detached: self.is_detached,
            pid: self.pid,
        }
    }

    /// The first reason stays.
    fn kill(&self, signal: i32, cause: Cause) {
        self.doom.send_if_modified(|doom| {
            let is_first = doom.is_none();
            doom.get_or_insert((signal, cause));
            is_first
        });
    }

    /// Carries the program to its end. Dropped when the guest ends.
    pub(super) async fn carry_out(&self, guest: &Guest, program: impl Future<Output = i32>) {
        let mut doom = self.doom.subscribe();
        let timeout = async {
            match self.timeout_at {
                None => std::future::pending().await,
                Some(at) => guest.sleep_until(at).await,
            }
        };
        let (code, signal, cause) = tokio::select! {
            biased;
            doom = doom.wait_for(Option::is_some) => {
                let (signal, cause) = doom.ok().and_then(|d| *d).unwrap_or((SIGKILL, Cause::Cancelled));
                (None, Some(signal), cause)
            }
            code = program => (Some(code), None, Cause::Exited),
            () = timeout => (None, Some(SIGTERM), Cause::TimedOut),
        };
        let end = || {
            let duration = guest.now().saturating_sub(self.started_at);
            self.end.send_replace(Some(Exited {
                exit_code: code,
                signal,
                cause: cause.into(),
                duration_us: u64::try_from(duration.as_micros()).unwrap_or(u64::MAX),
                stdout_bytes: self.stdout.end(),
                stderr_bytes: self.stderr.end(),
            }));
        };
        guest.effect(end).await;
        self.grown.notify_waiters();
    }

    /// Serves one connection until the run has ended, the host is gone or another one attached.
    pub(super) async fn serve(
        &self,
        guest: &Guest,
        mut session: GuestSession,
        offsets: [u64; 2],
    ) -> Result<(), ClientError> {
        let mine = {
            let mut number = 0;
            self.attachment.send_modify(|n| {
                *n += 1;
                number = *n;
            });
            number
        };
        let mut attachment = self.attachment.subscribe();
        let streams = [(Stream::Stdout, &self.stdout), (Stream::Stderr, &self.stderr)];
        let mut next = [0; 2];
        for (i, (_, stream)) in streams.iter().enumerate() {
            next[i] = stream.start_at(offsets[i]);
        }
        session
            .send(Started {
                pid: self.pid,
                stdout_offset: next[0],
                stderr_offset: next[1],
                stdin_window: STDIN_WINDOW_BYTES,
            })
            .await?;
        let mut told = self.stdin.taken();
        loop {
            guest.unpaused().await;
            let grown = self.grown.notified();
            tokio::pin!(grown);
            grown.as_mut().enable();
            let end = self.end.borrow().clone();

            let mut progressed = false;
            for (i, (kind, stream)) in streams.iter().enumerate() {
                let data = stream.read(next[i], DATA_BYTES_MAX);
                if !data.is_empty() {
                    let length = data.len() as u64;
                    let stream_kind = i32::from(*kind);
                    session.send(Output { stream: stream_kind, offset: next[i], data }).await?;
                    next[i] += length;
                    stream.mark_sent(next[i]);
                    progressed = true;
                }
            }
            let taken = self.stdin.taken();
            if taken != told {
                session.send(StdinTaken { bytes: taken }).await?;
                told = taken;
            }
            if let (Some(exited), false) = (end, progressed) {
                return session.send(exited).await;
            }
            let replaced = async { attachment.wait_for(|n| *n != mine).await.is_ok() };
            let event = tokio::select! {
                biased;
                message = session.next() => Event::Message(message?),
                _ = replaced => Event::Replaced,
                () = std::future::ready(()), if progressed => Event::Grown,
                () = grown => Event::Grown,
            };
            match event {
                Event::Grown => {}
                Event::Message(message) => {
                    if !self.take(message) {
                        return Ok(());
                    }
                }
                Event::Replaced => {
                    let code = ErrorCode::Replaced.into();
                    let message = "another connection has attached".to_owned();
                    return session.send(FromGuestBody::Failed(Failed { code, message })).await;
                }
            }
        }
    }

    /// False where the host is gone or broke the protocol, which is the same.
    fn take(&self, message: Option<ToGuestBody>) -> bool {
        match message {
            Some(ToGuestBody::Stdin(stdin)) if self.stdin.push(&stdin.data) => {}
            Some(ToGuestBody::StdinEof(_)) => self.stdin.close(),
            Some(ToGuestBody::Signal(signal)) if (1..=64).contains(&signal.number) => {
                // Window changes, children and continuations do not end a program.
                if ![17, 18, 23, 28].contains(&signal.number) {
                    self.kill(signal.number, Cause::Exited);
                }
            }
            Some(ToGuestBody::Resize(size)) => {
                *lock(&self.tty) = TtySize { rows: size.rows, cols: size.cols };
            }
            Some(ToGuestBody::Cancel(_)) => self.kill(SIGTERM, Cause::Cancelled),
            Some(
                ToGuestBody::Stdin(_)
                | ToGuestBody::Signal(_)
                | ToGuestBody::Hello(_)
                | ToGuestBody::Request(_)
                | ToGuestBody::Data(_)
                | ToGuestBody::End(_),
            )
            | None => {
                self.connection_lost();
                return false;
            }
        }
        true
    }

    pub(super) fn connection_lost(&self) {
        if !self.is_detached {
            self.kill(SIGKILL, Cause::ConnectionLost);
        }
    }
}
