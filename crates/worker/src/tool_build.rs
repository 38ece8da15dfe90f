//! Layers of tools, and the task that waits for them: it says how far they are.
//!
//! ```text
//!   tool:build, vm:create, … ──► layers() ──► aether-tools (cache, else one build for all)
//!            └── told() ◄── Telling ◄── what happens on the way
//! ```

use std::{
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use aether_store::{AttemptEnd, StoreError};
use aether_tools::{ReadyLayer, ToolEvent};
use aether_types::{DriverKind, ErrorCode, Fault, ToolRequest, VmTool, limits};
use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};

use crate::{
    attempt::{Attempt, Outcome, cancelled, done, failed},
    failure::Failure,
    fault,
    worker::Core,
};

/// What happens is written down no more often than that, and what is over sooner not at all: a
/// layer that is there costs no write.
const INTERVAL: Duration = Duration::from_millis(250);
/// Of one line of an installer.
const LINE_BYTES_MAX: usize = 4096;

/// What is to be told of layers that are being got. Bounded: the end of what installers said.
#[derive(Default)]
pub(crate) struct Telling {
    told: Mutex<Told>,
    news: Notify,
}

#[derive(Default)]
struct Told {
    now: String,
    log: String,
}

impl Telling {
    pub(crate) fn hear(&self, event: ToolEvent) {
        let mut told = self.lock();
        match event {
            ToolEvent::Stage { tool, version, stage } => {
                told.now = format!("{tool} {version}: {stage}");
            }
            ToolEvent::Line { tool, version: _, line } => told.line(&tool, &line),
            ToolEvent::Ready { cached: true, .. } => return,
            ToolEvent::Ready { tool, version, cached: false } => {
                told.now = format!("{tool} {version}: ready");
            }
        }
        drop(told);
        self.news.notify_one();
    }

    /// There is something to tell, and it is time.
    async fn news(&self, not_before: Instant) {
        self.news.notified().await;
        sleep_until(not_before).await;
    }

    fn text(&self) -> (String, String) {
        let told = self.lock();
        (told.now.clone(), told.log.clone())
    }

