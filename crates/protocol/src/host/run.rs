//! A command seen from the host.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

use super::client::{GuestClient, GuestStream, Reader, Writer, next_message};
use super::error::{ClientError, ProtocolError, unwanted};
use crate::limits::DATA_BYTES_MAX;
use crate::message::{
    Attach, Cancel, Exited, FromGuest, FromGuestBody, Output, Request, Resize, Run, Signal,
    Started, Stdin, StdinEof, Stream, ToGuest,
};
use crate::token::Token;

/// What a run sends.
#[derive(Debug, Clone, PartialEq)]
pub enum RunEvent {
    /// Bytes of a stream; the offset is that of the first of them and follows the last event's.
    Output { stream: Stream, offset: u64, data: Bytes },
    /// The last event.
    Exited(Exited),
}

/// A command that was started. Dropping it closes the connection, which kills a command that is
/// not detached.
#[derive(Debug)]
pub struct RunSession {
    output: RunOutput,
    input: RunInput,
}

/// The half that reads. While it is not read, the command waits, and so does standard input.
pub struct RunOutput {
    reader: Reader,
    started: Started,
    boot_id: String,
    next_offset: [u64; 2],
    has_exited: bool,
    credit: Arc<Credit>,
}

/// The half that writes.
///
/// Each call is cancel-safe in this sense: a message that was begun stays queued and goes out,
/// whole, before the next one; a dropped call has queued its message or not. To know, await it.
pub struct RunInput {
    writer: Writer,
    sent: u64,
    credit: Arc<Credit>,
}

/// Standard input that the guest lets the host send.
#[derive(Debug)]
struct Credit {
    /// Highest count of bytes that may have been sent.
    limit: AtomicU64,
    is_closed: AtomicBool,
    changed: Notify,
}

/// Starts a command; returns once its process exists.
///
/// Not cancel-safe: a dropped call closes the connection.
pub async fn run(
    stream: impl GuestStream + 'static,
    token: &Token,
    run: Run,
    limit: Duration,
) -> Result<RunSession, ClientError> {
    begin(stream, token, run.into(), [0; 2], limit).await
}

/// Attaches to a detached run. [`RunSession::started`] says where its streams go on.
pub async fn attach(
    stream: impl GuestStream + 'static,
    token: &Token,
    attach: Attach,
    limit: Duration,
) -> Result<RunSession, ClientError> {
    let offsets = [attach.stdout_offset, attach.stderr_offset];
    begin(stream, token, attach.into(), offsets, limit).await
}

async fn begin(
    stream: impl GuestStream + 'static,
    token: &Token,
    request: Request,
    asked: [u64; 2],
    limit: Duration,
) -> Result<RunSession, ClientError> {
    let deadline = Instant::now() + limit;
    let (mut client, welcome) = GuestClient::open_until(stream, token, request, deadline).await?;
    let answer = timeout_at(deadline, client.next())
        .await
        .map_err(|_| ClientError::Timeout { context: "wait for the start" })??;
    let started = match answer.body {
        Some(FromGuestBody::Started(started)) => started,
        body => return Err(unwanted(FromGuest { body }, "wait for the start")),
    };
    let next_offset = [started.stdout_offset, started.stderr_offset];
    for (&expected, &actual) in asked.iter().zip(&next_offset) {
        if actual < expected {
            return Err(ProtocolError::Offset { expected, actual }.into());
        }
    }
    let credit = Arc::new(Credit {
        limit: AtomicU64::new(started.stdin_window.into()),
        is_closed: AtomicBool::new(false),
        changed: Notify::new(),
    });
    let input = RunInput { writer: client.writer, sent: 0, credit: Arc::clone(&credit) };
    let boot_id = welcome.boot_id;
    let output = RunOutput {
        reader: client.reader,
        started,
        boot_id,
        next_offset,
        has_exited: false,
        credit,
    };
    Ok(RunSession { output, input })
}

impl RunSession {
    pub fn started(&self) -> &Started {
        self.output.started()
    }

    /// Tells whether the guest has booted, or its agent was replaced, since another session.
    pub fn boot_id(&self) -> &str {
        self.output.boot_id()
    }

    /// See [`RunOutput::next`].
    pub async fn next(&mut self) -> Result<RunEvent, ClientError> {
        self.output.next().await
    }

    /// The half that writes, for a session that is not split. [`RunInput::stdin`] waits for credit
    /// that only reading brings: send long input from a task of its own, after
    /// [`Self::split`].
    pub fn input(&mut self) -> &mut RunInput {
        &mut self.input
    }

    /// For reading and writing in two tasks. The connection closes when both halves are dropped.
    pub fn split(self) -> (RunInput, RunOutput) {
        (self.input, self.output)
    }
}

impl RunOutput {
    pub fn started(&self) -> &Started {
        &self.started
    }

    pub fn boot_id(&self) -> &str {
        &self.boot_id
    }

