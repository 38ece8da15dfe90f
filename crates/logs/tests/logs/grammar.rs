//! Queries against Loki's published grammar: Grafana's LogQL parser, run by Node.js on the queries
//! that the store really sends. Without it the test says that it skipped.

use std::{
    path::PathBuf,
    process::{Command, Stdio},
};

use aether_logs::{LogFilter, LogLevel, LogQuery, LogStore, LokiConfig, LokiStore};
use aether_types::{TaskId, VmId, limits::LOG_TEXT_BYTES_MAX};

use crate::peer::Peer;

/// A folder whose `node_modules` has `@grafana/lezer-logql` and `@lezer/lr`.
const FOLDER: &str = "AETHER_TEST_LOGQL";

/// Prints the names of the nodes of each query's tree, and its strings.
const SCRIPT: &str = r"
import { createRequire } from 'node:module';
import { readFileSync } from 'node:fs';
const require = createRequire(process.argv[1] + '/');
const { parser } = require('@grafana/lezer-logql');
for (const query of JSON.parse(readFileSync(0, 'utf8'))) {
    const names = [];
    const strings = [];
    parser.parse(query).iterate({ enter: (node) => {
        names.push(node.type.isError ? 'ERROR' : node.name);
        if (node.name === 'String') strings.push(query.slice(node.from, node.to));
    } });
    console.log(JSON.stringify({ names: names.join(' '), strings }));
}
";

const HOSTILE: &[&str] = &[
    "plain",
    "\"",
    "\\",
    "\\\"",
    "\"} |= \"x",
    "\" or vm_id=\"",
    "`",
    "\n",
    "a\u{0}b\u{feff}\u{2028}\u{7f}",
    "{service=\"gateway\"}",
    "x\" | line_format \"{{.vm_id}}",
    "# comment",
    "😀é",
    "\\u0022",
];

#[tokio::test]
async fn hostile_text_changes_no_query() {
    let Some(folder) = std::env::var_os(FOLDER).map(PathBuf::from) else {
        println!("skipped: {FOLDER} names no folder with Grafana's LogQL parser");
        return;
    };
    let queries = queries().await;
    let found = parse(&folder, &queries);
    assert_eq!(found.len(), queries.len());
    let plain = &found[0].0;
    for ((names, strings), query) in found.iter().zip(&queries) {
        assert!(!names.contains("ERROR"), "{query}: {names}");
        // The same tree whatever the text: it is one string in it, and nothing else.
        assert_eq!(names, plain, "{query}");
        assert_eq!(strings.len(), 5, "{query}");
    }
}

/// What the store sends for each hostile text, with all else the same.
async fn queries() -> Vec<String> {
    let (folder, peer) = (tempfile::tempdir().unwrap(), Peer::start().await);
    let path = folder.path().join("logs.db");
    let store = LokiStore::open(&path, LokiConfig::new(&peer.url)).await.unwrap();
    let (vm_id, task_id) = (Some(VmId::new()), Some(TaskId::new()));
    let long = "\u{1}\"".repeat(LOG_TEXT_BYTES_MAX / 2);
    for text in HOSTILE.iter().copied().chain([long.as_str()]) {
        let (text, level) = (Some(text.to_owned()), Some(LogLevel::Warn));
        let filter = LogFilter { vm_id, task_id, level, text };
        store.query(&LogQuery { filter, ..LogQuery::default() }).await.unwrap();
    }
    store.close().await;
    peer.with(|peer| peer.queries.clone())
}

fn parse(folder: &std::path::Path, queries: &[String]) -> Vec<(String, Vec<String>)> {
    let mut node = Command::new("node")
        .args(["--input-type=module", "--eval", SCRIPT])
        .arg(folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    serde_json::to_writer(node.stdin.take().unwrap(), queries).unwrap();
    let output = node.wait_with_output().unwrap();
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    let read = |line: &str| {
        let value: serde_json::Value = serde_json::from_str(line).unwrap();
        let strings = value["strings"].as_array().unwrap();
        let strings = strings.iter().map(|text| text.as_str().unwrap().to_owned()).collect();
        (value["names"].as_str().unwrap().to_owned(), strings)
    };
    text.lines().map(read).collect()
}
