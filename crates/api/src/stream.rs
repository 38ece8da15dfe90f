//! An execution followed live: as lines of JSON (`?stream=true`), and on a WebSocket (terminal).
//!
//! The WebSocket carries output as binary messages, [`CHANNEL_STDOUT`] or [`CHANNEL_STDERR`] and
//! then the bytes, and everything else as text messages with one [`StreamEvent`]. The client's
//! first message is a text with a [`TerminalStart`]; then come binary messages, [`CHANNEL_STDIN`]
//! and the bytes, and texts with a [`TerminalControl`].
//!
//! A client has at most [`STDIN_WINDOW_BYTES`] of standard input on the way that the server has not
//! yet said it has taken. So the server never has to stop reading, and hears of a signal, a resize
//! and the client's end however full the command's standard input is.

use std::collections::BTreeMap;

use aether_types::{
    ExecutionId, ExecutionSpec, ExecutionState, ExitStatus, Fault, OutputStream, TaskId, TtySize,
    VmId,
};
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::execution::{millis, split_exit};

pub const NDJSON_MEDIA_TYPE: &str = "application/x-ndjson";

pub const CHANNEL_STDIN: u8 = 0;
pub const CHANNEL_STDOUT: u8 = 1;
pub const CHANNEL_STDERR: u8 = 2;

pub const STDIN_WINDOW_BYTES: u32 = 256 * 1024;

/// What a client that follows an execution is told, in this order: `accepted`, `started`, output
/// in any mixture, and one of `end` and `detached`. A stream that ends without either was cut off.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum StreamEvent {
    /// Recorded.
    Accepted {
        task_id: TaskId,
        vm_id: VmId,
        execution_id: ExecutionId,
    },
    /// The guest has started the command.
    Started,
    /// `data` is base64 in JSON.
    Stdout {
        #[serde(with = "base64_bytes")]
        #[cfg_attr(feature = "schema", schemars(with = "String", extend("contentEncoding" = "base64")))]
        data: Bytes,
    },
    Stderr {
        #[serde(with = "base64_bytes")]
        #[cfg_attr(feature = "schema", schemars(with = "String", extend("contentEncoding" = "base64")))]
        data: Bytes,
    },
    /// Bytes of the output that this stream cannot show.
    Skipped {
        stream: OutputStream,
        bytes: u64,
    },
    /// Only on a terminal: this much more of the standard input has gone on its way.
    StdinTaken {
        bytes: u64,
    },
    End(StreamEnd),
    /// The server stops following because it shuts down. A streamed execution may go on; its
    /// result can be asked for later.
    Detached,
}

/// How an execution ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct StreamEnd {
    pub status: ExecutionState,
    pub exit_code: Option<i32>,
    pub signal: Option<i32>,
    pub error: Option<Fault>,
    pub duration_ms: Option<f64>,
}

impl StreamEnd {
    #[must_use]
    pub fn new(
        status: ExecutionState,
        exit: Option<ExitStatus>,
        error: Option<Fault>,
        duration_us: Option<u64>,
    ) -> Self {
        let (exit_code, signal) = split_exit(exit);
        Self { status, exit_code, signal, error, duration_ms: duration_us.map(millis) }
    }
}

/// What an interactive execution runs. It ends when the client goes.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct TerminalStart {
    /// Empty: a login shell.
    pub command: String,
    #[cfg_attr(feature = "schema", schemars(with = "aether_types::schema::Args"))]
    pub args: Vec<String>,
    #[cfg_attr(feature = "schema", schemars(with = "aether_types::schema::Env"))]
    pub env: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(with = "Option<aether_types::schema::Folder>"))]
    pub cwd: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(with = "Option<aether_types::schema::User>"))]
    pub user: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = aether_types::limits::EXECUTION_TIMEOUT_S_MAX)))]
    pub timeout_s: Option<u64>,
    /// Run on a terminal of this size; separate streams without.
    pub tty: Option<TtySize>,
}

impl From<TerminalStart> for ExecutionSpec {
    fn from(start: TerminalStart) -> Self {
        let TerminalStart { mut command, mut args, env, cwd, user, timeout_s, tty } = start;
        if command.is_empty() && args.is_empty() {
            // In every guest. It reads the profile, as after a login.
            command = "/bin/sh".into();
            args = vec![
                "-c".into(),
                "if [ -x /bin/bash ]; then exec /bin/bash -l; else exec /bin/sh -l; fi".into(),
            ];
        }
        Self { command, args, env, cwd, user, stdin: None, timeout_s, tty, interactive: true }
    }
}

/// From the client, in text messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum TerminalControl {
    StdinEof,
    /// To the process group, by its number on Linux.
    Signal {
        signal: i32,
    },
    Resize {
        rows: u16,
        cols: u16,
    },
}

mod base64_bytes {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    use bytes::Bytes;
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub(super) fn serialize<S: Serializer>(data: &Bytes, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(data))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Bytes, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        STANDARD.decode(text.as_bytes()).map(Bytes::from).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_have_their_documented_form() {
        let out = StreamEvent::Stdout { data: Bytes::from_static(b"hi\n") };
        let text = serde_json::to_string(&out).unwrap();
        assert_eq!(text, r#"{"type":"stdout","data":"aGkK"}"#);
        assert_eq!(serde_json::from_str::<StreamEvent>(&text).unwrap(), out);
        let end =
            StreamEnd::new(ExecutionState::Completed, Some(ExitStatus::Code(3)), None, Some(1500));
        assert_eq!(
            serde_json::to_string(&StreamEvent::End(end)).unwrap(),
            r#"{"type":"end","status":"completed","exit_code":3,"signal":null,"error":null,"duration_ms":1.5}"#
        );
        assert_eq!(serde_json::to_string(&StreamEvent::Started).unwrap(), r#"{"type":"started"}"#);
        assert_eq!(
            serde_json::from_str::<TerminalControl>(r#"{"type":"resize","rows":2,"cols":3}"#)
                .unwrap(),
            TerminalControl::Resize { rows: 2, cols: 3 }
        );
    }

    #[test]
    fn an_empty_start_is_a_login_shell() {
        let spec = ExecutionSpec::from(TerminalStart::default());
        assert_eq!(spec.command, "/bin/sh");
        assert!(spec.interactive);
        assert_eq!(spec.validate(), Ok(()));
    }
}
