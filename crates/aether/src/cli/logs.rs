//! `aether logs`.

use aether_api::{
    LogEntryView, LogEvent, QueryLogs,
    client::{Client, LogsFrom},
};
use aether_logs::now_ns;
use aether_types::PreciseTime;

use super::connect;
use crate::{
    args::{Global, Logs, Since},
    exit::Exit,
    failure::Failure,
    output,
};

pub(crate) async fn run(global: &Global, args: Logs) -> Result<Exit, Failure> {
    let client = connect(global)?;
    let start = args.since.map(point);
    let filter = QueryLogs {
        vm_id: args.vm,
        task_id: args.task,
        level: args.level,
        text: args.text,
        ..QueryLogs::default()
    };
    if args.follow {
        return follow(&client, &filter, start, args.limit, global.json).await;
    }
    let query = QueryLogs { start, limit: Some(args.limit), ..filter };
    let found = client.query_logs(&query).await?;
    if global.json {
        output::json(&found);
        return Ok(Exit::Success);
    }
    if found.more {
        output::note(&format!("... there are earlier lines than these {}", found.items.len()));
    }
    found.items.iter().for_each(show);
    Ok(Exit::Success)
}

/// Without a point in time, the latest lines and then what comes after them.
async fn follow(
    client: &Client,
    filter: &QueryLogs,
    start: Option<PreciseTime>,
    limit: u32,
    json: bool,
) -> Result<Exit, Failure> {
    let mut from = if let Some(time) = start {
        LogsFrom::Time(time)
    } else {
        let query = QueryLogs { limit: Some(limit), ..filter.clone() };
        let latest = client.query_logs(&query).await?;
        let last = latest.items.iter().map(|entry| entry.sequence).max();
        for entry in latest.items {
            print(&LogEvent::Entry(entry), json);
        }
        // Where there was none, the first that comes is the first that fits.
        LogsFrom::After(last.unwrap_or(0))
    };
    loop {
        let mut stream = client.follow_logs(filter, from).await?;
        while let Some(event) = stream.next().await? {
            if let LogEvent::Entry(entry) = &event {
                from = LogsFrom::After(entry.sequence);
            }
            print(&event, json);
            if event == LogEvent::Detached {
                return Ok(Exit::Success);
            }
        }
        // It was cut off: go on where it was. A server that is gone is an error of the next call.
    }
}

pub(super) fn point(since: Since) -> PreciseTime {
    match since {
        Since::Time(time) => time,
        Since::Ago(ago) => {
            let ago = i64::try_from(ago.as_nanos()).unwrap_or(i64::MAX);
            PreciseTime::from_unix_ns(now_ns().saturating_sub(ago))
        }
    }
}

fn print(event: &LogEvent, json: bool) {
    if json {
        return output::json_line(event);
    }
    match event {
        LogEvent::Entry(entry) => show(entry),
        LogEvent::Missed { lines } => {
            output::note(&format!("... {lines} lines were removed before they could be shown"));
        }
        LogEvent::Detached => output::note("aether: the server shuts down"),
    }
}

fn show(entry: &LogEntryView) {
    if entry.missing > 0 {
        output::note(&format!("... {} lines are missing here", entry.missing));
    }
    output::line(&form(entry));
}

/// One line whatever a guest wrote: what would move the cursor or end the line is shown as text.
fn form(entry: &LogEntryView) -> String {
    let time = entry.time.to_string();
    // To the millisecond, which is enough for people.
    let time = time.get(..23).unwrap_or(&time);
    let whose = entry.vm_id.map(|vm| format!(" {vm}")).unwrap_or_default();
    let mut text = String::with_capacity(entry.text.len());
    for character in entry.text.chars() {
        if character.is_control() && character != '\t' {
            text.extend(character.escape_unicode());
        } else {
            text.push(character);
        }
    }
    let cut = match entry.cut_bytes {
        0 => String::new(),
        bytes => format!(" [{bytes} bytes cut]"),
    };
    format!("{time}Z {:5} {}/{}{whose} {text}{cut}", entry.level, entry.service, entry.stream)
}

#[cfg(test)]
mod tests {
    use aether_types::{LogLevel, LogService, LogStream};

    use super::*;

    #[test]
    fn a_line_stays_one_and_moves_no_cursor() {
        let entry = LogEntryView {
            sequence: 1,
            time: PreciseTime::from_unix_ns(1_700_000_000_123_456_789),
            service: LogService::Guest,
            level: LogLevel::Info,
            stream: LogStream::Stdout,
            vm_id: None,
            task_id: None,
            text: "a\tb\u{1b}[2J\r\u{9b}".into(),
            cut_bytes: 3,
            missing: 0,
        };
        assert_eq!(
            form(&entry),
            "2023-11-14T22:13:20.123Z info  guest/stdout a\tb\\u{1b}[2J\\u{d}\\u{9b} [3 bytes cut]"
        );
    }
}
