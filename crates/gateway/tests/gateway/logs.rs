//! Logs over the API.

use aether_api::{
    EVENT_STREAM_MEDIA_TYPE, LogEvent, QueryLogs,
    client::{ClientError, FollowLogs, LogsFrom},
};
use aether_logs::{LogEntry, LogLevel, LogService, LogStore as _, LogStream};
use aether_types::{TaskId, VmId};
use futures::StreamExt as _;
use reqwest::{Method, StatusCode};

use crate::rig::{Rig, problem, soon};

fn line(text: &str) -> LogEntry {
    LogEntry::new(LogService::Guest, LogLevel::Info, LogStream::Stdout, text)
}

async fn write(rig: &Rig, numbers: std::ops::Range<u64>) {
    rig.logs.append(numbers.map(|number| line(&number.to_string())).collect()).await.unwrap();
}

async fn next(follow: &mut FollowLogs) -> LogEvent {
    soon(follow.next()).await.unwrap().expect("the stream has ended")
}

/// Texts of the next lines.
async fn take(follow: &mut FollowLogs, count: usize) -> Vec<String> {
    let mut taken = Vec::new();
    while taken.len() < count {
        match next(follow).await {
            LogEvent::Entry(entry) => taken.push(entry.text),
            other => panic!("{other:?}"),
        }
    }
    taken
}

#[tokio::test]
async fn a_query_finds_lines_by_vm_task_level_text_and_time() {
    let rig = Rig::new().await;
    let (vm, task) = (rig.vm("a").await.id, TaskId::new());
    let error = || LogEntry::new(LogService::Worker, LogLevel::Error, LogStream::Log, "it broke");
    let lines = vec![
        line("of the VM").of_vm(Some(vm)).of_task(Some(task)).and_cut(3),
        line("of another").of_vm(Some(VmId::new())),
        error().of_vm(Some(vm)).after_missing(2),
    ];
    rig.logs.append(lines).await.unwrap();
    let ask = async |query: QueryLogs| rig.client.query_logs(&query).await.unwrap();

    let all = ask(QueryLogs::default()).await;
    assert_eq!((all.items.len(), all.more), (3, false));
    assert_eq!(all.items[0].cut_bytes, 3);
    assert_eq!(all.items[2].missing, 2);
    for name in ["a".to_owned(), vm.to_string()] {
        let found = ask(QueryLogs { vm_id: Some(name), ..QueryLogs::default() }).await;
        assert_eq!(found.items, [all.items[0].clone(), all.items[2].clone()]);
    }
    let of_task = QueryLogs { task_id: Some(task), ..QueryLogs::default() };
    assert_eq!(ask(of_task).await.items, all.items[..1]);
    let grave = QueryLogs { level: Some(LogLevel::Warn), ..QueryLogs::default() };
    assert_eq!(ask(grave).await.items, all.items[2..]);
    let text = QueryLogs { text: Some("of an".into()), ..QueryLogs::default() };
    assert_eq!(ask(text).await.items, all.items[1..2]);
    let latest = ask(QueryLogs { limit: Some(1), ..QueryLogs::default() }).await;
    assert_eq!((&latest.items[..], latest.more), (&all.items[2..], true));
    // Nanoseconds stay: what a line's time is asked with is exact.
    let from = QueryLogs { start: Some(all.items[1].time), ..QueryLogs::default() };
    assert_eq!(ask(from).await.items, all.items[1..]);
    let until = QueryLogs { end: Some(all.items[1].time), ..QueryLogs::default() };
    assert_eq!(ask(until).await.items, all.items[..1]);
}

