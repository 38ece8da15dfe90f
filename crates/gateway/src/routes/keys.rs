use std::time::Duration;

use aether_api::{CreateKey, KeyCreated, KeyView, PREFIX, Page};
use aether_store::{ApiKey, KeyFilter};
use aether_types::{Access, ErrorCode, KeyId, ProjectId, Resource, Scope, Verb, limits};
use axum::{
    Json as JsonAnswer,
    extract::{Path, State},
    http::StatusCode,
    response::{IntoResponse as _, Response},
};

use crate::{
    auth::{Caller, CreateKeyError, NewKey},
    extract::{Json, Params},
    openapi::{Operation, operation},
    parts::App,
    problem::{ApiError, ApiResult, chain},
    routes::projects,
    submit::attend,
};

/// Whether the answer came or not, the key is there: it is in the list, and can be revoked.
pub(super) async fn create(
    State(app): State<App>,
    caller: Caller,
    params: Params,
    body: Json<CreateKey>,
) -> ApiResult<Response> {
    params.finish()?;
    let new = admit(&app, body.value, &caller).await?;
    let shared = app.clone();
    let (key, kept) = attend(&app, "making a key", async move {
        shared.parts.keys.create(shared.store(), new).await.map_err(failure)
    })
    .await?;
    let location = [("location", format!("{PREFIX}/keys/{}", kept.id))];
    let answer = JsonAnswer(KeyCreated { key, view: view(kept) });
    Ok((StatusCode::CREATED, location, answer).into_response())
}

fn failure(error: CreateKeyError) -> ApiError {
    match error {
        CreateKeyError::Store(error) => error.into(),
        CreateKeyError::Random(_) => {
            tracing::error!(error = chain(&error), "make a key");
            ApiError::internal()
        }
    }
}

async fn admit(app: &App, request: CreateKey, caller: &Caller) -> ApiResult<NewKey> {
    let CreateKey { name, role, mut scopes, expires_in_s, project } = request;
    let max = limits::KEY_NAME_BYTES_MAX;
    if !(1..=max).contains(&name.len()) || name.chars().any(char::is_control) {
        return Err(ApiError::invalid(format!(
            "name: 1 to {max} bytes without control characters"
        )));
    }
    if scopes.len() > limits::KEY_SCOPES_MAX {
        return Err(ApiError::invalid(format!("scopes: at most {}", limits::KEY_SCOPES_MAX)));
    }
    scopes.sort_unstable();
    scopes.dedup();
    let (min, max) = (limits::KEY_TTL_S_MIN, limits::KEY_TTL_S_MAX);
    if expires_in_s.is_some_and(|s| !(min..=max).contains(&s)) {
        return Err(ApiError::invalid(format!("expires_in_s: {min} to {max}")));
    }
    let project = project_of(app, project.as_deref(), caller).await?;
    let access = Access { project, role, scopes };
    if let Some(beyond) = caller.access.lacks(&access) {
        let detail = format!("a key gives no more than it has, and this one lacks `{beyond}`");
        return Err(ApiError::new(ErrorCode::Forbidden, detail));
    }
    let expires_in = expires_in_s.map(Duration::from_secs);
    // A project does not see whose key made its first one.
    let created_by = (project == caller.project()).then_some(caller.key).flatten();
    Ok(NewKey { name, access, created_by, expires_in })
}

/// Whose key it is to be. Who may not see all projects does not learn which there are.
async fn project_of(app: &App, named: Option<&str>, caller: &Caller) -> ApiResult<ProjectId> {
    let Some(named) = named else { return Ok(caller.project()) };
    caller.check(Scope { resource: Resource::Projects, verb: Verb::Write })?;
    let found = projects::find(app, named).await;
    found.map(|project| project.id).map_err(|error| error.in_body("project"))
}

pub(super) async fn list(
    State(app): State<App>,
    caller: Caller,
    mut params: Params,
) -> ApiResult<JsonAnswer<Page<KeyView>>> {
    let revoked = params.flag("revoked")?;
    let page = params.page()?;
    params.finish()?;
    let filter = KeyFilter { project: Some(caller.project()), revoked };
    let found = app.store().keys(filter, page).await?;
    let items = found.items.into_iter().map(view).collect();
    Ok(JsonAnswer(Page { items, next_cursor: found.next.map(|c| c.to_string()) }))
}

/// A key of the caller's project; another's is one that there is not.
async fn find(app: &App, caller: &Caller, text: &str) -> ApiResult<ApiKey> {
    let found = match text.parse::<KeyId>() {
        Ok(id) => app.store().key(id).await?,
        Err(_) => None,
    };
    let shown: String = text.chars().take(64).collect();
    found
        .filter(|key| key.project_id == caller.project())
        .ok_or_else(|| ApiError::new(ErrorCode::KeyNotFound, format!("there is no key `{shown}`")))
}

pub(super) async fn show(
    State(app): State<App>,
    caller: Caller,
    Path(key): Path<String>,
    params: Params,
) -> ApiResult<JsonAnswer<KeyView>> {
    params.finish()?;
    find(&app, &caller, &key).await.map(view).map(JsonAnswer)
}

pub(super) async fn revoke(
    State(app): State<App>,
    caller: Caller,
    Path(key): Path<String>,
    params: Params,
) -> ApiResult<JsonAnswer<KeyView>> {
    params.finish()?;
    let id = find(&app, &caller, &key).await?.id;
    let shared = app.clone();
    let revoked =
        attend(&app, "revoking a key", async move { Ok(shared.store().revoke_key(id).await?) })
            .await?;
    Ok(JsonAnswer(view(revoked)))
}

fn view(key: ApiKey) -> KeyView {
    let ApiKey {
        id,
        name,
        prefix,
        hash: _,
        project_id,
        role,
        scopes,
        created_by,
        created_at,
        expires_at,
        last_used_at,
        revoked_at,
    } = key;
    KeyView {
        id,
        name,
        prefix,
        project_id,
        role,
        scopes,
        created_by,
        created_at,
        expires_at,
        last_used_at,
        revoked_at,
    }
}

pub(super) fn create_op() -> Operation {
    operation("createKey", "Make a key")
        .about("It gives no more than its maker has. `Idempotency-Key` is not looked at.")
        .body::<CreateKey>()
        .makes::<KeyCreated>("The key, this once.")
        .refuses(&[ErrorCode::TooManyKeys])
        .refuses_in_body(&[ErrorCode::ProjectNotFound])
}

pub(super) fn list_op() -> Operation {
    operation("listKeys", "List keys")
        .flag("revoked", "Those that are revoked too.")
        .page()
        .gives::<Page<KeyView>>("A page, newest first.")
}

pub(super) fn show_op() -> Operation {
    operation("getKey", "Show what is kept of a key").gives::<KeyView>("Never the key itself.")
}

pub(super) fn revoke_op() -> Operation {
    operation("revokeKey", "Revoke a key")
        .about("It opens nothing from that moment.")
        .gives::<KeyView>("What is kept of it.")
}
