use aether_types::{KeyId, ProjectId, Role, Scope, Timestamp};
use serde::{Deserialize, Serialize};

/// `POST /keys`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct CreateKey {
    /// For people; need not be unique.
    #[cfg_attr(feature = "schema", schemars(with = "aether_types::schema::KeyName"))]
    pub name: String,
    pub role: Role,
    /// Empty: all that the role may.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(feature = "schema", schemars(length(max = aether_types::limits::KEY_SCOPES_MAX)))]
    pub scopes: Vec<Scope>,
    /// From now; without it the key is good until it is revoked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = aether_types::limits::KEY_TTL_S_MIN, max = aether_types::limits::KEY_TTL_S_MAX)))]
    pub expires_in_s: Option<u64>,
    /// Id or name of another project than one's own; for who may see all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub project: Option<String>,
}

/// A key as it is kept: never the key itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct KeyView {
    pub id: KeyId,
    pub name: String,
    /// The first characters, to recognise it by.
    pub prefix: String,
    pub project_id: ProjectId,
    pub role: Role,
    pub scopes: Vec<Scope>,
    /// `null`: the installation itself, an admin of the platform, or before this was kept.
    pub created_by: Option<KeyId>,
    pub created_at: Timestamp,
    pub expires_at: Option<Timestamp>,
    /// To a few minutes.
    pub last_used_at: Option<Timestamp>,
    pub revoked_at: Option<Timestamp>,
}

/// The answer to the creation of a key: the only one that has the key in it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct KeyCreated {
    /// To be sent as `Authorization: Bearer KEY`.
    pub key: String,
    #[serde(flatten)]
    pub view: KeyView,
}

// The key must not reach a log.
impl std::fmt::Debug for KeyCreated {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KeyCreated").field("view", &self.view).finish_non_exhaustive()
    }
}
