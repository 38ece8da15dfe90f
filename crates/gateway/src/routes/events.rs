//! What has happened, followed on a WebSocket or as server-sent events.

use std::{collections::VecDeque, sync::Arc};

use aether_api::{EVENT_VERSION, EventMessage, EventView};
use aether_store::{EventFilter, EventRecord, EventsFrom};
use aether_types::{
    ErrorCode, EventPattern, Resource, Scope, TaskId, Timestamp, Verb, VmId, limits,
};
use axum::{extract::State, http::HeaderMap, response::Response};
use tokio::sync::OwnedSemaphorePermit;

use crate::{
    auth::Caller,
    extract::Params,
    history::Place,
    openapi::{Operation, of, operation, several, text},
    parts::App,
    problem::{ApiError, ApiResult, chain},
    routes::vms::find,
    tail::{Follow, Tail, last_event_id},
};

/// Of the caller's project; who may look at the whole platform may ask for all.
pub(super) async fn follow(
    State(app): State<App>,
    caller: Caller,
    mut params: Params,
    headers: HeaderMap,
    follow: Follow,
) -> ApiResult<Response> {
    let topics = params.list::<EventPattern>("topic")?;
    if topics.len() > limits::EVENT_PATTERNS_MAX {
        let most = limits::EVENT_PATTERNS_MAX;
        return Err(ApiError::invalid(format!("topic: {most} at most")));
    }
    let vm = params.one("vm_id")?;
    let task = params.one("task_id")?.map(|text| text.parse::<TaskId>());
    let task = task.transpose().map_err(|error| ApiError::invalid(format!("task_id: {error}")))?;
    let all = params.flag("all")?;
    let waits = match params.one("follow")?.as_deref() {
        None | Some("true") => true,
        Some("false") => false,
        Some(_) => return Err(ApiError::invalid("follow: true or false".into())),
    };
    let from = from(&mut params, &headers)?;
    params.finish()?;
    let way = follow.way()?;
    if all {
        caller.check(Scope { resource: Resource::Platform, verb: Verb::Read })?;
    }
    let vm = match vm {
        Some(vm) => Some(vm_id(&app, &caller, &vm).await?),
        None => None,
    };
    let project = (!all).then(|| caller.project());
    let filter = EventFilter { project, topics, vm, task };
    let slot = app.stream_place()?;
    let place = Place::new(&app, filter, from).await?;
    let tail = EventTail { app: app.clone(), place, waits, is_over: false, _slot: slot };
    Ok(way.answer(&app, tail))
}

/// By id also of VMs that are no more, whose events are there; those of others are not found, since
/// the filter has the project in it.
async fn vm_id(app: &App, caller: &Caller, vm: &str) -> ApiResult<VmId> {
    match vm.parse() {
        Ok(id) => Ok(id),
        Err(_) => find(app, caller, vm).await.map(|vm| vm.id),
    }
}

fn from(params: &mut Params, headers: &HeaderMap) -> ApiResult<EventsFrom> {
    let wrong = |_| ApiError::invalid("since: a time such as 2026-01-31T12:00:00Z".into());
    let since = params.one("since")?.map(|text| text.parse::<Timestamp>()).transpose();
    let since = since.map_err(wrong)?;
    let after = params.number::<u64>("after")?;
    if since.is_some() && after.is_some() {
        return Err(ApiError::invalid("after: not together with since".into()));
    }
    Ok(match (last_event_id(headers).or(after), since) {
        (Some(sequence), _) => EventsFrom::After(sequence),
        (None, Some(time)) => EventsFrom::Time(time),
        (None, None) => EventsFrom::Now,
    })
}

struct EventTail {
    app: App,
    place: Place,
    /// For what is still to come.
    waits: bool,
    is_over: bool,
    /// For as long as somebody follows.
    _slot: OwnedSemaphorePermit,
}

impl Tail for EventTail {
    type Item = EventMessage;

    fn id(item: &EventMessage) -> Option<u64> {
        match item {
            EventMessage::Event(event) => Some(event.sequence),
            EventMessage::Missed | EventMessage::Detached => None,
        }
    }

    async fn next(&mut self) -> Option<VecDeque<EventMessage>> {
        if self.is_over {
            return None;
        }
        let caught = tokio::select! {
            biased;
            () = self.app.closing.cancelled() => None,
            caught = self.place.next(self.waits) => Some(caught),
        };
        let caught = match caught {
            Some(Ok(caught)) => caught,
            ended => {
                if let Some(Err(error)) = ended {
                    tracing::warn!(error = chain(&error), "a follower of events is let go");
                }
                self.is_over = true;
                return Some(VecDeque::from([EventMessage::Detached]));
            }
        };
        if caught.events.is_empty() && !caught.missed {
            self.is_over = true;
            return None;
        }
        let missed = caught.missed.then_some(EventMessage::Missed);
        let events = caught.events.iter().map(|event| EventMessage::Event(Box::new(view(event))));
        Some(missed.into_iter().chain(events).collect())
    }
}

fn view(event: &Arc<EventRecord>) -> EventView {
    let subject = event.subject.as_str();
    let noun = event.topic.noun();
    let is = |other: &str| noun == other;
    EventView {
        version: EVENT_VERSION,
        sequence: event.sequence,
        topic: event.topic.clone(),
        at: event.at,
        project_id: event.project_id,
        vm_id: event.vm_id,
        task_id: event.task_id,
        execution_id: subject.parse().ok().filter(|_| is("execution")),
        snapshot_id: subject.parse().ok().filter(|_| is("snapshot")),
        template_id: subject.parse().ok().filter(|_| is("template")),
        worker_id: subject.parse().ok().filter(|_| is("worker")),
        name: event.detail.clone().filter(|_| !is("task")),
        kind: event.detail.clone().filter(|_| is("task")),
        code: event.code,
    }
}

pub(super) fn follow_op() -> Operation {
    operation("followEvents", "Follow what happens")
        .about(
            "On a WebSocket, or, where the client accepts `text/event-stream`, as server-sent \
             events, each with its `sequence` as id.",
        )
        .query("topic", several::<EventPattern>, "`vm.running`, `vm.*` or `*`.")
        .query("vm_id", text, "Of this VM, by its name or its id.")
        .query("task_id", of::<TaskId>, "Of this task.")
        .flag("all", "Of every project and of the platform; needs `platform:read`.")
        .query("follow", of::<bool>, "`false`: only what has happened so far.")
        .query("since", of::<Timestamp>, "From this time on.")
        .query("after", of::<u64>, "After this event; not together with `since`.")
        .header("Last-Event-ID", text, "As `after`.")
        .follows(of::<EventMessage>)
        .refuses(&[ErrorCode::VmNotFound])
}
