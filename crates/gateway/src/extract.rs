//! What a request carries: its JSON, its parameters, its keys. Strict: what is not known is named
//! and refused. What a client sent is never repeated from a body, since it may be a secret.

use std::time::Duration;

use aether_api::{IDEMPOTENCY_KEY_HEADER, parse_wait};
use aether_store::{Idempotency, PageRequest};
use aether_types::{ErrorCode, limits};
use axum::{
    body::{Body, BodyDataStream, HttpBody as _},
    extract::{FromRequest, FromRequestParts, Request},
    http::{HeaderMap, StatusCode, header, request::Parts},
};
use bytes::{Bytes, BytesMut};
use futures::StreamExt as _;
use serde::de::DeserializeOwned;
use tokio::time::{Instant, timeout_at};

use crate::{
    auth::Caller,
    parts::App,
    problem::{ApiError, ApiResult},
    strict::Strict,
};

/// All of a JSON body has to come in this time.
const BODY_LIMIT: Duration = Duration::from_secs(30);

/// Of a body that is refused, so much is still taken in, so that a client that is still sending
/// gets to read the answer.
const DRAIN_BYTES_MAX: usize = 8 * 1024 * 1024;
const DRAIN_LIMIT: Duration = Duration::from_secs(2);

pub(crate) const IDEMPOTENCY_KEY_BYTES_MAX: usize = 255;

/// A JSON body, and the bytes that it came as.
pub(crate) struct Json<T> {
    pub(crate) value: T,
    pub(crate) bytes: Bytes,
}

impl<T: DeserializeOwned> FromRequest<App> for Json<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &App) -> ApiResult<Self> {
        let (parts, body) = request.into_parts();
        if !is_json(&parts.headers) {
            drain(body).await;
            let detail = "send the body with `content-type: application/json`";
            return Err(ApiError::new(ErrorCode::UnsupportedMediaType, detail));
        }
        let bytes = collect(body, &parts.headers).await?;
        let value = from_json(&bytes)?;
        Ok(Self { value, bytes })
    }
}

/// A JSON body that may be left out where everything in it has a default.
pub(crate) struct JsonOrNothing<T>(pub(crate) Json<T>);

impl<T: DeserializeOwned + Default> FromRequest<App> for JsonOrNothing<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &App) -> ApiResult<Self> {
        if request.body().is_end_stream() {
            return Ok(Self(Json { value: T::default(), bytes: Bytes::new() }));
        }
        Json::from_request(request, app).await.map(Self)
    }
}

fn is_json(headers: &HeaderMap) -> bool {
    let value = headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let kind = value.split(';').next().unwrap_or_default().trim();
    kind.eq_ignore_ascii_case("application/json")
}

async fn collect(body: Body, headers: &HeaderMap) -> ApiResult<Bytes> {
    let announced = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|v| v.to_str().ok()?.parse::<usize>().ok())
        .unwrap_or(0);
    if announced > limits::BODY_BYTES_MAX {
        drain(body).await;
        return Err(too_large());
    }
    let deadline = Instant::now() + BODY_LIMIT;
    let mut stream = body.into_data_stream();
    let mut bytes = BytesMut::with_capacity(announced);
    loop {
        let slow = |_| {
            let detail = format!("the body did not come within {} s", BODY_LIMIT.as_secs());
            ApiError::new(ErrorCode::MalformedBody, detail).status(StatusCode::REQUEST_TIMEOUT)
        };
        match timeout_at(deadline, stream.next()).await.map_err(slow)? {
            Some(Ok(chunk)) if bytes.len() + chunk.len() > limits::BODY_BYTES_MAX => {
                drain(Body::from_stream(stream)).await;
                return Err(too_large());
            }
            Some(Ok(chunk)) => bytes.extend_from_slice(&chunk),
            Some(Err(_)) => {
                return Err(ApiError::new(ErrorCode::MalformedBody, "the body was cut off"));
            }
            None => return Ok(bytes.freeze()),
        }
    }
}

fn too_large() -> ApiError {
    let detail = format!("a body has at most {} bytes", limits::BODY_BYTES_MAX);
    ApiError::new(ErrorCode::BodyTooLarge, detail)
}

/// Takes in a part of what a refused request still sends: a client that is cut off while it sends
/// does not read why.
pub(crate) async fn drain(body: Body) {
    drain_stream(&mut body.into_data_stream(), DRAIN_BYTES_MAX, DRAIN_LIMIT).await;
}

pub(crate) async fn drain_stream(stream: &mut BodyDataStream, bytes_max: usize, limit: Duration) {
    let mut left = bytes_max;
    let deadline = Instant::now() + limit;
    while let Ok(Some(Ok(chunk))) = timeout_at(deadline, stream.next()).await {
        left = left.saturating_sub(chunk.len());
        if left == 0 {
            break;
        }
    }
}

/// Reads JSON and, where that fails, names place and field and repeats no value.
pub(crate) fn from_json<T: DeserializeOwned>(bytes: &[u8]) -> ApiResult<T> {
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(Strict(&mut reader)).map_err(|error| {
        let path = error.path().to_string();
        malformed(&path, error.inner())
    })?;
    reader.end().map_err(|error| malformed(".", &error))?;
    Ok(value)
}

