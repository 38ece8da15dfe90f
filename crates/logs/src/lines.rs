//! From bytes of a stream to lines of a log.

use std::time::{Duration, Instant};

use aether_types::limits::LOG_LINE_BYTES_MAX;

use crate::{LogEntry, LogLevel, LogService, LogSink, LogStream};
use aether_types::{TaskId, VmId};

/// What one stream may log in the long run ...
const BYTES_PER_SECOND: u64 = 1 << 20;
/// ... and at once. A guest that prints without end would else push out what all others say.
const BURST_BYTES: u64 = 4 << 20;
/// What a line costs besides its text, so that empty ones are bounded too.
const LINE_COST_BYTES: u64 = 160;

/// Cuts a stream into lines, bounds their length and how many come, and writes them into a sink.
#[derive(Debug)]
pub struct Lines {
    sink: LogSink,
    service: LogService,
    level: LogLevel,
    stream: LogStream,
    vm_id: Option<VmId>,
    task_id: Option<TaskId>,
    line: Vec<u8>,
    cut_bytes: u64,
    budget: u64,
    refilled: Instant,
    missing: u64,
}

impl Lines {
    #[must_use]
    pub fn new(sink: LogSink, service: LogService, stream: LogStream) -> Self {
        Self {
            sink,
            service,
            level: LogLevel::Info,
            stream,
            vm_id: None,
            task_id: None,
            line: Vec::new(),
            cut_bytes: 0,
            budget: BURST_BYTES,
            refilled: Instant::now(),
            missing: 0,
        }
    }

    #[must_use]
    pub fn of(self, vm_id: Option<VmId>, task_id: Option<TaskId>) -> Self {
        Self { vm_id, task_id, ..self }
    }

    /// Never waits.
    pub fn push(&mut self, bytes: &[u8]) {
        let mut parts = bytes.split(|byte| *byte == b'\n');
        // What follows the last line's end is the beginning of a line; where there is no line's
        // end, that is all.
        let last = parts.next_back().unwrap_or_default();
        for part in parts {
            self.add(part);
            self.end_line();
        }
        self.add(last);
    }

    /// The stream has ended, with or without a line's end.
    pub fn finish(&mut self) {
        if !self.line.is_empty() || self.cut_bytes > 0 {
            self.end_line();
        }
        if self.missing > 0 {
            let missing = std::mem::take(&mut self.missing);
            let gap = LogEntry::gap(self.service, missing, "the guest wrote too fast");
            self.sink.write(gap.of_vm(self.vm_id).of_task(self.task_id));
        }
    }

    fn add(&mut self, part: &[u8]) {
        let room = LOG_LINE_BYTES_MAX - self.line.len();
        let kept = part.len().min(room);
        self.line.extend_from_slice(&part[..kept]);
        self.cut_bytes += (part.len() - kept) as u64;
    }

    fn end_line(&mut self) {
        let bytes = std::mem::take(&mut self.line);
        let cut = std::mem::take(&mut self.cut_bytes);
        let cost = bytes.len() as u64 + LINE_COST_BYTES;
        self.refill();
        if self.budget < cost {
            self.missing += 1;
            return;
        }
        self.budget -= cost;
        let text = String::from_utf8_lossy(&bytes);
        let text = if cut == 0 { text.strip_suffix('\r').unwrap_or(&text) } else { &text };
        let mut entry = LogEntry::new(self.service, self.level, self.stream, text).and_cut(cut);
        entry.missing = std::mem::take(&mut self.missing);
        self.sink.write(entry.of_vm(self.vm_id).of_task(self.task_id));
    }

    fn refill(&mut self) {
        let since = self.refilled.elapsed().min(Duration::from_mins(1));
        let more = u64::try_from(since.as_millis()).unwrap_or(0) * BYTES_PER_SECOND / 1000;
        if more > 0 {
            self.budget = BURST_BYTES.min(self.budget + more);
            self.refilled = Instant::now();
        }
    }
}