    // Nothing panics while the lock is held.
    fn lock(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Told {
    /// What an installer says moves no cursor.
    fn line(&mut self, tool: &str, line: &str) {
        let line = &line[..line.floor_char_boundary(LINE_BYTES_MAX)];
        self.log.push_str(tool);
        self.log.push_str("| ");
        self.log.extend(line.chars().filter(|c| !c.is_control() || *c == '\t'));
        self.log.push('\n');
        if let Some(over) = self.log.len().checked_sub(limits::TOOL_LOG_BYTES) {
            // Whole lines, a quarter more than must go, so that not every line moves all of them.
            let over = self.log.floor_char_boundary(over + limits::TOOL_LOG_BYTES / 4);
            let cut = self.log[over..].find('\n').map_or(self.log.len(), |at| over + at + 1);
            self.log.drain(..cut);
        }
    }
}

impl Core {
    /// Does `work`, and writes down what is told meanwhile as the progress of the attempt's task.
    pub(crate) async fn told<T>(
        &self,
        attempt: &Attempt,
        telling: &Telling,
        work: impl Future<Output = T>,
    ) -> T {
        let mut work = pin!(work);
        let mut next = Instant::now() + INTERVAL;
        let mut has_said = false;
        loop {
            // What is told while the second arm waits is told at the end, where that comes first.
            tokio::select! {
                biased;
                answer = &mut work => {
                    if has_said {
                        self.tell(attempt, telling).await;
                    }
                    return answer;
                }
                () = telling.news(next) => {
                    self.tell(attempt, telling).await;
                    has_said = true;
                    next = Instant::now() + INTERVAL;
                }
            }
        }
    }

    async fn tell(&self, attempt: &Attempt, telling: &Telling) {
        let (now, log) = telling.text();
        let (id, epoch) = (attempt.task.id, attempt.lease.epoch);
        match self.parts.store.task_progress(id, epoch, now, log).await {
            Ok(task) => self.publish_task(&task).await,
            // Another attempt speaks for the task; this one learns that at its end.
            Err(StoreError::Fenced) => {}
            Err(error) => {
                tracing::warn!(task.id = %id, error = fault::chain(&error), "write down progress");
            }
        }
    }

    /// For VMs to come: on the default image, for the kind of machine that this worker has first.
    async fn layers_ahead(
        &self,
        wanted: &[ToolRequest],
        telling: &Telling,
    ) -> Result<Vec<ReadyLayer>, Failure> {
        let driver = self.parts.drivers.first().map(|driver| driver.capabilities().kind);
        let driver = driver.unwrap_or(DriverKind::Qemu);
        self.ready_layers(wanted, aether_images::DEFAULT_IMAGE, driver, telling).await
    }

    /// Carries out a `tool:build`.
    pub(crate) async fn build_tools(
        self: &Arc<Self>,
        attempt: &Attempt,
    ) -> Result<Outcome, StoreError> {
        let wanted: Vec<ToolRequest> = attempt.task.tools.iter().map(VmTool::request).collect();
        let telling = Telling::default();
        let layers = tokio::select! {
            biased;
            layers = self.told(attempt, &telling, self.layers_ahead(&wanted, &telling)) => layers,
            () = attempt.cancelled.cancelled() => {
                let fault = Fault::new(ErrorCode::Cancelled, "the build was cancelled");
                return self.end(attempt, cancelled(fault)).await;
            }
            () = self.draining.cancelled() => {
                // The next process takes it up again.
                let _ = self.parts.queue.release(&attempt.lease, Duration::ZERO).await;
                return Ok(Outcome::Left);
            }
        };
        match layers {
            Ok(layers) => {
                let tools = Some(layers.iter().map(vm_tool).collect());
                self.end(attempt, AttemptEnd { tools, ..done() }).await
            }
            Err(Failure { fault, retryable })
                if retryable && attempt.task.attempts < attempt.task.max_attempts =>
            {
                self.give_back(attempt, fault.clone(), failed(fault)).await
            }
            Err(Failure { fault, .. }) => {
                tracing::warn!(task.id = %attempt.task.id, code = %fault.code, "task failed");
                self.end(attempt, failed(fault)).await
            }
        }
    }
}

/// What a VM that has the layer has.
pub(crate) fn vm_tool(layer: &ReadyLayer) -> VmTool {
    VmTool {
        name: layer.name.clone(),
        asked: layer.asked.clone(),
        got: Some(layer.got.clone()),
        verified_at: Some(layer.verified_at),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(telling: &Telling, line: &str) {
        let (tool, version) = ("go".to_owned(), "1".to_owned());
        telling.hear(ToolEvent::Line { tool, version, line: line.to_owned() });
    }

    #[test]
    fn what_is_told_is_the_end_in_whole_lines_without_control_characters() {
        let telling = Telling::default();
        let stage = "install".to_owned();
        telling.hear(ToolEvent::Stage { tool: "go".into(), version: "1".into(), stage });
        line(&telling, "a\u{1b}[1mb\tc\0");
        assert_eq!(telling.text(), ("go 1: install".to_owned(), "go| a[1mb\tc\n".to_owned()));
        for n in 0..10_000 {
            line(&telling, &format!("{n} ä"));
            let (_, log) = telling.text();
            assert!(log.len() <= limits::TOOL_LOG_BYTES);
            assert!(log.starts_with("go| ") && log.ends_with(&format!("go| {n} ä\n")), "{n}");
        }
        line(&telling, &"ä".repeat(LINE_BYTES_MAX * 100));
        assert!(telling.text().1.len() <= limits::TOOL_LOG_BYTES);
        telling.hear(ToolEvent::Ready { tool: "go".into(), version: "1".into(), cached: false });
        assert_eq!(telling.text().0, "go 1: ready");
    }
}
