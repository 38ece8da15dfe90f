//! Opening a session, and the sessions that are one question and one answer.

use std::fmt;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadHalf, WriteHalf};
use tokio::time::{Instant, timeout_at};

use super::error::{ClientError, ProtocolError, unwanted};
use super::frames::{FrameReader, FrameWriter};
use crate::check::check_request;
use crate::handshake;
use crate::limits::{
    FILE_NAME_BYTES_MAX, LIST_ENTRIES_MAX, MESSAGE_BYTES_MAX, RUNS_MAX, SHORT_TEXT_BYTES_MAX,
    WARNINGS_MAX,
};
use crate::message::{
    Configure, Configured, Done, FileStat, Forget, FromGuest, FromGuestBody, List, ListRuns,
    Listing, Mkdir, Move, Ping, Pong, Remove, Request, RequestBody, Runs, Shutdown, Stat, ToGuest,
    Welcome,
};
use crate::token::Token;

/// A connection to a guest's agent, however a driver made it.
pub trait GuestStream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<S: AsyncRead + AsyncWrite + Unpin + Send + ?Sized> GuestStream for S {}

pub type BoxStream = Box<dyn GuestStream>;

pub(super) type Reader = FrameReader<ReadHalf<BoxStream>, FromGuest>;
pub(super) type Writer = FrameWriter<WriteHalf<BoxStream>>;

/// A session after its first exchange. Dropping it closes the connection.
pub struct GuestClient {
    pub(super) reader: Reader,
    pub(super) writer: Writer,
}

impl fmt::Debug for GuestClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestClient").finish_non_exhaustive()
    }
}

impl GuestClient {
    /// Sends token and request and waits for the guest to take it.
    ///
    /// Not cancel-safe: a dropped call closes the connection, and the guest may have begun.
    pub async fn open(
        stream: impl GuestStream + 'static,
        token: &Token,
        request: impl Into<Request> + Send,
        first_exchange_limit: Duration,
    ) -> Result<(Self, Welcome), ClientError> {
        let deadline = Instant::now() + first_exchange_limit;
        Self::open_until(stream, token, request.into(), deadline).await
    }

    pub(super) async fn open_until(
        stream: impl GuestStream + 'static,
        token: &Token,
        request: Request,
        deadline: Instant,
    ) -> Result<(Self, Welcome), ClientError> {
        check_request(request.body.as_ref().ok_or(crate::RequestError::Unknown)?)?;
        let (read, write) = tokio::io::split(Box::new(stream) as BoxStream);
        let mut client = Self { reader: Reader::new(read), writer: Writer::new(write) };
        client.writer.queue(&ToGuest::from(handshake::hello(token)))?;
        client.writer.queue(&ToGuest::from(request))?;
        let welcome = timeout_at(deadline, client.exchange())
            .await
            .map_err(|_| ClientError::Timeout { context: "wait for the welcome" })??;
        Ok((client, welcome))
    }

    async fn exchange(&mut self) -> Result<Welcome, ClientError> {
        // A guest that refuses may close before it has read everything; its answer counts.
        let sent = self.writer.flush().await;
        let answer = self.reader.next().await;
        let message = match (answer, sent) {
            (Ok(Some(message)), _) => message,
            (_, Err(error)) => return Err(ClientError::io("send the request")(error)),
            (Ok(None), Ok(())) => {
                return Err(ClientError::Closed { context: "wait for the welcome" });
            }
            (Err(error), Ok(())) => return Err(error),
        };
        match message.body {
            Some(FromGuestBody::Welcome(welcome)) => checked_welcome(welcome),
            Some(FromGuestBody::Refused(refused)) => Err(refused.into()),
            Some(_) | None => Err(ClientError::unexpected("wait for the welcome")),
        }
    }

    /// The connection, where nothing of this session is left on it.
    fn into_stream(self) -> Option<BoxStream> {
        let (read, write) = (self.reader.into_stream()?, self.writer.into_stream()?);
        Some(read.unsplit(write))
    }

