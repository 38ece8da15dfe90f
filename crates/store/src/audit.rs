//! Entries of the audit log.

use std::{net::IpAddr, str::FromStr};

use aether_types::{AuditId, ErrorCode, KeyId, ProjectId, Scope, Timestamp};

/// How a call ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Done,
    /// Who asked may not.
    Refused,
    /// Anything else that it was not done for.
    Failed,
    /// The client left before the answer; it may have been done.
    Abandoned,
}

impl Outcome {
    pub const ALL: &'static [Self] = &[Self::Done, Self::Refused, Self::Failed, Self::Abandoned];

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Refused => "refused",
            Self::Failed => "failed",
            Self::Abandoned => "abandoned",
        }
    }
}

impl FromStr for Outcome {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .iter()
            .copied()
            .find(|outcome| outcome.as_str() == text)
            .ok_or_else(|| "one of done, refused, failed, abandoned is needed".to_owned())
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditEntry {
    pub id: AuditId,
    pub at: Timestamp,
    /// Of who asked; `None`: nobody that is known.
    pub project_id: Option<ProjectId>,
    pub key_id: Option<KeyId>,
    pub key_prefix: Option<String>,
    /// What was needed; `None` where that is not known.
    pub action: Option<Scope>,
    pub method: String,
    /// Below the prefix of the API, as it was asked for.
    pub path: String,
    /// Where what was made can be found.
    pub made: Option<String>,
    pub outcome: Outcome,
    /// Of the answer; 0 where there was none.
    pub status: u16,
    pub code: Option<ErrorCode>,
    pub request_id: String,
    pub address: Option<IpAddr>,
}

#[derive(Debug, Clone, Default)]
pub struct AuditFilter {
    /// `None`: of every project, and of nobody that is known.
    pub project: Option<ProjectId>,
    pub key: Option<KeyId>,
    /// Empty: every outcome.
    pub outcomes: Vec<Outcome>,
    pub since: Option<Timestamp>,
    pub until: Option<Timestamp>,
}
