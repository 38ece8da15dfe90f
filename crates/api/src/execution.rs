//! Commands: the request, and the execution as it is kept.

use std::collections::BTreeMap;

use aether_types::{
    Execution, ExecutionId, ExecutionSpec, ExecutionState, ExitStatus, Fault, RetainedOutput,
    TaskId, Timestamp, VmId,
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::{Deserialize, Serialize};

/// `POST /vms/{vm}/execute`. No shell reads the command.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct ExecuteRequest {
    /// A program, by path or found on the PATH.
    #[cfg_attr(feature = "schema", schemars(with = "aether_types::schema::Command"))]
    pub command: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(feature = "schema", schemars(with = "aether_types::schema::Args"))]
    pub args: Vec<String>,
    /// Laid over the VM's. Values are never shown again.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[cfg_attr(feature = "schema", schemars(with = "aether_types::schema::Env"))]
    pub env: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(with = "Option<aether_types::schema::Folder>"))]
    pub cwd: Option<String>,
    /// A name or `UID[:GID]`; root where it is not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(with = "Option<aether_types::schema::User>"))]
    pub user: Option<String>,
    /// All of the standard input.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(max = aether_types::limits::STDIN_BYTES_MAX)))]
    pub stdin: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = aether_types::limits::EXECUTION_TIMEOUT_S_MAX)))]
    pub timeout_s: Option<u64>,
}

impl From<ExecuteRequest> for ExecutionSpec {
    fn from(request: ExecuteRequest) -> Self {
        let ExecuteRequest { command, args, env, cwd, user, stdin, timeout_s } = request;
        Self { command, args, env, cwd, user, stdin, timeout_s, tty: None, interactive: false }
    }
}

/// An execution as it is now.
///
/// `stdout` and `stderr` are text: what is not UTF-8 is replaced by U+FFFD, and where bytes were
/// not kept a line such as `[... 1048576 bytes cut ...]` stands in their place. Where the text
/// does not say all (the kept bytes are not UTF-8), `stdout_base64` and `stderr_base64` carry the
/// kept bytes, without that line. The kept bytes also come raw from `.../output?stream=stdout`.
/// All of these are absent from lists and, since output is kept at the end, while it runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ExecutionView {
    pub id: ExecutionId,
    pub vm_id: VmId,
    pub task_id: TaskId,
    pub command: String,
    pub args: Vec<String>,
    pub cwd: Option<String>,
    pub user: Option<String>,
    pub status: ExecutionState,
    /// 0 to 255; absent where a signal ended the command or it did not end by itself.
    pub exit_code: Option<i32>,
    pub signal: Option<i32>,
    /// Why the platform could not run the command to its end.
    pub error: Option<Fault>,
    pub created_at: Timestamp,
    pub started_at: Option<Timestamp>,
    pub finished_at: Option<Timestamp>,
    /// Measured in the guest, from start to exit.
    pub duration_ms: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdout: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdout_base64: Option<String>,
    /// Written by the command, kept or not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdout_bytes: Option<u64>,
    /// Of these, not kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdout_cut_bytes: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stderr: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stderr_base64: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stderr_bytes: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stderr_cut_bytes: Option<u64>,
}

/// What was kept of both streams.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct KeptOutput {
    pub stdout: RetainedOutput,
    pub stderr: RetainedOutput,
}

impl ExecutionView {
    #[must_use]
    pub fn new(execution: Execution, output: Option<&KeptOutput>) -> Self {
        let Execution {
            id,
            // That of the key that asks.
            project_id: _,
            vm_id,
            task_id,
            spec,
            state,
            boot_id: _,
            exit,
            error,
            created_at,
            started_at,
            finished_at,
            duration_us,
        } = execution;
        let (exit_code, signal) = split_exit(exit);
        let stdout = output.map(|o| StreamText::new(&o.stdout)).unwrap_or_default();
        let stderr = output.map(|o| StreamText::new(&o.stderr)).unwrap_or_default();
        Self {
            id,
            vm_id,
            task_id,
            command: spec.command,
            args: spec.args,
            cwd: spec.cwd,
            user: spec.user,
            status: state,
            exit_code,
            signal,
            error,
            created_at,
            started_at,
            finished_at,
            duration_ms: duration_us.map(millis),
            stdout: stdout.text,
            stdout_base64: stdout.base64,
            stdout_bytes: stdout.bytes,
            stdout_cut_bytes: stdout.cut_bytes,
            stderr: stderr.text,
            stderr_base64: stderr.base64,
            stderr_bytes: stderr.bytes,
            stderr_cut_bytes: stderr.cut_bytes,
        }
    }
}

