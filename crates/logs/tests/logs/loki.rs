//! Shipping to Loki, and reading from it, with a peer that checks every push.

use std::{collections::BTreeMap, path::Path, time::Duration};

use aether_logs::{
    EmbeddedConfig, FollowFrom, Followed, LogFilter, LogLevel, LogQuery, LogStore, LokiConfig,
    LokiStore,
};
use aether_types::{ErrorCode, TaskId, VmId};

use crate::{
    peer::{Answer, Peer, Taken},
    support::{line, line_of, lines, minutes_ago, next, take, texts},
};

fn config(peer: &Peer) -> LokiConfig {
    LokiConfig {
        batch_interval: Duration::from_millis(20),
        retry_min: Duration::from_millis(5),
        retry_max: Duration::from_millis(20),
        ..LokiConfig::new(&peer.url)
    }
}

async fn open(path: &Path, config: LokiConfig) -> LokiStore {
    LokiStore::open(path, config).await.unwrap()
}

fn numbers(taken: &[Taken]) -> Vec<u64> {
    taken.iter().map(Taken::sequence).collect()
}

#[tokio::test]
async fn batches_keep_the_contract_the_order_and_the_labels_few() {
    let (folder, peer) = (tempfile::tempdir().unwrap(), Peer::start().await);
    // So long that only full batches go by themselves.
    let slow = LokiConfig { batch_interval: Duration::from_hours(1), ..config(&peer) };
    let store = open(&folder.path().join("logs.db"), slow).await;
    let (vm, task) = (VmId::new(), TaskId::new());
    let entries: Vec<_> = (0..250)
        .map(|n| match n % 3 {
            0 => line_of(vm, &n.to_string()).of_task(Some(task)).and_cut(9),
            1 => line("hostile \"} \u{0}\n\u{feff}😀"),
            _ => line(&n.to_string()).after_missing(4),
        })
        .collect();
    store.append(entries.clone()).await.unwrap();
    peer.until(|peer| peer.batches == [100, 100]).await;
    // The rest goes at the end.
    store.close().await;
    peer.until(|peer| peer.batches == [100, 100, 50]).await;

    let taken = peer.taken();
    assert_eq!(numbers(&taken), (1..=250).collect::<Vec<_>>());
    for (one, entry) in taken.iter().zip(&entries) {
        assert_eq!((one.line.as_str(), one.time_ns), (entry.text(), entry.time_ns));
        let labels = [("level", "info"), ("service", "guest"), ("stream", "stdout")];
        let labels: BTreeMap<_, _> =
            labels.into_iter().map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
        assert_eq!(one.labels, labels);
        assert_eq!(one.fact("vm_id"), entry.vm_id.map_or(String::new(), |id| id.to_string()));
        assert_eq!(one.fact("task_id"), entry.task_id.map_or(String::new(), |id| id.to_string()));
    }
    assert_eq!((taken[0].fact("cut_bytes"), taken[2].fact("missing")), ("9", "4"));
}

#[tokio::test]
async fn a_batch_goes_when_its_time_is_over() {
    let (folder, peer) = (tempfile::tempdir().unwrap(), Peer::start().await);
    let store = open(&folder.path().join("logs.db"), config(&peer)).await;
    store.append(lines(0..3)).await.unwrap();
    peer.until(|peer| peer.taken.len() == 3).await;
    assert_eq!(LokiConfig::new("").batch_interval, Duration::from_secs(5));
    assert_eq!(LokiConfig::new("").batch_entries, 100);
}

#[tokio::test]
async fn what_loki_does_not_take_waits_and_goes_in_order() {
    let (folder, peer) = (tempfile::tempdir().unwrap(), Peer::start().await);
    peer.with(|peer| {
        peer.answers.extend([
            Answer::Status(500, "ingester is gone"),
            Answer::Status(503, ""),
            Answer::Hang,
            Answer::Status(401, "no password"),
            Answer::Lost,
            Answer::RetryAfter(1),
        ]);
    });
    let impatient = LokiConfig { request_limit: Duration::from_millis(200), ..config(&peer) };
    let store = open(&folder.path().join("logs.db"), impatient).await;
    store.append(lines(0..350)).await.unwrap();
    peer.until(|peer| peer.taken.len() == 450).await;
    let pushes = peer.with(|peer| peer.pushes.clone());
    // Whoever is asked to wait a second waits a second.
    assert!(pushes[6].1 - pushes[5].1 >= Duration::from_secs(1));
    let taken = peer.taken();
    // The batch whose answer was lost came twice, the same each time, which Loki keeps once.
    assert_eq!(taken[..100], taken[100..200]);
    assert_eq!(numbers(&taken[100..]), (1..=350).collect::<Vec<_>>());
    let report = store.report();
    assert_eq!((report.tries_failed, report.entries_refused), (6, 0));
}

