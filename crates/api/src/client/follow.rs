//! An execution as lines of JSON.

use bytes::{Buf as _, BytesMut};
use reqwest::{Method, Response};

use super::http::{Query, segment};
use super::{Client, ClientError};
use crate::{ExecuteRequest, IDEMPOTENCY_KEY_HEADER, StreamEvent};

/// The longest line: one message of output, in base64, and its frame, with room to spare.
const LINE_BYTES_MAX: usize = 4 * 1024 * 1024;

/// A streamed execution.
#[derive(Debug)]
pub struct Follow {
    response: Response,
    buffer: BytesMut,
    /// Bytes of `buffer` without a line's end.
    searched: usize,
}

pub(super) async fn open(
    client: &Client,
    vm: &str,
    request: &ExecuteRequest,
    idempotency_key: Option<&str>,
) -> Result<Follow, ClientError> {
    let mut query = Query::default();
    query.add("stream", "true");
    let path = format!("/vms/{}/execute", segment(vm));
    let mut call = client.request(Method::POST, &path, &query).json(request);
    if let Some(key) = idempotency_key {
        call = call.header(IDEMPOTENCY_KEY_HEADER, key);
    }
    let response = client.send(call).await?;
    Ok(Follow { response, buffer: BytesMut::new(), searched: 0 })
}

impl Follow {
    /// The next event. `None` where the server has closed the stream: after `End` or `Detached`
    /// as it should be, else it was cut off. Cancel-safe.
    pub async fn next(&mut self) -> Result<Option<StreamEvent>, ClientError> {
        loop {
            if let Some(event) = self.buffered()? {
                return Ok(Some(event));
            }
            let chunk = self.response.chunk().await.map_err(|error| {
                ClientError::transport("follow the execution")(error.without_url().into())
            })?;
            match chunk {
                Some(chunk) => self.buffer.extend_from_slice(&chunk),
                None => return Ok(None),
            }
        }
    }

    fn buffered(&mut self) -> Result<Option<StreamEvent>, ClientError> {
        loop {
            let Some(at) = self.buffer[self.searched..].iter().position(|b| *b == b'\n') else {
                self.searched = self.buffer.len();
                if self.searched > LINE_BYTES_MAX {
                    return Err(ClientError::unexpected("a line is too long"));
                }
                return Ok(None);
            };
            let line = self.buffer.split_to(self.searched + at);
            self.buffer.advance(1);
            self.searched = 0;
            if !line.iter().all(u8::is_ascii_whitespace) {
                return serde_json::from_slice(&line)
                    .map(Some)
                    .map_err(|error| ClientError::unexpected(error.to_string()));
            }
        }
    }
}
