//! A process is killed with SIGKILL again and again while it writes: what it was told is kept is
//! there when the next one opens the store, with numbers that have no holes.

use std::{
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Command, Stdio},
};

use aether_logs::{FollowFrom, Followed, LogFilter, LogQuery, LogStore};

use crate::support::{lines, next, open};

const FILE: &str = "AETHER_TEST_LOG_FILE";
const ROUNDS: u64 = 12;

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// The process that is killed: this program again, with this test alone.
#[test]
#[ignore = "is started by the test below"]
fn writer() {
    let Some(path) = std::env::var_os(FILE) else { return };
    runtime().block_on(async {
        let store = open(Path::new(&path)).await;
        // Goes on where the process before it was killed.
        let last = store.query(&LogQuery { limit: 1, ..LogQuery::default() }).await.unwrap();
        let mut count = last.entries.last().map_or(0, |logged| logged.sequence);
        let mut out = std::io::stdout();
        for size in (1..=40).cycle() {
            store.append(lines(count..count + size)).await.unwrap();
            count += size;
            // Past the test harness, which would keep what is printed.
            writeln!(out, "\nsaid {count}").unwrap();
            out.flush().unwrap();
        }
    });
}

#[test]
fn acknowledged_entries_survive_sigkill() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("logs.db");
    for round in 0..ROUNDS {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "crash::writer", "--ignored", "--nocapture"])
            .env(FILE, &path)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let (mut heard, mut said) = (0, 0);
        for heard_line in BufReader::new(child.stdout.take().unwrap()).lines() {
            let heard_line = heard_line.unwrap();
            let Some(count) = heard_line.strip_prefix("said ") else { continue };
            // The last line may have been cut by the kill.
            said = count.parse::<u64>().unwrap_or(said).max(said);
            heard += 1;
            if heard == 3 + round * 9 {
                // SIGKILL; what it has said until it is dead is read to the end.
                child.kill().unwrap();
            }
        }
        child.wait().unwrap();
        assert!(heard >= 3 + round * 9, "the writer ended by itself");
        runtime().block_on(check(&path, said));
    }
}

/// At least `said` entries, each with its own number's text, once and in order.
async fn check(path: &Path, said: u64) {
    let store = open(path).await;
    let mut follower = store.follow(LogFilter::default(), FollowFrom::After(0)).await.unwrap();
    let mut count = 0;
    while count < said {
        let Followed::Entries(entries) = next(&mut follower).await else { panic!("at {count}") };
        for logged in entries {
            assert_eq!(logged.entry.text(), count.to_string());
            count += 1;
            assert_eq!(logged.sequence, count);
        }
    }
    store.close().await;
}
