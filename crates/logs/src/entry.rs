//! One line, and what is known about it.

use std::{
    fmt,
    str::FromStr,
    time::{SystemTime, UNIX_EPOCH},
};

use aether_types::{TaskId, VmId, limits::LOG_LINE_BYTES_MAX};
use serde::{Deserialize, Serialize};

/// The text names nothing of this kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a {noun}; it is one of {known}")]
pub struct UnknownWord {
    noun: &'static str,
    text: String,
    known: String,
}

macro_rules! words {
    ($(#[$doc:meta])* $name:ident, $noun:literal,
     $($(#[$variant_doc:meta])* $variant:ident = $text:literal),+ $(,)?) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum $name { $($(#[$variant_doc])* $variant),+ }

        impl $name {
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text),+ }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.as_str())
            }
        }

        impl FromStr for $name {
            type Err = UnknownWord;

            fn from_str(text: &str) -> Result<Self, UnknownWord> {
                Self::ALL.iter().copied().find(|word| word.as_str() == text).ok_or_else(|| {
                    let known: Vec<_> = Self::ALL.iter().map(|word| word.as_str()).collect();
                    let text = text.chars().take(64).collect();
                    UnknownWord { noun: $noun, text, known: known.join(", ") }
                })
            }
        }
    };
}

words!(
    /// Who said it. A label of Loki, so there are few.
    LogService, "service",
    Gateway = "gateway",
    Worker = "worker",
    /// Our program in the guest.
    Agent = "agent",
    /// What runs in the guest.
    Guest = "guest",
    /// The rest of the platform.
    Platform = "platform",
);

words!(
    /// In ascending order of weight. A label of Loki.
    LogLevel, "level",
    Trace = "trace",
    Debug = "debug",
    Info = "info",
    Warn = "warn",
    Error = "error",
);

words!(
    /// Where it was said. A label of Loki.
    LogStream, "stream",
    Stdout = "stdout",
    Stderr = "stderr",
    /// Of the VM.
    Console = "console",
    /// A line of the platform's own log.
    Log = "log",
);

impl LogLevel {
    /// This and all that weigh more.
    #[must_use]
    pub fn and_above(self) -> &'static [Self] {
        let from = Self::ALL.iter().position(|level| *level == self).unwrap_or(0);
        Self::ALL.get(from..).unwrap_or_default()
    }
}

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

    #[test]
    fn words_have_one_spelling() {
        assert_eq!("warn".parse(), Ok(LogLevel::Warn));
        assert_eq!(LogLevel::Warn.and_above(), [LogLevel::Warn, LogLevel::Error]);
        let error = "WARN".parse::<LogLevel>().unwrap_err();
        assert_eq!(
            error.to_string(),
            "`WARN` is not a level; it is one of trace, debug, info, warn, error"
        );
        for stream in LogStream::ALL {
            let json = serde_json::to_string(stream).unwrap();
            assert_eq!(json, format!("\"{stream}\""));
        }
    }
}