    /// The next event. After `Exited` there is none, and a further call is an error.
    ///
    /// Cancel-safe: can be used in `select!`.
    pub async fn next(&mut self) -> Result<RunEvent, ClientError> {
        if self.has_exited {
            return Err(ClientError::Closed { context: "the run has ended" });
        }
        loop {
            let message = next_message(&mut self.reader, "wait for the run").await?;
            match message.body {
                Some(FromGuestBody::Output(output)) => return self.take_output(output),
                Some(FromGuestBody::Exited(exited)) => return self.take_exit(exited),
                Some(FromGuestBody::StdinTaken(taken)) => {
                    self.credit.raise(taken.bytes.saturating_add(self.started.stdin_window.into()));
                }
                body => return Err(unwanted(FromGuest { body }, "wait for the run")),
            }
        }
    }

    fn take_output(&mut self, output: Output) -> Result<RunEvent, ClientError> {
        let stream = output.stream();
        let expected = match stream {
            Stream::Stdout => &mut self.next_offset[0],
            Stream::Stderr => &mut self.next_offset[1],
            Stream::Unspecified => return Err(ClientError::unexpected("output of no stream")),
        };
        let Output { offset, data, .. } = output;
        if offset != *expected {
            return Err(ProtocolError::Offset { expected: *expected, actual: offset }.into());
        }
        if data.is_empty() || data.len() > DATA_BYTES_MAX {
            return Err(ProtocolError::Field { field: "output" }.into());
        }
        *expected = expected
            .checked_add(data.len() as u64)
            .ok_or(ProtocolError::Field { field: "output" })?;
        Ok(RunEvent::Output { stream, offset, data })
    }

    fn take_exit(&mut self, exited: Exited) -> Result<RunEvent, ClientError> {
        let lengths = [exited.stdout_bytes, exited.stderr_bytes];
        for (&expected, &actual) in self.next_offset.iter().zip(&lengths) {
            if actual != expected {
                return Err(ProtocolError::Offset { expected, actual }.into());
            }
        }
        self.has_exited = true;
        self.credit.close();
        Ok(RunEvent::Exited(exited))
    }
}

impl Drop for RunOutput {
    fn drop(&mut self) {
        // Nobody is left to bring credit.
        self.credit.close();
    }
}

impl RunInput {
    /// Standard input. Waits while the guest holds a full window that the command has not read;
    /// the other half must be read meanwhile. A dropped call may have sent a part of `data`.
    pub async fn stdin(&mut self, mut data: Bytes) -> Result<(), ClientError> {
        while !data.is_empty() {
            self.stdin_part(&mut data).await?;
        }
        Ok(())
    }

    /// Sends as much of `data` as one frame and the guest's window take, at least a byte, and
    /// leaves the rest. Cancel-safe: what was taken from `data` is sent, what was not is not.
    pub async fn stdin_part(&mut self, data: &mut Bytes) -> Result<(), ClientError> {
        let room = self.credit.wait(self.sent).await?;
        // An earlier message goes out first, so that at most one waits in the writer.
        self.writer.flush().await.map_err(ClientError::io("write standard input"))?;
        let chunk = data.split_to(data.len().min(room).min(DATA_BYTES_MAX));
        self.sent += chunk.len() as u64;
        self.writer.queue(&ToGuest::from(Stdin { data: chunk }))?;
        self.writer.flush().await.map_err(ClientError::io("write standard input"))
    }

    pub async fn stdin_eof(&mut self) -> Result<(), ClientError> {
        self.writer.send(&ToGuest::from(StdinEof {})).await
    }

    /// A signal to the process group.
    pub async fn signal(&mut self, number: i32) -> Result<(), ClientError> {
        self.writer.send(&ToGuest::from(Signal { number })).await
    }

    pub async fn resize(&mut self, rows: u32, cols: u32) -> Result<(), ClientError> {
        self.writer.send(&ToGuest::from(Resize { rows, cols })).await
    }

    /// Ends the command: `SIGTERM`, and `SIGKILL` after the grace. `Exited` follows.
    pub async fn cancel(&mut self) -> Result<(), ClientError> {
        self.writer.send(&ToGuest::from(Cancel {})).await
    }
}

impl Credit {
    fn raise(&self, limit: u64) {
        self.limit.fetch_max(limit, Ordering::AcqRel);
        self.changed.notify_one();
    }

    fn close(&self) {
        self.is_closed.store(true, Ordering::Release);
        self.changed.notify_one();
    }

    /// Waits for room after `sent` bytes. Cancel-safe.
    async fn wait(&self, sent: u64) -> Result<usize, ClientError> {
        loop {
            let room = self.limit.load(Ordering::Acquire).saturating_sub(sent);
            if room > 0 {
                return Ok(usize::try_from(room).unwrap_or(usize::MAX));
            }
            if self.is_closed.load(Ordering::Acquire) {
                return Err(ClientError::Closed { context: "write standard input" });
            }
            // `notify_one` keeps a permit where nobody waits yet, so no change is missed.
            self.changed.notified().await;
        }
    }
}

impl fmt::Debug for RunOutput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RunOutput").field("started", &self.started).finish_non_exhaustive()
    }
}

impl fmt::Debug for RunInput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RunInput").field("sent", &self.sent).finish_non_exhaustive()
    }
}
