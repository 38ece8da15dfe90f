//! API keys.

use aether_types::KeyId;

use super::{Client, ClientError, PageQuery, http::Query};
use crate::{CreateKey, KeyCreated, KeyView, Page};

/// Filters of `GET /keys`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KeyQuery {
    /// Those that are revoked too.
    pub revoked: bool,
    pub page: PageQuery,
}

impl Client {
    /// The answer has the key in it, this once.
    pub async fn create_key(&self, request: &CreateKey) -> Result<KeyCreated, ClientError> {
        self.post("/keys", &Query::default(), Some(request)).await
    }

    /// Newest first.
    pub async fn keys(&self, query: &KeyQuery) -> Result<Page<KeyView>, ClientError> {
        let mut q = Query::default();
        q.opt("revoked", query.revoked.then_some("true")).page(&query.page);
        self.get("/keys", &q).await
    }

    pub async fn key(&self, id: KeyId) -> Result<KeyView, ClientError> {
        self.get(&format!("/keys/{id}"), &Query::default()).await
    }

    /// It opens nothing from now on.
    pub async fn revoke_key(&self, id: KeyId) -> Result<KeyView, ClientError> {
        self.delete(&format!("/keys/{id}")).await
    }
}
