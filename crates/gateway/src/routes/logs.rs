//! Logs: asked for, and followed on a WebSocket or as server-sent events.
//!
//! A follower reads from the store at its client's pace, so a client that stands still costs the
//! others nothing. One that takes nothing for the idle limit is gone; it can go on later after the
//! number of the last line that it got.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use aether_api::{EVENT_STREAM_MEDIA_TYPE, LogEntryView, LogEvent, LogsView, QueryLogs};
use aether_logs::{FollowFrom, Followed, LogFilter, LogFollower, LogQuery, Logged};
use aether_types::{
    ErrorCode, LogLevel, PreciseTime, Resource, Scope, TaskId, Verb, VmId,
    limits::LOG_QUERY_LIMIT_DEFAULT,
};
use axum::{
    Json as JsonAnswer,
    body::Body,
    extract::{
        State, WebSocketUpgrade,
        ws::{self, CloseFrame, Message, WebSocket, close_code},
    },
    http::{HeaderMap, header},
    response::{IntoResponse as _, Response},
};
use bytes::{BufMut as _, Bytes, BytesMut};
use futures::{SinkExt as _, StreamExt as _};
use tokio::{
    sync::OwnedSemaphorePermit,
    time::{Instant, MissedTickBehavior, interval, timeout},
};

use crate::{
    auth::Caller,
    extract::{Json, Params},
    parts::App,
    problem::{ApiError, ApiResult},
    routes::vms::{find, resolve},
};

/// A client has nothing to say but pongs and its end.
const MESSAGE_BYTES_MAX: usize = 4096;
/// The client's socket takes an ending message in this time, or is left.
const GOODBYE_LIMIT: Duration = Duration::from_secs(5);

/// The VM whose lines are asked for. They are those of a VM or a task of the caller's project; who
/// may look at the whole platform may ask for all, and for those of things that are no more.
async fn owned(
    app: &App,
    caller: &Caller,
    vm: Option<&str>,
    task: Option<TaskId>,
) -> ApiResult<Option<VmId>> {
    let all = Scope { resource: Resource::Platform, verb: Verb::Read };
    if caller.check(all).is_ok() {
        return match vm {
            Some(vm) => resolve(app, caller, vm).await.map(Some),
            None => Ok(None),
        };
    }
    if let Some(task) = task {
        let found = app.store().task(task).await?;
        if found.is_none_or(|found| found.project_id != caller.project()) {
            let detail = format!("there is no task `{task}`");
            return Err(ApiError::new(ErrorCode::TaskNotFound, detail));
        }
    }
    match vm {
        Some(vm) => find(app, caller, vm).await.map(|vm| Some(vm.id)),
        None if task.is_some() => Ok(None),
        None => {
            let detail = format!("name a `vm_id` or a `task_id`: lines of all need `{all}`");
            Err(ApiError::new(ErrorCode::Forbidden, detail))
        }
    }
}

pub(super) async fn query(
    State(app): State<App>,
    caller: Caller,
    params: Params,
    body: Json<QueryLogs>,
) -> ApiResult<JsonAnswer<LogsView>> {
    params.finish()?;
    let QueryLogs { vm_id, task_id, level, text, start, end, limit } = body.value;
    let owned = owned(&app, &caller, vm_id.as_deref(), task_id).await;
    let named = if task_id.is_some() { "task_id" } else { "vm_id" };
    let vm_id = owned.map_err(|error| error.in_body(named))?;
    let query = LogQuery {
        filter: LogFilter { vm_id, task_id, level, text },
        start_ns: start.map(PreciseTime::unix_ns),
        end_ns: end.map(PreciseTime::unix_ns),
        limit: limit.unwrap_or(LOG_QUERY_LIMIT_DEFAULT),
    };
    let answer = app.parts.logs.query(&query).await?;
    let items = answer.entries.iter().map(|logged| view(logged)).collect();
    Ok(JsonAnswer(LogsView { items, more: answer.more }))
}

fn view(logged: &Logged) -> LogEntryView {
    let entry = &logged.entry;
    LogEntryView {
        sequence: logged.sequence,
        time: PreciseTime::from_unix_ns(entry.time_ns),
        service: entry.service,
        level: entry.level,
        stream: entry.stream,
        vm_id: entry.vm_id,
        task_id: entry.task_id,
        text: entry.text().to_owned(),
        cut_bytes: entry.cut_bytes(),
        missing: entry.missing,
    }
}

pub(super) async fn stream(
    State(app): State<App>,
    caller: Caller,
    mut params: Params,
    headers: HeaderMap,
    upgrade: Result<WebSocketUpgrade, ws::rejection::WebSocketUpgradeRejection>,
) -> ApiResult<Response> {
    let (vm, mut filter) = filter(&mut params)?;
    let from = from(&mut params, &headers)?;
    params.finish()?;
    let wants_events = headers
        .get(header::ACCEPT)
        .and_then(|value| value.to_str().ok())
        .is_some_and(|accept| accept.contains(EVENT_STREAM_MEDIA_TYPE));
    let upgrade = match upgrade {
        Ok(upgrade) => Some(upgrade),
        Err(_) if wants_events => None,
        Err(rejection) => {
            let detail =
                format!("open a WebSocket, or accept {EVENT_STREAM_MEDIA_TYPE}: {rejection}");
            return Err(ApiError::new(ErrorCode::InvalidRequest, detail));
        }
    };
    filter.vm_id = owned(&app, &caller, vm.as_deref(), filter.task_id).await?;
    let place = app.stream_place()?;
    let follower = app.parts.logs.follow(filter, from).await?;
    let tail = Tail { app: app.clone(), follower, is_over: false, _place: place };
    let Some(upgrade) = upgrade else { return Ok(events(tail)) };
    let tasks = app.tasks.clone();
    Ok(upgrade.max_message_size(MESSAGE_BYTES_MAX).max_frame_size(MESSAGE_BYTES_MAX).on_upgrade(
        async move |socket| {
            // Tracked, so that the gateway's end waits for it.
            tasks.track_future(attend(tail, socket)).await;
        },
    ))
}

