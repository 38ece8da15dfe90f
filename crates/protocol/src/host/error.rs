use std::io;

use crate::check::RequestError;
use crate::codec::CodecError;
use crate::limits::MESSAGE_BYTES_MAX;
use crate::message::{ErrorCode, Failed, FromGuest, FromGuestBody, Refused};

/// Why a session did not come to its end.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("{context}")]
    Io {
        context: &'static str,
        #[source]
        source: io::Error,
    },
    /// The guest did not answer within the limit of the first exchange.
    #[error("the guest did not answer in time: {context}")]
    Timeout { context: &'static str },
    /// The guest, or the way to it, went away before the session was complete.
    #[error("the guest closed the connection: {context}")]
    Closed { context: &'static str },
    /// Nothing was done.
    #[error("the guest refused: {message} ({code})")]
    Refused { code: ErrorCode, message: String },
    /// Something was begun.
    #[error("the guest failed: {message} ({code})")]
    Failed { code: ErrorCode, message: String },
    /// The request would be refused by every guest and was not sent.
    #[error("the request is invalid")]
    Request(#[from] RequestError),
    #[error("the guest broke the protocol")]
    Protocol(#[from] ProtocolError),
}

/// What a guest did that it must not.
#[derive(Debug, thiserror::Error)]
pub enum ProtocolError {
    #[error(transparent)]
    Codec(#[from] CodecError),
    #[error("a message came that has no place here: {context}")]
    Unexpected { context: &'static str },
    #[error("a stream went on at {actual} where {expected} was next")]
    Offset { expected: u64, actual: u64 },
    #[error("a field is past its limit: {field}")]
    Field { field: &'static str },
    #[error("the guest chose generation {generation}, which was not offered")]
    Generation { generation: u32 },
    /// It ignored a field that it does not know, and that must not be ignored.
    #[error("the guest's agent is too old: it does not know {what}; build its image again")]
    Outdated { what: &'static str },
}

impl ClientError {
    /// The guest's own code, where it gave one, or the one it would have given.
    pub fn code(&self) -> Option<ErrorCode> {
        match self {
            Self::Refused { code, .. } | Self::Failed { code, .. } => Some(*code),
            Self::Request(error) => Some(error.code()),
            Self::Io { .. } | Self::Timeout { .. } | Self::Closed { .. } | Self::Protocol(_) => {
                None
            }
        }
    }

    /// Whether the connection failed rather than the request, so that the state in the guest is
    /// not known.
    pub fn is_connection_lost(&self) -> bool {
        match self {
            Self::Io { .. } | Self::Timeout { .. } | Self::Closed { .. } => true,
            Self::Refused { .. } | Self::Failed { .. } | Self::Request(_) | Self::Protocol(_) => {
                false
            }
        }
    }

    pub(super) fn io(context: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| match source.kind() {
            // A peer that has closed may be seen first by a write.
            io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::UnexpectedEof => Self::Closed { context },
            _ => Self::Io { context, source },
        }
    }

    pub(super) fn unexpected(context: &'static str) -> Self {
        ProtocolError::Unexpected { context }.into()
    }
}

impl From<CodecError> for ClientError {
    fn from(error: CodecError) -> Self {
        Self::Protocol(error.into())
    }
}

impl From<Refused> for ClientError {
    fn from(refused: Refused) -> Self {
        Self::Refused { code: refused.code(), message: bounded(refused.message) }
    }
}

impl From<Failed> for ClientError {
    fn from(failed: Failed) -> Self {
        Self::Failed { code: failed.code(), message: bounded(failed.message) }
    }
}

/// What a message means where another one was wanted.
pub(super) fn unwanted(message: FromGuest, context: &'static str) -> ClientError {
    match message.body {
        Some(FromGuestBody::Failed(failed)) => failed.into(),
        Some(_) | None => ClientError::unexpected(context),
    }
}

fn bounded(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(MESSAGE_BYTES_MAX));
    text
}
