//! One command in one VM.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{ExecutionId, Fault, ProjectId, TaskId, Timestamp, VmId, limits, vm::validate_env};

/// What to run, complete and checked. Values of `env` are never logged or listed.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ExecutionSpec {
    /// A program, by path or found on the PATH; no shell reads it.
    pub command: String,
    #[serde(default)]
    pub args: Vec<String>,
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// The user's home where it is not given.
    #[serde(default)]
    pub cwd: Option<String>,
    /// A name or `UID[:GID]`; root where it is not given.
    #[serde(default)]
    pub user: Option<String>,
    /// All of the standard input; empty where neither this nor a stream is given.
    #[serde(default)]
    pub stdin: Option<String>,
    #[serde(default)]
    pub timeout_s: Option<u64>,
    /// Run on a terminal of this size.
    #[serde(default)]
    pub tty: Option<TtySize>,
    /// A client holds the session: it feeds standard input, and the command ends when it goes.
    #[serde(default)]
    pub interactive: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct TtySize {
    #[cfg_attr(feature = "schema", schemars(range(min = 1)))]
    pub rows: u16,
    #[cfg_attr(feature = "schema", schemars(range(min = 1)))]
    pub cols: u16,
}

impl ExecutionSpec {
    pub fn validate(&self) -> Result<(), String> {
        if self.command.is_empty() {
            return Err("command: must not be empty".into());
        }
        if self.args.len() > limits::ARGS_MAX {
            return Err(format!("args: at most {} arguments", limits::ARGS_MAX));
        }
        let strings = || std::iter::once(&self.command).chain(&self.args);
        if strings().any(|s| s.contains('\0')) {
            return Err("command, args: must not contain NUL".into());
        }
        if strings().any(|s| s.len() > limits::ARG_BYTES_MAX) {
            return Err(format!("args: one argument has at most {} bytes", limits::ARG_BYTES_MAX));
        }
        let total: usize = strings().map(|s| s.len() + 1).sum();
        if total > limits::ARGS_BYTES_MAX {
            return Err(format!(
                "args: {total} bytes with the command, at most {}",
                limits::ARGS_BYTES_MAX
            ));
        }
        validate_env("env", &self.env)?;
        validate_text("cwd", self.cwd.as_deref(), limits::PATH_BYTES_MAX)?;
        validate_text("user", self.user.as_deref(), limits::USER_BYTES_MAX)?;
        if self.stdin.as_ref().is_some_and(|s| s.len() > limits::STDIN_BYTES_MAX) {
            return Err(format!(
                "stdin: at most {} bytes in a request; stream more",
                limits::STDIN_BYTES_MAX
            ));
        }
        if let Some(s) = self.timeout_s
            && (s == 0 || s > limits::EXECUTION_TIMEOUT_S_MAX)
        {
            return Err(format!("timeout_s: 1 to {} seconds", limits::EXECUTION_TIMEOUT_S_MAX));
        }
        if self.tty.is_some_and(|t| t.rows == 0 || t.cols == 0) {
            return Err("tty: rows and cols are at least 1".into());
        }
        Ok(())
    }
}

