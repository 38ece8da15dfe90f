//! Names of snapshots, templates and projects. Paths take a name or an id, so that no name looks like one.

use aether_types::{
    SnapshotId,
    limits::{PROJECT_NAME_BYTES_MAX, SNAPSHOT_NAME_BYTES_MAX, TEMPLATE_NAME_BYTES_MAX},
    template::{DEFAULT_TAG, NO_TEMPLATE},
};

use crate::problem::{ApiError, ApiResult};

pub(crate) fn snapshot_name(name: String) -> ApiResult<String> {
    plain("name", name, SNAPSHOT_NAME_BYTES_MAX)
}

pub(crate) fn project_name(name: String) -> ApiResult<String> {
    plain("name", name, PROJECT_NAME_BYTES_MAX)
}

/// `name:tag`, or a name alone, which means its `latest`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TemplateName {
    pub(crate) name: String,
    pub(crate) tag: String,
}

impl TemplateName {
    /// Of a template to be.
    pub(crate) fn new(name: String, tag: Option<String>) -> ApiResult<Self> {
        let tag = tag.unwrap_or_else(|| DEFAULT_TAG.to_owned());
        if name == NO_TEMPLATE {
            let text = format!("name: `{NO_TEMPLATE}` stands for no template; choose another");
            return Err(ApiError::invalid(text));
        }
        Ok(Self {
            name: plain("name", name, TEMPLATE_NAME_BYTES_MAX)?,
            tag: plain("tag", tag, TEMPLATE_NAME_BYTES_MAX)?,
        })
    }

    /// As it is written in a path or a request; whether such a template can be is not asked.
    pub(crate) fn parse(text: &str) -> Self {
        let (name, tag) = text.split_once(':').unwrap_or((text, DEFAULT_TAG));
        Self { name: name.to_owned(), tag: tag.to_owned() }
    }
}

fn plain(field: &str, text: String, bytes_max: usize) -> ApiResult<String> {
    let inner = |c: char| matches!(c, 'a'..='z' | '0'..='9' | '-' | '_' | '.');
    let first = |c: char| matches!(c, 'a'..='z' | '0'..='9');
    let is_id = text.parse::<SnapshotId>().is_ok();
    if text.starts_with(first) && text.chars().all(inner) && text.len() <= bytes_max && !is_id {
        return Ok(text);
    }
    Err(ApiError::invalid(format!(
        "{field}: 1 to {bytes_max} of a-z 0-9 - _ . with a letter or a digit first, and not an id"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_without_a_tag_means_the_latest() {
        assert_eq!(TemplateName::parse("a").tag, "latest");
        let TemplateName { name, tag } = TemplateName::parse("a:1.2");
        assert_eq!((name.as_str(), tag.as_str()), ("a", "1.2"));
    }

    #[test]
    fn a_name_can_stand_in_a_path() {
        for good in ["a", "0", "my-app_1.2", &"x".repeat(63)] {
            assert!(snapshot_name(good.to_owned()).is_ok(), "{good}");
        }
        let id = SnapshotId::new().to_string();
        for bad in ["", "-a", ".", "A", "a:b", "a/b", "a b", "ä", &"x".repeat(64), id.as_str()] {
            let error = snapshot_name(bad.to_owned()).unwrap_err();
            assert_eq!(error.problem().field.as_deref(), Some("name"), "{bad}");
        }
    }
}
