use aether_api::{AuditView, Page};
use aether_store::{AuditEntry, AuditFilter, Outcome};
use aether_types::{ErrorCode, KeyId, Resource, Scope, Timestamp, Verb};
use axum::{Json as JsonAnswer, extract::State};

use crate::{
    auth::Caller,
    extract::Params,
    openapi::{Operation, of, operation, text},
    parts::App,
    problem::{ApiError, ApiResult},
    routes::projects,
};

/// Of the caller's project; who may see all projects may ask for another, or for all.
pub(super) async fn list(
    State(app): State<App>,
    caller: Caller,
    mut params: Params,
) -> ApiResult<JsonAnswer<Page<AuditView>>> {
    let project = params.one("project")?;
    let all = params.flag("all")?;
    let key = params.one("key")?.map(|text| text.parse::<KeyId>());
    let key = key.transpose().map_err(|_| ApiError::invalid("key: an id is needed".into()))?;
    let outcomes = params.list::<Outcome>("outcome")?;
    let since = time(&mut params, "since")?;
    let until = time(&mut params, "until")?;
    let page = params.page()?;
    params.finish()?;
    if all || project.is_some() {
        caller.check(Scope { resource: Resource::Projects, verb: Verb::Read })?;
    }
    let project = match project {
        Some(_) if all => {
            return Err(ApiError::invalid("project: not together with all".into()));
        }
        Some(named) => Some(projects::find(&app, &named).await?.id),
        None if all => None,
        None => Some(caller.project()),
    };
    let filter = AuditFilter { project, key, outcomes, since, until };
    let found = app.store().audit_entries(filter, page).await?;
    let items = found.items.into_iter().map(view).collect();
    Ok(JsonAnswer(Page { items, next_cursor: found.next.map(|c| c.to_string()) }))
}

fn time(params: &mut Params, name: &str) -> ApiResult<Option<Timestamp>> {
    let wrong = |_| ApiError::invalid(format!("{name}: a time such as 2026-01-31T12:00:00Z"));
    params.one(name)?.map(|text| text.parse().map_err(wrong)).transpose()
}

fn view(entry: AuditEntry) -> AuditView {
    let AuditEntry {
        id,
        at,
        project_id,
        key_id,
        key_prefix,
        action,
        method,
        path,
        made,
        outcome,
        status,
        code,
        request_id,
        address,
    } = entry;
    AuditView {
        id,
        at,
        project_id,
        key_id,
        key_prefix,
        action,
        method,
        path,
        made,
        outcome: outcome.as_str().to_owned(),
        status,
        code: code.map(|code| code.as_str().to_owned()),
        request_id,
        address,
    }
}

pub(super) fn list_op() -> Operation {
    operation("listAuditEntries", "List who did what")
        .query("key", of::<KeyId>, "By this key.")
        .query("outcome", outcomes, "With one of these outcomes.")
        .query("since", of::<Timestamp>, "Not before.")
        .query("until", of::<Timestamp>, "Before.")
        .query("project", text, "Of another project; needs `projects:read`.")
        .flag("all", "Of every project; needs `projects:read`, and not together with `project`.")
        .page()
        .gives::<Page<AuditView>>("A page, newest first.")
        .refuses(&[ErrorCode::ProjectNotFound])
}

fn outcomes(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
    let known: Vec<_> = Outcome::ALL.iter().map(|outcome| outcome.as_str()).collect();
    schemars::json_schema!({ "type": "array", "items": { "type": "string", "enum": known } })
}