#[tokio::test]
async fn a_wrong_question_is_refused_with_what_to_do() {
    let rig = Rig::new().await;
    for (body, status, words) in [
        (r#"{"limit":0}"#, StatusCode::BAD_REQUEST, "it is from 1 to 5000"),
        (r#"{"vm":"a"}"#, StatusCode::BAD_REQUEST, "unknown field `vm`"),
        (r#"{"level":"loud"}"#, StatusCode::BAD_REQUEST, "expected one of `trace`"),
        (r#"{"start":"now"}"#, StatusCode::BAD_REQUEST, "start"),
        (r#"{"vm_id":"none"}"#, StatusCode::UNPROCESSABLE_ENTITY, "none"),
    ] {
        let request = rig.call(Method::POST, "/logs/query");
        let request = request.header("content-type", "application/json").body(body);
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), status, "{body}");
        let detail = problem(response).await.detail;
        assert!(detail.contains(words), "{body}: {detail}");
    }
    for (parameters, words) in [
        ("level=loud", "level: one of trace, debug"),
        ("since=now", "since: a time such as"),
        ("after=1&since=2026-01-31T09:30:00Z", "after: not together with since"),
        ("task_id=1", "task_id: `1` is not a task id"),
        ("vm=a", "`vm` is not known"),
        ("", "open a WebSocket, or accept text/event-stream"),
    ] {
        let path = format!("/logs/stream?{parameters}");
        let response = rig.call(Method::GET, &path).send().await.unwrap();
        assert_eq!(response.status(), StatusCode::BAD_REQUEST, "{parameters}");
        let detail = problem(response).await.detail;
        assert!(detail.contains(words), "{parameters}: {detail}");
    }
    let filter = QueryLogs { text: Some("x".repeat(1025)), ..QueryLogs::default() };
    let refused = rig.client.follow_logs(&filter, LogsFrom::Now).await.unwrap_err();
    let ClientError::Problem(refused) = refused else { panic!("{refused:?}") };
    assert_eq!(refused.code, "invalid_request");
    let bare = rig.bare(Method::GET, "/logs/stream").send().await.unwrap();
    assert_eq!(bare.status(), StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn a_follower_gets_the_past_and_then_what_comes() {
    let rig = Rig::new().await;
    write(&rig, 0..500).await;
    let all = QueryLogs::default();
    let first = rig.client.query_logs(&all).await.unwrap().items[0].time;
    let mut since = rig.client.follow_logs(&all, LogsFrom::Time(first)).await.unwrap();
    let mut after = rig.client.follow_logs(&all, LogsFrom::After(490)).await.unwrap();
    let nines = QueryLogs { text: Some("99".into()), ..QueryLogs::default() };
    let mut now = rig.client.follow_logs(&nines, LogsFrom::Now).await.unwrap();
    write(&rig, 500..700).await;
    let wanted: Vec<_> = (0..700).map(|number| number.to_string()).collect();
    assert_eq!(take(&mut since, 700).await, wanted);
    assert_eq!(take(&mut after, 210).await, wanted[490..]);
    assert_eq!(take(&mut now, 2).await, ["599", "699"]);

    rig.shutdown.cancel();
    assert_eq!(next(&mut since).await, LogEvent::Detached);
    assert_eq!(soon(since.next()).await.unwrap(), None);
}

#[tokio::test]
async fn server_sent_events_go_on_after_the_last_id() {
    let rig = Rig::new().await;
    write(&rig, 0..3).await;
    let request = rig.call(Method::GET, "/logs/stream").header("accept", EVENT_STREAM_MEDIA_TYPE);
    let response = request.header("last-event-id", "1").send().await.unwrap();
    assert_eq!(response.headers()["content-type"], EVENT_STREAM_MEDIA_TYPE);
    let mut body = response.bytes_stream();
    let mut text = String::new();
    while text.matches("data: ").count() < 2 {
        let part = soon(body.next()).await.unwrap().unwrap();
        text.push_str(std::str::from_utf8(&part).unwrap());
    }
    let events: Vec<_> = text.split_terminator("\n\n").collect();
    let (id, data) = events[0].split_once('\n').unwrap();
    assert_eq!(id, "id: 2");
    let event: LogEvent = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
    assert!(matches!(event, LogEvent::Entry(entry) if entry.text == "1"));
    assert!(events[1].starts_with("id: 3\n"));
}

#[tokio::test]
async fn a_client_that_stands_still_holds_up_nobody_and_loses_nothing() {
    let rig = Rig::new().await;
    let all = QueryLogs::default();
    let mut stalled = rig.client.follow_logs(&all, LogsFrom::Now).await.unwrap();
    let mut reads = rig.client.follow_logs(&all, LogsFrom::Now).await.unwrap();
    let pad = "x".repeat(8000);
    // Far more than both sides' sockets hold.
    for batch in 0..40_u64 {
        let texts = (0..50).map(|n| line(&format!("{} {pad}", batch * 50 + n)));
        rig.logs.append(texts.collect()).await.unwrap();
        assert_eq!(take(&mut reads, 50).await.len(), 50);
    }
    for (number, text) in take(&mut stalled, 2000).await.iter().enumerate() {
        assert!(text.starts_with(&format!("{number} ")), "{number}");
    }
}
