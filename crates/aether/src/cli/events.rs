//! `aether events`.

use aether_api::{
    EventMessage, EventView,
    client::{EventQuery, EventsFrom},
};
use aether_types::Timestamp;

use super::{connect, logs::point};
use crate::{
    args::{Events, Global, Since},
    exit::Exit,
    failure::Failure,
    output,
};

const PAST: std::time::Duration = std::time::Duration::from_hours(1);

pub(crate) async fn run(global: &Global, args: Events) -> Result<Exit, Failure> {
    let client = connect(global)?;
    let query = EventQuery {
        topics: args.topics.iter().map(|topic| topic.as_str().to_owned()).collect(),
        vm: args.vm,
        task: args.task,
        all: args.all,
        past: !args.follow,
    };
    let since = args.since.or((!args.follow).then_some(Since::Ago(PAST)));
    let mut from = match (args.after, since) {
        (Some(sequence), _) => EventsFrom::After(sequence),
        (None, Some(since)) => EventsFrom::Time(time(since)),
        (None, None) => EventsFrom::Now,
    };
    loop {
        let mut stream = client.follow_events(&query, from).await?;
        while let Some(message) = stream.next().await? {
            if let EventMessage::Event(event) = &message {
                from = EventsFrom::After(event.sequence);
            }
            print(&message, global.json);
            if message == EventMessage::Detached {
                return Ok(Exit::Success);
            }
        }
        if query.past {
            return Ok(Exit::Success);
        }
        // It was cut off: go on where it was. A server that is gone is an error of the next call.
    }
}

fn time(since: Since) -> Timestamp {
    Timestamp::from_unix_ms(point(since).unix_ns() / 1_000_000)
}

fn print(message: &EventMessage, json: bool) {
    if json {
        return output::json_line(message);
    }
    match message {
        EventMessage::Event(event) => output::line(&form(event)),
        EventMessage::Missed => output::note("... earlier events are not kept any more"),
        EventMessage::Detached => output::note("aether: the server shuts down"),
    }
}

/// When, what, to whom; then whose it is, and more about it.
fn form(event: &EventView) -> String {
    let EventView { at, topic, name, kind, code, .. } = event;
    let subjects = [
        event.execution_id.map(|id| id.to_string()),
        event.snapshot_id.map(|id| id.to_string()),
        event.template_id.map(|id| id.to_string()),
        event.worker_id.map(|id| id.to_string()),
        event.task_id.map(|id| id.to_string()),
    ];
    let vm = event.vm_id.map(|id| id.to_string());
    let (subject, vm) = match subjects.into_iter().flatten().next() {
        Some(subject) => (subject, vm),
        None => (vm.unwrap_or_default(), None),
    };
    let more = [
        ("vm", vm),
        ("name", name.clone()),
        ("kind", kind.clone()),
        ("code", code.map(|code| code.to_string())),
    ];
    let more = more.into_iter().filter_map(|(what, value)| Some(format!(" {what}={}", value?)));
    format!("{at} {topic:20} {subject}{}", more.collect::<String>())
}