    /// The next message of the guest. Cancel-safe.
    pub async fn next(&mut self) -> Result<FromGuest, ClientError> {
        next_message(&mut self.reader, "wait for an answer").await
    }

    /// Sends one message. A dropped call has queued it whole or not at all.
    pub async fn send(&mut self, message: impl Into<ToGuest> + Send) -> Result<(), ClientError> {
        self.writer.send(&message.into()).await
    }
}

pub(super) async fn next_message(
    reader: &mut Reader,
    context: &'static str,
) -> Result<FromGuest, ClientError> {
    reader.next().await?.ok_or(ClientError::Closed { context })
}

fn checked_welcome(welcome: Welcome) -> Result<Welcome, ClientError> {
    if !handshake::is_acceptable(&welcome) {
        return Err(ProtocolError::Generation { generation: welcome.generation }.into());
    }
    short("agent version", &welcome.agent_version)?;
    short("boot id", &welcome.boot_id)?;
    Ok(welcome)
}

fn short(field: &'static str, text: &str) -> Result<(), ProtocolError> {
    let bounded = text.len() <= SHORT_TEXT_BYTES_MAX && !text.contains(char::is_control);
    if bounded { Ok(()) } else { Err(ProtocolError::Field { field }) }
}

/// One question, one answer, one limit for both.
async fn ask(
    stream: impl GuestStream + 'static,
    token: &Token,
    request: RequestBody,
    limit: Duration,
) -> Result<FromGuest, ClientError> {
    exchange(stream, token, request, limit).await.map(|(_client, _welcome, answer)| answer)
}

async fn exchange(
    stream: impl GuestStream + 'static,
    token: &Token,
    request: RequestBody,
    limit: Duration,
) -> Result<(GuestClient, Welcome, FromGuest), ClientError> {
    let deadline = Instant::now() + limit;
    let request = Request { body: Some(request) };
    let (mut client, welcome) = GuestClient::open_until(stream, token, request, deadline).await?;
    let answer = timeout_at(deadline, client.next())
        .await
        .map_err(|_| ClientError::Timeout { context: "wait for the answer" })??;
    Ok((client, welcome, answer))
}

