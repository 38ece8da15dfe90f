//! `aether audit`.

use aether_api::{
    AuditView, Page,
    client::{AuditQuery, Client, PageQuery},
};
use aether_types::limits;

use super::{connect, table};
use crate::{
    args::{AuditArgs, Global},
    exit::Exit,
    failure::Failure,
    output,
};

pub(crate) async fn run(global: &Global, args: AuditArgs) -> Result<Exit, Failure> {
    let client = connect(global)?;
    let entries = entries(&client, args).await?;
    if global.json {
        output::json(&Page { items: entries, next_cursor: None });
    } else {
        print(entries);
    }
    Ok(Exit::Success)
}

async fn entries(client: &Client, args: AuditArgs) -> Result<Vec<AuditView>, Failure> {
    let wanted = args.limit as usize;
    let mut query = AuditQuery {
        project: args.project,
        all: args.all,
        key: args.key.map(|id| id.to_string()),
        outcomes: args.outcome.iter().map(|outcome| outcome.as_str().to_owned()).collect(),
        page: PageQuery { limit: Some(args.limit.min(limits::PAGE_LIMIT_MAX)), cursor: None },
    };
    let mut entries = Vec::new();
    loop {
        let page = client.audit(&query).await?;
        entries.extend(page.items);
        entries.truncate(wanted);
        match page.next_cursor {
            Some(cursor) if entries.len() < wanted => query.page.cursor = Some(cursor),
            _ => return Ok(entries),
        }
    }
}

fn print(entries: Vec<AuditView>) {
    let row = |entry: AuditView| {
        let outcome = match &entry.code {
            Some(code) => format!("{} [{code}]", entry.outcome),
            None => entry.outcome.clone(),
        };
        vec![
            entry.at.to_string(),
            table::or_dash(entry.key_prefix),
            entry.method,
            table::printable(&entry.path),
            outcome,
            table::or_dash(entry.address),
        ]
    };
    table::print(
        &["TIME", "KEY", "METHOD", "PATH", "OUTCOME", "FROM"],
        entries.into_iter().map(row).collect(),
    );
}
