//! `aether project`.

use aether_api::{
    CreateProject, Page, ProjectView,
    client::{Client, PageQuery},
};
use aether_types::{Timestamp, limits};

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
        Project::Create { name } => {
            let made = client.create_project(&CreateProject { name }).await?;
            describe(&made, global.json);
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
