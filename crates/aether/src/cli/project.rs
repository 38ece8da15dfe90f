//! `aether project`.

use aether_api::{
    CreateProject, Page, ProjectView,
    client::{Client, PageQuery},
};
use aether_types::{
    Timestamp, limits,
    project::{Quota, Usage},
};

use super::{connect, table};
use crate::{
    args::{Global, Project},
    exit::Exit,
    failure::Failure,
    output,
};

pub(crate) async fn run(global: &Global, command: Project) -> Result<Exit, Failure> {
    let client = connect(global)?;
    match command {
        Project::Create { name, limits } => {
            let quota = limits.into();
            let made = client.create_project(&CreateProject { name, quota }).await?;
            describe(&made, global.json);
        }
        Project::Quota { project, limits, none } => {
            quota(&client, project.as_deref(), limits.into(), none, global.json).await?;
        }
        Project::List => {
            let projects = list(&client).await?;
            if global.json {
                output::json(&Page { items: projects, next_cursor: None });
            } else {
                print(projects);
            }
        }
        Project::Get { project } => describe(&client.project(&project).await?, global.json),
        Project::Delete { project } => {
            let deleted = client.delete_project(&project).await?;
            if global.json {
                output::json(&deleted);
            } else {
                output::line(&format!("deleted {}", table::printable(&deleted.name)));
            }
        }
    }
    Ok(Exit::Success)
}

/// Without limits it shows, with limits it sets.
async fn quota(
    client: &Client,
    project: Option<&str>,
    limits: Quota,
    none: bool,
    json: bool,
) -> Result<(), Failure> {
    let sets = none || limits != Quota::default();
    let view = match project {
        Some(project) if sets => client.set_quota(project, &limits).await?,
        Some(project) => client.project(project).await?,
        None if sets => return Err(Failure::usage("name the project whose quota is to be set")),
        None => {
            let view = client.quota().await?;
            if json {
                output::json(&view);
            } else {
                print_quota(view.quota, view.used);
            }
            return Ok(());
        }
    };
    if json {
        output::json(&view);
    } else {
        print_quota(view.quota, view.used.unwrap_or_default());
    }
    Ok(())
}

fn print_quota(quota: Quota, used: Usage) {
    let row = |name: &str, limit: Option<u32>, used: u64| {
        vec![name.to_owned(), used.to_string(), table::or_dash(limit)]
    };
    let rows = vec![
        row("vms", quota.vms, used.vms),
        row("vcpus", quota.vcpus, used.vcpus),
        row("memory_mb", quota.memory_mb, used.memory_mb),
        row("waiting_tasks", quota.waiting_tasks, used.waiting_tasks),
    ];
    table::print(&["OF", "USED", "QUOTA"], rows);
}

async fn list(client: &Client) -> Result<Vec<ProjectView>, Failure> {
    let mut page = PageQuery { limit: Some(limits::PAGE_LIMIT_MAX), cursor: None };
    let mut projects = Vec::new();
    loop {
        let found = client.projects(&page).await?;
        projects.extend(found.items);
        match found.next_cursor {
            Some(cursor) => page.cursor = Some(cursor),
            None => return Ok(projects),
        }
    }
}

fn print(projects: Vec<ProjectView>) {
    let now = Timestamp::now();
    let row = |project: ProjectView| {
        vec![project.id.to_string(), project.name, table::age(project.created_at, now)]
    };
    table::print(&["ID", "NAME", "AGE"], projects.into_iter().map(row).collect());
}

fn describe(project: &ProjectView, json: bool) {
    if json {
        output::json(project);
        return;
    }
    output::line(&format!("id         {}", project.id));
    output::line(&format!("name       {}", table::printable(&project.name)));
    output::line(&format!("created    {}", project.created_at));
}
