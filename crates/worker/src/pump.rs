//! Moves bytes between a command and whoever follows it, and keeps what is to be kept.
//!
//! Cancellation: every await in here may be dropped. A message to the guest that was begun stays
//! queued in the writer; output that was received has been collected before anything is awaited.

use std::{collections::VecDeque, time::Duration};

use aether_logs::{Lines, LogService, LogSink, LogStream};
use aether_protocol::{
    Cause, Exited, Stream,
    host::{ClientError, RunEvent, RunInput, RunOutput, RunSession},
};
use aether_store::{AttemptEnd, ExecutionEnd};
use aether_streams::{SessionInput, SessionOutput, WorkerEnd};
use aether_types::{
    ErrorCode, ExecutionSpec, ExecutionState, ExitStatus, Fault, OutputStream, RetainedOutput,
    TaskId, TaskState, VmId,
};
use bytes::Bytes;
use tokio::{
    sync::{
        mpsc::{Receiver, Sender},
        watch,
    },
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

use crate::{
    attempt::done,
    execute::{cancelled, states},
    fault,
    guest::Guest,
};

/// After a cancellation the guest ends the command within its grace; then this host stops waiting.
const CANCEL_LIMIT: Duration = Duration::from_secs(10);

pub(crate) struct Pump<'a> {
    pub(crate) guest: &'a Guest,
    pub(crate) cancelled: &'a CancellationToken,
    /// The process ends and leaves the VM running.
    pub(crate) closing: &'a CancellationToken,
    pub(crate) interactive: bool,
    pub(crate) limit: Duration,
}

pub(crate) enum PumpEnd {
    Exited(Exited),
    /// The guest is gone, or the command was given up.
    Over(Fault),
    /// The connection is gone; the guest may not be.
    Lost(ClientError),
    Left,
}

/// Standard input on its way to a command; the gateway bounds how much. Survives a lost connection, except for bytes that were
/// on the wire.
pub(crate) struct Feed {
    waiting: VecDeque<Bytes>,
    /// Bytes that came, in all.
    received: u64,
    ended: bool,
    eof_sent: bool,
}

impl Feed {
    pub(crate) fn new(spec: &ExecutionSpec) -> Self {
        let given = spec.stdin.as_ref().filter(|text| !text.is_empty());
        let waiting: VecDeque<_> =
            given.map(|text| Bytes::copy_from_slice(text.as_bytes())).into_iter().collect();
        Self {
            received: waiting.iter().map(|data| data.len() as u64).sum(),
            // Without a stream and without text the command has no standard input at all.
            eof_sent: !spec.interactive && waiting.is_empty(),
            ended: !spec.interactive,
            waiting,
        }
    }

    /// Passes on what the client sends. Completes only when the client of an interactive command
    /// has gone.
    async fn pass_on(
        &mut self,
        input: &mut RunInput,
        mut from_client: Option<&mut Receiver<SessionInput>>,
        taken: Option<&watch::Sender<u64>>,
        interactive: bool,
    ) {
        loop {
            if let Some(taken) = taken {
                // Counted here and not after sending, which may be dropped when it has sent.
                let waiting: u64 = self.waiting.iter().map(|data| data.len() as u64).sum();
                taken.send_if_modified(|bytes| {
                    std::mem::replace(bytes, self.received - waiting) != self.received - waiting
                });
            }
            let message = tokio::select! {
                sent = self.send_next(input) => match sent {
                    Ok(()) => continue,
                    // The reading half sees why, and decides.
                    Err(_) => return std::future::pending().await,
                },
                // A signal is not to wait behind input that the command does not read.
                message = receive(&mut from_client) => message,
            };
            let sent = match message {
                Some(SessionInput::Stdin(data)) if !self.ended && !data.is_empty() => {
                    self.received += data.len() as u64;
                    self.waiting.push_back(data);
                    Ok(())
                }
                Some(SessionInput::Stdin(data)) => {
                    self.received += data.len() as u64;
                    Ok(())
                }
                Some(SessionInput::StdinEof) => {
                    self.ended = true;
                    Ok(())
                }
                Some(SessionInput::Signal(number)) => input.signal(number).await,
                Some(SessionInput::Resize(size)) => {
                    input.resize(size.rows.into(), size.cols.into()).await
                }
                None if interactive => return,
                None => {
                    from_client = None;
                    Ok(())
                }
            };
            if sent.is_err() {
                return std::future::pending().await;
            }
        }
    }

