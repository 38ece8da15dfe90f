//! Which pages of other origins may read answers in a browser: those on the list, and none where there
//! is no list. Keys are no cookies, so that no page sends one that it was not given.

use std::collections::BTreeSet;

use axum::{
    extract::Request,
    http::{HeaderMap, HeaderValue, Method, StatusCode, header},
    response::{IntoResponse as _, Response},
};

const METHODS: &str = "GET, POST, PUT, DELETE";
const HEADERS: &str = "authorization, content-type, idempotency-key, x-request-id";
const EXPOSED: &str = "location, ratelimit, ratelimit-policy, retry-after, x-request-id, \
     x-output-bytes, x-output-cut-bytes, x-output-cut-at, x-file-size, x-file-mode";
const MAX_AGE_S: &str = "600";

/// Origins such as `https://board.example`, exactly as a browser sends them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Origins(BTreeSet<String>);

impl Origins {
    /// Fails with what is no origin. A wildcard is none: whoever wants all must know them.
    pub fn new<S: AsRef<str>>(origins: &[S]) -> Result<Self, String> {
        let check = |origin: &S| {
            let origin = origin.as_ref();
            let rest = origin.strip_prefix("https://").or(origin.strip_prefix("http://"));
            let plain = |c: char| {
                c.is_ascii_lowercase()
                    || c.is_ascii_digit()
                    || matches!(c, '.' | '-' | ':' | '[' | ']')
            };
            match rest {
                Some(host) if !host.is_empty() && host.chars().all(plain) => Ok(origin.to_owned()),
                Some(_) | None => {
                    Err(format!("`{origin}` is no origin such as https://board.example:8443"))
                }
            }
        };
        origins.iter().map(check).collect::<Result<_, _>>().map(Self)
    }

    /// The origin of a request, where it is on the list.
    pub(crate) fn allowed(&self, headers: &HeaderMap) -> Option<HeaderValue> {
        let origin = headers.get(header::ORIGIN)?;
        self.0.contains(origin.to_str().ok()?).then(|| origin.clone())
    }

    /// The answer to a browser that asks whether a page may send a request.
    pub(crate) fn preflight(&self, request: &Request) -> Option<Response> {
        let asks = request.headers().contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
        if request.method() != Method::OPTIONS || !asks {
            return None;
        }
        self.allowed(request.headers())?;
        let headers = [
            (header::ACCESS_CONTROL_ALLOW_METHODS, METHODS),
            (header::ACCESS_CONTROL_ALLOW_HEADERS, HEADERS),
            (header::ACCESS_CONTROL_MAX_AGE, MAX_AGE_S),
        ];
        Some((StatusCode::NO_CONTENT, headers).into_response())
    }

    pub(crate) fn tell(&self, allowed: Option<HeaderValue>, headers: &mut HeaderMap) {
        if self.0.is_empty() {
            return;
        }
        // An answer for one origin is none for another, wherever it is kept.
        headers.append(header::VARY, HeaderValue::from_static("origin"));
        if let Some(origin) = allowed {
            headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
            let exposed = HeaderValue::from_static(EXPOSED);
            headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, exposed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_origins_are_on_the_list() {
        assert!(Origins::new(&["https://board.example", "http://localhost:3000"]).is_ok());
        for bad in
            ["*", "null", "board.example", "https://", "https://a/b", "https://A.example", ""]
        {
            assert!(Origins::new(&[bad]).is_err(), "{bad}");
        }
    }
}
