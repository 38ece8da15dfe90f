//! Loki's HTTP API, within bounds of time and size.

use std::time::Duration;

use futures::StreamExt as _;
use reqwest::{
    Client, Response, StatusCode, Url,
    header::{CONTENT_TYPE, RETRY_AFTER},
    redirect::Policy,
};

use super::{
    answer::{Answer, Found},
    logql, push,
};
use crate::{LogError, LogFilter};

const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// Loki may ask for patience; not for more than this.
const RETRY_AFTER_MAX: Duration = Duration::from_mins(5);
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// Shown of what Loki says about a refusal.
const REASON_BYTES_MAX: usize = 500;
const FORM: &str = "application/x-www-form-urlencoded";

#[derive(Clone)]
pub(crate) struct LokiClient {
    http: Client,
    push: Url,
    query: Url,
    /// Without user and password, for people.
    shown: String,
    limit: Duration,
}

// The addresses may have a password.
impl std::fmt::Debug for LokiClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LokiClient").field("url", &self.shown).finish_non_exhaustive()
    }
}

/// What became of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Pushed {
    Taken,
    /// It will never be taken.
    Refused(String),
    /// It may be taken later; where Loki says when, not before.
    Later {
        reason: String,
        after: Option<Duration>,
    },
}

/// Which part of the past is read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Range {
    pub(crate) start_ns: Option<i64>,
    pub(crate) end_ns: Option<i64>,
    pub(crate) limit: u32,
    pub(crate) order: Order,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    LatestFirst,
    EarliestFirst,
}