/// What is asked for, and of which VM.
fn filter(params: &mut Params) -> ApiResult<(Option<String>, LogFilter)> {
    let vm = params.one("vm_id")?;
    let task_id = params.one("task_id")?.map(|text| text.parse::<TaskId>());
    let task_id =
        task_id.transpose().map_err(|error| ApiError::invalid(format!("task_id: {error}")))?;
    let level = params.parsed::<LogLevel>("level")?;
    let text = params.one("text")?;
    Ok((vm, LogFilter { vm_id: None, task_id, level, text }))
}

/// A client of events that connects again says where it was in a header.
fn from(params: &mut Params, headers: &HeaderMap) -> ApiResult<FollowFrom> {
    let since = params.parsed::<PreciseTime>("since")?;
    let after = params.number::<u64>("after")?;
    if since.is_some() && after.is_some() {
        return Err(ApiError::invalid("after: not together with since".into()));
    }
    let again = headers.get("last-event-id").and_then(|value| value.to_str().ok()?.parse().ok());
    Ok(match (again.or(after), since) {
        (Some(sequence), _) => FollowFrom::After(sequence),
        (None, Some(time)) => FollowFrom::Time(time.unix_ns()),
        (None, None) => FollowFrom::Now,
    })
}

/// What one client is told.
struct Tail {
    app: App,
    follower: Box<dyn LogFollower>,
    is_over: bool,
    /// For as long as somebody follows.
    _place: OwnedSemaphorePermit,
}

impl Tail {
    /// The next events, one at least; `None` after the last. Cancel-safe.
    async fn next(&mut self) -> Option<VecDeque<LogEvent>> {
        if self.is_over {
            return None;
        }
        let followed = tokio::select! {
            biased;
            () = self.app.closing.cancelled() => Followed::Closed,
            followed = self.follower.next() => followed,
        };
        Some(match followed {
            Followed::Entries(entries) => {
                entries.iter().map(|logged: &Arc<Logged>| LogEvent::Entry(view(logged))).collect()
            }
            Followed::Missed(lines) => VecDeque::from([LogEvent::Missed { lines }]),
            Followed::Closed => {
                self.is_over = true;
                VecDeque::from([LogEvent::Detached])
            }
        })
    }
}

fn json(event: &LogEvent) -> String {
    // An event of texts and numbers always has a JSON form.
    serde_json::to_string(event).unwrap_or_default()
}

/// The answer as server-sent events: one a line, with the line's number as id.
fn events(tail: Tail) -> Response {
    let pause = tail.app.parts.config.idle_limit / 3;
    let parts = futures::stream::unfold(tail, move |mut tail| async move {
        let part = match timeout(pause, tail.next()).await {
            Ok(events) => written(&events?),
            // Keeps proxies from taking silence for the end.
            Err(_) => Bytes::from_static(b":\n\n"),
        };
        Some((Ok::<_, std::convert::Infallible>(part), tail))
    });
    let headers =
        [(header::CONTENT_TYPE, EVENT_STREAM_MEDIA_TYPE), (header::CACHE_CONTROL, "no-store")];
    (headers, Body::from_stream(parts)).into_response()
}

fn written(events: &VecDeque<LogEvent>) -> Bytes {
    let mut bytes = BytesMut::new();
    for event in events {
        if let LogEvent::Entry(entry) = event {
            bytes.put_slice(format!("id: {}\n", entry.sequence).as_bytes());
        }
        // JSON has no line's end within.
        bytes.put_slice(b"data: ");
        bytes.put_slice(json(event).as_bytes());
        bytes.put_slice(b"\n\n");
    }
    bytes.freeze()
}

/// Until the logs, the gateway or the client end.
async fn attend(mut tail: Tail, socket: WebSocket) {
    let idle_limit = tail.app.parts.config.idle_limit;
    let (mut sink, mut stream) = socket.split();
    let mut pings = interval(idle_limit / 3);
    pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut heard = Instant::now();
    let is_over = loop {
        let messages: Vec<_> = tokio::select! {
            events = tail.next() => match events {
                Some(events) => events.iter().map(|event| Message::Text(json(event).into())).collect(),
                None => break true,
            },
            message = stream.next() => match message {
                Some(Ok(Message::Close(_)) | Err(_)) | None => break false,
                Some(Ok(_)) => {
                    heard = Instant::now();
                    continue;
                }
            },
            _ = pings.tick() => {
                if heard.elapsed() > idle_limit {
                    break false;
                }
                vec![Message::Ping(Bytes::new())]
            }
        };
        let is_ping = matches!(messages.as_slice(), [Message::Ping(_)]);
        let send = async {
            for message in messages {
                sink.feed(message).await?;
            }
            sink.flush().await
        };
        if !matches!(timeout(idle_limit, send).await, Ok(Ok(()))) {
            break false;
        }
        if !is_ping {
            // It takes what it is sent: it is not silent.
            heard = Instant::now();
        }
    };
    drop(tail);
    if is_over {
        let frame = CloseFrame { code: close_code::NORMAL, reason: "".into() };
        let goodbye = async {
            sink.send(Message::Close(Some(frame))).await?;
            sink.close().await
        };
        let _ = timeout(GOODBYE_LIMIT, goodbye).await;
    }
}
