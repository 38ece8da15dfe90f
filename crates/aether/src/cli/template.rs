//! `aether template`.

use aether_api::{
    Accepted, Page, TemplateView,
    client::{CallOptions, Client, PageQuery, Since, TemplateQuery, Waited},
};
use aether_types::{TemplateState, Timestamp, limits};

use super::{
    WAIT, build::BuildProgress, connect, fault_failure, outcome::Outcome, table, template_file,
};
use crate::{
    args::{Global, Template, TemplateBuild, TemplateList},
    exit::Exit,
    failure::Failure,
    output,
};

pub(crate) async fn run(global: &Global, command: Template) -> Result<Exit, Failure> {
    if let Template::Build(args) = command {
        return build(global, args).await;
    }
    let client = connect(global)?;
    match command {
        Template::Build(_) => Ok(Exit::Success),
        Template::List(args) => list(&client, global, args).await,
        Template::Inspect { templates } => {
            let mut outcome = Outcome::new(templates.len() > 1, global.json);
            for name in templates {
                match client.template(&name).await {
                    Ok(template) if global.json => outcome.json(&template),
                    Ok(template) => describe(&template),
                    Err(error) => outcome.failed(&name, error.into()),
                }
            }
            outcome.finish()
        }
        Template::Delete { templates } => {
            let mut outcome = Outcome::new(templates.len() > 1, global.json);
            for name in templates {
                match client.delete_template(&name).await {
                    Ok(template) if global.json => outcome.json(&template),
                    Ok(template) => {
                        output::line(&format!("{} is deleted", template.full_name()));
                    }
                    Err(error) => outcome.failed(&name, error.into()),
                }
            }
            outcome.finish()
        }
    }
}

async fn build(global: &Global, args: TemplateBuild) -> Result<Exit, Failure> {
    let (no_wait, quiet) = (args.no_wait, args.quiet);
    // What is wrong with it is said before a server is asked for.
    let request = template_file::request(args)?;
    let client = connect(global)?;
    let answer = client.build_template(&request, &CallOptions::default()).await?;
    let accepted = match answer {
        Waited::Accepted(accepted) => accepted,
        Waited::Done(template) => {
            ready(global, &template);
            return Ok(Exit::Success);
        }
    };
    if no_wait {
        told(global, &accepted);
        return Ok(Exit::Success);
    }
    let id = accepted.template_id.map(|id| id.to_string()).unwrap_or_default();
    let mut progress = BuildProgress::new(global.json, quiet);
    let mut template = client.template(&id).await?;
    loop {
        progress.show(&template);
        if template.state != TemplateState::Building {
            break;
        }
        let since = Since::Generation(template.generation);
        template = client.template_wait(&id, since, WAIT).await?;
    }
    drop(progress);
    match template.state {
        TemplateState::Ready => {
            ready(global, &template);
            Ok(Exit::Success)
        }
        TemplateState::Building | TemplateState::Failed | TemplateState::Deleted => {
            let otherwise = format!("the template is {}", template.state);
            Err(fault_failure(template.reason.as_ref(), &otherwise))
        }
    }
}

fn told(global: &Global, accepted: &Accepted) {
    if global.json {
        output::json(accepted);
    } else if let Some(id) = accepted.template_id {
        output::line(&id.to_string());
    }
}

/// One line in a stream of events, for programs.
fn ready(global: &Global, template: &TemplateView) {
    if global.json {
        output::json_line(&serde_json::json!({ "event": "ready", "template": template }));
        return;
    }
    let took = template.updated_at.unix_ms() - template.created_at.unix_ms();
    output::line(&format!(
        "{} is {} ({}, {}) after {}",
        template.full_name(),
        template.state,
        template.id,
        table::or_dash(template.size_bytes.map(table::size)),
        super::start::ms(f64::from(i32::try_from(took).unwrap_or(i32::MAX))),
    ));
}

async fn list(client: &Client, global: &Global, args: TemplateList) -> Result<Exit, Failure> {
    let mut query = TemplateQuery {
        states: args.state.iter().map(ToString::to_string).collect(),
        name: args.name,
        page: PageQuery { limit: Some(limits::PAGE_LIMIT_MAX), cursor: None },
    };
    let limit = args.limit.unwrap_or(usize::MAX);
    let mut templates = Vec::new();
    loop {
        let page = client.templates(&query).await?;
        templates.extend(page.items);
        match page.next_cursor {
            Some(cursor) if templates.len() < limit => query.page.cursor = Some(cursor),
            Some(_) | None => break,
        }
    }
    templates.truncate(limit);
    if global.json {
        output::json(&Page { items: templates, next_cursor: None });
    } else if templates.is_empty() {
        output::note("there are no templates; `aether template build` makes one");
    } else {
        print(templates);
    }
    Ok(Exit::Success)
}

fn print(templates: Vec<TemplateView>) {
    let now = Timestamp::now();
    let row = |template: TemplateView| {
        vec![
            template.full_name(),
            template.id.to_string(),
            template.state.to_string(),
            template.spec.image.clone(),
            template.spec.vcpus.to_string(),
            format!("{} MB", template.spec.memory_mb),
            table::or_dash(template.size_bytes.map(table::size)),
            table::or_dash(template.pool.as_ref().map(|p| format!("{} of {}", p.ready, p.target))),
            table::age(template.created_at, now),
        ]
    };
    table::print(
        &["TEMPLATE", "ID", "STATE", "IMAGE", "CPUS", "MEMORY", "ON DISK", "POOL", "AGE"],
        templates.into_iter().map(row).collect(),
    );
}

fn describe(template: &TemplateView) {
    let line = |name: &str, value: String| {
        output::line(&format!("{name:<10} {}", table::printable(&value)));
    };
    line("template", template.full_name());
    line("id", template.id.to_string());
    line("state", template.state.to_string());
    if let Some(reason) = &template.reason {
        line("reason", format!("{} [{}]", reason.message, reason.code));
    }
    if template.state == TemplateState::Building {
        let progress = &template.progress;
        line("step", format!("{} of {}: {}", progress.done, progress.steps, progress.now));
    }
    let spec = &template.spec;
    line("image", spec.image.clone());
    line("driver", spec.driver.to_string());
    let (vcpus, memory, disk) = (spec.vcpus, spec.memory_mb, spec.disk_mb);
    line("size", format!("{vcpus} vCPU, {memory} MB memory, {disk} MB disk"));
    if !spec.env.is_empty() {
        line("env", spec.env.join(", "));
    }
    if !spec.tools.is_empty() {
        line("tools", spec.tools.join(", "));
    }
    for file in spec.files.iter().flatten() {
        let size = table::size(file.size_bytes);
        line("file", format!("{} ({:04o}, {size})", file.path, file.mode));
    }
    for step in spec.steps.iter().flatten() {
        line("run", step.run.clone());
    }
    if let Some(start) = &spec.start {
        line("start", start.clone());
    }
    if let Some(ready) = &spec.ready {
        line("ready", ready.command.clone());
    }
    line("on disk", table::or_dash(template.size_bytes.map(table::size)));
    line("digest", table::or_dash(template.digest.as_ref()));
    if let Some(pool) = &template.pool {
        let (ready, target) = (pool.ready, pool.target);
        line("pool", format!("{ready} of {target}, {} to {}", pool.min, pool.max));
    }
    line("created", template.created_at.to_string());
}
