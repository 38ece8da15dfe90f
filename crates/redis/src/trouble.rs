//! What an error of Redis means for who asked.

use redis::{ErrorKind, RedisError, ServerErrorKind};

use crate::Place;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// It cannot be reached, or cannot serve now. What was asked may have been done.
    Away,
    /// It has no room, or cannot write to its disk: it takes nothing new.
    Full,
    /// It does not let us do that: a wrong password, a user without the right.
    Refused,
    Other,
}

#[derive(Debug, thiserror::Error)]
#[error("{}", match trouble {
    Trouble::Away => format!("Redis at {place} cannot be reached"),
    Trouble::Full => format!("Redis at {place} has no room"),
    Trouble::Refused => format!("Redis at {place} refuses us"),
    Trouble::Other => format!("Redis at {place}"),
})]
pub struct CallError {
    pub trouble: Trouble,
    pub place: Place,
    #[source]
    pub source: Option<RedisError>,
}

pub(crate) fn trouble(error: &RedisError) -> Trouble {
    match error.kind() {
        ErrorKind::AuthenticationFailed | ErrorKind::Server(ServerErrorKind::NoPerm) => {
            Trouble::Refused
        }
        // What cannot be parsed leaves a connection on which nothing can be trusted.
        ErrorKind::Io
        | ErrorKind::Parse
        | ErrorKind::Server(
            ServerErrorKind::BusyLoading
            | ServerErrorKind::TryAgain
            | ServerErrorKind::ClusterDown
            | ServerErrorKind::MasterDown
            | ServerErrorKind::ReadOnly,
        ) => Trouble::Away,
        _ => match error.code() {
            Some("OOM" | "MISCONF" | "NOREPLICAS") => Trouble::Full,
            Some("NOAUTH" | "WRONGPASS") => Trouble::Refused,
            // A script of another runs for too long.
            Some("BUSY") => Trouble::Away,
            Some(_) | None => Trouble::Other,
        },
    }
}

/// Whether another connection may do better: this one is gone, or leads to a server that is no
/// longer the one to write to.
pub(crate) fn wants_another_connection(error: &RedisError) -> bool {
    matches!(
        error.kind(),
        ErrorKind::Io | ErrorKind::Parse | ErrorKind::Server(ServerErrorKind::ReadOnly)
    )
}