pub(crate) fn split_exit(exit: Option<ExitStatus>) -> (Option<i32>, Option<i32>) {
    match exit {
        Some(ExitStatus::Code(code)) => (Some(code), None),
        Some(ExitStatus::Signal(signal)) => (None, Some(signal)),
        None => (None, None),
    }
}

/// Milliseconds with three decimals.
pub(crate) fn millis(us: u64) -> f64 {
    (std::time::Duration::from_micros(us).as_secs_f64() * 1e6).round() / 1e3
}

#[derive(Default)]
struct StreamText {
    text: Option<String>,
    base64: Option<String>,
    bytes: Option<u64>,
    cut_bytes: Option<u64>,
}

impl StreamText {
    fn new(output: &RetainedOutput) -> Self {
        let (text, is_exact) = render(output);
        let kept = || [output.head.as_slice(), &output.tail].concat();
        Self {
            text: Some(text),
            base64: (!is_exact).then(|| STANDARD.encode(kept())),
            bytes: Some(output.total_bytes),
            cut_bytes: Some(output.cut_bytes()),
        }
    }
}

/// The text, and whether every kept byte is in it.
fn render(output: &RetainedOutput) -> (String, bool) {
    let cut = output.cut_bytes();
    if cut == 0 {
        let bytes = [output.head.as_slice(), &output.tail].concat();
        return match String::from_utf8(bytes) {
            Ok(text) => (text, true),
            Err(error) => (String::from_utf8_lossy(error.as_bytes()).into_owned(), false),
        };
    }
    // The cut may fall inside a character; its halves are no fault of the command.
    let head = without_open_end(&output.head);
    let tail = without_open_start(&output.tail);
    let is_exact = std::str::from_utf8(head).is_ok() && std::str::from_utf8(tail).is_ok();
    let kept = head.len() + tail.len();
    let cut = output.total_bytes - kept as u64;
    let (head, tail) = (String::from_utf8_lossy(head), String::from_utf8_lossy(tail));
    (format!("{head}\n[... {cut} bytes cut ...]\n{tail}"), is_exact)
}

fn without_open_end(bytes: &[u8]) -> &[u8] {
    match std::str::from_utf8(bytes) {
        // No length: the end came in the middle of a character.
        Err(error) if error.error_len().is_none() => &bytes[..error.valid_up_to()],
        Ok(_) | Err(_) => bytes,
    }
}

fn without_open_start(bytes: &[u8]) -> &[u8] {
    let open = bytes.iter().take(3).take_while(|b| **b & 0xC0 == 0x80).count();
    &bytes[open..]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(head: &[u8], tail: &[u8], total_bytes: u64) -> RetainedOutput {
        RetainedOutput { head: head.to_vec(), tail: tail.to_vec(), total_bytes }
    }

    #[test]
    fn text_is_text_and_other_bytes_come_twice() {
        let plain = StreamText::new(&kept("grü".as_bytes(), b"n", 5));
        assert_eq!(plain.text.as_deref(), Some("grün"));
        assert_eq!(plain.base64, None);
        let binary = StreamText::new(&kept(&[b'a', 0xff], &[], 2));
        assert_eq!(binary.text.as_deref(), Some("a\u{fffd}"));
        assert_eq!(binary.base64.as_deref(), Some("Yf8="));
    }

    #[test]
    fn a_cut_is_said_where_it_is_and_splits_no_character() {
        let ue = "ü".as_bytes();
        let cut = StreamText::new(&kept(&[b'a', ue[0]], &[ue[1], b'z'], 10));
        assert_eq!(cut.text.as_deref(), Some("a\n[... 8 bytes cut ...]\nz"));
        assert_eq!((cut.base64, cut.cut_bytes), (None, Some(6)));
    }

    #[test]
    fn a_misspelt_field_is_named() {
        let error = serde_json::from_str::<ExecuteRequest>(r#"{"command":"a","comand":1}"#);
        assert!(error.unwrap_err().to_string().contains("`comand`"));
    }

    #[test]
    fn durations_keep_their_microseconds() {
        assert_eq!(millis(1_234).to_string(), "1.234");
        assert_eq!(millis(3_600_000_001).to_string(), "3600000.001");
    }
}
