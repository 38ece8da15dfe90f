//! What an event is called, and which ones are asked for.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{ExecutionState, SnapshotState, TaskState, TemplateState, VmState};

/// What workers do; the others are named after the states that they come to.
const OF_WORKERS: [&str; 5] = ["registered", "draining", "activated", "left", "lost"];

/// `vm.running`: the noun, and what became of it. What is recorded first is `created`, after that
/// the state that it has come to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct EventTopic(String);

impl EventTopic {
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    #[must_use]
    pub fn noun(&self) -> &str {
        self.0.split_once('.').map_or("", |(noun, _)| noun)
    }

    /// Every topic that this program knows.
    pub fn all() -> impl Iterator<Item = String> {
        let nouns: [(&str, Vec<&str>); 6] = [
            ("vm", VmState::ALL.iter().map(|s| s.as_str()).collect()),
            ("task", TaskState::ALL.iter().map(|s| s.as_str()).collect()),
            ("execution", ExecutionState::ALL.iter().map(|s| s.as_str()).collect()),
            ("snapshot", SnapshotState::ALL.iter().map(|s| s.as_str()).collect()),
            ("template", TemplateState::ALL.iter().map(|s| s.as_str()).collect()),
            ("worker", OF_WORKERS.to_vec()),
        ];
        nouns.into_iter().flat_map(|(noun, words)| {
            let created = (noun != "worker").then_some("created");
            let words = created.into_iter().chain(words);
            words.map(move |word| format!("{noun}.{word}")).collect::<Vec<_>>()
        })
    }
}

impl fmt::Display for EventTopic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for EventTopic {
    type Err = String;

    /// Takes topics of newer programs too.
    fn from_str(text: &str) -> Result<Self, String> {
        let is_word = |word: &str| !word.is_empty() && word.bytes().all(|b| b.is_ascii_lowercase());
        match text.split_once('.') {
            Some((noun, word)) if is_word(noun) && is_word(word) => Ok(Self(text.to_owned())),
            _ => Err("a topic such as vm.running is needed".to_owned()),
        }
    }
}

impl TryFrom<String> for EventTopic {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<EventTopic> for String {
    fn from(topic: EventTopic) -> Self {
        topic.0
    }
}

/// A topic, `vm.*` for all of a noun, or `*` for all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventPattern(String);

impl EventPattern {
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl EventPattern {
    #[must_use]
    pub fn fits(&self, topic: &EventTopic) -> bool {
        match self.0.strip_suffix('*') {
            Some(noun) => topic.0.starts_with(noun),
            None => topic.0 == self.0,
        }
    }
}

impl FromStr for EventPattern {
    /// A sentence with what is known.
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let noun = text.strip_suffix('*');
        let is_known = |topic: String| match noun {
            Some("") => true,
            Some(noun) => noun.ends_with('.') && topic.starts_with(noun),
            None => topic == text,
        };
        if EventTopic::all().any(is_known) {
            return Ok(Self(text.to_owned()));
        }
        let known: Vec<_> = EventTopic::all().collect();
        Err(format!("one of {}, one such as vm.*, or * is needed", known.join(", ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topics_are_nouns_with_what_became_of_them() {
        let all: Vec<_> = EventTopic::all().collect();
        for topic in ["vm.created", "vm.deleted", "task.completed", "task.failed", "worker.lost"] {
            assert!(all.iter().any(|known| known == topic), "{topic}");
        }
        assert!(!all.iter().any(|known| known == "worker.created"));
        for topic in &all {
            assert_eq!(topic.parse::<EventTopic>().unwrap().as_str(), topic);
        }
        for bad in ["", "vm", "vm.", ".running", "VM.running", "vm.running.x", "vm.%", "vm._"] {
            assert!(bad.parse::<EventTopic>().is_err(), "{bad}");
        }
    }

    #[test]
    fn patterns_are_of_what_there_is() {
        for good in ["*", "vm.*", "worker.*", "task.failed"] {
            assert_eq!(good.parse::<EventPattern>().unwrap().as_str(), good);
        }
        for bad in ["", "v*", "vm*", "vm.r*", "**", "*.running", "vms.*", "vm.asleep", "%", "vm.%"]
        {
            let error = bad.parse::<EventPattern>().unwrap_err();
            assert!(error.contains("vm.running"), "{error}");
        }
    }
}
