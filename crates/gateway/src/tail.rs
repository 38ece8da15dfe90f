//! A client that is told something as it happens, on a WebSocket or as server-sent events.
//!
//! Each goes at its own pace, so one that stands still costs the others nothing. One that takes
//! nothing for the idle limit is gone; it can go on later after the number of the last thing that
//! it got.

use std::{collections::VecDeque, time::Duration};

use aether_api::EVENT_STREAM_MEDIA_TYPE;
use aether_types::ErrorCode;
use axum::{
    body::Body,
    extract::{
        FromRequestParts, WebSocketUpgrade,
        ws::{self, CloseFrame, Message, WebSocket, close_code},
    },
    http::{HeaderMap, header, request},
    response::{IntoResponse as _, Response},
};
use bytes::{BufMut as _, Bytes, BytesMut};
use futures::{SinkExt as _, StreamExt as _};
use serde::Serialize;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use crate::{
    parts::App,
    problem::{ApiError, ApiResult},
};

/// A client has nothing to say but pongs and its end.
const MESSAGE_BYTES_MAX: usize = 4096;
/// The client's socket takes an ending message in this time, or is left.
const GOODBYE_LIMIT: Duration = Duration::from_secs(5);

/// What one client is told.
pub(crate) trait Tail: Send + 'static {
    type Item: Serialize + Send + Sync;

    /// After which a client can go on.
    fn id(item: &Self::Item) -> Option<u64>;

    /// What comes next, one at least; `None` after the last. Cancel-safe.
    fn next(&mut self) -> impl Future<Output = Option<VecDeque<Self::Item>>> + Send;
}

/// A client of server-sent events that connects again says in a header where it was.
pub(crate) fn last_event_id(headers: &HeaderMap) -> Option<u64> {
    headers.get("last-event-id").and_then(|value| value.to_str().ok()?.parse().ok())
}

/// How the client wants to be told; looked at when the rest of its request is known to be good.
pub(crate) struct Follow {
    upgrade: Result<WebSocketUpgrade, ws::rejection::WebSocketUpgradeRejection>,
    wants_events: bool,
}

impl<S: Send + Sync> FromRequestParts<S> for Follow {
    type Rejection = std::convert::Infallible;

    async fn from_request_parts(
        parts: &mut request::Parts,
        state: &S,
    ) -> Result<Self, Self::Rejection> {
        let accept = parts.headers.get(header::ACCEPT).and_then(|value| value.to_str().ok());
        let wants_events = accept.is_some_and(|accept| accept.contains(EVENT_STREAM_MEDIA_TYPE));
        Ok(Self { upgrade: WebSocketUpgrade::from_request_parts(parts, state).await, wants_events })
    }
}

pub(crate) enum Way {
    Socket(WebSocketUpgrade),
    Events,
}

impl Follow {
    pub(crate) fn way(self) -> ApiResult<Way> {
        match self.upgrade {
            Ok(upgrade) => Ok(Way::Socket(upgrade)),
            Err(_) if self.wants_events => Ok(Way::Events),
            Err(rejection) => {
                let detail =
                    format!("open a WebSocket, or accept {EVENT_STREAM_MEDIA_TYPE}: {rejection}");
                Err(ApiError::new(ErrorCode::InvalidRequest, detail))
            }
        }
    }
}

impl Way {
    pub(crate) fn answer(self, app: &App, tail: impl Tail) -> Response {
        let idle_limit = app.parts.config.idle_limit;
        let Self::Socket(upgrade) = self else { return events(tail, idle_limit / 3) };
        let tasks = app.tasks.clone();
        let upgrade = upgrade.max_message_size(MESSAGE_BYTES_MAX).max_frame_size(MESSAGE_BYTES_MAX);
        upgrade.on_upgrade(async move |socket| {
            // Tracked, so that the gateway's end waits for it.
            tasks.track_future(attend(tail, idle_limit, socket)).await;
        })
    }
}

fn json(item: &impl Serialize) -> String {
    // Texts and numbers always have a JSON form.
    serde_json::to_string(item).unwrap_or_default()
}

/// The answer as server-sent events: one a line, with its number as id.
fn events<T: Tail>(tail: T, pause: Duration) -> Response {
    let parts = futures::stream::unfold(tail, move |mut tail| async move {
        let part = match timeout(pause, tail.next()).await {
            Ok(items) => written::<T>(&items?),
            // Keeps proxies from taking silence for the end.
            Err(_) => Bytes::from_static(b":\n\n"),
        };
        Some((Ok::<_, std::convert::Infallible>(part), tail))
    });
    let headers =
        [(header::CONTENT_TYPE, EVENT_STREAM_MEDIA_TYPE), (header::CACHE_CONTROL, "no-store")];
    (headers, Body::from_stream(parts)).into_response()
}

fn written<T: Tail>(items: &VecDeque<T::Item>) -> Bytes {
    let mut bytes = BytesMut::new();
    for item in items {
        if let Some(id) = T::id(item) {
            bytes.put_slice(format!("id: {id}\n").as_bytes());
        }
        // JSON has no line's end within.
        bytes.put_slice(b"data: ");
        bytes.put_slice(json(item).as_bytes());
        bytes.put_slice(b"\n\n");
    }
    bytes.freeze()
}

/// Until what is told, the gateway or the client end.
async fn attend(mut tail: impl Tail, idle_limit: Duration, socket: WebSocket) {
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
