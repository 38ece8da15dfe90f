//! `aether key`.

use aether_api::{
    CreateKey, KeyView, Page,
    client::{Client, KeyQuery, PageQuery},
};
use aether_types::{KeyId, Timestamp, limits};

use super::{connect, table};
use crate::{
    args::{Global, Key, KeyCreate, KeyList},
    exit::Exit,
    failure::Failure,
    output,
};

pub(crate) async fn run(global: &Global, command: Key) -> Result<Exit, Failure> {
    let client = connect(global)?;
    match command {
        Key::Create(args) => create(&client, args, global.json).await?,
        Key::List(args) => {
            let keys = list(&client, &args).await?;
            if global.json {
                output::json(&Page { items: keys, next_cursor: None });
            } else {
                print(keys);
            }
        }
        Key::Get { id } => describe(&client.key(id).await?, global.json),
        Key::Revoke { ids } => return revoke(&client, &ids, global.json).await,
    }
    Ok(Exit::Success)
}

async fn create(client: &Client, args: KeyCreate, json: bool) -> Result<(), Failure> {
    let request = CreateKey {
        name: args.name,
        role: args.role,
        scopes: args.scope,
        expires_in_s: args.expires.map(|time| time.as_secs()),
        project: args.project,
    };
    let made = client.create_key(&request).await?;
    if json {
        output::json(&made);
        return Ok(());
    }
    // The key alone on standard output, for whoever puts it somewhere.
    output::note("the key, shown this once:");
    output::line(&made.key);
    output::note(&format!("aether key revoke {} takes it back", made.view.id));
    Ok(())
}

async fn list(client: &Client, args: &KeyList) -> Result<Vec<KeyView>, Failure> {
    let mut query = KeyQuery { revoked: args.all, page: PageQuery::default() };
    let mut keys = Vec::new();
    while keys.len() < args.limit {
        let wanted = u32::try_from(args.limit - keys.len()).unwrap_or(u32::MAX);
        query.page.limit = Some(wanted.min(limits::PAGE_LIMIT_MAX));
        let page = client.keys(&query).await?;
        keys.extend(page.items);
        match page.next_cursor {
            Some(cursor) => query.page.cursor = Some(cursor),
            None => break,
        }
    }
    keys.truncate(args.limit);
    Ok(keys)
}

/// All of them are tried; the first failure is told at the end.
async fn revoke(client: &Client, ids: &[KeyId], json: bool) -> Result<Exit, Failure> {
    let mut failed = None;
    for &id in ids {
        match client.revoke_key(id).await {
            Ok(view) if json => output::json_line(&view),
            Ok(view) => output::line(&format!("revoked {}", table::printable(&view.name))),
            Err(error) => {
                let failure = Failure::from(error);
                if failed.is_some() {
                    output::failure(&failure, json);
                } else {
                    failed = Some(failure);
                }
            }
        }
    }
    failed.map_or(Ok(Exit::Success), Err)
}

fn state(key: &KeyView, now: Timestamp) -> &'static str {
    match (key.revoked_at, key.expires_at) {
        (Some(_), _) => "revoked",
        (None, Some(at)) if at <= now => "expired",
        (None, Some(_) | None) => "good",
    }
}

fn scopes(key: &KeyView) -> Option<String> {
    let scopes: Vec<_> = key.scopes.iter().map(ToString::to_string).collect();
    Some(scopes.join(" ")).filter(|text| !text.is_empty())
}

fn print(keys: Vec<KeyView>) {
    let now = Timestamp::now();
    let row = |key: KeyView| {
        vec![
            key.id.to_string(),
            key.name.clone(),
            format!("{}…", key.prefix),
            key.role.to_string(),
            table::or_dash(scopes(&key)),
            state(&key, now).to_owned(),
            table::age(key.created_at, now),
            table::or_dash(key.last_used_at.map(|at| table::age(at, now))),
        ]
    };
    table::print(
        &["ID", "NAME", "KEY", "ROLE", "SCOPES", "STATE", "AGE", "USED"],
        keys.into_iter().map(row).collect(),
    );
}

fn describe(key: &KeyView, json: bool) {
    if json {
        output::json(key);
        return;
    }
    let line = |name: &str, value: String| {
        output::line(&format!("{name:<10} {}", table::printable(&value)));
    };
    line("id", key.id.to_string());
    line("name", key.name.clone());
    line("key", format!("{}…", key.prefix));
    line("state", state(key, Timestamp::now()).to_owned());
    line("role", key.role.to_string());
    line("scopes", scopes(key).unwrap_or_else(|| "all that the role may".to_owned()));
    line("project", key.project_id.to_string());
    line("made by", table::or_dash(key.created_by));
    line("created", key.created_at.to_string());
    line("expires", table::or_dash(key.expires_at));
    line("used", table::or_dash(key.last_used_at));
    line("revoked", table::or_dash(key.revoked_at));
}
