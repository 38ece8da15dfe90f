//! Queries, followers and bounds of the embedded store.

use std::{sync::Arc, time::Duration};

use aether_logs::{
    EmbeddedConfig, EmbeddedStore, FollowFrom, Followed, LogEntry, LogFilter, LogLevel, LogQuery,
    LogService, LogStore, LogStream,
};
use aether_types::{ErrorCode, TaskId, VmId, limits};
use proptest::prelude::*;

use crate::support::{LIMIT, line, line_of, lines, minutes_ago, next, open, take, texts};

#[tokio::test]
async fn a_query_gives_what_fits_oldest_first_and_the_latest_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder.path().join("logs.db")).await;
    let (vm, task) = (VmId::new(), TaskId::new());
    let nine = minutes_ago(9);
    let minute = 60_000_000_000;
    let error = LogEntry::new(LogService::Worker, LogLevel::Error, LogStream::Log, "it broke");
    store
        .append(vec![
            line_of(vm, "first 100% sure").at(nine),
            line_of(vm, "second").of_task(Some(task)).at(nine + minute),
            line_of(VmId::new(), "other").at(nine + 2 * minute),
            error.of_vm(Some(vm)).at(nine + 3 * minute),
        ])
        .await
        .unwrap();

    let ask = async |filter: LogFilter| {
        let query = LogQuery { filter, ..LogQuery::default() };
        let answer = store.query(&query).await.unwrap();
        assert!(!answer.more);
        texts(&answer).join(",")
    };
    let all = LogFilter::default();
    assert_eq!(ask(all.clone()).await, "first 100% sure,second,other,it broke");
    let of_vm = LogFilter { vm_id: Some(vm), ..all.clone() };
    assert_eq!(ask(of_vm.clone()).await, "first 100% sure,second,it broke");
    assert_eq!(ask(LogFilter { task_id: Some(task), ..of_vm.clone() }).await, "second");
    assert_eq!(ask(LogFilter { level: Some(LogLevel::Warn), ..of_vm.clone() }).await, "it broke");
    let text = |text: &str| LogFilter { text: Some(text.into()), ..all.clone() };
    assert_eq!(ask(text("100%")).await, "first 100% sure");
    assert_eq!(ask(text("1__%")).await, "");
    assert_eq!(ask(text("FIRST")).await, "");
    assert_eq!(ask(text("' or 1=1 --")).await, "");

    let part =
        LogQuery { filter: of_vm, start_ns: Some(nine), end_ns: Some(nine + 3 * minute), limit: 1 };
    let answer = store.query(&part).await.unwrap();
    assert_eq!((texts(&answer), answer.more), (vec!["second"], true));
    let logged = &answer.entries[0];
    assert_eq!((logged.sequence, logged.entry.task_id), (2, Some(task)));
}

#[tokio::test]
async fn what_is_asked_for_has_bounds_and_refusals_have_codes() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder.path().join("logs.db")).await;
    for limit in [0, limits::LOG_QUERY_LIMIT_MAX + 1] {
        let error = store.query(&LogQuery { limit, ..LogQuery::default() }).await.unwrap_err();
        assert_eq!(error.code(), ErrorCode::InvalidRequest);
    }
    let text = "x".repeat(limits::LOG_TEXT_BYTES_MAX + 1);
    let filter = LogFilter { text: Some(text), ..LogFilter::default() };
    let error = store.follow(filter, FollowFrom::Now).await.err().unwrap();
    assert_eq!(error.code(), ErrorCode::InvalidRequest);

    // Lines of one answer are bounded in bytes, too.
    let wide = "x".repeat(limits::LOG_LINE_BYTES_MAX);
    store.append(vec![line(&wide); 600]).await.unwrap();
    let answer = store.query(&LogQuery::default()).await.unwrap();
    assert!(answer.more);
    let bytes: usize = answer.entries.iter().map(|logged| logged.entry.text().len()).sum();
    assert_eq!(bytes, limits::LOG_QUERY_BYTES_MAX);

    // A query with no time to answer in.
    let path = folder.path().join("slow.db");
    let config = EmbeddedConfig { query_limit: Duration::ZERO, ..EmbeddedConfig::default() };
    let store = EmbeddedStore::open(&path, config).await.unwrap();
    store.append(lines(0..20_000)).await.unwrap();
    let rare = LogFilter { text: Some("none".into()), ..LogFilter::default() };
    let error = store.query(&LogQuery { filter: rare, ..LogQuery::default() }).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::Unavailable);
    assert!(error.to_string().contains("shorter time"), "{error}");
    store.close().await;
    assert_eq!(store.append(lines(0..1)).await.unwrap_err().code(), ErrorCode::Unavailable);
}

#[tokio::test]
async fn a_follower_joins_the_past_and_the_live_part() {
    let folder = tempfile::tempdir().unwrap();
    // The ring holds a few entries, so most of the past is on the disk.
    let config = EmbeddedConfig { ring_bytes_max: 2000, ..EmbeddedConfig::default() };
    let store = EmbeddedStore::open(&folder.path().join("logs.db"), config).await.unwrap();
    let store = Arc::new(store);
    store.append(vec![line("early").at(minutes_ago(60))]).await.unwrap();
    store.append(lines(0..3000)).await.unwrap();

    // Written while the followers begin.
    let writer = tokio::spawn({
        let store = Arc::clone(&store);
        async move {
            for number in (3000..9000).step_by(3) {
                store.append(lines(number..number + 3)).await.unwrap();
            }
        }
    });
    let wanted: Vec<_> = (0..9000).map(|number| number.to_string()).collect();
    for _ in 0..4 {
        let from = FollowFrom::Time(minutes_ago(1));
        let mut follower = store.follow(LogFilter::default(), from).await.unwrap();
        assert!(take(&mut follower, 9000).await == wanted);
    }
    writer.await.unwrap();

    let text = Some("777".to_owned());
    let filter = LogFilter { text, ..LogFilter::default() };
    let mut follower = store.follow(filter, FollowFrom::After(1)).await.unwrap();
    let found = take(&mut follower, 18).await;
    assert!(found.iter().all(|text| text.contains("777")), "{found:?}");

    let mut follower = store.follow(LogFilter::default(), FollowFrom::Now).await.unwrap();
    store.append(vec![line("new")]).await.unwrap();
    assert_eq!(take(&mut follower, 1).await, ["new"]);
    store.close().await;
    assert!(matches!(next(&mut follower).await, Followed::Closed));
}

