//! The tools of this installation: opened as the command line says, and shown to the gateway.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
};

use aether_api::{
    CachedToolView, LockedToolView, ToolVersionView, ToolVersionsView, ToolView, ToolsPruned,
};
use aether_gateway::ToolCatalogue;
use aether_tools::{Endpoints, LockedTool, ToolError, ToolVersion, Tools, ToolsConfig};
use aether_types::{Fault, ToolRequest, tool::validate_tools};

use crate::{args::ToolOptions, exit::Exit, failure::Failure};

/// Of every VM, where nothing else is configured.
const DEFAULTS: [&str; 4] = ["git", "nodejs@20", "bun", "claude-code"];

/// Room for layers and artefacts, where nothing else is configured: 20 GiB.
const BUDGET_MB: u64 = 20 * 1024;

/// Tools, and those of them that every VM has.
#[derive(Debug, Clone)]
pub(crate) struct ToolsHere {
    pub(crate) tools: Tools,
    defaults: Vec<ToolRequest>,
}

impl ToolsHere {
    /// `folder` is where they are kept unless the options say so.
    pub(crate) async fn open(options: ToolOptions, folder: PathBuf) -> Result<Self, Failure> {
        let opened = tokio::task::spawn_blocking(move || Self::read(&options, &folder)).await;
        opened.map_err(|error| Failure::internal("open the tools", &error))?
    }

    fn read(options: &ToolOptions, folder: &Path) -> Result<Self, Failure> {
        let folder = options.tools_dir.clone().unwrap_or_else(|| folder.to_owned());
        let config = ToolsConfig {
            catalogue: options.tools_catalogue.clone(),
            mirror: options.tools_mirror.clone(),
            endpoints: Endpoints {
                npm: options.npm_registry.clone(),
                pypi: options.pypi_index.clone(),
                debian: options.debian_mirror.clone(),
                debian_security: options.debian_security_mirror.clone(),
            },
            budget_bytes: Some(
                options.tools_budget_mb.unwrap_or(BUDGET_MB).saturating_mul(1 << 20),
            ),
            ..ToolsConfig::new(folder)
        };
        let tools = Tools::open(config).map_err(|error| failure(&error))?;
        let defaults = defaults(options, &tools)?;
        Ok(Self { tools, defaults })
    }

    pub(crate) fn defaults(&self) -> &[ToolRequest] {
        &self.defaults
    }
}

/// By name, each once, as the catalogue calls them.
fn defaults(options: &ToolOptions, tools: &Tools) -> Result<Vec<ToolRequest>, Failure> {
    if options.no_default_tools {
        return Ok(Vec::new());
    }
    let wrong = |text: String| Failure::usage(text).hint("see --default-tool");
    let mut found = BTreeMap::new();
    if options.default_tools.is_empty() {
        for text in DEFAULTS {
            let request: ToolRequest = text.parse().map_err(wrong)?;
            match tools.catalogue().find(&request.name) {
                Ok(_) => drop(found.insert(request.name, request.version)),
                Err(error) => tracing::warn!(%error, "VMs go without a default tool"),
            }
        }
    }
    for ToolRequest { name, version } in &options.default_tools {
        let recipe = tools.catalogue().find(name).map_err(|error| failure(&error))?;
        if let Some(other) = found.insert(recipe.name.clone(), version.clone())
            && other != *version
        {
            let name = &recipe.name;
            let text = format!("default tool {name} is to be both {other} and {version}");
            return Err(wrong(text));
        }
    }
    let list = found.into_iter().map(|(name, version)| ToolRequest { name, version });
    let list: Vec<ToolRequest> = list.collect();
    validate_tools("--default-tool", &list).map_err(wrong)?;
    Ok(list)
}

fn failure(error: &ToolError) -> Failure {
    Failure::new(error.code().as_str(), Exit::Usage, error.to_string())
        .hint("docs/tools.md says what a recipe is and where tools come from")
}

#[async_trait::async_trait]
impl ToolCatalogue for ToolsHere {
    fn find(&self, name: &str) -> Result<String, Fault> {
        let found = self.tools.catalogue().find(name);
        found.map(|recipe| recipe.name.clone()).map_err(|error| error.to_fault())
    }

    fn defaults(&self) -> Vec<ToolRequest> {
        self.defaults.clone()
    }