#[tokio::test]
async fn trouble_is_told_and_passes() {
    let (folder, peer) = (tempfile::tempdir().unwrap(), Peer::start().await);
    peer.with(|peer| peer.always = Some(Answer::Status(500, "ingester is\ngone")));
    let store = open(&folder.path().join("logs.db"), config(&peer)).await;
    store.check().await.unwrap();
    store.append(lines(0..1)).await.unwrap();
    peer.until(|peer| peer.pushes.len() >= 2).await;
    let error = store.check().await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::Unavailable);
    assert!(error.to_string().contains("500 Internal Server Error: ingester is gone"), "{error}");
    peer.with(|peer| peer.always = None);
    peer.until(|peer| peer.taken.len() == 1).await;
    store.append(lines(1..2)).await.unwrap();
    peer.until(|peer| peer.taken.len() == 2).await;
    store.close().await;
    assert_eq!(store.report().trouble, None);
}

#[tokio::test]
async fn what_loki_refuses_is_dropped_counted_and_marked() {
    let (folder, peer) = (tempfile::tempdir().unwrap(), Peer::start().await);
    peer.with(|peer| peer.answers.push_back(Answer::Status(400, "timestamp too old")));
    let store = open(&folder.path().join("logs.db"), config(&peer)).await;
    store.append(lines(0..130)).await.unwrap();
    peer.until(|peer| peer.taken.len() == 31).await;
    let taken = peer.taken();
    let mark = &taken[0];
    assert_eq!((mark.fact("missing"), mark.sequence()), ("100", 100));
    assert_eq!(mark.line, "100 lines are missing here: Loki refused them");
    assert_eq!(numbers(&taken[1..]), (101..=130).collect::<Vec<_>>());
    let report = store.report();
    assert_eq!(report.entries_refused, 100);
    assert!(report.refusal.unwrap().ends_with("400 Bad Request: timestamp too old"));
}

#[tokio::test]
async fn a_full_spool_loses_the_oldest_and_marks_where() {
    let (folder, peer) = (tempfile::tempdir().unwrap(), Peer::start().await);
    peer.with(|peer| peer.always = Some(Answer::Status(500, "")));
    let spool =
        EmbeddedConfig { bytes_max: 1 << 20, ring_bytes_max: 2000, ..EmbeddedConfig::default() };
    let store = open(&folder.path().join("logs.db"), LokiConfig { spool, ..config(&peer) }).await;
    let pad = "x".repeat(1000);
    for _ in 0..60 {
        store.append(vec![line(&pad); 50]).await.unwrap();
    }
    peer.with(|peer| peer.always = None);
    peer.until(|peer| peer.taken.last().is_some_and(|last| last.sequence() == 3000)).await;
    let taken = peer.taken();
    let marks: Vec<_> = taken.iter().filter(|one| !one.fact("missing").is_empty()).collect();
    let missing: u64 = marks.iter().map(|mark| mark.fact("missing").parse::<u64>().unwrap()).sum();
    assert!(missing > 1000, "{missing}");
    assert_eq!(store.report().entries_missed, missing);
    // Each entry is there once, or is one of those that a mark in its place tells of.
    let mut expected = 1;
    for one in &taken {
        expected += one.fact("missing").parse::<u64>().unwrap_or(1);
        assert_eq!(one.sequence(), expected - 1);
    }
    assert_eq!(expected, 3001);
}

#[tokio::test]
async fn the_next_process_ships_what_this_one_could_not() {
    let (folder, peer) = (tempfile::tempdir().unwrap(), Peer::start().await);
    let path = folder.path().join("logs.db");
    let store = open(&path, config(&peer)).await;
    store.append(lines(0..150)).await.unwrap();
    peer.until(|peer| peer.taken.len() == 150).await;
    store.close().await;
    drop(store);

    peer.with(|peer| peer.always = Some(Answer::Status(503, "")));
    let store = open(&path, config(&peer)).await;
    store.append(lines(150..160)).await.unwrap();
    peer.until(|peer| peer.pushes.last().is_some_and(|(count, _)| *count == 10)).await;
    store.close().await;
    drop(store);

    peer.with(|peer| peer.always = None);
    let store = open(&path, config(&peer)).await;
    peer.until(|peer| peer.taken.len() == 160).await;
    assert_eq!(numbers(&peer.taken()), (1..=160).collect::<Vec<_>>());
    store.close().await;
}

