//! Moving things for a person at a terminal; nothing at all for anybody else.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::output;

/// Shown until it is dropped.
#[derive(Debug)]
pub(crate) struct Progress(Option<ProgressBar>);

impl Progress {
    pub(crate) fn spinner(text: impl Into<String>, json: bool) -> Self {
        if json || !output::is_watched() {
            return Self(None);
        }
        let bar = ProgressBar::new_spinner().with_message(text.into());
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {elapsed}") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(100));
        Self(Some(bar))
    }

    /// Of bytes; `total` may not be known.
    pub(crate) fn bytes(text: impl Into<String>, total: Option<u64>, json: bool) -> Self {
        if json || !output::is_watched() {
            return Self(None);
        }
        let (bar, template) = match total {
            Some(total) => {
                let template =
                    "{msg} [{bar:30}] {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}";
                (ProgressBar::new(total), template)
            }
            None => (ProgressBar::no_length(), "{msg} {spinner} {bytes} {binary_bytes_per_sec}"),
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        Self(Some(bar.with_message(text.into())))
    }

    pub(crate) fn add(&self, bytes: usize) {
        if let Some(bar) = &self.0 {
            bar.inc(bytes as u64);
        }
    }

    /// A line that stays, above the moving one.
    pub(crate) fn above(&self, text: &str) {
        if let Some(bar) = &self.0 {
            bar.println(text);
        }
    }

    pub(crate) fn say(&self, text: &str) {
        if let Some(bar) = &self.0 {
            bar.set_message(text.to_owned());
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = self.0.take() {
            bar.finish_and_clear();
        }
    }
}
