//! An interactive execution on a WebSocket.

use std::sync::Arc;

use bytes::{BufMut as _, Bytes, BytesMut};
use futures::{
    SinkExt as _, StreamExt as _,
    stream::{SplitSink, SplitStream},
};
use tokio::sync::Semaphore;
use tokio_tungstenite::tungstenite::Message;

use super::{
    Client, ClientError,
    http::{Query, segment},
    socket::{Socket, connect, event, lost},
};
use crate::{
    CHANNEL_STDERR, CHANNEL_STDIN, CHANNEL_STDOUT, STDIN_WINDOW_BYTES, StreamEvent,
    TerminalControl, TerminalStart,
};

/// The half that feeds the command.
#[derive(Debug)]
pub struct TerminalInput {
    sink: SplitSink<Socket, Message>,
    credit: Arc<Semaphore>,
}

/// The half that hears of it. It also answers the server's pings and brings the credit for
/// standard input: keep it going.
#[derive(Debug)]
pub struct TerminalOutput {
    stream: SplitStream<Socket>,
    credit: Arc<Semaphore>,
}

/// One message of standard input.
const STDIN_CHUNK_BYTES: usize = 64 * 1024;

pub(super) async fn open(
    client: &Client,
    vm: &str,
    start: &TerminalStart,
) -> Result<(TerminalInput, TerminalOutput), ClientError> {
    let path = format!("/vms/{}/terminal", segment(vm));
    let mut socket = connect(client, &path, &Query::default()).await?;
    socket.send(text(start)?).await.map_err(lost)?;
    let (sink, stream) = socket.split();
    let window = usize::try_from(STDIN_WINDOW_BYTES).unwrap_or(usize::MAX);
    let credit = Arc::new(Semaphore::new(window));
    let input = TerminalInput { sink, credit: Arc::clone(&credit) };
    Ok((input, TerminalOutput { stream, credit }))
}

impl TerminalInput {
    /// Waits while the command has not taken what came before. Cancel-safe only as a whole: a
    /// dropped call may have sent a part.
    pub async fn stdin(&mut self, mut data: Bytes) -> Result<(), ClientError> {
        while !data.is_empty() {
            let room = self.room().await?;
            let chunk = data.split_to(data.len().min(room).min(STDIN_CHUNK_BYTES));
            if let Ok(taken) = u32::try_from(chunk.len())
                && let Ok(permits) = self.credit.try_acquire_many(taken)
            {
                permits.forget();
            }
            let mut message = BytesMut::with_capacity(chunk.len() + 1);
            message.put_u8(CHANNEL_STDIN);
            message.put(chunk);
            self.sink.send(Message::Binary(message.freeze())).await.map_err(lost)?;
        }
        Ok(())
    }

    /// Waits until the command takes more input; so many bytes can be sent now without waiting for
    /// it, at least one. Cancel-safe, so that a control can be sent meanwhile.
    pub async fn room(&self) -> Result<usize, ClientError> {
        match self.credit.acquire().await {
            Ok(permit) => drop(permit),
            Err(error) => return Err(ClientError::transport("use the terminal")(error.into())),
        }
        Ok(self.credit.available_permits().max(1))
    }

    pub async fn stdin_eof(&mut self) -> Result<(), ClientError> {
        self.control(TerminalControl::StdinEof).await
    }

    pub async fn signal(&mut self, signal: i32) -> Result<(), ClientError> {
        self.control(TerminalControl::Signal { signal }).await
    }

    pub async fn resize(&mut self, rows: u16, cols: u16) -> Result<(), ClientError> {
        self.control(TerminalControl::Resize { rows, cols }).await
    }

    pub async fn control(&mut self, control: TerminalControl) -> Result<(), ClientError> {
        self.sink.send(text(&control)?).await.map_err(lost)
    }

    /// Says goodbye; a command that still runs is ended.
    pub async fn close(mut self) -> Result<(), ClientError> {
        self.sink.close().await.map_err(lost)
    }
}

impl TerminalOutput {
    /// The next event; `None` where the server has closed. An error [`ClientError::Problem`] is
    /// the server's refusal. Cancel-safe.
    pub async fn next(&mut self) -> Result<Option<StreamEvent>, ClientError> {
        while let Some(message) = self.stream.next().await {
            match message.map_err(lost)? {
                Message::Binary(mut data) => {
                    let channel = (!data.is_empty()).then(|| data.split_to(1)[0]);
                    return match channel {
                        Some(CHANNEL_STDOUT) => Ok(Some(StreamEvent::Stdout { data })),
                        Some(CHANNEL_STDERR) => Ok(Some(StreamEvent::Stderr { data })),
                        Some(_) | None => Err(ClientError::unexpected("an unknown channel")),
                    };
                }
                Message::Text(text) => match event(text.as_str())? {
                    StreamEvent::StdinTaken { bytes } => self.give_back(bytes)?,
                    event => return Ok(Some(event)),
                },
                Message::Close(_) => return Ok(None),
                Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => {}
            }
        }
        Ok(None)
    }

    fn give_back(&self, bytes: u64) -> Result<(), ClientError> {
        let window = u64::from(STDIN_WINDOW_BYTES);
        match usize::try_from(bytes) {
            Ok(taken) if bytes.saturating_add(self.credit.available_permits() as u64) <= window => {
                self.credit.add_permits(taken);
                Ok(())
            }
            Ok(_) | Err(_) => Err(ClientError::unexpected("more input was taken than was sent")),
        }
    }
}

impl Drop for TerminalOutput {
    fn drop(&mut self) {
        // Nobody is left to bring credit.
        self.credit.close();
    }
}

fn text(value: &impl serde::Serialize) -> Result<Message, ClientError> {
    let text = serde_json::to_string(value)
        .map_err(|error| ClientError::transport("write a message")(error.into()))?;
    Ok(Message::Text(text.into()))
}
