//! The OpenAPI document of what is served: made of the table of routes, of what each says of itself,
//! and of the types of bodies.
//!
//! What it does not say: which of two fields exclude each other, and bounds in bytes where
//! characters have several. The server refuses more than the document does, never less.

mod document;
mod operation;

use std::sync::LazyLock;

use axum::{
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse as _, Response},
};

pub(crate) use document::{Entry, document};
pub(crate) use operation::{JSON, Operation, bytes, of, operation, several, text, wait};

use crate::{extract::Params, problem::ApiResult, routes};

pub(crate) const PATH: &str = "/openapi.json";

/// A client asks each time whether it has changed.
const CACHING: HeaderValue = HeaderValue::from_static("no-cache");

/// As it is served and checked in.
pub(crate) fn written() -> String {
    let mut text = serde_json::to_string_pretty(&document(routes::entries())).unwrap_or_default();
    text.push('\n');
    text
}

/// It changes with the program alone.
static SERVED: LazyLock<(String, HeaderValue)> = LazyLock::new(|| {
    let text = written();
    let tag = format!("\"{}\"", blake3::hash(text.as_bytes()).to_hex());
    // Hexadecimal digits are a header's value.
    let tag = HeaderValue::from_str(&tag).unwrap_or(HeaderValue::from_static("\"\""));
    (text, tag)
});

pub(crate) async fn show(headers: HeaderMap, params: Params) -> ApiResult<Response> {
    params.finish()?;
    let (text, tag) = &*SERVED;
    let told = [(header::ETAG, tag.clone()), (header::CACHE_CONTROL, CACHING)];
    if has(&headers, tag) {
        return Ok((StatusCode::NOT_MODIFIED, told).into_response());
    }
    let kind = [(header::CONTENT_TYPE, JSON)];
    Ok((told, kind, text.as_str()).into_response())
}

/// The client has it already.
fn has(headers: &HeaderMap, tag: &HeaderValue) -> bool {
    let given = headers.get_all(header::IF_NONE_MATCH).iter().filter_map(|v| v.to_str().ok());
    let tag = tag.to_str().unwrap_or_default();
    let mut tags = given.flat_map(|list| list.split(',')).map(str::trim);
    tags.any(|one| one == "*" || one.trim_start_matches("W/") == tag)
}

pub(crate) fn show_op() -> Operation {
    operation("getOpenApi", "This document")
        .about("It changes with the version of the server alone.")
        .header("If-None-Match", text, "The `etag` of the document that the client has.")
        .answers(
            StatusCode::OK,
            "The document.",
            Some(JSON),
            |_| schemars::json_schema!({ "type": "object" }),
            &["etag"],
        )
        .answers(StatusCode::NOT_MODIFIED, "The client has it.", None, text, &["etag"])
}
