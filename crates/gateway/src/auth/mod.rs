//! Who asks, and whether they may.
//!
//! ```text
//!   authenticate: rates 429, header → key or token → Caller   401
//!     route found → authorize: Caller, Rule      403
//!       handler
//!     audit: what changes something, and what was refused
//! ```
//!
//! Every route has one [`Rule`], in the table of routes alone. Handlers decide nothing about rights,
//! but for a key that is to be made: nobody gives more than they have, nor to others.

mod jwt;
mod keys;

use std::sync::Arc;

use aether_store::ApiKey;
use aether_types::{Access, ErrorCode, KeyId, ProjectId, Resource, Scope, Timestamp, Verb};
use axum::{
    extract::{FromRequestParts, Request, State},
    http::{HeaderMap, header, request::Parts},
    middleware::Next,
    response::{IntoResponse as _, Response},
};

pub use jwt::{
    JWT_LEEWAY_MAX, JWT_SECRET_BYTES_MIN, JwksTimes, JwksUrlError, JwtRules, JwtVerifier,
};
pub use keys::{AuthSecret, CreateKeyError, KeyRing, NewKey};

use jwt::{Proven, Refusal};

use crate::{
    audit::{self, Ruled, Trail},
    health,
    limit::{Counted, Sender},
    openapi,
    parts::App,
    problem::{ApiError, ApiResult},
};

/// What a route needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rule {
    /// Nothing, not even a key. [`authenticate`] has to know its path.
    Open,
    Needs(Scope),
}

pub(crate) const fn read(resource: Resource) -> Rule {
    Rule::Needs(Scope { resource, verb: Verb::Read })
}

pub(crate) const fn write(resource: Resource) -> Rule {
    Rule::Needs(Scope { resource, verb: Verb::Write })
}

/// Whose key or token it is, and what it may do.
#[derive(Debug, Clone)]
pub(crate) struct Caller(Arc<Identity>);

#[derive(Debug)]
pub(crate) struct Identity {
    /// `None`: it came with a token.
    pub(crate) key: Option<KeyId>,
    /// For the audit log: what the key begins with, or the name of the token's subject.
    pub(crate) shown: String,
    /// Whose requests are counted together with this one.
    sender: Sender,
    pub(crate) access: Access,
}

impl std::ops::Deref for Caller {
    type Target = Identity;

    fn deref(&self) -> &Identity {
        &self.0
    }
}

impl Caller {
    fn new(key: &ApiKey) -> Self {
        Self(Arc::new(Identity {
            key: Some(key.id),
            shown: key.prefix.clone(),
            sender: Sender::Key(key.id),
            access: key.access(),
        }))
    }

    fn proven(Proven { subject, access }: Proven) -> Self {
        let sender = Sender::Subject(subject.bucket);
        Self(Arc::new(Identity { key: None, shown: subject.name, sender, access }))
    }

    /// Whose everything is that it sees.
    pub(crate) fn project(&self) -> ProjectId {
        self.access.project
    }

    pub(crate) fn check(&self, needed: Scope) -> ApiResult<()> {
        if self.access.allows(needed) {
            return Ok(());
        }
        let Access { role, scopes, .. } = &self.access;
        let what = if self.key.is_some() { "key" } else { "token" };
        let mut has = format!("the role of this {what} is {role}");
        if !scopes.is_empty() {
            let scopes: Vec<_> = scopes.iter().map(ToString::to_string).collect();
            has = format!("{has}, narrowed down to {}", scopes.join(", "));
        }
        let detail = format!("`{needed}` is needed here; {has}");
        Err(ApiError::new(ErrorCode::Forbidden, detail))
    }
}

impl<S: Sync> FromRequestParts<S> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> ApiResult<Self> {
        // The authentication layer put it there; without it this is no route of ours.
        parts.extensions.get::<Self>().cloned().ok_or_else(ApiError::internal)
    }
}

