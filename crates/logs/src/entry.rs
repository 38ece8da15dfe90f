//! One line, and what is known about it.

use std::time::{SystemTime, UNIX_EPOCH};

use aether_types::{LogLevel, LogService, LogStream, TaskId, VmId, limits::LOG_LINE_BYTES_MAX};

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogEntry {
    /// Since 1970, in UTC.
    pub time_ns: i64,
    pub service: LogService,
    pub level: LogLevel,
    pub stream: LogStream,
    pub vm_id: Option<VmId>,
    pub task_id: Option<TaskId>,
    /// Without the line's end; never longer than [`LOG_LINE_BYTES_MAX`].
    text: String,
    /// Of the line, beyond `text`.
    cut_bytes: u64,
    /// Entries that should stand before this one and were lost.
    pub missing: u64,
}

impl LogEntry {
    /// Said now, by nobody's VM. What is too long is cut.
    #[must_use]
    pub fn new(service: LogService, level: LogLevel, stream: LogStream, text: &str) -> Self {
        let kept = text.floor_char_boundary(LOG_LINE_BYTES_MAX);
        Self {
            time_ns: now_ns(),
            service,
            level,
            stream,
            vm_id: None,
            task_id: None,
            text: text[..kept].to_owned(),
            cut_bytes: (text.len() - kept) as u64,
            missing: 0,
        }
    }

    /// Stands where entries are missing.
    #[must_use]
    pub fn gap(service: LogService, missing: u64, why: &str) -> Self {
        let text = format!("{missing} lines are missing here: {why}");
        Self { missing, ..Self::new(service, LogLevel::Warn, LogStream::Log, &text) }
    }

    #[must_use]
    pub fn at(self, time_ns: i64) -> Self {
        Self { time_ns, ..self }
    }

    #[must_use]
    pub fn of_vm(self, vm_id: Option<VmId>) -> Self {
        Self { vm_id, ..self }
    }

    #[must_use]
    pub fn of_task(self, task_id: Option<TaskId>) -> Self {
        Self { task_id, ..self }
    }

    /// More was cut before the text came here.
    #[must_use]
    pub fn and_cut(self, bytes: u64) -> Self {
        Self { cut_bytes: self.cut_bytes.saturating_add(bytes), ..self }
    }

    /// Entries that should stand before it were lost.
    #[must_use]
    pub fn after_missing(self, missing: u64) -> Self {
        Self { missing, ..self }
    }

    pub fn text(&self) -> &str {
        &self.text
    }

    pub fn cut_bytes(&self) -> u64 {
        self.cut_bytes
    }

    /// What it takes of a bound in bytes: the text, and the rest roughly.
    pub(crate) fn weight(&self) -> usize {
        self.text.len() + 160
    }
}

/// An entry that a store has taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Logged {
    /// From 1, without holes, in the order in which the store took them.
    pub sequence: u64,
    pub entry: LogEntry,
}

/// The present moment.
#[must_use]
pub fn now_ns() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_line_is_cut_between_characters_and_says_so() {
        let text = format!("{}é", "x".repeat(LOG_LINE_BYTES_MAX - 1));
        let entry = LogEntry::new(LogService::Guest, LogLevel::Info, LogStream::Stdout, &text);
        assert_eq!(entry.text().len(), LOG_LINE_BYTES_MAX - 1);
        assert_eq!(entry.cut_bytes(), 2);
        assert_eq!(entry.and_cut(5).cut_bytes(), 7);
    }
}
