//! The audit log.

use super::{Client, ClientError, PageQuery, http::Query};
use crate::{AuditView, Page};

/// Filters of `GET /audit`. Empty: the key's own project.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AuditQuery {
    /// Id or name of another project.
    pub project: Option<String>,
    /// Every project, and those without a key.
    pub all: bool,
    /// An id.
    pub key: Option<String>,
    /// Several are an "or".
    pub outcomes: Vec<String>,
    pub page: PageQuery,
}

impl Client {
    /// Newest first.
    pub async fn audit(&self, query: &AuditQuery) -> Result<Page<AuditView>, ClientError> {
        let mut q = Query::default();
        q.opt("project", query.project.as_deref()).opt("all", query.all.then_some("true"));
        q.opt("key", query.key.as_deref()).all("outcome", &query.outcomes).page(&query.page);
        self.get("/audit", &q).await
    }
}
