use std::net::IpAddr;

use aether_types::{AuditId, KeyId, ProjectId, Scope, Timestamp};
use serde::{Deserialize, Serialize};

/// Who did what. Written once, never changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct AuditView {
    pub id: AuditId,
    pub at: Timestamp,
    /// Of who asked; `null`: nobody that is known.
    pub project_id: Option<ProjectId>,
    /// `null`: nobody that is known, or one with a token.
    pub key_id: Option<KeyId>,
    /// What the key begins with; of a token `jwt:ISSUER/SUBJECT`.
    pub key_prefix: Option<String>,
    /// What was needed, as `vms:write`.
    pub action: Option<Scope>,
    pub method: String,
    /// As it was asked for, with ids and names.
    pub path: String,
    /// Where what was made can be found.
    pub made: Option<String>,
    /// `done`, `refused`, `failed`, or `abandoned`: the client left before the answer.
    pub outcome: String,
    /// Of the answer; 0 where there was none.
    pub status: u16,
    /// Of the problem.
    pub code: Option<String>,
    pub request_id: String,
    /// Of the last hop.
    pub address: Option<IpAddr>,
}
