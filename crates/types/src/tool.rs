//! Tools in VMs: what is asked for, and what a VM has.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{Timestamp, limits};

/// The version where none is asked for.
pub const LATEST: &str = "latest";

/// A tool and the version that was asked for: `latest`, a version, or a part or range of versions.
/// Written `go@1.23.1`, `go=1.23.1` or `go`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ToolRequest {
    pub name: String,
    pub version: String,
}

impl ToolRequest {
    /// Checks the form; whether there is such a tool is for the catalogue to say.
    pub fn new(name: &str, version: Option<&str>) -> Result<Self, String> {
        let version = version.unwrap_or(LATEST);
        if !is_tool_name(name) {
            return Err(format!(
                "a tool's name is 1 to {} lower-case letters, digits and `-`, and begins with a \
                 letter",
                limits::TOOL_NAME_BYTES_MAX
            ));
        }
        if !is_tool_version(version) {
            return Err(format!(
                "the version of {name} is 1 to {} letters, digits and `.+-_~^<>=*|, `",
                limits::TOOL_VERSION_BYTES_MAX
            ));
        }
        Ok(Self { name: name.to_owned(), version: version.to_owned() })
    }
}

impl fmt::Display for ToolRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.name, self.version)
    }
}

impl FromStr for ToolRequest {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(['@', '=']) {
            Some((name, version)) => Self::new(name, Some(version)),
            None => Self::new(text, None),
        }
    }
}

fn is_tool_name(name: &str) -> bool {
    name.len() <= limits::TOOL_NAME_BYTES_MAX
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
}

fn is_tool_version(version: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || ".+-_~^<>=*|, ".contains(c);
    (1..=limits::TOOL_VERSION_BYTES_MAX).contains(&version.len())
        && version.trim() == version
        && version.chars().all(is_plain)
}

/// A tool of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmTool {
    pub name: String,
    /// As it was asked for, by the request or the configured defaults.
    pub asked: String,
    /// The version that is there; `None` until the VM has it.
    pub got: Option<String>,
    /// When its layer was built and the tool itself was run to see that it works.
    pub verified_at: Option<Timestamp>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_a_name_and_a_version() {
        for (text, name, version) in [
            ("go", "go", "latest"),
            ("go@1.23.1", "go", "1.23.1"),
            ("go=1.23.1", "go", "1.23.1"),
            ("nodejs@20.x", "nodejs", "20.x"),
            ("python@>=3.10, <3.12", "python", ">=3.10, <3.12"),
        ] {
            let request: ToolRequest = text.parse().unwrap();
            assert_eq!((request.name.as_str(), request.version.as_str()), (name, version));
        }
        assert_eq!(ToolRequest::from_str("go=1.2").unwrap().to_string(), "go@1.2");
    }

    #[test]
    fn what_is_no_request_is_refused() {
        for text in ["", "@1", "Go", "1go", "go@", "go@ 1", "go@1;rm", "go@$(x)", "a/b", "go@../x"]
        {
            assert!(ToolRequest::from_str(text).is_err(), "{text:?}");
        }
        assert!(ToolRequest::new(&"a".repeat(64), None).is_err());
        assert!(ToolRequest::new("go", Some(&"1".repeat(65))).is_err());
    }
}
