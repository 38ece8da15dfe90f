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

/// What a specification may have: by name, each once, and no more than one VM has layers.
pub fn validate_tools(field: &str, tools: &[ToolRequest]) -> Result<(), String> {
    if tools.len() > limits::TOOLS_MAX {
        return Err(format!(
            "{field}: {} tools in all, the defaults included; at most {}",
            tools.len(),
            limits::TOOLS_MAX
        ));
    }
    for ToolRequest { name, version } in tools {
        ToolRequest::new(name, Some(version)).map_err(|text| format!("{field}: {text}"))?;
    }
    for pair in tools.windows(2) {
        let [one, other] = pair else { continue };
        if one.name == other.name {
            return Err(format!(
                "{field}: {} is asked for as {} and as {}; one VM has one version of a tool",
                one.name, one.version, other.version
            ));
        }
        if one.name > other.name {
            return Err(format!("{field}: {} stands before {}", one.name, other.name));
        }
    }
    Ok(())
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
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct VmTool {
    pub name: String,
    /// As it was asked for, by the request or the configured defaults.
    pub asked: String,
    /// The version that is there; `null` until the VM has it.
    pub got: Option<String>,
    /// When its layer was built and the tool itself was run to see that it works.
    pub verified_at: Option<Timestamp>,
}

impl VmTool {
    /// As it is before anything came of the request.
    #[must_use]
    pub fn asked(request: &ToolRequest) -> Self {
        let ToolRequest { name, version } = request.clone();
        Self { name, asked: version, got: None, verified_at: None }
    }

    #[must_use]
    pub fn request(&self) -> ToolRequest {
        ToolRequest { name: self.name.clone(), version: self.asked.clone() }
    }
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

    #[test]
    fn a_list_has_each_tool_once_and_in_order() {
        let list = |texts: &[&str]| -> Vec<ToolRequest> {
            texts.iter().map(|text| text.parse().unwrap()).collect()
        };
        assert_eq!(validate_tools("tools", &list(&["bun", "go@1", "rust"])), Ok(()));
        for (bad, refusal) in [
            (&["go@1", "go@2"][..], "tools: go is asked for as 1 and as 2;"),
            (&["go", "bun"], "tools: go stands before bun"),
        ] {
            let error = validate_tools("tools", &list(bad)).unwrap_err();
            assert!(error.starts_with(refusal), "{error}");
        }
        let many: Vec<_> = (0..33).map(|n| format!("t{n:02}").parse().unwrap()).collect();
        assert_eq!(validate_tools("tools", &many[..32]), Ok(()));
        let error = validate_tools("tools", &many).unwrap_err();
        assert_eq!(error, "tools: 33 tools in all, the defaults included; at most 32");
        let hostile = ToolRequest { name: "go".into(), version: "$(x)".into() };
        assert!(validate_tools("tools", &[hostile]).is_err());
    }

    #[test]
    fn a_tool_begins_as_what_was_asked_for() {
        let request: ToolRequest = "go@1.23".parse().unwrap();
        let tool = VmTool::asked(&request);
        assert_eq!((tool.got.as_deref(), tool.verified_at), (None, None));
        assert_eq!(tool.request(), request);
    }
}
