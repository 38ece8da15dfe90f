//! The messages of a session: a length, a kind, a body. The peer is one of the fleet, and is
//! checked all the same.

use std::io;

use aether_types::{ExitStatus, Fault, OutputStream, TtySize};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use crate::{SessionInput, SessionOutput};

/// Kind and body. Data comes in pieces of at most [`DATA_BYTES_MAX`].
const MESSAGE_BYTES_MAX: u32 = 128 * 1024;
const DATA_BYTES_MAX: usize = 64 * 1024;

#[derive(Debug, PartialEq, Eq)]
pub(super) enum ToWorker {
    Input(SessionInput),
    /// The task has ended: nobody will take a session that was not taken.
    Settled,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum ToGateway {
    Output(SessionOutput),
    /// Bytes of standard input that have gone on to the guest, in all.
    Taken(u64),
}

const STDIN: u8 = 0;
const STDIN_EOF: u8 = 1;
const SIGNAL: u8 = 2;
const RESIZE: u8 = 3;
const SETTLED: u8 = 4;

const STARTED: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const SKIPPED: u8 = 3;
const END: u8 = 4;
const TAKEN: u8 = 5;

#[derive(Serialize, Deserialize)]
struct End {
    exit: Option<ExitStatus>,
    error: Option<Fault>,
    duration_us: Option<u64>,
}

impl ToWorker {
    /// Not cancel-safe: dropped in the middle, the stream is of no more use.
    pub(super) async fn write(self, to: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
        match self {
            Self::Input(SessionInput::Stdin(data)) => write_data(to, STDIN, &data).await,
            Self::Input(SessionInput::StdinEof) => write(to, STDIN_EOF, &[]).await,
            Self::Input(SessionInput::Signal(signal)) => {
                write(to, SIGNAL, &signal.to_be_bytes()).await
            }
            Self::Input(SessionInput::Resize(TtySize { rows, cols })) => {
                let (rows, cols) = (rows.to_be_bytes(), cols.to_be_bytes());
                write(to, RESIZE, &[rows, cols].concat()).await
            }
            Self::Settled => write(to, SETTLED, &[]).await,
        }
    }

    /// `None` at the end. Not cancel-safe.
    pub(super) async fn read(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Self>> {
        let Some((kind, body)) = read(from).await? else { return Ok(None) };
        let input = match kind {
            STDIN => SessionInput::Stdin(body),
            STDIN_EOF => SessionInput::StdinEof,
            SIGNAL => SessionInput::Signal(i32::from_be_bytes(fixed(&body)?)),
            RESIZE => {
                let [a, b, c, d] = fixed(&body)?;
                let (rows, cols) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
                SessionInput::Resize(TtySize { rows, cols })
            }
            SETTLED => return Ok(Some(Self::Settled)),
            _ => return Err(malformed()),
        };
        Ok(Some(Self::Input(input)))
    }
}

impl ToGateway {
    /// Not cancel-safe: dropped in the middle, the stream is of no more use.
    pub(super) async fn write(self, to: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
        match self {
            Self::Output(SessionOutput::Started) => write(to, STARTED, &[]).await,
            Self::Output(SessionOutput::Data { stream, data }) => {
                write_data(to, kind_of(stream), &data).await
            }
            Self::Output(SessionOutput::Skipped { stream, bytes }) => {
                let body = [&[kind_of(stream)][..], &bytes.to_be_bytes()].concat();
                write(to, SKIPPED, &body).await
            }
            Self::Output(SessionOutput::End { exit, error, duration_us }) => {
                let body = serde_json::to_vec(&End { exit, error, duration_us })?;
                write(to, END, &body).await
            }
            Self::Taken(bytes) => write(to, TAKEN, &bytes.to_be_bytes()).await,
        }
    }

