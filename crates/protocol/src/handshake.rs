//! The first exchange, without I/O: who may talk, and in which generation.

use bytes::Bytes;

use crate::message::{
    ErrorCode, Failed, FromGuest, FromGuestBody, Hello, Refused, Request, RequestBody, ToGuest,
    ToGuestBody, Welcome,
};
use crate::token::Token;
use crate::{GENERATION, GENERATION_MIN};

/// What a host opens a connection with.
pub fn hello(token: &Token) -> Hello {
    Hello {
        generation: GENERATION,
        generation_min: GENERATION_MIN,
        token: Bytes::copy_from_slice(token.as_bytes()),
    }
}

/// The guest's verdict on a `Hello`: the generation to speak.
///
/// The token is looked at first, so that a stranger learns nothing else.
pub fn accept(hello: &Hello, token: &Token) -> Result<u32, Refused> {
    if !token.matches(&hello.token) {
        return Err(Refused::new(ErrorCode::Unauthorized, "the token is wrong"));
    }
    let chosen = hello.generation.min(GENERATION);
    if chosen < hello.generation_min.max(GENERATION_MIN) {
        return Err(Refused::new(
            ErrorCode::UnsupportedGeneration,
            format!("the guest speaks generations {GENERATION_MIN} to {GENERATION}"),
        ));
    }
    Ok(chosen)
}

/// The host's verdict on the generation in a `Welcome`.
pub fn is_acceptable(welcome: &Welcome) -> bool {
    (GENERATION_MIN..=GENERATION).contains(&welcome.generation)
}

impl Refused {
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code: code.into(), message: message.into() }
    }
}

impl Failed {
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code: code.into(), message: message.into() }
    }
}

/// Wraps each kind of body in its envelope.
macro_rules! envelope {
    ($envelope:ident, $body:ident: $($kind:ident),+ $(,)?) => {
        impl From<$body> for $envelope {
            fn from(body: $body) -> Self {
                Self { body: Some(body) }
            }
        }
        $(impl From<crate::message::$kind> for $envelope {
            fn from(kind: crate::message::$kind) -> Self {
                $body::$kind(kind).into()
            }
        })+
    };
}

envelope!(ToGuest, ToGuestBody: Hello, Request, Stdin, StdinEof, Signal, Resize, Cancel, Data, End);
envelope!(
    FromGuest, FromGuestBody: Welcome, Refused, Failed, Started, Output, Exited, StdinTaken, Data,
    End, FileStat, Listing, Done, Configured, Pong, Runs, ShuttingDown,
);
envelope!(
    Request, RequestBody: Ping, Configure, Shutdown, Run, Attach, Forget, ListRuns, ReadFile,
    WriteFile, List, Stat, Mkdir, Move, Remove,
);

#[cfg(test)]
mod tests {
    use super::*;

    fn code(result: Result<u32, Refused>) -> ErrorCode {
        result.unwrap_err().code()
    }

    #[test]
    fn generation_is_the_newest_that_both_speak() {
        let token = Token::from_bytes([1; 32]);
        let newer = Hello { generation: GENERATION + 5, ..hello(&token) };
        assert_eq!(accept(&newer, &token), Ok(GENERATION));
        let too_new = Hello { generation_min: GENERATION + 1, ..newer };
        assert_eq!(code(accept(&too_new, &token)), ErrorCode::UnsupportedGeneration);
        let too_old = Hello { generation: 0, generation_min: 0, ..hello(&token) };
        assert_eq!(code(accept(&too_old, &token)), ErrorCode::UnsupportedGeneration);
    }

    #[test]
    fn stranger_learns_nothing_but_that_the_token_is_wrong() {
        let theirs = Token::from_bytes([2; 32]);
        let wrong = Hello { generation: 0, ..hello(&theirs) };
        assert_eq!(code(accept(&wrong, &Token::from_bytes([1; 32]))), ErrorCode::Unauthorized);
    }
}