macro_rules! question {
    ($(#[$doc:meta])* $name:ident, $request:ident => $answer:ident) => {
        $(#[$doc])*
        ///
        /// The limit is for the whole exchange.
        pub async fn $name(
            stream: impl GuestStream + 'static,
            token: &Token,
            request: $request,
            limit: Duration,
        ) -> Result<$answer, ClientError> {
            let answer = ask(stream, token, RequestBody::$request(request), limit).await?;
            match answer.body {
                Some(FromGuestBody::$answer(answer)) => Ok(answer),
                body => Err(unwanted(FromGuest { body }, stringify!($name))),
            }
        }
    };
}

/// Configures the guest, after its boot or after a restore. The answer has the guest's boot id from
/// now on.
///
/// The limit is for the whole exchange. Where the answer is lost, the guest may have taken the new
/// token or not.
pub async fn configure(
    stream: impl GuestStream + 'static,
    token: &Token,
    request: Configure,
    limit: Duration,
) -> Result<Configured, ClientError> {
    configure_and_keep(stream, token, request, limit).await.map(|(configured, _kept)| configured)
}

/// The same; gives the connection back where the guest has kept it open: another session may begin
/// on it as on a new one, within the guest's [`HANDSHAKE_LIMIT`](crate::limits::HANDSHAKE_LIMIT).
pub async fn configure_and_keep(
    stream: impl GuestStream + 'static,
    token: &Token,
    request: Configure,
    limit: Duration,
) -> Result<(Configured, Option<BoxStream>), ClientError> {
    let must_be_known = request.restored || request.new_token.is_some();
    let request = RequestBody::Configure(request);
    let (client, welcome, answer) = exchange(stream, token, request, limit).await?;
    match answer.body {
        Some(FromGuestBody::Configured(configured)) => {
            let kept = configured.kept_open.then(|| client.into_stream()).flatten();
            Ok((checked_configured(configured, welcome, must_be_known)?, kept))
        }
        body => Err(unwanted(FromGuest { body }, "configure")),
    }
}

fn checked_configured(
    mut configured: Configured,
    welcome: Welcome,
    must_be_known: bool,
) -> Result<Configured, ClientError> {
    short("boot id", &configured.boot_id)?;
    if configured.boot_id.is_empty() {
        if must_be_known {
            let what = "clones and new tokens";
            return Err(ProtocolError::Outdated { what }.into());
        }
        configured.boot_id = welcome.boot_id;
    }
    configured.warnings.truncate(WARNINGS_MAX);
    for warning in &mut configured.warnings {
        warning.truncate(warning.floor_char_boundary(MESSAGE_BYTES_MAX));
    }
    Ok(configured)
}

question! {
    /// Makes a directory.
    mkdir, Mkdir => Done
}
question! {
    /// Renames a file or directory.
    move_, Move => Done
}
question! {
    /// Removes a file or directory.
    remove, Remove => Done
}
question! {
    /// Describes a file.
    stat, Stat => FileStat
}
question! {
    /// Drops a finished detached run.
    forget, Forget => Done
}
question! {
    /// Ends the guest; the answer says that it has begun.
    shutdown, Shutdown => ShuttingDown
}

use crate::message::ShuttingDown;

/// Asks whether the guest is well.
pub async fn ping(
    stream: impl GuestStream + 'static,
    token: &Token,
    limit: Duration,
) -> Result<Pong, ClientError> {
    match ask(stream, token, RequestBody::Ping(Ping {}), limit).await?.body {
        Some(FromGuestBody::Pong(pong)) => {
            short("boot id", &pong.boot_id)?;
            Ok(pong)
        }
        body => Err(unwanted(FromGuest { body }, "ping")),
    }
}

/// Lists runs that are alive, and detached ones that have ended and are kept.
pub async fn list_runs(
    stream: impl GuestStream + 'static,
    token: &Token,
    limit: Duration,
) -> Result<Runs, ClientError> {
    match ask(stream, token, RequestBody::ListRuns(ListRuns {}), limit).await?.body {
        Some(FromGuestBody::Runs(runs)) if runs.runs.len() <= 2 * RUNS_MAX => Ok(runs),
        Some(FromGuestBody::Runs(_)) => Err(ProtocolError::Field { field: "runs" }.into()),
        body => Err(unwanted(FromGuest { body }, "list runs")),
    }
}

/// Lists one page of a directory. Names have no separator in them and are never `.` or `..`.
pub async fn list(
    stream: impl GuestStream + 'static,
    token: &Token,
    request: List,
    limit: Duration,
) -> Result<Listing, ClientError> {
    match ask(stream, token, RequestBody::List(request), limit).await?.body {
        Some(FromGuestBody::Listing(listing)) => checked_listing(listing),
        body => Err(unwanted(FromGuest { body }, "list")),
    }
}

fn checked_listing(listing: Listing) -> Result<Listing, ClientError> {
    let few = listing.entries.len() as u64 <= u64::from(LIST_ENTRIES_MAX);
    // A host that copies a directory joins these names to a path of its own.
    let plain = listing.entries.iter().all(|entry| {
        // A replaced byte grows to three.
        let short = entry.name.len() <= 3 * FILE_NAME_BYTES_MAX;
        let raw = entry.raw_name.as_ref();
        let has_separator = entry.name.contains(['/', '\0']) || raw.contains(&b'/');
        let is_dots =
            ["", ".", ".."].contains(&entry.name.as_str()) || [&b"."[..], b".."].contains(&raw);
        short && raw.len() <= FILE_NAME_BYTES_MAX && !has_separator && !is_dots
    });
    if few && plain && listing.next.len() <= FILE_NAME_BYTES_MAX {
        Ok(listing)
    } else {
        Err(ProtocolError::Field { field: "listing" }.into())
    }
}
