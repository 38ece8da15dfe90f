//! All that goes to standard output and standard error. Nobody is left to be told when these are
//! closed, so their errors are dropped.

use std::{
    io::{IsTerminal as _, Write as _},
    sync::OnceLock,
};

use serde::Serialize;

use crate::{args::Form, failure::Failure};

pub(crate) fn line(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{text}").and_then(|()| out.flush());
}

/// To standard error: not part of the result.
pub(crate) fn note(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// Of documents. One process prints in one form.
static FORM: OnceLock<Form> = OnceLock::new();

pub(crate) fn choose(form: Form) {
    let _ = FORM.set(form);
}

/// The document, where YAML is asked for.
fn yaml(value: &impl Serialize) -> Option<String> {
    let wanted = FORM.get() == Some(&Form::Yaml);
    // What the API sent can be written again.
    wanted.then(|| serde_saphyr::to_string(value).unwrap_or_default())
}

/// For programs: one document.
pub(crate) fn json(value: &impl Serialize) {
    match yaml(value) {
        Some(text) => line(text.trim_end()),
        None => line(&serde_json::to_string_pretty(value).unwrap_or_default()),
    }
}

/// For programs: one of many documents; of JSON, on one line.
pub(crate) fn json_line(value: &impl Serialize) {
    match yaml(value) {
        Some(text) => line(&format!("---\n{}", text.trim_end())),
        None => line(&serde_json::to_string(value).unwrap_or_default()),
    }
}

pub(crate) fn failure(failure: &Failure, json: bool) {
    #[derive(Serialize)]
    struct Document<'a> {
        code: &'a str,
        message: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        hint: Option<&'a str>,
        exit_status: u8,
    }
    if json {
        let document = Document {
            code: &failure.code,
            message: &failure.message,
            hint: failure.hint.as_deref(),
            exit_status: failure.exit.status(),
        };
        note(&serde_json::to_string(&document).unwrap_or_default());
    } else {
        note(&format!("aether: {failure}"));
    }
}

/// Whether a person watches: moving things are shown to nobody else.
pub(crate) fn is_watched() -> bool {
    std::io::stderr().is_terminal()
}