fn malformed(path: &str, error: &serde_json::Error) -> ApiError {
    let place = format!("line {}, column {}", error.line(), error.column());
    if !error.is_data() {
        let what = if error.is_eof() { "the body ends too early" } else { "the body is not JSON" };
        return ApiError::new(ErrorCode::MalformedBody, format!("{what}: {place}"));
    }
    let text = error.to_string();
    let text = text.rsplit_once(" at line ").map_or(text.as_str(), |(text, _)| text);
    let about_field = ["unknown field `", "missing field `", "duplicate field `"]
        .iter()
        .find_map(|start| text.strip_prefix(start)?.split('`').next());
    if let Some(name) = about_field {
        let detail = format!("{}: {place}", text.chars().take(512).collect::<String>());
        let field = if path == "." || path == name || path.ends_with(&format!(".{name}")) {
            path.trim_start_matches('.').to_owned()
        } else {
            format!("{path}.{name}")
        };
        let field = if field.is_empty() { name.to_owned() } else { field };
        let field: String = field.chars().take(128).collect();
        return ApiError::new(ErrorCode::MalformedBody, detail).field(field);
    }
    let wanted = match text.rsplit_once(", expected ") {
        Some((_, wanted)) => format!("expected {wanted}"),
        // Texts of our own about a rule, which holds no secret.
        None if path.starts_with("network") => text.to_owned(),
        None => "the value is not valid".to_owned(),
    };
    let error = ApiError::new(ErrorCode::MalformedBody, format!("{path}: {wanted}: {place}"));
    if path == "." { error } else { error.field(path) }
}

/// The parameters after the `?`. Take what is known, then [`Params::finish`].
pub(crate) struct Params(Vec<(String, String)>);

impl<S: Sync> FromRequestParts<S> for Params {
    type Rejection = std::convert::Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Self::Rejection> {
        let query = parts.uri.query().unwrap_or_default();
        Ok(Self(form_urlencoded::parse(query.as_bytes()).into_owned().collect()))
    }
}

impl Params {
    pub(crate) fn all(&mut self, name: &str) -> Vec<String> {
        let (taken, rest) = std::mem::take(&mut self.0).into_iter().partition(|(n, _)| n == name);
        self.0 = rest;
        let taken: Vec<(String, String)> = taken;
        taken.into_iter().map(|(_, value)| value).collect()
    }

    /// Several values of one parameter, repeated or with commas between.
    pub(crate) fn list<T: std::str::FromStr<Err = String>>(
        &mut self,
        name: &str,
    ) -> ApiResult<Vec<T>> {
        let values = self.all(name);
        values.iter().flat_map(|v| v.split(',')).map(|v| read(name, v.parse())).collect()
    }

    pub(crate) fn one(&mut self, name: &str) -> ApiResult<Option<String>> {
        let mut values = self.all(name);
        match values.len() {
            0 | 1 => Ok(values.pop()),
            _ => Err(ApiError::invalid(format!("{name}: given more than once"))),
        }
    }

    pub(crate) fn need(&mut self, name: &str) -> ApiResult<String> {
        self.one(name)?.ok_or_else(|| ApiError::invalid(format!("{name}: is needed")))
    }

    pub(crate) fn parsed<T: std::str::FromStr<Err = String>>(
        &mut self,
        name: &str,
    ) -> ApiResult<Option<T>> {
        self.one(name)?.map(|v| read(name, v.parse())).transpose()
    }

    pub(crate) fn number<T: std::str::FromStr>(&mut self, name: &str) -> ApiResult<Option<T>> {
        let parse = |v: String| v.parse().map_err(|_| "a whole number is needed".to_owned());
        self.one(name)?.map(|v| read(name, parse(v))).transpose()
    }

    pub(crate) fn flag(&mut self, name: &str) -> ApiResult<bool> {
        match self.one(name)?.as_deref() {
            None | Some("false" | "0") => Ok(false),
            Some("" | "true" | "1") => Ok(true),
            Some(_) => Err(ApiError::invalid(format!("{name}: true or false is needed"))),
        }
    }

    /// Permission bits in octal.
    pub(crate) fn mode(&mut self, name: &str) -> ApiResult<Option<u32>> {
        self.one(name)?.map(|v| read_mode(name, &v)).transpose()
    }

    pub(crate) fn wait(&mut self) -> ApiResult<Option<Duration>> {
        let Some(text) = self.one("wait")? else { return Ok(None) };
        let wait = read("wait", parse_wait(&text).map_err(|error| error.to_string()))?;
        if wait > Duration::from_secs(limits::WAIT_S_MAX) {
            return Err(ApiError::invalid(format!("wait: at most {} s", limits::WAIT_S_MAX)));
        }
        Ok(Some(wait))
    }

    pub(crate) fn page(&mut self) -> ApiResult<PageRequest> {
        let limit = self.number::<u32>("limit")?;
        if limit.is_some_and(|l| !(1..=limits::PAGE_LIMIT_MAX).contains(&l)) {
            return Err(ApiError::invalid(format!("limit: 1 to {}", limits::PAGE_LIMIT_MAX)));
        }
        Ok(PageRequest::new(limit, self.one("cursor")?.as_deref())?)
    }

