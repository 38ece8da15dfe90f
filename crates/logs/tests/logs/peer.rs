//! An HTTP server that stands where a Loki would: it holds every push to Loki's contract, keeps
//! what it takes, answers what a test tells it to, and answers queries from what it has.
//!
//! Its messages are its own, so that a wrong field number of the product's is found.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex},
    time::Instant,
};

use axum::{
    Form, Json, Router,
    body::Bytes,
    extract::State,
    http::{HeaderMap, StatusCode},
    response::{IntoResponse as _, Response},
    routing::post,
};
use prost::Message;
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::Notify, task::JoinHandle, time::timeout};

use crate::support::LIMIT;

#[derive(Clone, PartialEq, Message)]
struct PushRequest {
    #[prost(message, repeated, tag = "1")]
    streams: Vec<PushStream>,
}

#[derive(Clone, PartialEq, Message)]
struct PushStream {
    #[prost(string, tag = "1")]
    labels: String,
    #[prost(message, repeated, tag = "2")]
    entries: Vec<PushEntry>,
    #[prost(uint64, tag = "3")]
    hash: u64,
}

#[derive(Clone, PartialEq, Message)]
struct PushEntry {
    #[prost(message, optional, tag = "1")]
    timestamp: Option<Time>,
    #[prost(string, tag = "2")]
    line: String,
    #[prost(message, repeated, tag = "3")]
    structured_metadata: Vec<Pair>,
}

#[derive(Clone, PartialEq, Message)]
struct Time {
    #[prost(int64, tag = "1")]
    seconds: i64,
    #[prost(int32, tag = "2")]
    nanos: i32,
}

#[derive(Clone, PartialEq, Message)]
struct Pair {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    value: String,
}

/// Loki's own default of a request.
const REQUEST_BYTES_MAX: usize = 4 << 20;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Taken {
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) time_ns: i64,
    pub(crate) line: String,
    pub(crate) facts: BTreeMap<String, String>,
}

impl Taken {
    pub(crate) fn fact(&self, name: &str) -> &str {
        self.facts.get(name).map_or("", String::as_str)
    }

    pub(crate) fn sequence(&self) -> u64 {
        self.fact("sequence").parse().unwrap()
    }
}

