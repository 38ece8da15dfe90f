//! The outermost layer: what every request goes through, in this order.
//!
//! 1. It gets an id, the client's own where that is sane.
//! 2. Its `Host` is checked.
//! 3. It takes a place among the requests in hand, or is answered 503 at once. Health needs none.
//! 4. A panic in it becomes a 500, and the next one is served.
//! 5. Its error, if any, is written as a problem document.

use std::{panic::AssertUnwindSafe, sync::Arc};

use aether_api::REQUEST_ID_HEADER;
use aether_types::ErrorCode;
use axum::{
    extract::{Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    middleware::Next,
    response::{IntoResponse as _, Response},
};
use futures::FutureExt as _;
use tracing::Instrument as _;

use crate::{
    health,
    metrics::Measured,
    parts::App,
    problem::{self, ApiError},
};

/// An answer is data: no browser shows it as a page, in a frame, or as what it is not.
const SECURITY: [(HeaderName, &str); 4] = [
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::X_FRAME_OPTIONS, "DENY"),
    (header::CONTENT_SECURITY_POLICY, "default-src 'none'; frame-ancestors 'none'"),
    (header::REFERRER_POLICY, "no-referrer"),
];

/// A year: a browser that has been here once asks for nothing in clear any more.
const TRANSPORT_SECURITY: &str = "max-age=31536000";

const REQUEST_ID_BYTES_MAX: usize = 64;

/// As it is answered and logged.
#[derive(Debug, Clone)]
pub(crate) struct RequestId(pub(crate) Arc<str>);

pub(crate) async fn edge(State(app): State<App>, mut request: Request, next: Next) -> Response {
    let id = request_id(request.headers());
    request.extensions_mut().insert(RequestId(id.as_str().into()));
    let span = tracing::info_span!(
        "request", id, method = %request.method(), path = request.uri().path()
    );
    async {
        let measured = Measured::begin(&request);
        let origins = &app.parts.config.origins;
        let origin = origins.allowed(request.headers());
        let answer = match origins.preflight(&request) {
            Some(answer) => answer,
            None => admit(&app, request, next).await,
        };
        let mut response = problem::render(answer, &id);
        origins.tell(origin, response.headers_mut());
        if let Ok(value) = HeaderValue::from_str(&id) {
            response.headers_mut().insert(REQUEST_ID_HEADER, value);
        }
        let headers = response.headers_mut();
        // What says nothing else is for this client and this moment alone.
        headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
        for (name, value) in SECURITY {
            headers.insert(name, HeaderValue::from_static(value));
        }
        if app.parts.tls.is_some() {
            let value = HeaderValue::from_static(TRANSPORT_SECURITY);
            headers.insert(header::STRICT_TRANSPORT_SECURITY, value);
        }
        measured.answered(&response);
        let status = response.status().as_u16();
        tracing::debug!(status, duration_us = measured.begun.elapsed().as_micros(), "answered");
        response
    }
    .instrument(span)
    .await
}

async fn admit(app: &App, request: Request, next: Next) -> Response {
    let host = request.headers().get(header::HOST).map(|h| h.to_str().unwrap_or_default());
    if !app.parts.hosts.allows(host) {
        return ApiError::new(ErrorCode::InvalidRequest, "this host name is not served here")
            .field("host")
            .status(StatusCode::MISDIRECTED_REQUEST)
            .into_response();
    }
    let _place = match Arc::clone(&app.requests).try_acquire_owned() {
        Ok(place) => Some(place),
        Err(_) if request.uri().path() == health::PATH => None,
        Err(_) => return ApiError::full().into_response(),
    };
    match AssertUnwindSafe(next.run(request)).catch_unwind().await {
        Ok(response) => response,
        Err(payload) => {
            let text = payload.downcast_ref::<&str>().copied();
            let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
            tracing::error!(panic = text.unwrap_or("no text"), "a handler panicked");
            ApiError::internal().into_response()
        }
    }
}

fn request_id(headers: &HeaderMap) -> String {
    let sane = |id: &&str| {
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
        (1..=REQUEST_ID_BYTES_MAX).contains(&id.len()) && id.bytes().all(plain)
    };
    let given = headers.get(REQUEST_ID_HEADER).and_then(|id| id.to_str().ok()).filter(sane);
    given.map_or_else(|| uuid::Uuid::now_v7().to_string(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_sane_id_of_the_client_is_kept() {
        let with = |id: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(REQUEST_ID_HEADER, id.parse().unwrap());
            request_id(&headers)
        };
        assert_eq!(with("build-17.a_B"), "build-17.a_B");
        for odd in ["", "a b", "a/b", "<x>", &"x".repeat(65)] {
            assert_ne!(with(odd), odd);
        }
        assert_eq!(request_id(&HeaderMap::new()).len(), 36);
    }
}
