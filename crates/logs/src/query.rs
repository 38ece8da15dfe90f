//! What is asked for.

use std::sync::Arc;

use aether_types::{
    TaskId, VmId,
    limits::{LOG_QUERY_LIMIT_DEFAULT, LOG_QUERY_LIMIT_MAX, LOG_TEXT_BYTES_MAX},
};

use crate::{LogEntry, LogError, LogLevel, Logged};

/// Everything that is given must fit.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogFilter {
    pub vm_id: Option<VmId>,
    pub task_id: Option<TaskId>,
    /// This level and those that weigh more.
    pub level: Option<LogLevel>,
    /// In the line, as it is written: no pattern, and capitals count.
    pub text: Option<String>,
}

impl LogFilter {
    #[must_use]
    pub fn fits(&self, entry: &LogEntry) -> bool {
        self.vm_id.is_none_or(|id| entry.vm_id == Some(id))
            && self.task_id.is_none_or(|id| entry.task_id == Some(id))
            && self.level.is_none_or(|level| entry.level >= level)
            && self.text.as_ref().is_none_or(|text| entry.text().contains(text.as_str()))
    }

    pub(crate) fn check(&self) -> Result<(), LogError> {
        match &self.text {
            Some(text) if text.len() > LOG_TEXT_BYTES_MAX => {
                Err(LogError::TextTooLong { bytes: text.len() })
            }
            _ => Ok(()),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogQuery {
    pub filter: LogFilter,
    /// Not before; in ns since 1970.
    pub start_ns: Option<i64>,
    /// Before.
    pub end_ns: Option<i64>,
    /// At most this many, the latest.
    pub limit: u32,
}

impl Default for LogQuery {
    fn default() -> Self {
        Self {
            filter: LogFilter::default(),
            start_ns: None,
            end_ns: None,
            limit: LOG_QUERY_LIMIT_DEFAULT,
        }
    }
}

impl LogQuery {
    pub(crate) fn check(&self) -> Result<(), LogError> {
        self.filter.check()?;
        if !(1..=LOG_QUERY_LIMIT_MAX).contains(&self.limit) {
            return Err(LogError::BadLimit { limit: self.limit });
        }
        Ok(())
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogAnswer {
    /// Oldest first.
    pub entries: Vec<Arc<Logged>>,
    /// There are earlier ones that fit.
    pub more: bool,
}

/// Where a follower begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FollowFrom {
    Now,
    /// Entries of this time and later; in ns since 1970.
    Time(i64),
    /// After the entry of this sequence number.
    After(u64),
}