fn validate_text(field: &str, text: Option<&str>, bytes_max: usize) -> Result<(), String> {
    match text {
        Some(t) if t.is_empty() || t.len() > bytes_max || t.contains('\0') => {
            Err(format!("{field}: 1 to {bytes_max} bytes without NUL"))
        }
        _ => Ok(()),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum ExecutionState {
    Pending,
    /// Handed to the guest, or about to be: from here on it is never started a second time.
    Running,
    /// The command ran and ended, whatever its exit code.
    Completed,
    /// The platform could not run it to its end; `error` says why.
    Failed,
    Cancelled,
}

impl ExecutionState {
    pub const ALL: &'static [Self] =
        &[Self::Pending, Self::Running, Self::Completed, Self::Failed, Self::Cancelled];

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Running => "running",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    #[must_use]
    pub fn is_end(self) -> bool {
        match self {
            Self::Pending | Self::Running => false,
            Self::Completed | Self::Failed | Self::Cancelled => true,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum OutputStream {
    Stdout,
    Stderr,
}

/// How a command ended by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitStatus {
    /// 0 to 255; 127 where the command was not found, 126 where it could not be run.
    Code(i32),
    Signal(i32),
}

/// What is kept of a stream: its start and its end, and how much there was in all.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RetainedOutput {
    pub head: Vec<u8>,
    pub tail: Vec<u8>,
    pub total_bytes: u64,
}

impl RetainedOutput {
    pub fn push(&mut self, mut data: &[u8]) {
        self.total_bytes += data.len() as u64;
        let room = limits::OUTPUT_HEAD_BYTES - self.head.len().min(limits::OUTPUT_HEAD_BYTES);
        let (head, rest) = data.split_at(room.min(data.len()));
        self.head.extend_from_slice(head);
        data = rest;
        if data.len() >= limits::OUTPUT_TAIL_BYTES {
            self.tail.clear();
            data = &data[data.len() - limits::OUTPUT_TAIL_BYTES..];
        }
        self.tail.extend_from_slice(data);
        // Trimmed only at twice the size, so that a long stream costs one copy per byte.
        if self.tail.len() > 2 * limits::OUTPUT_TAIL_BYTES {
            self.tail.drain(..self.tail.len() - limits::OUTPUT_TAIL_BYTES);
        }
    }

    /// Bytes lost on the way (a worker died before it had stored them).
    pub fn skip(&mut self, bytes: u64) {
        self.total_bytes += bytes;
    }

    /// Brings `tail` to its bound. Call once, when the stream has ended.
    pub fn finish(&mut self) {
        if self.tail.len() > limits::OUTPUT_TAIL_BYTES {
            self.tail.drain(..self.tail.len() - limits::OUTPUT_TAIL_BYTES);
        }
    }

    /// Bytes between head and tail that were not kept.
    #[must_use]
    pub fn cut_bytes(&self) -> u64 {
        self.total_bytes.saturating_sub((self.head.len() + self.tail.len()) as u64)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Execution {
    pub id: ExecutionId,
    /// Its VM's.
    pub project_id: ProjectId,
    pub vm_id: VmId,
    pub task_id: TaskId,
    pub spec: ExecutionSpec,
    pub state: ExecutionState,
    /// Of the guest agent that was given the command; tells a lost command from one not yet sent.
    pub boot_id: Option<String>,
    pub exit: Option<ExitStatus>,
    pub error: Option<Fault>,
    pub created_at: Timestamp,
    pub started_at: Option<Timestamp>,
    pub finished_at: Option<Timestamp>,
    /// Measured in the guest, from start to exit.
    pub duration_us: Option<u64>,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn retained_output_is_the_ends_of_what_came(
            sizes in prop::collection::vec(0usize..700_000, 0..8)
        ) {
            let mut all = Vec::new();
            let mut kept = RetainedOutput::default();
            for (i, size) in sizes.iter().enumerate() {
                let chunk: Vec<u8> = (0..*size).map(|b| u8::try_from((b + i) % 251).unwrap()).collect();
                kept.push(&chunk);
                all.extend_from_slice(&chunk);
            }
            kept.finish();
            prop_assert_eq!(kept.total_bytes, all.len() as u64);
            prop_assert!(all.starts_with(&kept.head));
            prop_assert!(all.ends_with(&kept.tail));
            let bound = limits::OUTPUT_HEAD_BYTES + limits::OUTPUT_TAIL_BYTES;
            prop_assert_eq!(kept.cut_bytes(), all.len().saturating_sub(bound) as u64);
        }
    }

    #[test]
    fn an_argument_list_past_the_limit_is_refused() {
        let args = vec!["x".repeat(1000); 140];
        let spec = ExecutionSpec { command: "true".into(), args, ..Default::default() };
        assert!(spec.validate().unwrap_err().starts_with("args:"));
    }
}
