//! Following one execution: live from its session, and from the store where there is no session
//! or it broke off.
//!
//! ```text
//!   Live ──End──► Done
//!    │ the session closed without an end (its worker left, or none ever took it)
//!    ▼
//!   Stored: wait for the task's end ──► what was kept and not shown yet, gaps named ──► Done
//! ```

use std::collections::VecDeque;

use aether_api::{StreamEnd, StreamEvent};
use aether_streams::{ClientEnd, SessionInput, SessionOutput};
use aether_types::{
    ErrorCode, Execution, ExecutionId, ExecutionState, Fault, OutputStream, RetainedOutput, TaskId,
    TaskState,
};
use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, mpsc, watch};

use crate::{
    parts::App,
    problem::{ApiError, ApiResult},
    submit::Recorded,
    wait::TaskWatch,
};

/// Stored output in one event.
const CHUNK_BYTES: usize = 64 * 1024;

pub(crate) struct Follower {
    app: App,
    watch: TaskWatch,
    task: TaskId,
    execution: ExecutionId,
    phase: Phase,
    ready: VecDeque<StreamEvent>,
    shown: [u64; 2],
    has_started: bool,
    task_ended: bool,
    /// For as long as somebody follows.
    _place: OwnedSemaphorePermit,
}

enum Phase {
    Live(ClientEnd),
    Stored,
    Done,
}

impl Follower {
    /// `watch` and `client` were made before the execution was recorded.
    pub(crate) fn new(
        app: &App,
        watch: TaskWatch,
        client: ClientEnd,
        recorded: &Recorded<Execution>,
        place: OwnedSemaphorePermit,
    ) -> Self {
        let task = &recorded.accepted.task;
        let execution = recorded.made.id;
        // A repeated request follows the earlier execution, to which this session is not joined.
        let phase = if recorded.accepted.repeated { Phase::Stored } else { Phase::Live(client) };
        let accepted = StreamEvent::Accepted {
            task_id: task.id,
            vm_id: recorded.made.vm_id,
            execution_id: execution,
        };
        Self {
            app: app.clone(),
            watch,
            task: task.id,
            execution,
            phase,
            ready: VecDeque::from([accepted]),
            shown: [0; 2],
            has_started: false,
            task_ended: task.state.is_end(),
            _place: place,
        }
    }

    /// To the command, while it is followed live.
    pub(crate) fn input(&self) -> Option<mpsc::Sender<SessionInput>> {
        match &self.phase {
            Phase::Live(client) => Some(client.input.clone()),
            Phase::Stored | Phase::Done => None,
        }
    }

    /// Bytes of standard input that have gone on to the guest.
    pub(crate) fn taken(&self) -> Option<watch::Receiver<u64>> {
        match &self.phase {
            Phase::Live(client) => Some(client.taken.clone()),
            Phase::Stored | Phase::Done => None,
        }
    }

    /// The next event; `None` after the last. Cancel-safe.
    pub(crate) async fn next(&mut self) -> Option<StreamEvent> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            let closing = self.app.closing.clone();
            tokio::select! {
                biased;
                more = self.advance() => if !more {
                    return None;
                },
                () = closing.cancelled() => {
                    self.phase = Phase::Done;
                    return Some(StreamEvent::Detached);
                }
            }
        }
    }

    /// Makes events ready, or changes the phase. `false`: nothing comes any more. Cancel-safe.
    async fn advance(&mut self) -> bool {
        match &mut self.phase {
            Phase::Live(client) => {
                tokio::select! {
                    biased;
                    message = client.output.recv() => match message {
                        Some(message) => self.live(message),
                        None => self.phase = Phase::Stored,
                    },
                    ended = self.watch.ended(self.task), if !self.task_ended => {
                        // An error is met again when the store is read for the end.
                        if ended.is_ok() {
                            self.task_ended = true;
                            // Closes the session where no worker ever took it.
                            client.settle();
                        }
                    }
                }
                true
            }
            Phase::Stored => {
                if !self.task_ended {
                    match self.end_of_task().await {
                        Ok(_) => self.task_ended = true,
                        Err(error) => self.give_up(&error),
                    }
                    return true;
                }
                match self.kept().await {
                    Ok(events) => {
                        self.ready.extend(events);
                        self.phase = Phase::Done;
                    }
                    Err(error) => self.give_up(&error),
                }
                true
            }
            Phase::Done => false,
        }
    }

    fn live(&mut self, message: SessionOutput) {
        let event = match message {
            SessionOutput::Started => {
                if self.has_started {
                    return;
                }
                self.has_started = true;
                StreamEvent::Started
            }
            SessionOutput::Data { stream, data } => {
                self.shown[index(stream)] += data.len() as u64;
                output_event(stream, data)
            }
            SessionOutput::Skipped { stream, bytes } => {
                self.shown[index(stream)] += bytes;
                StreamEvent::Skipped { stream, bytes }
            }
            SessionOutput::End { exit, error, duration_us } => {
                self.phase = Phase::Done;
                let status = status_of(error.as_ref());
                StreamEvent::End(StreamEnd::new(status, exit, error, duration_us))
            }
        };
        self.ready.push_back(event);
    }

    /// It may have ended before anybody listened.
    async fn end_of_task(&mut self) -> ApiResult<TaskState> {
        if let Some(task) = self.app.store().task(self.task).await?
            && task.state.is_end()
        {
            return Ok(task.state);
        }
        self.watch.ended(self.task).await
    }

    /// What the store kept and this follower has not shown.
    async fn kept(&mut self) -> ApiResult<Vec<StreamEvent>> {
        let store = self.app.store();
        let (execution, stdout, stderr) = tokio::try_join!(
            store.execution(self.execution),
            store.output(self.execution, OutputStream::Stdout),
            store.output(self.execution, OutputStream::Stderr),
        )?;
        let execution = execution
            .ok_or_else(|| ApiError::new(ErrorCode::ExecutionNotFound, "the execution is gone"))?;
        let mut events = Vec::new();
        if execution.started_at.is_some() && !self.has_started {
            events.push(StreamEvent::Started);
        }
        for (stream, output) in [(OutputStream::Stdout, stdout), (OutputStream::Stderr, stderr)] {
            replay(stream, &output, self.shown[index(stream)], &mut events);
        }
        events.push(StreamEvent::End(end_of(execution)));
        Ok(events)
    }

    fn give_up(&mut self, error: &ApiError) {
        let code = error.problem().error_code().unwrap_or(ErrorCode::Internal);
        let fault = Fault::new(code, error.problem().detail.clone());
        tracing::warn!(execution.id = %self.execution, %fault, "an execution is followed no more");
        // What became of the command is in the store, once that can be read again.
        self.ready.push_back(StreamEvent::Detached);
        self.phase = Phase::Done;
    }
}