    /// Cancel-safe.
    async fn send_next(&mut self, input: &mut RunInput) -> Result<(), ClientError> {
        if let Some(data) = self.waiting.front_mut() {
            let sent = input.stdin_part(data).await;
            if data.is_empty() {
                self.waiting.pop_front();
            }
            return sent;
        }
        if self.ended && !self.eof_sent {
            self.eof_sent = true;
            return input.stdin_eof().await;
        }
        std::future::pending().await
    }
}

async fn receive(from: &mut Option<&mut Receiver<SessionInput>>) -> Option<SessionInput> {
    match from {
        Some(receiver) => receiver.recv().await,
        None => std::future::pending().await,
    }
}

impl Pump<'_> {
    pub(crate) async fn run(
        &self,
        run: RunSession,
        session: &mut Option<WorkerEnd>,
        feed: &mut Feed,
        collected: &mut Collected,
    ) -> PumpEnd {
        collected
            .skip_to(run.started().stdout_offset, run.started().stderr_offset, session.as_ref())
            .await;
        let (input, output) = run.split();
        let (from_client, to_client, taken) = match session {
            Some(end) => (Some(&mut end.input), Some(&end.output), Some(&end.taken)),
            None => (None, None, None),
        };
        let client_left = CancellationToken::new();
        let mut feeding = std::pin::pin!(self.feed(input, from_client, taken, feed, &client_left));
        let mut reading = std::pin::pin!(self.read(output, to_client, collected, &client_left));
        let mut over = std::pin::pin!(self.guest.ended());
        let mut deadline = std::pin::pin!(sleep_until(Instant::now() + self.limit));
        let mut cancelling = false;
        loop {
            tokio::select! {
                end = &mut reading => return end,
                fault = &mut over => return PumpEnd::Over(fault),
                () = self.closing.cancelled() => return PumpEnd::Left,
                () = &mut deadline => return PumpEnd::Over(overdue(cancelling)),
                () = &mut feeding, if !cancelling => {
                    // It ends only when the command is to end; the guest has been told.
                    cancelling = true;
                    deadline.as_mut().reset(Instant::now() + CANCEL_LIMIT);
                }
            }
        }
    }

    /// Feeds the command until its end is wanted, and then asks for it.
    async fn feed(
        &self,
        mut input: RunInput,
        from_client: Option<&mut Receiver<SessionInput>>,
        taken: Option<&watch::Sender<u64>>,
        feed: &mut Feed,
        client_left: &CancellationToken,
    ) {
        tokio::select! {
            () = self.cancelled.cancelled() => {}
            () = client_left.cancelled(), if self.interactive => {}
            () = feed.pass_on(&mut input, from_client, taken, self.interactive) => {}
        }
        let _ = input.cancel().await;
    }

    async fn read(
        &self,
        mut output: RunOutput,
        to_client: Option<&Sender<SessionOutput>>,
        collected: &mut Collected,
        client_left: &CancellationToken,
    ) -> PumpEnd {
        let mut to_client = to_client;
        loop {
            let event = match output.next().await {
                Ok(event) => event,
                Err(error) if error.is_connection_lost() => return PumpEnd::Lost(error),
                Err(error) => return PumpEnd::Over(fault::from_client(&error)),
            };
            let (stream, data) = match event {
                RunEvent::Exited(exited) => return PumpEnd::Exited(exited),
                RunEvent::Output { stream, data, .. } => (output_stream(stream), data),
            };
            collected.push(stream, &data);
            if let Some(client) = to_client {
                // While this waits, the guest's socket fills and the command waits with it.
                let sent = tokio::select! {
                    sent = client.send(SessionOutput::Data { stream, data }) => sent.is_ok(),
                    () = self.cancelled.cancelled() => false,
                };
                if !sent {
                    to_client = None;
                    client_left.cancel();
                }
            }
        }
    }
}

/// What is kept of a command's output so far, and its way to the logs.
pub(crate) struct Collected {
    stdout: RetainedOutput,
    stderr: RetainedOutput,
    stdout_lines: Lines,
    stderr_lines: Lines,
}