    /// Refuses what nobody has taken.
    pub(crate) fn finish(self) -> ApiResult<()> {
        match self.0.into_iter().next() {
            None => Ok(()),
            Some((name, _)) => {
                let name: String = name.chars().take(64).collect();
                let error = ApiError::new(
                    ErrorCode::InvalidRequest,
                    format!("the parameter `{name}` is not known here"),
                );
                Err(error.field(name))
            }
        }
    }
}

fn read<T>(name: &str, value: Result<T, String>) -> ApiResult<T> {
    value.map_err(|text| ApiError::invalid(format!("{name}: {text}")))
}

pub(crate) fn read_mode(name: &str, text: &str) -> ApiResult<u32> {
    let digits = !text.is_empty() && text.bytes().all(|b| matches!(b, b'0'..=b'7'));
    match u32::from_str_radix(text, 8) {
        Ok(mode) if digits && mode <= 0o7777 => Ok(mode),
        Ok(_) | Err(_) => {
            Err(ApiError::invalid(format!("{name}: octal permission bits such as 0644 are needed")))
        }
    }
}

/// Method, path, caller and idempotency key of a request that makes a task.
pub(crate) struct Once {
    method: String,
    path: String,
    caller: Caller,
    key: Option<String>,
}

impl<S: Sync> FromRequestParts<S> for Once {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> ApiResult<Self> {
        let caller = parts.extensions.get::<Caller>().cloned().ok_or_else(ApiError::internal)?;
        let key = parts.headers.get(IDEMPOTENCY_KEY_HEADER).map(|v| v.to_str().unwrap_or_default());
        let fits = |k: &str| (1..=IDEMPOTENCY_KEY_BYTES_MAX).contains(&k.len());
        if key.is_some_and(|k| !fits(k)) {
            return Err(ApiError::invalid(format!(
                "{IDEMPOTENCY_KEY_HEADER}: 1 to {IDEMPOTENCY_KEY_BYTES_MAX} visible characters"
            )));
        }
        Ok(Self {
            method: parts.method.to_string(),
            path: parts.uri.path().to_owned(),
            caller,
            key: key.map(str::to_owned),
        })
    }
}

impl Once {
    /// The key with a digest of the request; `body` is empty where there is none.
    pub(crate) fn idempotency(self, body: &[u8]) -> Option<Idempotency> {
        let key = self.key?;
        let mut hasher = blake3::Hasher::new();
        for part in [self.method.as_bytes(), self.path.as_bytes(), body] {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        Some(Idempotency {
            key: format!("{}/{key}", self.caller.project()),
            request_digest: *hasher.finalize().as_bytes(),
        })
    }
}

#[cfg(test)]
mod tests {
    use aether_api::{CreateVm, ExecuteRequest};

    use super::*;

    fn refusal<T: DeserializeOwned>(body: &str) -> (String, Option<String>) {
        let Err(error) = from_json::<T>(body.as_bytes()) else { panic!("{body} was taken") };
        assert_eq!(error.problem().code, "malformed_body");
        (error.problem().detail.clone(), error.problem().field.clone())
    }

    #[test]
    fn a_malformed_body_is_named_by_place_and_field() {
        for (body, detail, field) in [
            ("{", "the body ends too early: line 1, column 1", None),
            ("{]", "the body is not JSON: line 1, column 2", None),
            ("{} {", "the body is not JSON: line 1, column 4", None),
            (r#"{"vcpus":"s3cret"}"#, "vcpus: expected u32: line 1, column 17", Some("vcpus")),
            (
                r#"{"env":{"A":["s3cret"]}}"#,
                "env.A: expected a string: line 1, column 12",
                Some("env.A"),
            ),
            (r#"{"network":{"allow":["x"]}}"#, "network.allow[0]: ", Some("network.allow[0]")),
            (r#"{"network":{"egres":1}}"#, "unknown field `egres`", Some("network.egres")),
            (r#"{"vcpu":1}"#, "unknown field `vcpu`", Some("vcpu")),
            (
                r#"{"driver":"s3cret"}"#,
                "driver: expected one of `firecracker`, `qemu`, `docker`, `sim`",
                Some("driver"),
            ),
        ] {
            let (text, named) = refusal::<CreateVm>(body);
            assert!(text.starts_with(detail), "{text}");
            assert!(!text.contains("s3cret"), "{text}");
            assert_eq!(named.as_deref(), field);
        }
        let (text, field) = refusal::<ExecuteRequest>("{}");
        assert!(text.starts_with("missing field `command`"), "{text}");
        assert_eq!(field.as_deref(), Some("command"));
    }

    #[test]
    fn modes_are_octal() {
        assert_eq!(read_mode("mode", "0644").unwrap(), 0o644);
        for bad in ["", "9", "0x1", "+7", "77777"] {
            assert!(read_mode("mode", bad).is_err(), "{bad}");
        }
    }
}
