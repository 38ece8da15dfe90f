//! From the three ways to ask for tools to one list.

use std::collections::{BTreeMap, btree_map::Entry};

use aether_types::{ToolRequest, tool::LATEST};

use crate::{
    ToolCatalogue,
    problem::{ApiError, ApiResult},
};

/// As a request has them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AskedTools<'a> {
    pub(crate) tools: &'a [String],
    pub(crate) additional: &'a [String],
    pub(crate) versions: &'a BTreeMap<String, String>,
}

impl<'a> AskedTools<'a> {
    pub(crate) fn of(tools: &'a [String]) -> Self {
        static NONE: BTreeMap<String, String> = BTreeMap::new();
        Self { tools, additional: &[], versions: &NONE }
    }
}

/// What is there without being asked for.
pub(crate) fn default_tools(
    wanted: Option<bool>,
    catalogue: &dyn ToolCatalogue,
) -> Vec<ToolRequest> {
    if wanted.unwrap_or(true) { catalogue.defaults() } else { Vec::new() }
}

/// What was asked for, over what there is anyway: by name, each tool once. The refusals name the
/// field; how many there may be is for the specification to say.
pub(crate) fn admit_tools(
    asked: AskedTools<'_>,
    base: &[ToolRequest],
    catalogue: &dyn ToolCatalogue,
) -> ApiResult<Vec<ToolRequest>> {
    let mut list = Asked { catalogue, versions: BTreeMap::new() };
    for (list_name, texts) in [("tools", asked.tools), ("additional_tools", asked.additional)] {
        for (n, text) in texts.iter().enumerate() {
            let field = format!("{list_name}[{n}]");
            let (name, version) = match text.split_once(['@', '=']) {
                Some((name, version)) => (name, Some(version)),
                None => (text.as_str(), None),
            };
            list.add(&field, name, version)?;
        }
    }
    for (name, version) in asked.versions {
        let found = list.find("tool_versions", name, Some(version))?;
        if !list.versions.contains_key(&found) && !base.iter().any(|tool| tool.name == found) {
            let text = format!(
                "tool_versions: {found} has a version and is not asked for; add it to tools or \
                 additional_tools"
            );
            return Err(ApiError::invalid(text));
        }
        list.add("tool_versions", name, Some(version))?;
    }
    Ok(over(base, list.versions))
}

fn over(base: &[ToolRequest], asked: BTreeMap<String, Option<String>>) -> Vec<ToolRequest> {
    let base = base.iter().cloned().map(|tool| (tool.name, tool.version));
    let mut tools: BTreeMap<String, String> = base.collect();
    for (name, version) in asked {
        match (version, tools.entry(name)) {
            (Some(version), entry) => drop(entry.insert_entry(version)),
            // Asked for without a version, it is as it would be anyway.
            (None, entry) => drop(entry.or_insert_with(|| LATEST.to_owned())),
        }
    }
    tools.into_iter().map(|(name, version)| ToolRequest { name, version }).collect()
}

/// By the catalogue's name; `None` where no version was given.
struct Asked<'a> {
    catalogue: &'a dyn ToolCatalogue,
    versions: BTreeMap<String, Option<String>>,
}

impl Asked<'_> {
    /// The catalogue's name.
    fn find(&self, field: &str, name: &str, version: Option<&str>) -> ApiResult<String> {
        ToolRequest::new(name, version)
            .map_err(|text| ApiError::invalid(format!("{field}: {text}")))?;
        self.catalogue.find(name).map_err(|fault| ApiError::from(fault).in_body(field))
    }

    fn add(&mut self, field: &str, name: &str, version: Option<&str>) -> ApiResult<()> {
        let found = self.find(field, name, version)?;
        let version = version.map(ToOwned::to_owned);
        match self.versions.entry(found) {
            Entry::Vacant(entry) => drop(entry.insert(version)),
            Entry::Occupied(mut entry) => match (entry.get(), &version) {
                (Some(one), Some(other)) if one != other => {
                    let text = format!(
                        "{field}: {} is asked for as {one} and as {other}; one VM has one version \
                         of a tool",
                        entry.key()
                    );
                    return Err(ApiError::invalid(text));
                }
                (None, Some(_)) => drop(entry.insert(version)),
                (_, _) => {}
            },
        }
        Ok(())
    }
}
