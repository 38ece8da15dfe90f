//! What is done in a template's builder: files, steps, the command that stays, the ready check.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use aether_events::Event;
use aether_protocol::{
    Cause, ExitStatus, Exited, Run, WriteFile,
    host::{self, ClientError, RunEvent},
};
use aether_store::StoreError;
use aether_types::{
    ErrorCode, ExecutionId, Fault, Template, TemplateFile, TemplateProgress, TemplateReady,
    TemplateStep, Timestamp, limits,
};
use bytes::Bytes;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::{
    attempt::Attempt,
    failure::{Failure, internal},
    fault,
    guest::{AskError, Guest},
    worker::Core,
};

/// Output is written down no more often than that.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);
/// A guest ends a command at its limit; one that does not is given up this long after it.
const LIMIT_GRACE: Duration = Duration::from_secs(10);
const FILE_LIMIT: Duration = Duration::from_secs(30);
pub(crate) const SYNC_LIMIT: Duration = Duration::from_mins(2);
/// Between two runs of the ready check.
const READY_PAUSE_MIN: Duration = Duration::from_millis(50);
const READY_PAUSE_MAX: Duration = Duration::from_secs(2);
/// Of a failed step, told with its failure.
const LAST_LINES: usize = 12;
const LAST_BYTES: usize = 2048;
/// Has in the snapshot's memory what the first commands of nearly every VM read from the disk.
pub(crate) const WARM_UP: &str =
    "for it in sh bash; do $it -c 'ls -l / | cat; env'; done >/dev/null 2>&1";
/// Where the output of the command that stays goes, in the guest.
const START_LOG: &str = "/var/log/template-start.log";

pub(super) struct Steps<'a> {
    core: &'a Core,
    attempt: &'a Attempt,
    guest: Arc<Guest>,
    template: &'a Template,
    progress: TemplateProgress,
    log: Log,
    written: Instant,
}

impl<'a> Steps<'a> {
    pub(super) fn new(
        core: &'a Core,
        attempt: &'a Attempt,
        guest: Arc<Guest>,
        template: &'a Template,
    ) -> Self {
        let steps = u32::try_from(template.spec.steps.len()).unwrap_or(u32::MAX);
        let progress = TemplateProgress { steps, ..TemplateProgress::default() };
        let (log, written) = (Log::default(), Instant::now());
        Self { core, attempt, guest, template, progress, log, written }
    }

    /// All of it; the guest is then as the snapshot shall have it.
    pub(super) async fn run(mut self) -> Result<(), Failure> {
        let template = self.template;
        let spec = &template.spec;
        for file in &spec.files {
            self.now(format!("write {}", file.path)).await?;
            self.write(file).await?;
        }
        for (index, step) in spec.steps.iter().enumerate() {
            self.step(index + 1, step).await?;
            self.progress.done += 1;
        }
        if let Some(command) = &spec.start {
            self.now("start the command that stays".to_owned()).await?;
            self.start(command).await?;
        }
        if let Some(ready) = &spec.ready {
            self.now("wait for the ready check".to_owned()).await?;
            self.ready(ready).await?;
        }
        self.now("take the snapshot".to_owned()).await?;
        // Of no interest where the image lacks one of them.
        self.command("warm-up", "sh", &["-c", WARM_UP], SYNC_LIMIT).await?;
        // What the guest has not written would be in the memory alone, and a boot on the disk
        // would not have it.
        let synced = self.command("sync", "sync", &[], SYNC_LIMIT).await?;
        expect_success("sync", &synced, &self.log)
    }

    async fn write(&mut self, file: &TemplateFile) -> Result<(), Failure> {
        let request = WriteFile {
            path: file.path.clone(),
            mode: Some(file.mode),
            user: None,
            create_parents: true,
            append: false,
            sync: false,
        };
        let limit = self.core.parts.config.guest_limit;
        let written = timeout(FILE_LIMIT, async {
            let stream = self.guest.connect(limit).await.map_err(Failure::again)?;
            let refused = |error: ClientError| {
                let lost = error.is_connection_lost();
                let Fault { code, message } = fault::from_client(&error);
                let text = format!("write {}: {message}", file.path);
                if lost { Failure::again(Fault::new(code, text)) } else { build_failed(text) }
            };
            let token = &self.guest.token;
            let opened = host::write_file(stream.stream, token, request, limit).await;
            let mut writer = opened.map_err(refused)?;
            let content = Bytes::copy_from_slice(file.content.as_bytes());
            writer.write(content).await.map_err(refused)?;
            writer.finish().await.map_err(refused)?;
            Ok(())
        });
        written.await.map_err(|_| self.silent())?
    }