    /// `None` at the end. Not cancel-safe.
    pub(super) async fn read(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Self>> {
        let Some((kind, body)) = read(from).await? else { return Ok(None) };
        let output = match kind {
            STARTED => SessionOutput::Started,
            STDOUT | STDERR => SessionOutput::Data { stream: stream_of(kind)?, data: body },
            SKIPPED => {
                let (&kind, bytes) = body.split_first().ok_or_else(malformed)?;
                let bytes = u64::from_be_bytes(fixed(bytes)?);
                SessionOutput::Skipped { stream: stream_of(kind)?, bytes }
            }
            END => {
                let End { exit, error, duration_us } = serde_json::from_slice(&body)?;
                SessionOutput::End { exit, error, duration_us }
            }
            TAKEN => return Ok(Some(Self::Taken(u64::from_be_bytes(fixed(&body)?)))),
            _ => return Err(malformed()),
        };
        Ok(Some(Self::Output(output)))
    }
}

fn kind_of(stream: OutputStream) -> u8 {
    match stream {
        OutputStream::Stdout => STDOUT,
        OutputStream::Stderr => STDERR,
    }
}

fn stream_of(kind: u8) -> io::Result<OutputStream> {
    match kind {
        STDOUT => Ok(OutputStream::Stdout),
        STDERR => Ok(OutputStream::Stderr),
        _ => Err(malformed()),
    }
}

fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "a message of a session is malformed")
}

fn fixed<const N: usize>(body: &[u8]) -> io::Result<[u8; N]> {
    body.try_into().map_err(|_| malformed())
}

async fn write_data(to: &mut (impl AsyncWrite + Unpin), kind: u8, data: &[u8]) -> io::Result<()> {
    for piece in data.chunks(DATA_BYTES_MAX) {
        write(to, kind, piece).await?;
    }
    Ok(())
}

async fn write(to: &mut (impl AsyncWrite + Unpin), kind: u8, body: &[u8]) -> io::Result<()> {
    let length = u32::try_from(body.len() + 1).ok().filter(|&l| l <= MESSAGE_BYTES_MAX);
    let [a, b, c, d] = length.ok_or_else(malformed)?.to_be_bytes();
    to.write_all(&[a, b, c, d, kind]).await?;
    to.write_all(body).await
}

async fn read(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<(u8, Bytes)>> {
    let mut head = [0; 4];
    // The end may come between messages, and nowhere else.
    if from.read(&mut head[..1]).await? == 0 {
        return Ok(None);
    }
    from.read_exact(&mut head[1..]).await?;
    let length = u32::from_be_bytes(head);
    if !(1..=MESSAGE_BYTES_MAX).contains(&length) {
        return Err(malformed());
    }
    let kind = from.read_u8().await?;
    let mut body = vec![0; length as usize - 1];
    from.read_exact(&mut body).await?;
    Ok(Some((kind, body.into())))
}

#[cfg(test)]
mod tests {
    use aether_types::ErrorCode;

    use super::*;

    #[tokio::test]
    async fn what_is_written_is_read() {
        let large = Bytes::from(vec![7; DATA_BYTES_MAX]);
        let outputs = || {
            let stream = OutputStream::Stderr;
            let error = Some(Fault::new(ErrorCode::ClientGone, "gone"));
            [
                ToGateway::Output(SessionOutput::Started),
                ToGateway::Output(SessionOutput::Data { stream, data: large.clone() }),
                ToGateway::Output(SessionOutput::Skipped { stream, bytes: u64::MAX }),
                ToGateway::Taken(9),
                ToGateway::Output(SessionOutput::End {
                    exit: Some(ExitStatus::Signal(9)),
                    error,
                    duration_us: Some(1),
                }),
            ]
        };
        let mut wire = Vec::new();
        for output in outputs() {
            output.write(&mut wire).await.unwrap();
        }
        let mut from = &wire[..];
        for output in outputs() {
            assert_eq!(ToGateway::read(&mut from).await.unwrap(), Some(output));
        }
        assert_eq!(ToGateway::read(&mut from).await.unwrap(), None);
        let inputs = || {
            let size = TtySize { rows: 24, cols: 80 };
            [
                ToWorker::Input(SessionInput::Stdin(Bytes::from_static(b"x"))),
                ToWorker::Input(SessionInput::Resize(size)),
                ToWorker::Input(SessionInput::Signal(-1)),
                ToWorker::Input(SessionInput::StdinEof),
                ToWorker::Settled,
            ]
        };
        let mut wire = Vec::new();
        for input in inputs() {
            input.write(&mut wire).await.unwrap();
        }
        let mut from = &wire[..];
        for input in inputs() {
            assert_eq!(ToWorker::read(&mut from).await.unwrap(), Some(input));
        }
    }

    #[tokio::test]
    async fn what_is_malformed_is_refused() {
        for wire in [
            &[0, 0, 0, 0][..],
            &[0xff, 0xff, 0xff, 0xff, 0],
            &[0, 0, 0, 1, 99],
            &[0, 0, 0, 2, TAKEN, 1],
            &[0, 0, 0, 2, END, b'x'],
            &[0, 0, 0, 1, SKIPPED],
            &[0, 0, 0, 9, STDOUT, 1],
            &[0, 0],
        ] {
            assert!(ToGateway::read(&mut &wire[..]).await.is_err(), "{wire:?}");
        }
        for wire in [&[0, 0, 0, 2, SIGNAL, 1][..], &[0, 0, 0, 2, RESIZE, 1], &[0, 0, 0, 1, 99]] {
            assert!(ToWorker::read(&mut &wire[..]).await.is_err(), "{wire:?}");
        }
    }
}
