//! The guest's side of a session, for guests that are simulated.

use std::fmt;

use tokio::io::{ReadHalf, WriteHalf};

use super::client::{BoxStream, GuestStream};
use super::error::ClientError;
use super::frames::{FrameReader, FrameWriter};
use crate::check::check_request;
use crate::handshake;
use crate::limits::{FRAME_BYTES_MAX, HELLO_BYTES_MAX};
use crate::message::{ErrorCode, FromGuest, Refused, RequestBody, ToGuest, ToGuestBody, Welcome};
use crate::token::Token;

/// A session whose request was read and neither taken nor refused yet.
pub struct GuestAcceptor {
    session: GuestSession,
    generation: u32,
}

/// A session whose request was taken.
pub struct GuestSession {
    reader: FrameReader<ReadHalf<BoxStream>, ToGuest>,
    writer: FrameWriter<WriteHalf<BoxStream>>,
}

impl fmt::Debug for GuestAcceptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestAcceptor").finish_non_exhaustive()
    }
}

impl fmt::Debug for GuestSession {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestSession").finish_non_exhaustive()
    }
}

impl GuestAcceptor {
    /// Reads the first two frames. A peer with a wrong token, generation or request is answered
    /// here, and the call fails with what it was told.
    pub async fn read(
        stream: impl GuestStream + 'static,
        token: &Token,
    ) -> Result<(Self, RequestBody), ClientError> {
        let (read, write) = tokio::io::split(Box::new(stream) as BoxStream);
        let mut session =
            GuestSession { reader: FrameReader::new(read), writer: FrameWriter::new(write) };
        session.reader.set_limit(HELLO_BYTES_MAX);
        let opened = match session.next().await? {
            Some(ToGuestBody::Hello(hello)) => handshake::accept(&hello, token),
            Some(_) | None => Err(Refused::new(ErrorCode::BadMessage, "a hello was wanted")),
        };
        let generation = match opened {
            Ok(generation) => generation,
            Err(refused) => return Err(session.turn_away(refused).await),
        };
        session.reader.set_limit(FRAME_BYTES_MAX);
        let request = match session.next().await? {
            Some(ToGuestBody::Request(request)) => request.body,
            Some(_) | None => None,
        };
        let checked = request.ok_or(crate::RequestError::Unknown).and_then(|request| {
            check_request(&request)?;
            Ok(request)
        });
        match checked {
            Ok(request) => Ok((Self { session, generation }, request)),
            Err(error) => Err(session.turn_away(error.into()).await),
        }
    }

    /// Takes the request.
    pub async fn welcome(
        mut self,
        agent_version: &str,
        boot_id: &str,
    ) -> Result<GuestSession, ClientError> {
        let welcome = Welcome {
            generation: self.generation,
            agent_version: agent_version.to_owned(),
            boot_id: boot_id.to_owned(),
        };
        self.session.send(welcome).await?;
        Ok(self.session)
    }

    pub async fn refuse(mut self, code: ErrorCode, message: &str) -> Result<(), ClientError> {
        self.session.send(Refused::new(code, message)).await
    }
}

impl GuestSession {
    /// The next message of the host; `None` where the host is gone. Cancel-safe.
    pub async fn next(&mut self) -> Result<Option<ToGuestBody>, ClientError> {
        match self.reader.next().await? {
            Some(ToGuest { body: Some(body) }) => Ok(Some(body)),
            Some(ToGuest { body: None }) => Err(ClientError::unexpected("read from the host")),
            None => Ok(None),
        }
    }

    pub async fn send(&mut self, message: impl Into<FromGuest> + Send) -> Result<(), ClientError> {
        self.writer.send(&message.into()).await
    }

    async fn turn_away(&mut self, refused: Refused) -> ClientError {
        match self.send(refused.clone()).await {
            Ok(()) => refused.into(),
            Err(error) => error,
        }
    }
}
