//! Templates and pools.

use std::time::Duration;

use reqwest::Method;

use super::{
    CallOptions, Client, ClientError, PageQuery, Waited,
    http::{Query, segment},
};
use crate::{BuildTemplate, Page, PoolView, TemplateView, format_wait};

/// Filters of `GET /templates`. Empty: every template that is not deleted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TemplateQuery {
    /// State names; several are an "or".
    pub states: Vec<String>,
    /// Of this name, with any tag.
    pub name: Option<String>,
    pub page: PageQuery,
}

/// What a question about a template waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Since {
    /// The end of the build.
    Build,
    /// A later generation than this one, or the end of the build.
    Generation(i64),
}

/// In every method `template` is an id, a name, or `name:tag`.
impl Client {
    /// With a wait: the template, once it is ready.
    pub async fn build_template(
        &self,
        request: &BuildTemplate,
        options: &CallOptions,
    ) -> Result<Waited<TemplateView>, ClientError> {
        self.submit(Method::POST, "/templates", Some(request), options).await
    }

    /// Newest first.
    pub async fn templates(
        &self,
        query: &TemplateQuery,
    ) -> Result<Page<TemplateView>, ClientError> {
        let mut q = Query::default();
        q.all("state", &query.states).opt("name", query.name.as_deref()).page(&query.page);
        self.get("/templates", &q).await
    }

    pub async fn template(&self, template: &str) -> Result<TemplateView, ClientError> {
        self.get(&format!("/templates/{}", segment(template)), &Query::default()).await
    }

    /// The template when what is waited for has come, or as it is when the time is over.
    pub async fn template_wait(
        &self,
        template: &str,
        since: Since,
        wait: Duration,
    ) -> Result<TemplateView, ClientError> {
        let mut q = Query::default();
        q.add("wait", format_wait(wait));
        if let Since::Generation(generation) = since {
            q.add("generation", generation.to_string());
        }
        self.get(&format!("/templates/{}", segment(template)), &q).await
    }

    pub async fn delete_template(&self, template: &str) -> Result<TemplateView, ClientError> {
        self.delete(&format!("/templates/{}", segment(template))).await
    }

    pub async fn pools(&self) -> Result<Page<PoolView>, ClientError> {
        self.get("/pools", &Query::default()).await
    }
}
