//! The installer's output: lines for who waits, and what the builder's script says to us.

use std::sync::{Arc, Mutex, PoisonError};

use super::{LogSink, SIZE_PREFIX, STAGE_PREFIX};
use crate::build::flight::Events;
use crate::tools::ToolEvent;

/// What is longer is cut: the rest of the line is left out.
const LINE_BYTES_MAX: usize = 4096;

/// Reads a builder's output as it comes. Every byte of it may be what an installer wants us to
/// read, so that all is bounded and nothing is believed that matters: the size is checked.
#[derive(Debug, Clone)]
pub(super) struct Output {
    tool: String,
    version: String,
    events: Arc<Events>,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    line: Vec<u8>,
    size_bytes: Option<u64>,
    stage: String,
}

impl Output {
    pub(super) fn new(tool: &str, version: &str, events: Arc<Events>) -> Self {
        let state = Arc::default();
        Self { tool: tool.to_owned(), version: version.to_owned(), events, state }
    }

    pub(super) fn sink(&self) -> LogSink {
        let output = self.clone();
        LogSink::new(move |bytes| output.take(bytes))
    }

    /// What the script said last of the size of the layer.
    pub(super) fn size_bytes(&self) -> Option<u64> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).size_bytes
    }

    /// The stage that the script was in last.
    pub(super) fn stage(&self) -> String {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).stage.clone()
    }

    /// Gives out what stands in a line without an end.
    pub(super) fn end(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if !state.line.is_empty() {
            self.line(&mut state);
        }
    }

    fn take(&self, bytes: &[u8]) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        for byte in bytes {
            match byte {
                // A progress bar writes its line again and again.
                b'\n' | b'\r' => self.line(&mut state),
                byte if state.line.len() < LINE_BYTES_MAX => state.line.push(*byte),
                _ => {}
            }
        }
    }

    fn line(&self, state: &mut State) {
        let line = std::mem::take(&mut state.line);
        let line = String::from_utf8_lossy(&line).replace(char::is_control, " ");
        let (tool, version) = (self.tool.clone(), self.version.clone());
        if let Some(stage) = line.strip_prefix(STAGE_PREFIX) {
            stage.clone_into(&mut state.stage);
            self.events.push(ToolEvent::Stage { tool, version, stage: stage.to_owned() });
        } else if let Some(size) = line.strip_prefix(SIZE_PREFIX) {
            state.size_bytes = size.trim().parse().ok();
        } else if !line.trim().is_empty() {
            self.events.push(ToolEvent::Line { tool, version, line });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_becomes_lines_and_what_the_script_says() {
        let events = Arc::new(Events::default());
        let output = Output::new("x", "1", Arc::clone(&events));
        let sink = output.sink();
        for part in ["::sta", "ge install\nhel", "lo\r\n\n", "a\x1b[0mb\n", "::size 4096\n", "end"]
        {
            sink.write(part.as_bytes());
        }
        output.end();
        assert_eq!(events.last_lines(9, 999), "hello\na [0mb\nend");
        assert_eq!((output.size_bytes(), output.stage().as_str()), (Some(4096), "install"));
    }

    #[test]
    fn output_without_an_end_is_bounded() {
        let events = Arc::new(Events::default());
        let output = Output::new("x", "1", Arc::clone(&events));
        let sink = output.sink();
        for _ in 0..1000 {
            sink.write(&[b'x'; 1000]);
        }
        sink.write(b"\n");
        assert_eq!(events.last_lines(1, 9999).len(), LINE_BYTES_MAX);
        for _ in 0..100_000 {
            sink.write(b"line\n");
        }
        assert!(events.last_lines(usize::MAX, usize::MAX).len() < 70_000);
    }
}