#[tokio::test]
async fn a_query_joins_what_was_shipped_and_what_was_not() {
    let (folder, peer) = (tempfile::tempdir().unwrap(), Peer::start().await);
    let store = open(&folder.path().join("logs.db"), config(&peer)).await;
    let old: Vec<_> = lines(0..120).into_iter().map(|entry| entry.at(minutes_ago(9))).collect();
    store.append(old).await.unwrap();
    peer.until(|peer| peer.taken.len() == 120).await;
    // In the peer, and unknown to the shipper as shipped: it must not come twice.
    peer.with(|peer| peer.always = Some(Answer::Lost));
    store.append(lines(120..150)).await.unwrap();
    peer.until(|peer| peer.taken.len() > 150).await;

    let all = LogQuery { start_ns: Some(minutes_ago(20)), ..LogQuery::default() };
    let answer = store.query(&all).await.unwrap();
    let wanted: Vec<_> = (0..150).map(|n| n.to_string()).collect();
    assert_eq!(texts(&answer), wanted);
    assert!(!answer.more);
    let some = store.query(&LogQuery { limit: 40, ..all.clone() }).await.unwrap();
    assert_eq!(
        (texts(&some), some.more),
        (wanted[110..].iter().map(String::as_str).collect(), true)
    );

    let filter = LogFilter { text: Some("x\"} or".into()), ..LogFilter::default() };
    store.query(&LogQuery { filter, ..all.clone() }).await.unwrap();
    let asked = peer.with(|peer| peer.queries.last().cloned());
    assert_eq!(asked.unwrap(), r#"{service=~".+"} |= "x\"} or""#);

    for (status, code) in [(400, ErrorCode::Internal), (500, ErrorCode::Unavailable)] {
        peer.with(|peer| peer.query_status = Some(status));
        let error = store.query(&all).await.unwrap_err();
        assert_eq!(error.code(), code, "{error}");
        assert!(error.to_string().contains("parse error"), "{error}");
    }
}

#[tokio::test]
async fn a_follower_begins_in_loki_and_goes_on_in_the_spool() {
    let (folder, peer) = (tempfile::tempdir().unwrap(), Peer::start().await);
    let spool =
        EmbeddedConfig { bytes_max: 1 << 20, ring_bytes_max: 2000, ..EmbeddedConfig::default() };
    let store = open(&folder.path().join("logs.db"), LokiConfig { spool, ..config(&peer) }).await;
    let pad = "x".repeat(1000);
    for batch in 0..60_u64 {
        // Many of one nanosecond: a page of Loki's ends between them.
        let time = minutes_ago(9) + i64::try_from(batch).unwrap();
        let entries = (0..50).map(|n| line(&format!("{} {pad}", batch * 50 + n)).at(time));
        store.append(entries.collect()).await.unwrap();
        peer.until(|peer| peer.taken.len() as u64 == (batch + 1) * 50).await;
    }
    let from = FollowFrom::Time(minutes_ago(20));
    let mut follower = store.follow(LogFilter::default(), from).await.unwrap();
    let found = take(&mut follower, 3000).await;
    for (number, text) in found.iter().enumerate() {
        assert!(text.starts_with(&format!("{number} ")), "{number}: {}", &text[..9]);
    }
    store.append(vec![line("live")]).await.unwrap();
    assert_eq!(take(&mut follower, 1).await, ["live"]);

    // What the spool has needs no Loki.
    peer.with(|peer| peer.query_status = Some(500));
    assert!(store.follow(LogFilter::default(), from).await.is_err());
    let level = Some(LogLevel::Info);
    let filter = LogFilter { level, ..LogFilter::default() };
    let recent = FollowFrom::Time(minutes_ago(1));
    let mut follower = store.follow(filter, recent).await.unwrap();
    assert_eq!(take(&mut follower, 1).await, ["live"]);
    store.close().await;
    assert!(matches!(next(&mut follower).await, Followed::Closed));
}

#[tokio::test]
async fn a_password_is_sent_and_never_shown() {
    let (folder, peer) = (tempfile::tempdir().unwrap(), Peer::start().await);
    peer.with(|peer| peer.answers.push_back(Answer::Status(500, "")));
    let url = peer.url.replace("http://", "http://me:s3cret@");
    let config = LokiConfig { url, ..config(&peer) };
    let shown = format!("{config:?}");
    let store = open(&folder.path().join("logs.db"), config).await;
    store.append(lines(0..1)).await.unwrap();
    peer.until(|peer| peer.taken.len() == 1).await;
    let sent = peer.with(|peer| peer.authorization.clone());
    assert_eq!(sent.as_deref(), Some("Basic bWU6czNjcmV0"));
    let shown = format!("{shown} {store:?} {:?}", store.report());
    assert!(!shown.contains("s3cret"), "{shown}");
}