impl LokiClient {
    pub(crate) fn new(url: &str, limit: Duration) -> Result<Self, LogError> {
        // An error says that the process has one already, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let bad = |shown: String, reason: &dyn std::fmt::Display| LogError::LokiAddress {
            shown,
            reason: reason.to_string(),
        };
        // What cannot be read may hold a password anywhere, so it is not shown.
        let base = Url::parse(url).map_err(|error| bad("...".to_owned(), &error))?;
        let shown = shown(&base);
        if !matches!(base.scheme(), "http" | "https") || base.host().is_none() {
            return Err(bad(shown, &"it begins with http:// or https:// and a host"));
        }
        let at = |path: &str| {
            let mut url = base.clone();
            url.set_path(&format!("{}/loki/api/v1/{path}", base.path().trim_end_matches('/')));
            url.set_query(None);
            url
        };
        let http = Client::builder()
            .user_agent(concat!("aetherium/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_LIMIT)
            .timeout(limit)
            // A password is for this address alone.
            .redirect(Policy::none())
            // The environment is not read here.
            .no_proxy()
            .build()
            .map_err(|error| bad(shown.clone(), &innermost(&error)))?;
        Ok(Self { http, push: at("push"), query: at("query_range"), shown, limit })
    }

    pub(crate) async fn push(&self, body: Vec<u8>) -> Pushed {
        let sent = self
            .http
            .post(self.push.clone())
            .header(CONTENT_TYPE, push::CONTENT_TYPE)
            .body(body)
            .send()
            .await;
        let response = match sent {
            Ok(response) if response.status().is_success() => return Pushed::Taken,
            Ok(response) => response,
            Err(error) => return Pushed::Later { reason: self.broken(&error), after: None },
        };
        let (status, after) = (response.status(), retry_after(&response));
        let reason = self.words(response).await;
        match status {
            // What is wrong with the batch is wrong with it for ever.
            StatusCode::BAD_REQUEST
            | StatusCode::PAYLOAD_TOO_LARGE
            | StatusCode::UNSUPPORTED_MEDIA_TYPE
            | StatusCode::UNPROCESSABLE_ENTITY => Pushed::Refused(reason),
            // Also a wrong path or password: it is mended by people, and the lines wait.
            _ => Pushed::Later { reason, after },
        }
    }

    pub(crate) async fn query(
        &self,
        filter: &LogFilter,
        range: Range,
    ) -> Result<Vec<Found>, LogError> {
        let unavailable = |reason| LogError::LokiUnavailable { reason };
        let asked = self
            .http
            .post(self.query.clone())
            .header(CONTENT_TYPE, FORM)
            .header("x-loki-response-encoding-flags", "categorize-labels")
            .body(form(filter, range))
            .send();
        let response = asked.await.map_err(|error| unavailable(self.broken(&error)))?;
        let status = response.status();
        if status.is_client_error() && status != StatusCode::TOO_MANY_REQUESTS {
            return Err(LogError::LokiRefuses { reason: self.words(response).await });
        }
        if !status.is_success() {
            return Err(unavailable(self.words(response).await));
        }
        let bytes = read(response, ANSWER_BYTES_MAX).await.map_err(|e| {
            unavailable(e.map_or_else(
                || format!("{} answers more than {ANSWER_BYTES_MAX} bytes", self.shown),
                |error| self.broken(&error),
            ))
        })?;
        let answer = serde_json::from_slice::<Answer>(&bytes).ok().and_then(Answer::entries);
        answer.ok_or_else(|| LogError::LokiRefuses {
            reason: format!("{} answers what is no list of streams", self.shown),
        })
    }

    fn broken(&self, error: &reqwest::Error) -> String {
        if error.is_timeout() {
            return format!("{}: no answer within {} s", self.shown, self.limit.as_secs());
        }
        format!("{}: {}", self.shown, innermost(error))
    }

    /// A refusal in Loki's words, on one line.
    async fn words(&self, response: Response) -> String {
        let status = response.status();
        let bytes = read(response, REASON_BYTES_MAX).await.unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let text: String =
            text.trim().chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        format!("{}: {status}: {text}", self.shown)
    }
}

/// POST, since a search text may be longer than an address.
fn form(filter: &LogFilter, range: Range) -> String {
    let mut form = form_urlencoded::Serializer::new(String::new());
    form.append_pair("query", &logql::query(filter));
    form.append_pair("limit", &range.limit.to_string());
    form.append_pair(
        "direction",
        match range.order {
            Order::LatestFirst => "backward",
            Order::EarliestFirst => "forward",
        },
    );
    // Loki looks back one hour where it is told nothing.
    form.append_pair("start", &range.start_ns.unwrap_or(0).to_string());
    if let Some(end) = range.end_ns {
        form.append_pair("end", &end.to_string());
    }
    form.finish()
}

/// `Err(None)`: there is more than that. A refusal is cut, and is not an error.
async fn read(response: Response, max: usize) -> Result<Vec<u8>, Option<reqwest::Error>> {
    let is_refusal = !response.status().is_success();
    let mut bytes = Vec::new();
    let mut body = response.bytes_stream();
    while let Some(part) = body.next().await {
        let part = part.map_err(Some)?;
        let room = max - bytes.len();
        if part.len() > room {
            if is_refusal {
                bytes.extend_from_slice(&part[..room]);
                return Ok(bytes);
            }
            return Err(None);
        }
        bytes.extend_from_slice(&part);
    }
    Ok(bytes)
}

/// In seconds; a date is rare, and then our own delay is as good.
fn retry_after(response: &Response) -> Option<Duration> {
    let seconds = response.headers().get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds).min(RETRY_AFTER_MAX))
}

/// The innermost cause says what is wrong; the outer ones only where, address and all.
fn innermost(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

fn shown(url: &Url) -> String {
    let mut url = url.clone();
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.set_query(None);
    url.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_checked_and_its_password_not_shown() {
        let new = |url| LokiClient::new(url, Duration::from_secs(1));
        let client = new("http://me:secret@loki:3100/prefix/").unwrap();
        assert_eq!(client.push.path(), "/prefix/loki/api/v1/push");
        assert_eq!(client.push.password(), Some("secret"));
        assert_eq!(client.shown, "http://loki:3100/prefix/");
        for wrong in ["loki:3100", "ftp://me:secret@loki", "http://me:secret@"] {
            let error = new(wrong).unwrap_err();
            assert!(!format!("{error} {error:?}").contains("secret"), "{error:?}");
        }
    }
}
