//! How far the build of a template, or of tools, has come, as it goes: a moving line for a person, lines for a
//! log, events for programs. All but the events go to standard error.

use aether_api::{TaskView, TemplateView};
use serde::Serialize;

use super::{progress::Progress, table};
use crate::output;

pub(super) struct BuildProgress {
    form: Form,
    /// What was shown.
    step: Option<(u32, String)>,
    log: String,
}

enum Form {
    Quiet,
    Events,
    Lines,
    /// With lines of the log above it.
    Moving(Progress),
}

#[derive(Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Event<'a> {
    Step { template_id: String, done: u32, steps: u32, now: &'a str },
    Stage { task_id: String, now: &'a str },
    Log { text: &'a str },
}

impl BuildProgress {
    pub(super) fn new(json: bool, quiet: bool) -> Self {
        let form = match (json, quiet) {
            (_, true) => Form::Quiet,
            (true, false) => Form::Events,
            (false, false) if output::is_watched() => {
                Form::Moving(Progress::spinner("waiting to begin", false))
            }
            (false, false) => Form::Lines,
        };
        Self { form, step: None, log: String::new() }
    }

    /// Shows what is new.
    pub(super) fn show(&mut self, template: &TemplateView) {
        let progress = &template.progress;
        self.show_log(&progress.log);
        let step = (progress.done, progress.now.clone());
        if !progress.now.is_empty() && self.step.as_ref() != Some(&step) {
            self.form.step(template);
            self.step = Some(step);
        }
    }

    /// Of a task that waits for tools, or builds them.
    pub(super) fn show_task(&mut self, task: &TaskView) {
        let Some(progress) = &task.progress else { return };
        self.show_log(&progress.log);
        let step = (0, progress.now.clone());
        if !progress.now.is_empty() && self.step.as_ref() != Some(&step) {
            self.form.stage(task, &progress.now);
            self.step = Some(step);
        }
    }

    fn show_log(&mut self, log: &str) {
        let news = news(&self.log, log);
        if !news.is_empty() {
            self.form.log(news);
            log.clone_into(&mut self.log);
        }
    }
}

impl Form {
    fn step(&self, template: &TemplateView) {
        let progress = &template.progress;
        let now = table::printable(&progress.now);
        let text = format!("[{}/{}] {now}", progress.done, progress.steps);
        match self {
            Self::Quiet => {}
            Self::Events => output::json_line(&Event::Step {
                template_id: template.id.to_string(),
                done: progress.done,
                steps: progress.steps,
                now: &progress.now,
            }),
            Self::Lines => output::note(&text),
            Self::Moving(line) => line.say(&text),
        }
    }

    fn stage(&self, task: &TaskView, now: &str) {
        match self {
            Self::Quiet => {}
            Self::Events => {
                output::json_line(&Event::Stage { task_id: task.id.to_string(), now });
            }
            Self::Lines => output::note(&table::printable(now)),
            Self::Moving(line) => line.say(&table::printable(now)),
        }
    }

    fn log(&self, text: &str) {
        match self {
            Self::Quiet => {}
            Self::Events => output::json_line(&Event::Log { text }),
            Self::Lines => lines(text).for_each(|line| output::note(&line)),
            Self::Moving(moving) => lines(text).for_each(|line| moving.above(&line)),
        }
    }
}

/// What a guest says moves no cursor.
fn lines(text: &str) -> impl Iterator<Item = String> + '_ {
    text.lines().map(|line| format!("  {}", table::printable(line)))
}

/// So much of the end of what was shown is looked for in what there is now.
const OVERLAP_BYTES: usize = 512;

/// The part of `now` that comes after `before`. Both are the end of something that grows.
fn news<'a>(before: &str, now: &'a str) -> &'a str {
    if let Some(news) = now.strip_prefix(before) {
        return news;
    }
    let mut from = before.len().saturating_sub(OVERLAP_BYTES);
    while !before.is_char_boundary(from) {
        from += 1;
    }
    let end = &before[from..];
    now.rfind(end).map_or(now, |at| &now[at + end.len()..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_log_only_what_is_new_is_shown() {
        assert_eq!(news("", "one\n"), "one\n");
        assert_eq!(news("one\n", "one\ntwo\n"), "two\n");
        assert_eq!(news("one\n", "one\n"), "");
        // Its beginning was dropped meanwhile.
        let before = format!("{}ä end\n", "x".repeat(5000));
        let now = format!("{}ä end\nmore\n", "x".repeat(4000));
        assert_eq!(news(&before, &now), "more\n");
        // More came than is kept.
        assert_eq!(news("one\n", "nine\n"), "nine\n");
    }
}
