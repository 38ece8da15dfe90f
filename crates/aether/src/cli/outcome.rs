//! One command on several things.

use crate::{exit::Exit, failure::Failure, output};

/// Every failure is told, and the first decides the exit status.
pub(super) struct Outcome {
    several: bool,
    json: bool,
    failure: Option<Failure>,
}

impl Outcome {
    pub(super) fn new(several: bool, json: bool) -> Self {
        Self { several, json, failure: None }
    }

    /// One thing is one document; several are one line each, in the order they were named.
    pub(super) fn json(&self, value: &impl serde::Serialize) {
        if self.several { output::json_line(value) } else { output::json(value) }
    }

    pub(super) fn failed(&mut self, name: &str, mut failure: Failure) {
        if self.several {
            failure.message = format!("{name}: {}", failure.message);
        }
        if let Some(earlier) = self.failure.replace(failure) {
            // The first stays, to be told last and to decide.
            if let Some(later) = self.failure.replace(earlier) {
                output::failure(&later, self.json);
            }
        }
    }

    pub(super) fn finish(self) -> Result<Exit, Failure> {
        self.failure.map_or(Ok(Exit::Success), Err)
    }
}