impl Collected {
    /// `vm` and `task` stand with every line in the logs.
    pub(crate) fn new(logs: &LogSink, vm: VmId, task: TaskId) -> Self {
        let lines =
            |stream| Lines::new(logs.clone(), LogService::Guest, stream).of(Some(vm), Some(task));
        Self {
            stdout: RetainedOutput::default(),
            stderr: RetainedOutput::default(),
            stdout_lines: lines(LogStream::Stdout),
            stderr_lines: lines(LogStream::Stderr),
        }
    }

    fn push(&mut self, stream: OutputStream, data: &[u8]) {
        let (output, lines) = match stream {
            OutputStream::Stdout => (&mut self.stdout, &mut self.stdout_lines),
            OutputStream::Stderr => (&mut self.stderr, &mut self.stderr_lines),
        };
        output.push(data);
        // Never waits: a log that is full or slow holds up no command.
        lines.push(data);
    }

    /// Where an attachment goes on.
    pub(crate) fn offsets(&self) -> [u64; 2] {
        [self.stdout.total_bytes, self.stderr.total_bytes]
    }

    async fn skip_to(&mut self, stdout: u64, stderr: u64, session: Option<&WorkerEnd>) {
        let gaps = [
            (OutputStream::Stdout, stdout.saturating_sub(self.stdout.total_bytes)),
            (OutputStream::Stderr, stderr.saturating_sub(self.stderr.total_bytes)),
        ];
        self.stdout.skip(gaps[0].1);
        self.stderr.skip(gaps[1].1);
        for (stream, bytes) in gaps {
            if let (Some(session), 1..) = (session, bytes) {
                let _ = session.output.send(SessionOutput::Skipped { stream, bytes }).await;
            }
        }
    }

    pub(crate) fn into_end(self, exited: &Exited) -> AttemptEnd {
        let (task, execution, error) = match exited.cause() {
            Cause::Exited | Cause::Unspecified => {
                (TaskState::Completed, ExecutionState::Completed, None)
            }
            Cause::TimedOut => (
                TaskState::Failed,
                ExecutionState::Failed,
                Some(Fault::new(
                    ErrorCode::ExecutionTimeout,
                    "the command ran past its time limit and was killed",
                )),
            ),
            Cause::Cancelled => {
                (TaskState::Cancelled, ExecutionState::Cancelled, Some(cancelled()))
            }
            Cause::ConnectionLost => (
                TaskState::Cancelled,
                ExecutionState::Cancelled,
                Some(Fault::new(ErrorCode::ClientGone, "the client went away")),
            ),
        };
        let exit = match exited.status() {
            aether_protocol::ExitStatus::Code(code) => ExitStatus::Code(code),
            aether_protocol::ExitStatus::Signal(signal) => ExitStatus::Signal(signal),
        };
        self.end(task, execution, Some(exit), error, Some(exited.duration_us))
    }

    pub(crate) fn into_failure(self, fault: Fault) -> AttemptEnd {
        let (task, execution) = states(&fault);
        self.end(task, execution, None, Some(fault), None)
    }

    fn end(
        mut self,
        task: TaskState,
        execution: ExecutionState,
        exit: Option<ExitStatus>,
        error: Option<Fault>,
        duration_us: Option<u64>,
    ) -> AttemptEnd {
        self.stdout.finish();
        self.stderr.finish();
        self.stdout_lines.finish();
        self.stderr_lines.finish();
        AttemptEnd {
            state: task,
            error: error.clone(),
            execution: Some(ExecutionEnd {
                state: execution,
                exit,
                error,
                duration_us,
                stdout: self.stdout,
                stderr: self.stderr,
            }),
            ..done()
        }
    }
}

fn output_stream(stream: Stream) -> OutputStream {
    match stream {
        Stream::Stderr => OutputStream::Stderr,
        Stream::Stdout | Stream::Unspecified => OutputStream::Stdout,
    }
}

fn overdue(cancelling: bool) -> Fault {
    if cancelling {
        return cancelled();
    }
    Fault::new(ErrorCode::ExecutionTimeout, "the guest did not end the command at its time limit")
}