/// What a push is answered with instead of being taken.
#[derive(Debug, Clone)]
pub(crate) enum Answer {
    Status(u16, &'static str),
    RetryAfter(u64),
    /// Taken, and the answer is lost.
    Lost,
    /// No answer in time.
    Hang,
}

#[derive(Default)]
struct Shared {
    state: Mutex<PeerState>,
    changed: Notify,
}

#[derive(Default)]
pub(crate) struct PeerState {
    /// For the next pushes; when it is empty they are taken.
    pub(crate) answers: VecDeque<Answer>,
    /// For every push while it is there.
    pub(crate) always: Option<Answer>,
    /// Sizes of pushes, in entries, with the moment of each.
    pub(crate) pushes: Vec<(usize, Instant)>,
    /// Those of each push that was taken.
    pub(crate) batches: Vec<usize>,
    pub(crate) taken: Vec<Taken>,
    /// What is wrong with a push, in words.
    pub(crate) breaches: Vec<String>,
    pub(crate) queries: Vec<String>,
    pub(crate) query_status: Option<u16>,
    pub(crate) authorization: Option<String>,
}

pub(crate) struct Peer {
    shared: Arc<Shared>,
    pub(crate) url: String,
    server: JoinHandle<()>,
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Peer {
    pub(crate) async fn start() -> Self {
        let shared = Arc::new(Shared::default());
        let app = Router::new()
            .route("/loki/api/v1/push", post(push))
            .route("/loki/api/v1/query_range", post(query))
            .with_state(Arc::clone(&shared));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let server = tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self { shared, url, server }
    }

    pub(crate) fn with<T>(&self, change: impl FnOnce(&mut PeerState) -> T) -> T {
        let result = change(&mut self.shared.state.lock().unwrap());
        self.shared.changed.notify_waiters();
        result
    }

    /// Waits until the peer has come to this.
    pub(crate) async fn until(&self, mut is_so: impl FnMut(&PeerState) -> bool) {
        let wait = async {
            loop {
                let changed = self.shared.changed.notified();
                tokio::pin!(changed);
                changed.as_mut().enable();
                if is_so(&self.shared.state.lock().unwrap()) {
                    return;
                }
                changed.await;
            }
        };
        timeout(LIMIT, wait).await.expect("the peer did not get there");
    }

    /// What it has, after a look at whether the contract was kept.
    pub(crate) fn taken(&self) -> Vec<Taken> {
        let state = self.shared.state.lock().unwrap();
        assert_eq!(state.breaches, Vec::<String>::new());
        state.taken.clone()
    }
}

async fn push(State(shared): State<Arc<Shared>>, headers: HeaderMap, body: Bytes) -> Response {
    let read = read_push(&headers, &body);
    let answer = {
        let mut state = shared.state.lock().unwrap();
        state.authorization =
            headers.get("authorization").map(|value| value.to_str().unwrap().to_owned());
        match read {
            Err(breach) => {
                state.breaches.push(breach.clone());
                shared.changed.notify_waiters();
                return (StatusCode::BAD_REQUEST, breach).into_response();
            }
            Ok(entries) => {
                state.pushes.push((entries.len(), Instant::now()));
                let answer = state.answers.pop_front().or_else(|| state.always.clone());
                if matches!(answer, None | Some(Answer::Lost)) {
                    state.batches.push(entries.len());
                    state.taken.extend(entries);
                }
                answer
            }
        }
    };
    shared.changed.notify_waiters();
    match answer {
        None => StatusCode::NO_CONTENT.into_response(),
        Some(Answer::Status(status, words)) => {
            (StatusCode::from_u16(status).unwrap(), words).into_response()
        }
        Some(Answer::RetryAfter(seconds)) => {
            (StatusCode::TOO_MANY_REQUESTS, [("retry-after", seconds.to_string())]).into_response()
        }
        Some(Answer::Lost) => StatusCode::BAD_GATEWAY.into_response(),
        Some(Answer::Hang) => std::future::pending().await,
    }
}

/// Loki's contract for pushes, as its documentation and its distributor's checks have it.
fn read_push(headers: &HeaderMap, body: &[u8]) -> Result<Vec<Taken>, String> {
    let kind = headers.get("content-type").and_then(|value| value.to_str().ok());
    if kind != Some("application/x-protobuf") {
        return Err(format!("content type {kind:?}"));
    }
    if headers.contains_key("content-encoding") {
        return Err("an encoding besides snappy's".into());
    }
    let bytes = snap::raw::Decoder::new().decompress_vec(body).map_err(|e| e.to_string())?;
    if bytes.len() > REQUEST_BYTES_MAX {
        return Err(format!("{} bytes", bytes.len()));
    }
    let request = PushRequest::decode(&*bytes).map_err(|e| e.to_string())?;
    let mut taken = Vec::new();
    for stream in request.streams {
        let labels = read_labels(&stream.labels)?;
        if stream.entries.is_empty() {
            return Err("a stream without entries".into());
        }
        let mut last = 0;
        for entry in stream.entries {
            let time = entry.timestamp.ok_or("no time")?;
            if !(0..1_000_000_000).contains(&time.nanos) {
                return Err(format!("{} ns", time.nanos));
            }
            let mut facts = BTreeMap::new();
            for Pair { name, value } in entry.structured_metadata {
                if !is_name(&name)
                    || value.is_empty()
                    || facts.insert(name.clone(), value).is_some()
                {
                    return Err(format!("structured metadata {name}"));
                }
            }
            let time_ns = time.seconds * 1_000_000_000 + i64::from(time.nanos);
            let one = Taken { labels: labels.clone(), time_ns, line: entry.line, facts };
            if one.sequence() < last {
                return Err(format!("number {} after {last} in one stream", one.sequence()));
            }
            last = one.sequence();
            taken.push(one);
        }
    }
    if taken.is_empty() {
        return Err("no entries".into());
    }
    taken.sort_by_key(Taken::sequence);
    Ok(taken)
}

/// `{name="value", ...}`, sorted, with few names and values.
fn read_labels(text: &str) -> Result<BTreeMap<String, String>, String> {
    let wrong = || format!("labels {text}");
    let inner = text.strip_prefix('{').and_then(|t| t.strip_suffix('}')).ok_or_else(wrong)?;
    let mut labels = BTreeMap::new();
    let mut names = Vec::new();
    for part in inner.split(", ") {
        let (name, value) = part.split_once('=').ok_or_else(wrong)?;
        let value = value.strip_prefix('"').and_then(|v| v.strip_suffix('"')).ok_or_else(wrong)?;
        if !is_name(name) || !value.chars().all(|c| c.is_ascii_lowercase()) {
            return Err(wrong());
        }
        names.push(name.to_owned());
        labels.insert(name.to_owned(), value.to_owned());
    }
    if names != ["level", "service", "stream"] {
        return Err(wrong());
    }
    Ok(labels)
}

fn is_name(name: &str) -> bool {
    !name.is_empty() && name.chars().all(|c| c.is_ascii_lowercase() || c == '_')
}

/// Knows the time, the direction and the limit; of the query itself it keeps the text, which the
/// grammar's test checks.
async fn query(
    State(shared): State<Arc<Shared>>,
    Form(form): Form<BTreeMap<String, String>>,
) -> Response {
    let mut state = shared.state.lock().unwrap();
    state.queries.push(form["query"].clone());
    if let Some(status) = state.query_status {
        let status = StatusCode::from_u16(status).unwrap();
        return (status, "parse error : \n somewhere").into_response();
    }
    let number = |name: &str| form.get(name).map(|text| text.parse::<i64>().unwrap());
    let (start, end) = (number("start").unwrap(), number("end").unwrap_or(i64::MAX));
    let mut fitting: Vec<&Taken> =
        state.taken.iter().filter(|one| (start..end).contains(&one.time_ns)).collect();
    fitting.sort_by_key(|one| (one.time_ns, one.sequence()));
    if form["direction"] == "backward" {
        fitting.reverse();
    }
    // As Loki does with what is pushed again.
    fitting.dedup();
    fitting.truncate(usize::try_from(number("limit").unwrap()).unwrap());
    let mut streams: BTreeMap<&BTreeMap<String, String>, Vec<Value>> = BTreeMap::new();
    for one in fitting {
        let facts = json!({ "structuredMetadata": one.facts });
        let value = json!([one.time_ns.to_string(), one.line, facts]);
        streams.entry(&one.labels).or_default().push(value);
    }
    let result: Vec<_> = streams
        .into_iter()
        .map(|(labels, values)| json!({ "stream": labels, "values": values }))
        .collect();
    let answer = json!({
        "status": "success",
        "data": { "resultType": "streams", "encodingFlags": ["categorize-labels"], "result": result },
    });
    Json(answer).into_response()
}