/// Lets nothing through without a key but health and the document of the API; paths that do not exist included.
pub(crate) async fn authenticate(
    State(app): State<App>,
    mut request: Request,
    next: Next,
) -> Response {
    let path = request.uri().path();
    if path == health::PATH {
        return next.run(request).await;
    }
    let is_open = path == openapi::PATH;
    let (limiter, limits) = (&*app.parts.limiter, app.parts.config.limits);
    let mut counted = Counted::default();
    if let Some(address) = audit::address(&request) {
        // Before the key is looked for: who sends many wrong ones is held up too.
        let sender = Sender::address(address);
        if let Some(refusal) = counted.count(limiter, sender, limits.address).await {
            return refusal;
        }
    }
    if is_open {
        let mut response = next.run(request).await;
        counted.tell(response.headers_mut());
        return response;
    }
    match caller(&app, request.headers()).await {
        Ok(caller) => {
            if let Some(refusal) = counted.count(limiter, caller.sender, limits.key).await {
                return refusal;
            }
            let trail = Trail::begin(&app, &caller, &mut request);
            request.extensions_mut().insert(caller);
            let mut response = next.run(request).await;
            audit::settled(trail.end(&response)).await;
            counted.tell(response.headers_mut());
            response
        }
        Err(error) => {
            // Not across the wait: a body is no one else's to look at.
            let entry = audit::asked(&request);
            audit::strange(&app, entry, &error).await;
            error.into_response()
        }
    }
}

/// Lets through who may do what the route needs.
pub(crate) async fn authorize(rule: Rule, request: Request, next: Next) -> Response {
    if let (Rule::Needs(needed), Some(ruled)) = (rule, request.extensions().get::<Ruled>()) {
        ruled.set(needed);
    }
    let allowed = match (rule, request.extensions().get::<Caller>()) {
        (Rule::Open, _) => Ok(()),
        (Rule::Needs(needed), Some(caller)) => caller.check(needed),
        (Rule::Needs(_), None) => Err(ApiError::internal()),
    };
    match allowed {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    }
}

async fn caller(app: &App, headers: &HeaderMap) -> ApiResult<Caller> {
    let refused = |detail: &str| ApiError::new(ErrorCode::Unauthorized, detail);
    let text = bearer(headers).map_err(refused)?;
    if let Some(verifier) = &app.parts.jwt
        && JwtVerifier::takes(text)
    {
        return by_token(app, verifier, text).await;
    }
    let keys = &app.parts.keys;
    let key = keys.find(app.store(), text).await?;
    let key = key.ok_or_else(|| refused("the key is not known here"))?;
    let now = Timestamp::now();
    if key.has_expired(now) {
        // Who has the key may know that it was one.
        return Err(refused("the key is past its time; make another"));
    }
    if let Some(noting) = keys.note_use(&app.parts.store, &key, now) {
        app.tasks.spawn(noting);
    }
    Ok(Caller::new(&key))
}

async fn by_token(app: &App, verifier: &JwtVerifier, text: &str) -> ApiResult<Caller> {
    let refusal = match verifier.verify(app.store(), text, Timestamp::now()).await {
        Ok(proven) => return Ok(Caller::proven(proven)),
        Err(refusal) => refusal,
    };
    let detail = refusal.to_string();
    Err(match refusal {
        Refusal::Unproven(reason) => {
            tracing::debug!(reason, "a token is refused");
            ApiError::new(ErrorCode::Unauthorized, detail)
        }
        Refusal::Claims(_) => ApiError::new(ErrorCode::Unauthorized, detail),
        Refusal::NoKeys => ApiError::new(ErrorCode::Unavailable, detail),
        Refusal::Store(error) => error.into(),
    })
}

fn bearer(headers: &HeaderMap) -> Result<&str, &'static str> {
    let Some(value) = headers.get(header::AUTHORIZATION) else {
        return Err("send the header `Authorization: Bearer KEY`");
    };
    let text = value.to_str().unwrap_or_default();
    match text.split_once(' ') {
        Some((scheme, key)) if scheme.eq_ignore_ascii_case("bearer") => Ok(key.trim()),
        Some(_) | None => Err("the header is not of the form `Authorization: Bearer KEY`"),
    }
}
