//! A command's live side, on this process's own streams: what `exec` and `shell` share.

use std::io;

use aether_api::{
    StreamEnd, StreamEvent, TerminalControl, TerminalStart,
    client::{Client, ClientError, TerminalInput, TerminalOutput},
};
use aether_types::{ErrorCode, ExecutionState, OutputStream};
use bytes::Bytes;
use tokio::{
    io::{AsyncWrite, AsyncWriteExt as _},
    sync::mpsc::Receiver,
};

use crate::{args::CommandOptions, exit::Exit, failure::Failure, output};

/// Where output goes.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Sink {
    /// The command's bytes, to the streams of the same name.
    Streams,
    /// One JSON document for each event, to standard output.
    Json,
}

/// Opens the command. Whatever goes wrong before it runs is the platform's doing: no status of
/// the command's own can be mistaken for it.
pub(crate) async fn open(
    client: &Client,
    vm: &str,
    start: &TerminalStart,
) -> Result<(TerminalInput, TerminalOutput), Failure> {
    client.terminal(vm, start).await.map_err(platform)
}

pub(crate) fn start(options: CommandOptions, mut command: Vec<String>) -> TerminalStart {
    let args = if command.is_empty() { Vec::new() } else { command.split_off(1) };
    TerminalStart {
        command: command.pop().unwrap_or_default(),
        args,
        env: options.env.into_iter().collect(),
        cwd: options.cwd,
        user: options.user,
        timeout_s: options.timeout.map(|t| t.as_secs()),
        tty: None,
    }
}

/// Passes input on; never returns, and the caller drops it when the command has ended. A command
/// that does not read holds up its input and no signal.
pub(crate) async fn feed(
    sink: &mut TerminalInput,
    mut data: Receiver<Bytes>,
    mut controls: Receiver<TerminalControl>,
) {
    // What is still to be sent of the last chunk, and whether more may come.
    let (mut chunk, mut open) = (Bytes::new(), true);
    loop {
        let sent = tokio::select! {
            biased;
            Some(control) = controls.recv() => sink.control(control).await,
            next = data.recv(), if open && chunk.is_empty() => {
                if let Some(next) = next {
                    chunk = next;
                    Ok(())
                } else {
                    open = false;
                    sink.stdin_eof().await
                }
            }
            room = sink.room(), if !chunk.is_empty() => match room {
                Ok(room) => sink.stdin(chunk.split_to(room.min(chunk.len()))).await,
                Err(error) => Err(error),
            },
            else => break,
        };
        // A connection that is gone is noticed, and told, by who reads from it.
        if sent.is_err() {
            break;
        }
    }
    // The sink stays open: dropping it would end the command.
    std::future::pending::<()>().await;
}

/// Writes what comes until the command has ended. One message is written before the next is
/// read: whoever reads our output slowly slows down the command and nothing else.
pub(crate) async fn follow(mut source: TerminalOutput, sink: Sink) -> Result<Exit, Failure> {
    let (mut stdout, mut stderr) = (tokio::io::stdout(), tokio::io::stderr());
    loop {
        let event = source.next().await.map_err(platform)?;
        let Some(event) = event else {
            return Err(Failure::new(
                "connection_lost",
                Exit::Platform,
                "the server closed the connection before the command had ended",
            ));
        };
        if let Sink::Json = sink {
            let mut line = serde_json::to_vec(&event).unwrap_or_default();
            line.push(b'\n');
            if write(&mut stdout, &line).await.is_err() {
                return Ok(broken_pipe());
            }
        }
        let written = match (&event, sink) {
            (StreamEvent::Stdout { data }, Sink::Streams) => write(&mut stdout, data).await,
            (StreamEvent::Stderr { data }, Sink::Streams) => write(&mut stderr, data).await,
            _ => Ok(()),
        };
        if written.is_err() {
            return Ok(broken_pipe());
        }
        match event {
            StreamEvent::Accepted { .. }
            | StreamEvent::Started
            | StreamEvent::Stdout { .. }
            | StreamEvent::Stderr { .. }
            | StreamEvent::StdinTaken { .. } => {}
            StreamEvent::Skipped { stream, bytes } => {
                let name = match stream {
                    OutputStream::Stdout => "stdout",
                    OutputStream::Stderr => "stderr",
                };
                output::note(&format!("aether: {bytes} bytes of {name} were lost on the way"));
            }
            StreamEvent::End(end) => return ended(&end),
            StreamEvent::Detached => {
                return Err(Failure::new(
                    ErrorCode::Unavailable.as_str(),
                    Exit::Platform,
                    "the server shuts down",
                ));
            }
        }
    }
}

async fn write(sink: &mut (impl AsyncWrite + Unpin), data: &[u8]) -> io::Result<()> {
    sink.write_all(data).await?;
    sink.flush().await
}

/// As a program that SIGPIPE ends: whoever read our output has gone.
fn broken_pipe() -> Exit {
    Exit::Command(128 + 13)
}

fn ended(end: &StreamEnd) -> Result<Exit, Failure> {
    match end.status {
        ExecutionState::Completed => Ok(match (end.exit_code, end.signal) {
            (Some(code), _) => Exit::Command(u8::try_from(code).unwrap_or(u8::MAX)),
            (None, Some(signal)) => Exit::Command(128 + u8::try_from(signal).unwrap_or(0).min(127)),
            (None, None) => Exit::Success,
        }),
        ExecutionState::Failed
        | ExecutionState::Cancelled
        | ExecutionState::Pending
        | ExecutionState::Running => {
            let failure = super::fault_failure(end.error.as_ref(), "the command did not end");
            let in_time = failure.code != ErrorCode::ExecutionTimeout.as_str();
            Err(failure.exit(if in_time { Exit::Platform } else { Exit::TimeLimit }))
        }
    }
}

fn platform(error: ClientError) -> Failure {
    Failure::from(error).exit(Exit::Platform)
}

/// Says before anything is sent what the server would refuse.
pub(crate) fn check(start: &TerminalStart) -> Result<(), Failure> {
    aether_types::ExecutionSpec::from(start.clone())
        .validate()
        .map_err(|text| Failure::new(ErrorCode::InvalidRequest.as_str(), Exit::Usage, text))
}

#[cfg(test)]
mod tests {
    use aether_types::Fault;

    use super::*;

    fn end(status: ExecutionState, code: Option<i32>, signal: Option<i32>) -> StreamEnd {
        StreamEnd { status, exit_code: code, signal, error: None, duration_ms: None }
    }

    #[test]
    fn the_exit_status_is_the_commands_own() {
        let completed = |code, signal| ended(&end(ExecutionState::Completed, code, signal));
        assert_eq!(completed(Some(3), None).unwrap().status(), 3);
        assert_eq!(completed(Some(127), None).unwrap().status(), 127);
        assert_eq!(completed(None, Some(9)).unwrap().status(), 137);
        let mut late = end(ExecutionState::Failed, None, Some(9));
        late.error = Some(Fault::new(ErrorCode::ExecutionTimeout, "over after 1 s"));
        assert_eq!(ended(&late).unwrap_err().exit.status(), 124);
        late.error = Some(Fault::new(ErrorCode::VmmExited, "gone"));
        assert_eq!(ended(&late).unwrap_err().exit.status(), 125);
    }
}
