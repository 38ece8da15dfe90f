//! What Loki answers to a query.

use std::{collections::HashMap, sync::Arc};

use serde::Deserialize;

use crate::{LogEntry, LogLevel, LogService, LogStream, Logged};

#[derive(Debug, Deserialize)]
pub(crate) struct Answer {
    data: Results,
}

#[derive(Debug, Deserialize)]
struct Results {
    #[serde(rename = "resultType")]
    kind: String,
    result: Vec<Stream>,
}

#[derive(Debug, Deserialize)]
struct Stream {
    stream: HashMap<String, String>,
    values: Vec<Value>,
}

/// The time, the line and, from newer Lokis that are asked for it, the structured metadata.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Value {
    Categorized(String, String, Categories),
    Plain(String, String),
}

#[derive(Debug, Default, Deserialize)]
struct Categories {
    #[serde(default, rename = "structuredMetadata")]
    structured_metadata: HashMap<String, String>,
}

/// An entry, and the store that took it first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) origin: String,
    pub(crate) logged: Arc<Logged>,
}

impl Answer {
    /// In no order; `None` where it is not what was asked for.
    pub(crate) fn entries(self) -> Option<Vec<Found>> {
        if self.data.kind != "streams" {
            return None;
        }
        let mut found = Vec::new();
        for Stream { stream, values } in self.data.result {
            for value in values {
                let (time, line, own) = match value {
                    Value::Categorized(time, line, own) => (time, line, own.structured_metadata),
                    Value::Plain(time, line) => (time, line, HashMap::new()),
                };
                let fact = |name: &str| own.get(name).or_else(|| stream.get(name));
                found.push(entry(time.parse().ok()?, &line, fact));
            }
        }
        Some(found)
    }
}

/// Others write to the same Loki, and their lines need not have our labels.
fn entry<'a>(time_ns: i64, line: &str, fact: impl Fn(&str) -> Option<&'a String>) -> Found {
    let number = |name: &str| fact(name).and_then(|text| text.parse().ok()).unwrap_or(0);
    let entry = LogEntry::new(
        fact("service").and_then(|text| text.parse().ok()).unwrap_or(LogService::Platform),
        fact("level").and_then(|text| text.parse().ok()).unwrap_or(LogLevel::Info),
        fact("stream").and_then(|text| text.parse().ok()).unwrap_or(LogStream::Log),
        line,
    )
    .at(time_ns)
    .and_cut(number("cut_bytes"))
    .of_vm(fact("vm_id").and_then(|text| text.parse().ok()))
    .of_task(fact("task_id").and_then(|text| text.parse().ok()))
    .after_missing(number("missing"));
    Found {
        origin: fact("origin").cloned().unwrap_or_default(),
        logged: Arc::new(Logged { sequence: number("sequence"), entry }),
    }
}