    async fn step(&mut self, number: usize, step: &TemplateStep) -> Result<(), Failure> {
        let of = self.template.spec.steps.len();
        let what = format!("step {number} of {of} (`{}`)", first_line(&step.run));
        self.now(what.clone()).await?;
        self.log.push(format!("$ {}\n", first_line(&step.run)).as_bytes());
        let seconds = step.timeout_s.unwrap_or(limits::TEMPLATE_STEP_TIMEOUT_S_DEFAULT);
        let from = self.log.total;
        let ended =
            self.command(&what, "sh", &["-ec", &step.run], Duration::from_secs(seconds)).await?;
        expect_success(&what, &ended, &self.log.since(from))
    }

    /// Its output goes to a file: nobody reads it, and a full pipe would hold it up.
    async fn start(&mut self, command: &str) -> Result<(), Failure> {
        let script = format!("exec >>{START_LOG} 2>&1; {command}");
        let request = Run {
            run_id: ExecutionId::new().to_string(),
            command: "sh".into(),
            args: vec!["-c".into(), script],
            detached: true,
            ..Run::default()
        };
        let limit = self.core.parts.config.guest_limit;
        let stream = self.guest.connect(limit).await.map_err(Failure::again)?.stream;
        let started = host::run(stream, &self.guest.token, request, limit).await;
        started.map(drop).map_err(|error| Failure::ask(&AskError::Client(error)))
    }

    async fn ready(&mut self, ready: &TemplateReady) -> Result<(), Failure> {
        let seconds = ready.timeout_s.unwrap_or(limits::TEMPLATE_READY_TIMEOUT_S_DEFAULT);
        let deadline = Instant::now() + Duration::from_secs(seconds);
        let mut pause = READY_PAUSE_MIN;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let from = self.log.total;
            let limit = left.max(Duration::from_millis(1));
            let ended =
                self.command("the ready check", "sh", &["-c", &ready.command], limit).await?;
            if is_success(&ended) {
                return Ok(());
            }
            if Instant::now() + pause >= deadline {
                let text = format!("the ready check did not succeed within {seconds} s");
                return Err(with_output(&text, &self.log.since(from)));
            }
            // What makes a check succeed is the guest's own affair and sends no event.
            sleep(pause).await;
            pause = (pause * 2).min(READY_PAUSE_MAX);
        }
    }

    /// Runs a command to its end, as root; its output goes to the log.
    async fn command(
        &mut self,
        what: &str,
        command: &str,
        args: &[&str],
        limit: Duration,
    ) -> Result<Exited, Failure> {
        let request = Run {
            run_id: ExecutionId::new().to_string(),
            command: command.to_owned(),
            args: args.iter().map(|&arg| arg.to_owned()).collect(),
            timeout_ms: u64::try_from(limit.as_millis()).unwrap_or(u64::MAX).max(1),
            ..Run::default()
        };
        let exchange = self.core.parts.config.guest_limit;
        let stream = self.guest.connect(exchange).await.map_err(Failure::again)?.stream;
        let guest = Arc::clone(&self.guest);
        let begun = host::run(stream, &guest.token, request, exchange).await;
        let lost = |error: ClientError| {
            tracing::warn!(vm.id = %guest.id, what, error = fault::chain(&error), "build");
            Failure::ask(&AskError::Client(error))
        };
        let mut run = begun.map_err(lost)?;
        let deadline = Instant::now() + limit + LIMIT_GRACE;
        loop {
            let write_at = self.written + PROGRESS_INTERVAL;
            tokio::select! {
                event = run.next() => match event.map_err(lost)? {
                    RunEvent::Output { data, .. } => self.log.push(&data),
                    RunEvent::Exited(exited) => return Ok(exited),
                },
                () = sleep_until(write_at), if self.log.changed => self.report().await?,
                reason = guest.ended() => return Err(build_failed(format!(
                    "the builder ended during {what}: {}", reason.message))),
                () = sleep_until(deadline) => return Err(self.silent()),
            }
        }
    }

    async fn now(&mut self, what: String) -> Result<(), Failure> {
        tracing::debug!(vm.id = %self.guest.id, template = self.template.name, what, "build");
        self.progress.now = what;
        self.report().await
    }

    async fn report(&mut self) -> Result<(), Failure> {
        self.log.changed = false;
        self.written = Instant::now();
        let progress = TemplateProgress { log: self.log.text(), ..self.progress.clone() };
        let (task, epoch) = (self.attempt.task.id, self.attempt.lease.epoch);
        let template = match self.core.parts.store.template_progress(task, epoch, progress).await {
            Ok(template) => template,
            // Nobody waits for this build; another attempt may be on its way.
            Err(error @ StoreError::Fenced) => return Err(Failure::store(&error)),
            Err(error) => {
                tracing::warn!(error = fault::chain(&error), "write down a build's progress");
                return Ok(());
            }
        };
        let event = Event::Template {
            template_id: template.id,
            state: template.state,
            at: Timestamp::now(),
        };
        self.core.publish(event).await;
        Ok(())
    }

    fn silent(&self) -> Failure {
        let text = format!("the builder's guest stopped answering: {}", self.progress.now);
        Failure::again(Fault::new(ErrorCode::GuestUnreachable, text))
    }
}