#[tokio::test]
async fn a_follower_that_stands_still_reads_on_where_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let config = EmbeddedConfig { ring_bytes_max: 2000, ..EmbeddedConfig::default() };
    let store = EmbeddedStore::open(&folder.path().join("logs.db"), config).await.unwrap();
    let vm = VmId::new();
    let filter = LogFilter { vm_id: Some(vm), ..LogFilter::default() };
    let mut slow = store.follow(filter, FollowFrom::Now).await.unwrap();
    store.append(vec![line_of(vm, "before")]).await.unwrap();
    assert_eq!(take(&mut slow, 1).await, ["before"]);
    // More than a step of a follower walks through.
    store.append(lines(0..45_000)).await.unwrap();
    store.append(vec![line_of(vm, "after")]).await.unwrap();
    assert_eq!(take(&mut slow, 1).await, ["after"]);
}

#[tokio::test]
async fn the_oldest_go_by_size_and_a_follower_is_told_how_many() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("logs.db");
    let bytes_max = 2 << 20;
    let config = EmbeddedConfig { bytes_max, ring_bytes_max: 2000, ..EmbeddedConfig::default() };
    let store = EmbeddedStore::open(&path, config).await.unwrap();
    let mut slow = store.follow(LogFilter::default(), FollowFrom::Now).await.unwrap();
    let pad = "x".repeat(1000);
    for batch in 0..200_u64 {
        let entries = (0..50).map(|n| line(&format!("{} {pad}", batch * 50 + n))).collect();
        store.append(entries).await.unwrap();
    }
    let size = std::fs::metadata(&path).unwrap().len();
    assert!(size < bytes_max * 2, "{size}");

    let Followed::Missed(missed) = next(&mut slow).await else { panic!("nothing was missed") };
    assert!((7000..10_000).contains(&missed), "{missed}");
    let rest = take(&mut slow, 10_000 - usize::try_from(missed).unwrap()).await;
    for (text, number) in rest.iter().zip(missed..) {
        assert!(text.starts_with(&format!("{number} ")), "{number}");
    }

    // The next process goes on with the numbers.
    store.close().await;
    drop(store);
    let store = open(&path).await;
    let mut follower = store.follow(LogFilter::default(), FollowFrom::After(10_000)).await.unwrap();
    store.append(vec![line("next")]).await.unwrap();
    let Followed::Entries(entries) = next(&mut follower).await else { panic!("no entries") };
    assert_eq!(entries[0].sequence, 10_001);
}

#[tokio::test]
async fn what_is_too_old_goes() {
    let folder = tempfile::tempdir().unwrap();
    let age_max = Some(Duration::from_hours(1));
    let config = EmbeddedConfig { age_max, ..EmbeddedConfig::default() };
    let store = EmbeddedStore::open(&folder.path().join("logs.db"), config).await.unwrap();
    let old = |entry: LogEntry| entry.at(minutes_ago(90));
    store.append(lines(0..5000).into_iter().map(old).collect()).await.unwrap();
    store.append(lines(5000..5300)).await.unwrap();
    let first = tokio::time::timeout(LIMIT, async {
        loop {
            let answer = store.query(&LogQuery::default()).await.unwrap();
            if answer.entries.len() == 300 {
                break answer.entries[0].entry.text().to_owned();
            }
            tokio::task::yield_now().await;
        }
    });
    assert_eq!(first.await.unwrap(), "5000");
}

fn entries() -> impl Strategy<Value = LogEntry> {
    let word = "[ab%_'\"\\\\\u{0}\n\u{1b}é]{0,6}";
    (word, 0..5_usize, any::<bool>()).prop_map(|(text, level, has_vm)| {
        let level = LogLevel::ALL[level];
        let entry = LogEntry::new(LogService::Guest, level, LogStream::Stdout, &text);
        entry.of_vm(has_vm.then(VmId::new)).and_cut(3).after_missing(7)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever the texts are: a query and a follower give what the filter takes, unchanged.
    #[test]
    fn hostile_text_is_text(
        kept in proptest::collection::vec(entries(), 1..20),
        text in "[ab%_'\"\\\\\u{0}\n\u{1b}é]{0,3}",
        level in 0..5_usize,
    ) {
        let level = Some(LogLevel::ALL[level]);
        let filter = LogFilter { text: Some(text), level, ..LogFilter::default() };
        let mut sorted = kept.clone();
        sorted.sort_by_key(|entry| entry.time_ns);
        let fitting: Vec<_> = sorted.into_iter().filter(|entry| filter.fits(entry)).collect();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let answer = runtime.block_on(async {
            let folder = tempfile::tempdir().unwrap();
            let store = open(&folder.path().join("logs.db")).await;
            store.append(kept).await.unwrap();
            let answer = store.query(&LogQuery { filter, ..LogQuery::default() }).await.unwrap();
            store.close().await;
            answer
        });
        let found: Vec<_> = answer.entries.iter().map(|logged| logged.entry.clone()).collect();
        prop_assert_eq!(found, fitting);
    }
}
