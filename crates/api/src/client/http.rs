//! Requests and answers.

use std::time::Duration;

use bytes::Bytes;
use reqwest::{
    Method, Response, StatusCode,
    header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue},
};
use serde::{Serialize, de::DeserializeOwned};

use super::{CallOptions, Client, ClientError, PageQuery, Trust, Waited};
use crate::{Health, IDEMPOTENCY_KEY_HEADER, PREFIX, PROBLEM_MEDIA_TYPE, Problem, format_wait};

/// For the TCP connection alone; answers may be waited for much longer.
pub(super) const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// The longest answer that is not a stream. Kept output is at most 2 MiB and grows in JSON.
const ANSWER_BYTES_MAX: usize = 64 * 1024 * 1024;

pub(super) fn connect(base: &str, key: Option<&str>, trust: &Trust) -> Result<Client, ClientError> {
    let base = base.trim_end_matches('/');
    let url = || ClientError::Url { url: base.to_owned() };
    let parsed = reqwest::Url::parse(base).map_err(|_| url())?;
    if !matches!(parsed.scheme(), "http" | "https") || parsed.host_str().is_none() {
        return Err(url());
    }
    if key.is_some_and(|k| bearer(k).is_none()) {
        return Err(ClientError::Key);
    }
    // An error: the program has chosen another one.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let tls = (parsed.scheme() == "https").then(|| trust.config()).transpose()?;
    let mut http = reqwest::Client::builder()
        .connect_timeout(CONNECT_LIMIT)
        .redirect(reqwest::redirect::Policy::none())
        .user_agent(concat!("aether/", env!("CARGO_PKG_VERSION")));
    if let Some(config) = &tls {
        http = http.tls_backend_preconfigured(rustls::ClientConfig::clone(config));
    }
    let http =
        http.build().map_err(|error| ClientError::transport("prepare the client")(error.into()))?;
    Ok(Client { http, tls, base: base.to_owned(), key: key.map(str::to_owned) })
}

pub(super) fn bearer(key: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(&format!("Bearer {}", key.trim())).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// The parameters of a request.
#[derive(Debug, Default)]
pub(super) struct Query(Vec<(&'static str, String)>);

impl Query {
    pub(super) fn add(&mut self, name: &'static str, value: impl Into<String>) -> &mut Self {
        self.0.push((name, value.into()));
        self
    }

    pub(super) fn opt(&mut self, name: &'static str, value: Option<&str>) -> &mut Self {
        if let Some(value) = value {
            self.add(name, value);
        }
        self
    }

    pub(super) fn all(&mut self, name: &'static str, values: &[String]) -> &mut Self {
        for value in values {
            self.add(name, value);
        }
        self
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn pairs(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (*name, value.as_str()))
    }

    pub(super) fn page(&mut self, page: &PageQuery) -> &mut Self {
        self.opt("limit", page.limit.map(|l| l.to_string()).as_deref());
        self.opt("cursor", page.cursor.as_deref())
    }
}

/// One segment of a path, whatever is in it.
pub(super) fn segment(text: &str) -> String {
    use std::fmt::Write as _;
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_') {
            out.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

impl Client {
    pub(super) fn request(
        &self,
        method: Method,
        path: &str,
        query: &Query,
    ) -> reqwest::RequestBuilder {
        let mut request = self.http.request(method, format!("{}{PREFIX}{path}", self.base));
        if !query.0.is_empty() {
            request = request.query(&query.0);
        }
        match self.key.as_deref().and_then(bearer) {
            Some(value) => request.header(AUTHORIZATION, value),
            None => request,
        }
    }

    /// Sends, and gives the answer if it is a success.
    pub(super) async fn send(
        &self,
        request: reqwest::RequestBuilder,
    ) -> Result<Response, ClientError> {
        let response = self.send_any(request).await?;
        if response.status().is_success() { Ok(response) } else { Err(problem(response).await) }
    }

    async fn send_any(&self, request: reqwest::RequestBuilder) -> Result<Response, ClientError> {
        request.send().await.map_err(|error| {
            if error.is_connect() {
                ClientError::connect(&self.base, error.into())
            } else {
                ClientError::transport("send the request")(error.without_url().into())
            }
        })
    }

    pub(super) async fn get<T: DeserializeOwned>(
        &self,
        path: &str,
        query: &Query,
    ) -> Result<T, ClientError> {
        decode(self.send(self.request(Method::GET, path, query)).await?).await
    }

    pub(super) async fn get_bytes(&self, path: &str, query: &Query) -> Result<Bytes, ClientError> {
        collect(self.send(self.request(Method::GET, path, query)).await?).await
    }

    pub(super) async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        query: &Query,
        body: Option<&(impl Serialize + Sync)>,
    ) -> Result<T, ClientError> {
        let mut request = self.request(Method::POST, path, query);
        if let Some(body) = body {
            request = request.json(body);
        }
        decode(self.send(request).await?).await
    }

    pub(super) async fn put<T: DeserializeOwned>(
        &self,
        path: &str,
        query: &Query,
        body: &(impl Serialize + Sync),
    ) -> Result<T, ClientError> {
        decode(self.send(self.request(Method::PUT, path, query).json(body)).await?).await
    }

    pub(super) async fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        decode(self.send(self.request(Method::DELETE, path, &Query::default())).await?).await
    }

    pub(super) async fn get_health(&self) -> Result<Health, ClientError> {
        let request = self.request(Method::GET, "/health", &Query::default());
        let response = self.send_any(request).await?;
        match response.status() {
            StatusCode::OK => decode(response).await,
            StatusCode::SERVICE_UNAVAILABLE if !is_problem(&response) => decode(response).await,
            _ => Err(problem(response).await),
        }
    }

    /// A request that makes a task.
    pub(super) async fn submit<T: DeserializeOwned, A: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&(impl Serialize + Sync)>,
        options: &CallOptions,
    ) -> Result<Waited<T, A>, ClientError> {
        self.submit_with(method, path, Query::default(), body, options).await
    }

    pub(super) async fn submit_with<T: DeserializeOwned, A: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        mut query: Query,
        body: Option<&(impl Serialize + Sync)>,
        options: &CallOptions,
    ) -> Result<Waited<T, A>, ClientError> {
        query.opt("wait", options.wait.map(format_wait).as_deref());
        let mut request = self.request(method, path, &query);
        if let Some(body) = body {
            request = request.json(body);
        }
        if let Some(key) = &options.idempotency_key {
            request = request.header(IDEMPOTENCY_KEY_HEADER, key);
        }
        let response = self.send(request).await?;
        if response.status() == StatusCode::ACCEPTED {
            decode(response).await.map(Waited::Accepted)
        } else {
            decode(response).await.map(Waited::Done)
        }
    }
}

