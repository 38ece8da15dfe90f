//! API keys as they are kept.

use aether_types::{Access, KeyId, ProjectId, Role, Scope, Timestamp};

/// An API key: a keyed hash, never the key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiKey {
    pub id: KeyId,
    pub name: String,
    /// The first characters of the key, to recognise it by.
    pub prefix: String,
    /// Zeros once it is revoked: no key has that hash.
    pub hash: [u8; 32],
    pub project_id: ProjectId,
    pub role: Role,
    /// Empty: all that the role may.
    pub scopes: Vec<Scope>,
    /// `None`: the installation itself, or a key of another project.
    pub created_by: Option<KeyId>,
    pub created_at: Timestamp,
    pub expires_at: Option<Timestamp>,
    /// To a few minutes; see [`crate::Store::key_used`].
    pub last_used_at: Option<Timestamp>,
    pub revoked_at: Option<Timestamp>,
}

impl ApiKey {
    /// All that decides what it may do.
    #[must_use]
    pub fn access(&self) -> Access {
        Access { project: self.project_id, role: self.role, scopes: self.scopes.clone() }
    }

    #[must_use]
    pub fn has_expired(&self, now: Timestamp) -> bool {
        self.expires_at.is_some_and(|at| at <= now)
    }
}

#[derive(Debug, Clone, Default)]
pub struct KeyFilter {
    /// `None`: of every project.
    pub project: Option<ProjectId>,
    /// Those that are revoked too.
    pub revoked: bool,
}
