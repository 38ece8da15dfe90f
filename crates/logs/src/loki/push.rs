//! Loki's push request: the messages of its `logproto`, written by hand, since a build that runs
//! a compiler for four messages is not worth it. Unknown fields are Loki's business.

use std::{collections::BTreeMap, sync::Arc};

use prost::Message;

use super::logql;
use crate::{LogEntry, Logged};

pub(crate) const CONTENT_TYPE: &str = "application/x-protobuf";

#[derive(Clone, PartialEq, Message)]
pub(crate) struct PushRequest {
    #[prost(message, repeated, tag = "1")]
    pub(crate) streams: Vec<StreamAdapter>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct StreamAdapter {
    /// As in a query: `{name="value", ...}`.
    #[prost(string, tag = "1")]
    pub(crate) labels: String,
    #[prost(message, repeated, tag = "2")]
    pub(crate) entries: Vec<EntryAdapter>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct EntryAdapter {
    #[prost(message, optional, tag = "1")]
    pub(crate) timestamp: Option<ProtoTime>,
    #[prost(string, tag = "2")]
    pub(crate) line: String,
    #[prost(message, repeated, tag = "3")]
    pub(crate) structured_metadata: Vec<LabelPairAdapter>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct LabelPairAdapter {
    #[prost(string, tag = "1")]
    pub(crate) name: String,
    #[prost(string, tag = "2")]
    pub(crate) value: String,
}

/// `google.protobuf.Timestamp`.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct ProtoTime {
    #[prost(int64, tag = "1")]
    pub(crate) seconds: i64,
    #[prost(int32, tag = "2")]
    pub(crate) nanos: i32,
}

/// The body of one push: protobuf in snappy's block format. Entries of one stream keep their
/// order.
pub(crate) fn body(entries: &[Arc<Logged>], origin: &str) -> Result<Vec<u8>, snap::Error> {
    let mut streams: BTreeMap<String, Vec<EntryAdapter>> = BTreeMap::new();
    for logged in entries {
        streams.entry(labels(&logged.entry)).or_default().push(adapted(logged, origin));
    }
    let streams =
        streams.into_iter().map(|(labels, entries)| StreamAdapter { labels, entries }).collect();
    snap::raw::Encoder::new().compress_vec(&PushRequest { streams }.encode_to_vec())
}

/// Few values each: every combination is a stream of its own in Loki.
fn labels(entry: &LogEntry) -> String {
    format!(
        "{{level={}, service={}, stream={}}}",
        logql::quoted(entry.level.as_str()),
        logql::quoted(entry.service.as_str()),
        logql::quoted(entry.stream.as_str())
    )
}

fn adapted(logged: &Logged, origin: &str) -> EntryAdapter {
    let entry = &logged.entry;
    let mut pairs =
        vec![pair("origin", origin.to_owned()), pair("sequence", logged.sequence.to_string())];
    pairs.extend(entry.vm_id.map(|id| pair("vm_id", id.to_string())));
    pairs.extend(entry.task_id.map(|id| pair("task_id", id.to_string())));
    if entry.cut_bytes() > 0 {
        pairs.push(pair("cut_bytes", entry.cut_bytes().to_string()));
    }
    if entry.missing > 0 {
        pairs.push(pair("missing", entry.missing.to_string()));
    }
    const SECOND: i64 = 1_000_000_000;
    let nanos = i32::try_from(entry.time_ns.rem_euclid(SECOND)).unwrap_or(0);
    EntryAdapter {
        timestamp: Some(ProtoTime { seconds: entry.time_ns.div_euclid(SECOND), nanos }),
        line: entry.text().to_owned(),
        structured_metadata: pairs,
    }
}

fn pair(name: &str, value: String) -> LabelPairAdapter {
    LabelPairAdapter { name: name.to_owned(), value }
}
