//! File transfers seen from the host.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, timeout_at};

use super::client::{GuestClient, GuestStream};
use super::error::{ClientError, ProtocolError, unwanted};
use crate::codec::DataHeader;
use crate::limits::DATA_BYTES_MAX;
use crate::message::{Done, End, FileStat, FromGuest, FromGuestBody, ReadFile, ToGuest, WriteFile};
use crate::token::Token;

/// Data frames written with one system call.
const BATCH_FRAMES: usize = 4;

/// A file that is being read.
#[derive(Debug)]
pub struct FileReader {
    client: GuestClient,
    stat: FileStat,
    /// Bytes that the guest may still send.
    remaining: u64,
    is_complete: bool,
}

/// Opens a file in the guest.
pub async fn read_file(
    stream: impl GuestStream + 'static,
    token: &Token,
    request: ReadFile,
    limit: Duration,
) -> Result<FileReader, ClientError> {
    let deadline = Instant::now() + limit;
    let remaining = request.limit.unwrap_or(u64::MAX);
    let (mut client, _welcome) =
        GuestClient::open_until(stream, token, request.into(), deadline).await?;
    let answer = timeout_at(deadline, client.next())
        .await
        .map_err(|_| ClientError::Timeout { context: "wait for the file" })??;
    match answer.body {
        Some(FromGuestBody::FileStat(stat)) => {
            Ok(FileReader { client, stat, remaining, is_complete: false })
        }
        body => Err(unwanted(FromGuest { body }, "wait for the file")),
    }
}

impl FileReader {
    /// The file as it was when it was opened.
    pub fn stat(&self) -> &FileStat {
        &self.stat
    }

    /// The next bytes; `None` once all have come. Cancel-safe.
    pub async fn next_chunk(&mut self) -> Result<Option<Bytes>, ClientError> {
        if self.is_complete {
            return Ok(None);
        }
        match self.client.next().await?.body {
            Some(FromGuestBody::Data(data)) => self.take(data.data).map(Some),
            Some(FromGuestBody::End(_)) => {
                self.is_complete = true;
                Ok(None)
            }
            body => Err(unwanted(FromGuest { body }, "read a file")),
        }
    }

    fn take(&mut self, data: Bytes) -> Result<Bytes, ClientError> {
        let field = ProtocolError::Field { field: "file data" };
        if data.is_empty() || data.len() > DATA_BYTES_MAX {
            return Err(field.into());
        }
        self.remaining = self.remaining.checked_sub(data.len() as u64).ok_or(field)?;
        Ok(data)
    }
}

/// A file that is being written. Dropping it before [`Self::finish`] discards the file.
#[derive(Debug)]
pub struct FileWriter {
    client: GuestClient,
    written: u64,
}

/// Begins a file in the guest.
pub async fn write_file(
    stream: impl GuestStream + 'static,
    token: &Token,
    request: WriteFile,
    limit: Duration,
) -> Result<FileWriter, ClientError> {
    let (client, _welcome) = GuestClient::open(stream, token, request, limit).await?;
    Ok(FileWriter { client, written: 0 })
}

impl FileWriter {
    /// Adds bytes, of any number.
    ///
    /// Not cancel-safe: a dropped call may have added a part. A guest that cannot go on (its disk is
    /// full) ends the call with [`ClientError::Failed`].
    pub async fn write(&mut self, mut data: Bytes) -> Result<(), ClientError> {
        while !data.is_empty() {
            for _ in 0..BATCH_FRAMES {
                if data.is_empty() {
                    break;
                }
                let chunk = data.split_to(data.len().min(DATA_BYTES_MAX));
                let header = DataHeader::data(chunk.len());
                self.written += chunk.len() as u64;
                self.client.writer.queue_bytes(Bytes::copy_from_slice(header.as_slice()));
                self.client.writer.queue_bytes(chunk);
            }
            self.flush().await?;
        }
        Ok(())
    }

    /// Completes the file and puts it in its place; gives the number of bytes written.
    pub async fn finish(mut self) -> Result<u64, ClientError> {
        self.client.writer.queue(&ToGuest::from(End {}))?;
        self.flush().await?;
        match self.client.next().await?.body {
            Some(FromGuestBody::Done(Done { bytes })) if bytes == self.written => Ok(bytes),
            Some(FromGuestBody::Done(Done { bytes })) => {
                Err(ProtocolError::Offset { expected: self.written, actual: bytes }.into())
            }
            body => Err(unwanted(FromGuest { body }, "finish a file")),
        }
    }

    /// Writes what is queued while listening, as a guest that failed reads no further.
    async fn flush(&mut self) -> Result<(), ClientError> {
        let GuestClient { reader, writer } = &mut self.client;
        let early = tokio::select! {
            biased;
            // Cancel-safe, both.
            written = writer.flush() => match written {
                Ok(()) => return Ok(()),
                Err(error) => {
                    // The reason may have come before the connection went.
                    match reader.next().await {
                        Ok(Some(message)) => message,
                        Ok(None) | Err(_) => return Err(ClientError::io("write a file")(error)),
                    }
                }
            },
            early = reader.next() => early?.ok_or(ClientError::Closed { context: "write a file" })?,
        };
        Err(unwanted(early, "write a file"))
    }
}