fn is_problem(response: &Response) -> bool {
    let kind = response.headers().get(CONTENT_TYPE);
    kind.is_some_and(|v| v.as_bytes().starts_with(PROBLEM_MEDIA_TYPE.as_bytes()))
}

pub(super) async fn problem(response: Response) -> ClientError {
    let status = response.status();
    if !is_problem(&response) {
        return ClientError::unexpected(format!("status {status}"));
    }
    match decode::<Problem>(response).await {
        Ok(problem) => ClientError::Problem(Box::new(problem)),
        Err(error) => error,
    }
}

async fn collect(mut response: Response) -> Result<Bytes, ClientError> {
    let mut body = Vec::new();
    let context = ClientError::transport;
    while let Some(chunk) = response
        .chunk()
        .await
        .map_err(|error| context("read the answer")(error.without_url().into()))?
    {
        if body.len() + chunk.len() > ANSWER_BYTES_MAX {
            return Err(ClientError::unexpected("it is too long"));
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body.into())
}

pub(super) async fn decode<T: DeserializeOwned>(response: Response) -> Result<T, ClientError> {
    let status = response.status();
    let body = collect(response).await?;
    serde_json::from_slice(&body)
        .map_err(|error| ClientError::unexpected(format!("status {status}, {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_stays_one() {
        assert_eq!(segment("my-vm_1"), "my-vm_1");
        assert_eq!(segment("../a b?"), "%2E%2E%2Fa%20b%3F");
    }

    #[test]
    fn what_is_no_server_is_refused_at_once() {
        let connect = |base: &str, key| connect(base, key, &Trust::System);
        for url in ["", "127.0.0.1:8080", "ftp://host", "http://"] {
            assert!(matches!(connect(url, None), Err(ClientError::Url { .. })), "{url}");
        }
        assert!(matches!(connect("http://h", Some("a\nb")), Err(ClientError::Key)));
        assert_eq!(connect("http://h:1/", None).unwrap().base(), "http://h:1");
    }
}