fn end_of(execution: Execution) -> StreamEnd {
    let Execution { state, exit, error, duration_us, .. } = execution;
    StreamEnd::new(state, exit, error, duration_us)
}

fn status_of(error: Option<&Fault>) -> ExecutionState {
    match error {
        None => ExecutionState::Completed,
        Some(fault) if fault.code == ErrorCode::Cancelled => ExecutionState::Cancelled,
        Some(_) => ExecutionState::Failed,
    }
}

fn index(stream: OutputStream) -> usize {
    match stream {
        OutputStream::Stdout => 0,
        OutputStream::Stderr => 1,
    }
}

fn output_event(stream: OutputStream, data: Bytes) -> StreamEvent {
    match stream {
        OutputStream::Stdout => StreamEvent::Stdout { data },
        OutputStream::Stderr => StreamEvent::Stderr { data },
    }
}

/// The kept bytes from `from` on, with the gap named where some were not kept.
fn replay(stream: OutputStream, output: &RetainedOutput, from: u64, events: &mut Vec<StreamEvent>) {
    let events_of = |bytes: &[u8]| -> Vec<StreamEvent> {
        let chunks = bytes.chunks(CHUNK_BYTES).map(Bytes::copy_from_slice);
        chunks.map(|data| output_event(stream, data)).collect()
    };
    let head_end = output.head.len() as u64;
    let tail_start = head_end + output.cut_bytes();
    events.extend(events_of(after(&output.head, from)));
    let next = from.max(head_end);
    if next < tail_start {
        events.push(StreamEvent::Skipped { stream, bytes: tail_start - next });
    }
    events.extend(events_of(after(&output.tail, next.saturating_sub(tail_start))));
}

fn after(bytes: &[u8], offset: u64) -> &[u8] {
    usize::try_from(offset).ok().and_then(|o| bytes.get(o..)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 4 bytes kept of the start, 3 of the end, 5 cut between.
    fn output() -> RetainedOutput {
        RetainedOutput { head: b"abcd".to_vec(), tail: b"xyz".to_vec(), total_bytes: 12 }
    }

    fn replayed(from: u64) -> String {
        let mut events = Vec::new();
        replay(OutputStream::Stdout, &output(), from, &mut events);
        events
            .into_iter()
            .map(|event| match event {
                StreamEvent::Stdout { data } => String::from_utf8(data.to_vec()).unwrap(),
                StreamEvent::Skipped { bytes, .. } => format!("<{bytes}>"),
                other => panic!("{other:?}"),
            })
            .collect()
    }

    #[test]
    fn what_was_shown_is_not_shown_again_and_gaps_are_named() {
        for (from, text) in [
            (0, "abcd<5>xyz"),
            (3, "d<5>xyz"),
            (4, "<5>xyz"),
            (6, "<3>xyz"),
            (9, "xyz"),
            (11, "z"),
            (12, ""),
            (99, ""),
        ] {
            assert_eq!(replayed(from), text, "{from}");
        }
    }
}