    async fn list(&self) -> Result<Vec<ToolView>, Fault> {
        let mut cached = cached(self.tools.locked().await.map_err(|error| error.to_fault())?);
        let default = |name: &str| {
            let found = self.defaults.iter().find(|tool| tool.name == name);
            found.map(|tool| tool.version.clone())
        };
        let recipes = self.tools.catalogue().list().iter();
        let view = |recipe: &aether_tools::Recipe| ToolView {
            name: recipe.name.clone(),
            aliases: recipe.aliases.clone(),
            summary: recipe.summary.clone(),
            source: recipe.origin(),
            commands: recipe.commands.clone(),
            default: default(&recipe.name),
            cached: cached.remove(&recipe.name).unwrap_or_default(),
        };
        Ok(recipes.map(view).collect())
    }

    async fn versions(&self, name: &str) -> Result<ToolVersionsView, Fault> {
        let found = self.tools.versions(name).await.map_err(|error| error.to_fault())?;
        let view = |ToolVersion { version, locked, cached, is_pre }: ToolVersion| ToolVersionView {
            version,
            prerelease: is_pre,
            cached,
            locked,
        };
        Ok(ToolVersionsView {
            name: found.name,
            latest: found.latest,
            offline: found.offline.is_some(),
            items: found.versions.into_iter().map(view).collect(),
            next_cursor: None,
        })
    }

    async fn locked(&self) -> Result<Vec<LockedToolView>, Fault> {
        let locked = self.tools.locked().await.map_err(|error| error.to_fault())?;
        Ok(locked.into_iter().map(locked_view).collect())
    }

    async fn refresh(&self) -> Result<(), Fault> {
        self.tools.refresh().await.map_err(|error| error.to_fault())
    }

    async fn prune(&self, keep_bytes: Option<u64>) -> Result<ToolsPruned, Fault> {
        let pruned = self.tools.prune(keep_bytes).await.map_err(|error| error.to_fault())?;
        Ok(ToolsPruned {
            layers: pruned.layers,
            artefacts: pruned.artefacts,
            freed_bytes: pruned.size_bytes,
            kept_bytes: pruned.kept_bytes,
        })
    }
}

/// The layers that are there, by tool, each once though several requests came to it.
fn cached(locked: Vec<LockedTool>) -> HashMap<String, Vec<CachedToolView>> {
    let mut by_tool: HashMap<String, Vec<CachedToolView>> = HashMap::new();
    let mut seen = std::collections::HashSet::new();
    for lock in locked.into_iter().filter(|lock| lock.cached) {
        if seen.insert((lock.name.clone(), lock.layer_digest)) {
            by_tool.entry(lock.name).or_default().push(CachedToolView {
                version: lock.got,
                size_bytes: lock.layer_bytes,
                verified_at: lock.verified_at,
            });
        }
    }
    by_tool
}

fn locked_view(lock: LockedTool) -> LockedToolView {
    LockedToolView {
        name: lock.name,
        asked: lock.asked,
        got: lock.got,
        source: lock.source,
        artefacts: lock.artefacts,
        layer_digest: lock.layer_digest,
        size_bytes: lock.layer_bytes,
        verified_at: lock.verified_at,
        cached: lock.cached,
    }
}

#[cfg(test)]
mod tests {
    use aether_types::Timestamp;

    use super::*;

    fn lock(name: &str, asked: &str, got: &str, cached: bool) -> LockedTool {
        LockedTool {
            name: name.into(),
            asked: asked.into(),
            got: got.into(),
            source: "npm:a".into(),
            artefacts: Vec::new(),
            recipe: "blake3:r".into(),
            base: "blake3:b".into(),
            layer_digest: format!("blake3:{got}"),
            layer_bytes: 4096,
            verified_at: Timestamp::from_unix_ms(0),
            cached,
        }
    }

    #[test]
    fn a_layer_is_listed_once_though_several_requests_came_to_it() {
        let locks = vec![
            lock("go", "latest", "1.24", true),
            lock("go", "1.24", "1.24", true),
            lock("go", "1.23", "1.23", false),
            lock("rust", "latest", "1.90", true),
        ];
        let by_tool = cached(locks);
        let versions = |name: &str| -> Vec<String> {
            by_tool[name].iter().map(|layer| layer.version.clone()).collect()
        };
        assert_eq!((versions("go"), versions("rust")), (vec!["1.24".into()], vec!["1.90".into()]));
    }

    #[test]
    fn no_defaults_need_no_catalogue_and_unknown_ones_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let none = ToolOptions { no_default_tools: true, ..ToolOptions::default() };
        assert_eq!(ToolsHere::read(&none, folder.path()).unwrap().defaults(), []);
        let unknown = ToolOptions {
            default_tools: vec!["no-such-tool".parse().unwrap()],
            ..ToolOptions::default()
        };
        let failure = ToolsHere::read(&unknown, folder.path()).unwrap_err();
        assert_eq!((failure.exit, failure.code.as_str()), (Exit::Usage, "tool_not_found"));
    }
}
