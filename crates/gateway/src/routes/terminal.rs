//! An interactive execution on a WebSocket, with or without a terminal.
//!
//! Reading never waits for the command: standard input is held here up to the client's window, so
//! a signal, a resize and the client's end are heard at once. When the client goes, its end of the
//! session is dropped, and the worker ends the command.

use std::{
    collections::VecDeque,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use aether_api::{
    CHANNEL_STDERR, CHANNEL_STDIN, CHANNEL_STDOUT, STDIN_WINDOW_BYTES, StreamEvent,
    TerminalControl, TerminalStart,
};
use aether_streams::SessionInput;
use aether_types::{ErrorCode, ExecutionId, ExecutionSpec, TtySize, VmId, VmState};
use axum::{
    extract::{
        Path, State, WebSocketUpgrade,
        ws::{self, CloseFrame, Message, WebSocket, close_code},
    },
    response::Response,
};
use bytes::{BufMut as _, Bytes, BytesMut};
use futures::{
    SinkExt as _, StreamExt as _,
    stream::{SplitSink, SplitStream},
};
use tokio::{
    sync::{Notify, OwnedSemaphorePermit, mpsc, watch},
    time::{MissedTickBehavior, interval, timeout},
};

use crate::{
    auth::Caller,
    extract::{Params, from_json},
    follow::Follower,
    openapi::{Operation, of, operation},
    parts::App,
    problem::{self, ApiError, ApiResult},
    routes::{executions::record, vms::find},
    wait::TaskWatch,
};

/// From the handshake to the first message.
const START_LIMIT: Duration = Duration::from_secs(10);

/// A message: the first one holds an argument list and an environment at most.
const MESSAGE_BYTES_MAX: usize = 1024 * 1024;

/// To the command in one piece.
const CHUNK_BYTES: usize = 64 * 1024;

/// The client's socket takes an ending message in this time, or is left.
const GOODBYE_LIMIT: Duration = Duration::from_secs(5);

pub(super) async fn open(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
    params: Params,
    upgrade: Result<WebSocketUpgrade, ws::rejection::WebSocketUpgradeRejection>,
) -> ApiResult<Response> {
    params.finish()?;
    let vm = find(&app, &caller, &vm).await?;
    if !vm.state.takes_commands() {
        return Err(wrong_state(&vm.name, vm.state));
    }
    let upgrade = upgrade.map_err(|rejection| {
        ApiError::new(ErrorCode::InvalidRequest, format!("open a WebSocket: {rejection}"))
    })?;
    let place = app.stream_place()?;
    let tasks = app.tasks.clone();
    Ok(upgrade.max_message_size(MESSAGE_BYTES_MAX).max_frame_size(MESSAGE_BYTES_MAX).on_upgrade(
        async move |socket| {
            // Tracked, so that the gateway's end waits for it.
            tasks.track_future(attend(app, caller, vm.id, place, socket)).await;
        },
    ))
}

fn wrong_state(name: &str, state: VmState) -> ApiError {
    let detail = format!("VM `{name}` is {state}; it cannot run commands");
    ApiError::new(ErrorCode::VmStateConflict, detail).vm_state(state)
}

async fn attend(
    app: App,
    caller: Caller,
    vm: VmId,
    place: OwnedSemaphorePermit,
    mut socket: WebSocket,
) {
    let watch = TaskWatch::new(&app);
    let closing = app.closing.clone();
    let follower = tokio::select! {
        follower = begin(&app, &caller, vm, place, watch, &mut socket) => follower,
        () = closing.cancelled() => Err(ApiError::new(ErrorCode::Unavailable, "shutting down")),
    };
    match follower {
        Ok(Some(follower)) => Terminal::new(&app).run(follower, socket).await,
        // The client left before it began anything.
        Ok(None) => {}
        Err(error) => {
            let goodbye = refuse(&mut socket, &error);
            let _ = timeout(GOODBYE_LIMIT, goodbye).await;
        }
    }
}

/// Takes the first message and records the execution.
async fn begin(
    app: &App,
    caller: &Caller,
    vm: VmId,
    place: OwnedSemaphorePermit,
    watch: TaskWatch,
    socket: &mut WebSocket,
) -> ApiResult<Option<Follower>> {
    let wanted =
        || ApiError::new(ErrorCode::MalformedBody, "the first message is text with the command");
    let start = loop {
        match timeout(START_LIMIT, socket.recv()).await {
            Ok(Some(Ok(Message::Text(text)))) => {
                break from_json::<TerminalStart>(text.as_bytes())?;
            }
            Ok(Some(Ok(Message::Ping(_) | Message::Pong(_)))) => {}
            Ok(Some(Ok(Message::Binary(_)))) | Err(_) => return Err(wanted()),
            Ok(None | Some(Err(_) | Ok(Message::Close(_)))) => return Ok(None),
        }
    };
    let spec = ExecutionSpec::from(start);
    spec.validate().map_err(ApiError::invalid)?;
    let id = ExecutionId::new();
    let client = app.parts.sessions.follow(vm, id).await?;
    let recorded = record(app, caller.project(), vm, id, spec, None).await?;
    Ok(Some(Follower::new(app, watch, client, &recorded, place)))
}

async fn refuse(socket: &mut WebSocket, error: &ApiError) -> Result<(), axum::Error> {
    let text = serde_json::to_string(&problem::plain(error)).unwrap_or_default();
    socket.send(Message::Text(text.into())).await?;
    let frame = CloseFrame { code: close_code::POLICY, reason: "refused".into() };
    socket.send(Message::Close(Some(frame))).await
}

struct Terminal {
    stdin: Stdin,
    idle_limit: Duration,
    /// Messages sent, pings not counted. A ping carries the count.
    sent: AtomicU64,
    /// The count of the last ping that was answered: the client has read this many.
    read: AtomicU64,
}

/// How the client's side ended.
enum Left {
    Gone,
    /// It broke the rules.
    Refused(ApiError),
}

impl Terminal {
    fn new(app: &App) -> Self {
        let idle_limit = app.parts.config.idle_limit;
        Self { stdin: Stdin::default(), idle_limit, sent: 0.into(), read: 0.into() }
    }

    /// Until the command or the client ends, whichever is first.
    async fn run(self, mut follower: Follower, socket: WebSocket) {
        let (mut sink, stream) = socket.split();
        // A new execution is live from the start.
        let (Some(input), Some(taken)) = (follower.input(), follower.taken()) else { return };
        let left = tokio::select! {
            _ = self.write(&mut follower, &mut sink, taken) => None,
            left = self.read(stream) => Some(left),
            () = self.feed(&input) => None,
        };
        // Before the goodbye, so that the command ends at once.
        drop((follower, input));
        let goodbye = async {
            let code = match &left {
                Some(Left::Refused(error)) => {
                    let text = serde_json::to_string(&problem::plain(error)).unwrap_or_default();
                    sink.send(Message::Text(text.into())).await?;
                    close_code::POLICY
                }
                Some(Left::Gone) => return Ok(()),
                None => close_code::NORMAL,
            };
            let frame = CloseFrame { code, reason: "".into() };
            sink.send(Message::Close(Some(frame))).await?;
            sink.close().await
        };
        let _ = timeout(GOODBYE_LIMIT, goodbye).await;
    }

    /// Everything to the client. Ends after the last event, or when the client takes no more.
    async fn write(
        &self,
        follower: &mut Follower,
        sink: &mut SplitSink<WebSocket, Message>,
        mut taken: watch::Receiver<u64>,
    ) -> Result<(), axum::Error> {
        // Two pings may get no answer before the silence is long enough to be the end.
        let mut pings = interval(self.idle_limit / 3);
        pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
        pings.tick().await;
        let mut said = 0;
        loop {
            let message = tokio::select! {
                event = follower.next() => match event {
                    Some(event) => message(&event),
                    None => return Ok(()),
                },
                Ok(()) = taken.changed() => {
                    let in_all = *taken.borrow_and_update();
                    let bytes = in_all - said;
                    said = in_all;
                    self.stdin.give_back(bytes);
                    message(&StreamEvent::StdinTaken { bytes })
                }
                _ = pings.tick() => {
                    let count = self.sent.load(Ordering::Relaxed).to_be_bytes();
                    Message::Ping(Bytes::copy_from_slice(&count))
                }
            };
            if !matches!(message, Message::Ping(_)) {
                self.sent.fetch_add(1, Ordering::Relaxed);
            }
            sink.send(message).await?;
        }
    }

    /// Everything from the client. Never waits for the command.
    async fn read(&self, mut stream: SplitStream<WebSocket>) -> Left {
        loop {
            let message = match timeout(self.idle_limit, stream.next()).await {
                Ok(Some(Ok(message))) => message,
                // Closed or broken.
                Ok(None | Some(Err(_))) => return Left::Gone,
                Err(_) if self.has_read_everything() => return Left::Gone,
                Err(_) => continue,
            };
            let taken = match message {
                Message::Binary(data) => self.stdin.take(data),
                Message::Text(text) => control(text.as_bytes(), &self.stdin),
                Message::Pong(count) => {
                    if let Ok(count) = <[u8; 8]>::try_from(count.as_ref()) {
                        self.read.store(u64::from_be_bytes(count), Ordering::Relaxed);
                    }
                    Ok(())
                }
                Message::Ping(_) => Ok(()),
                Message::Close(_) => return Left::Gone,
            };
            if let Err(error) = taken {
                return Left::Refused(error);
            }
        }
    }

    /// A client that is silent although it has is not there any more.
    fn has_read_everything(&self) -> bool {
        self.read.load(Ordering::Relaxed) == self.sent.load(Ordering::Relaxed)
    }

    /// From what was read to the command, in order. Ends when nobody takes it any more.
    async fn feed(&self, input: &mpsc::Sender<SessionInput>) {
        loop {
            // The place first, so that a signal that comes meanwhile goes before the input.
            let Ok(place) = input.reserve().await else {
                // The follower hears how the command ended.
                return std::future::pending().await;
            };
            place.send(self.stdin.next().await);
        }
    }
}

fn message(event: &StreamEvent) -> Message {
    let binary = |channel: u8, data: &Bytes| {
        let mut message = BytesMut::with_capacity(data.len() + 1);
        message.put_u8(channel);
        message.put_slice(data);
        Message::Binary(message.freeze())
    };
    match event {
        StreamEvent::Stdout { data } => binary(CHANNEL_STDOUT, data),
        StreamEvent::Stderr { data } => binary(CHANNEL_STDERR, data),
        StreamEvent::Accepted { .. }
        | StreamEvent::Started
        | StreamEvent::Skipped { .. }
        | StreamEvent::StdinTaken { .. }
        | StreamEvent::End(_)
        | StreamEvent::Detached => {
            // An event of texts and numbers always has a JSON form.
            Message::Text(serde_json::to_string(event).unwrap_or_default().into())
        }
    }
}

fn control(text: &[u8], stdin: &Stdin) -> ApiResult<()> {
    match from_json::<TerminalControl>(text)? {
        TerminalControl::StdinEof => stdin.end(),
        TerminalControl::Signal { signal } if !(1..=64).contains(&signal) => {
            return Err(ApiError::invalid("signal: 1 to 64".into()));
        }
        TerminalControl::Signal { signal } => return stdin.signal(signal),
        TerminalControl::Resize { rows, cols } if rows == 0 || cols == 0 => {
            return Err(ApiError::invalid("resize: rows and cols are at least 1".into()));
        }
        TerminalControl::Resize { rows, cols } => stdin.resize(TtySize { rows, cols }),
    }
    Ok(())
}

/// Signals that wait at once. A person at a keyboard makes a few.
const SIGNALS_MAX: usize = 64;

/// What the client sent and the command was not given yet. Signals and the last size go first.
#[derive(Default)]
struct Stdin {
    held: Mutex<Held>,
    changed: Notify,
}

#[derive(Default)]
struct Held {
    data: BytesMut,
    /// Held and on its way; the client may not have more than a window of it.
    unacknowledged: u64,
    signals: VecDeque<i32>,
    size: Option<TtySize>,
    has_ended: bool,
    end_was_given: bool,
}

impl Stdin {
    fn with<T>(&self, change: impl FnOnce(&mut Held) -> T) -> T {
        // Nothing panics while the lock is held; a poisoned one is as good as a clean one.
        let result = change(&mut self.held.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_one();
        result
    }

    /// A binary message of the client.
    fn take(&self, mut message: Bytes) -> ApiResult<()> {
        let bad = |detail: &str| Err(ApiError::new(ErrorCode::InvalidRequest, detail));
        if message.is_empty() || message.split_to(1)[0] != CHANNEL_STDIN {
            return bad("a binary message begins with the channel, which is 0");
        }
        self.with(|held| {
            held.unacknowledged += message.len() as u64;
            if held.unacknowledged > STDIN_WINDOW_BYTES.into() {
                return bad("more standard input came than there is a window for");
            }
            if !held.has_ended {
                held.data.put_slice(&message);
            }
            Ok(())
        })
    }

    fn give_back(&self, bytes: u64) {
        self.with(|held| held.unacknowledged = held.unacknowledged.saturating_sub(bytes));
    }

    fn end(&self) {
        self.with(|held| held.has_ended = true);
    }

    fn signal(&self, signal: i32) -> ApiResult<()> {
        self.with(|held| {
            if held.signals.len() >= SIGNALS_MAX {
                return Err(ApiError::invalid("signal: too many at once".into()));
            }
            held.signals.push_back(signal);
            Ok(())
        })
    }

    fn resize(&self, size: TtySize) {
        self.with(|held| held.size = Some(size));
    }

    async fn next(&self) -> SessionInput {
        loop {
            let next = {
                let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
                held.next()
            };
            match next {
                Some(next) => return next,
                // A change since the look above has left its permit here.
                None => self.changed.notified().await,
            }
        }
    }
}

impl Held {
    fn next(&mut self) -> Option<SessionInput> {
        if let Some(signal) = self.signals.pop_front() {
            return Some(SessionInput::Signal(signal));
        }
        if let Some(size) = self.size.take() {
            return Some(SessionInput::Resize(size));
        }
        if !self.data.is_empty() {
            let chunk = self.data.split_to(self.data.len().min(CHUNK_BYTES));
            return Some(SessionInput::Stdin(chunk.freeze()));
        }
        if self.has_ended && !self.end_was_given {
            self.end_was_given = true;
            return Some(SessionInput::StdinEof);
        }
        None
    }
}

pub(super) fn open_op() -> Operation {
    operation("openTerminal", "Run an interactive command on a WebSocket")
        .about(
            "The client's first message is a text with a `TerminalStart`; then texts with a \
             `TerminalControl`, and binary messages: 0 and bytes of the standard input. The server \
             sends texts with a `StreamEvent`, and binary messages: 1 or 2, and bytes of the \
             standard output or error. The command ends when the client goes.",
        )
        .talks("A WebSocket.", Some(from_client), of::<StreamEvent>)
        .refuses(&[ErrorCode::VmStateConflict])
}

fn from_client(schemas: &mut schemars::SchemaGenerator) -> schemars::Schema {
    schemars::json_schema!({
        "oneOf": [
            schemas.subschema_for::<TerminalStart>(),
            schemas.subschema_for::<TerminalControl>(),
        ],
    })
}
