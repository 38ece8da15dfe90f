//! Logs: asked for, and followed on a WebSocket or as server-sent events.
//!
//! A follower reads from the store at its client's pace, so a client that stands still costs the
//! others nothing. One that takes nothing for the idle limit is gone; it can go on later after the
//! number of the last line that it got.

use std::{collections::VecDeque, sync::Arc};

use aether_api::{LogEntryView, LogEvent, LogsView, QueryLogs};
use aether_logs::{FollowFrom, Followed, LogFilter, LogFollower, LogQuery, Logged};
use aether_types::{
    ErrorCode, LogLevel, PreciseTime, Resource, Scope, TaskId, Verb, VmId,
    limits::LOG_QUERY_LIMIT_DEFAULT,
};
use axum::{Json as JsonAnswer, extract::State, http::HeaderMap, response::Response};
use tokio::sync::OwnedSemaphorePermit;

use crate::{
    auth::Caller,
    extract::{Json, Params},
    openapi::{Operation, of, operation, text},
    parts::App,
    problem::{ApiError, ApiResult},
    routes::vms::{find, resolve},
    tail::{Follow, Tail, last_event_id},
};

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
    let vm_id = owned.map_err(|error| match error.problem().code.as_str() {
        code if code == ErrorCode::TaskNotFound.as_str() => error.in_body("task_id"),
        _ => error.in_body("vm_id"),
    })?;
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
    follow: Follow,
) -> ApiResult<Response> {
    let (vm, mut filter) = filter(&mut params)?;
    let from = from(&mut params, &headers)?;
    params.finish()?;
    let way = follow.way()?;
    filter.vm_id = owned(&app, &caller, vm.as_deref(), filter.task_id).await?;
    let place = app.stream_place()?;
    let follower = app.parts.logs.follow(filter, from).await?;
    let tail = LogTail { app: app.clone(), follower, is_over: false, _place: place };
    Ok(way.answer(&app, tail))
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
    Ok(match (last_event_id(headers).or(after), since) {
        (Some(sequence), _) => FollowFrom::After(sequence),
        (None, Some(time)) => FollowFrom::Time(time.unix_ns()),
        (None, None) => FollowFrom::Now,
    })
}

/// What one client is told.
struct LogTail {
    app: App,
    follower: Box<dyn LogFollower>,
    is_over: bool,
    /// For as long as somebody follows.
    _place: OwnedSemaphorePermit,
}

impl Tail for LogTail {
    type Item = LogEvent;

    fn id(item: &LogEvent) -> Option<u64> {
        match item {
            LogEvent::Entry(entry) => Some(entry.sequence),
            _ => None,
        }
    }

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

pub(super) fn query_op() -> Operation {
    operation("queryLogs", "Ask for lines of logs")
        .about("Without `vm_id` and `task_id`, of everybody; that needs `platform:read`.")
        .body::<QueryLogs>()
        .gives::<LogsView>("The latest that fit, oldest first.")
        .refuses_in_body(&[ErrorCode::VmNotFound, ErrorCode::TaskNotFound])
}

pub(super) fn stream_op() -> Operation {
    operation("followLogs", "Follow lines of logs")
        .about(
            "On a WebSocket, or, where the client accepts `text/event-stream`, as server-sent \
             events, each with its `sequence` as id. Without `vm_id` and `task_id`, of everybody; \
             that needs `platform:read`.",
        )
        .query("vm_id", text, "Of this VM, by its name or its id.")
        .query("task_id", of::<TaskId>, "Of this task.")
        .query("level", of::<LogLevel>, "This level and those that weigh more.")
        .query("text", searched, "In the line, as it is written.")
        .query("since", of::<PreciseTime>, "From this time on.")
        .query("after", of::<u64>, "After this line; not together with `since`.")
        .header("Last-Event-ID", text, "As `after`.")
        .follows(of::<LogEvent>)
        .refuses(&[ErrorCode::VmNotFound, ErrorCode::TaskNotFound])
}

fn searched(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
    schemars::json_schema!({
        "type": "string", "maxLength": aether_types::limits::LOG_TEXT_BYTES_MAX,
    })
}