/// The end of what the steps said.
#[derive(Default)]
struct Log {
    end: VecDeque<u8>,
    /// Bytes that came, in all.
    total: u64,
    changed: bool,
}

impl Log {
    fn push(&mut self, data: &[u8]) {
        self.total += data.len() as u64;
        self.changed = true;
        let kept = &data[data.len().saturating_sub(limits::TEMPLATE_LOG_BYTES)..];
        let over = (self.end.len() + kept.len()).saturating_sub(limits::TEMPLATE_LOG_BYTES);
        self.end.drain(..over);
        self.end.extend(kept);
    }

    /// What came after a moment at which `total` was this, as far as it is kept.
    fn since(&self, total: u64) -> Self {
        let new = usize::try_from(self.total - total).unwrap_or(usize::MAX);
        let from = self.end.len().saturating_sub(new);
        Self { end: self.end.range(from..).copied().collect(), total: 0, changed: false }
    }

    /// A guest's bytes as text that does nothing to a terminal.
    fn text(&self) -> String {
        let (head, tail) = self.end.as_slices();
        let bytes = [head, tail].concat();
        let text = String::from_utf8_lossy(&bytes);
        text.chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect()
    }
}

fn is_success(exited: &Exited) -> bool {
    matches!(exited.cause(), Cause::Exited | Cause::Unspecified)
        && exited.status() == ExitStatus::Code(0)
}

fn expect_success(what: &str, exited: &Exited, said: &Log) -> Result<(), Failure> {
    if is_success(exited) {
        return Ok(());
    }
    let how = match (exited.cause(), exited.status()) {
        (Cause::TimedOut, _) => "ran past its time limit and was killed".to_owned(),
        (_, ExitStatus::Code(code)) => format!("exited with {code}"),
        (_, ExitStatus::Signal(signal)) => format!("was killed by signal {signal}"),
    };
    Err(with_output(&format!("{what} {how}"), said))
}

fn with_output(text: &str, said: &Log) -> Failure {
    let said = said.text();
    let lines: Vec<_> = said.trim_end().lines().collect();
    let mut last = lines[lines.len().saturating_sub(LAST_LINES)..].join("\n");
    if last.len() > LAST_BYTES {
        last.drain(..last.ceil_char_boundary(last.len() - LAST_BYTES));
    }
    if last.is_empty() {
        return build_failed(text.to_owned());
    }
    build_failed(format!("{text}; it said last:\n{last}"))
}

pub(super) fn build_failed(text: String) -> Failure {
    Failure::last(Fault::new(ErrorCode::TemplateBuildFailed, text))
}

/// Of a step, for a line of text.
fn first_line(text: &str) -> String {
    const CHARACTERS_MAX: usize = 80;
    let line = text.trim().lines().next().unwrap_or_default();
    let mut short: String = line.chars().filter(|c| !c.is_control()).take(CHARACTERS_MAX).collect();
    if short.chars().count() < text.trim().chars().count() {
        short.push('…');
    }
    short
}

pub(super) fn no_guest() -> Failure {
    Failure::last(internal("find the builder's guest"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_keeps_the_end_and_no_control_characters() {
        let mut log = Log::default();
        log.push(b"first\n");
        log.push(&vec![b'x'; limits::TEMPLATE_LOG_BYTES]);
        log.push(b"\x1b[31mlast\xff\n");
        let text = log.text();
        assert!(text.ends_with("x[31mlast\u{fffd}\n"), "{}", &text[text.len() - 40..]);
        assert!(!text.contains("first"));
        assert_eq!(log.end.len(), limits::TEMPLATE_LOG_BYTES);
        let before = log.total;
        log.push(b"new");
        assert_eq!(log.since(before).text(), "new");
    }

    #[test]
    fn a_failed_step_is_told_with_its_last_lines() {
        let mut log = Log::default();
        for n in 0..100 {
            log.push(format!("line {n}\n").as_bytes());
        }
        let Fault { code, message } = with_output("step 1 exited with 2", &log).fault;
        assert_eq!(code, ErrorCode::TemplateBuildFailed);
        assert!(message.starts_with("step 1 exited with 2; it said last:\nline 88\n"), "{message}");
        assert!(message.ends_with("line 99"));
        assert_eq!(with_output("nothing said", &Log::default()).fault.message, "nothing said");
    }
}
