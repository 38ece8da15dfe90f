//! The tools that there are: one file each, those that come with the program and the user's own.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::error::ToolError;
use crate::recipe::Recipe;

macro_rules! built_in {
    ($($name:literal),* $(,)?) => {
        [$(($name, include_str!(concat!("../catalogue/", $name)))),*]
    };
}

/// A test sees that this has every file of the folder.
const BUILT_IN: [(&str, &str); 14] = built_in!(
    "amp.toml",
    "bun.toml",
    "claude-code.toml",
    "deno.toml",
    "docker.toml",
    "gh.toml",
    "git.toml",
    "go.toml",
    "jq.toml",
    "nodejs.toml",
    "python.toml",
    "ripgrep.toml",
    "rust.toml",
    "uv.toml",
);

/// More recipes than anybody writes.
const RECIPES_MAX: usize = 1024;
/// How many names an error offers.
const CLOSEST: usize = 3;

/// Every tool, by name.
#[derive(Debug, Clone)]
pub struct Catalogue {
    recipes: Vec<Recipe>,
}

impl Catalogue {
    /// What comes with the program, and the files `*.toml` of a folder, which add tools or replace
    /// those of their name. An alias that another tool has by now means the newer one.
    pub fn load(user: Option<&Path>) -> Result<Self, ToolError> {
        let mut recipes = BTreeMap::new();
        for (file, text) in BUILT_IN {
            let recipe = Recipe::parse(Path::new(file), text)?;
            recipes.insert(recipe.name.clone(), recipe);
        }
        for recipe in user.map(read_folder).transpose()?.unwrap_or_default() {
            let names: Vec<_> =
                std::iter::once(&recipe.name).chain(&recipe.aliases).cloned().collect();
            for other in recipes.values_mut() {
                other.aliases.retain(|alias| !names.contains(alias));
            }
            recipes.insert(recipe.name.clone(), recipe);
        }
        Ok(Self { recipes: recipes.into_values().collect() })
    }

    /// By name or alias; the error has the closest names.
    pub fn find(&self, name: &str) -> Result<&Recipe, ToolError> {
        let by_name = self.recipes.iter().find(|recipe| recipe.name == name);
        let has_alias = |recipe: &&Recipe| recipe.aliases.iter().any(|alias| alias == name);
        by_name.or_else(|| self.recipes.iter().find(has_alias)).ok_or_else(|| {
            ToolError::UnknownTool { name: name.to_owned(), closest: self.closest(name) }
        })
    }

    /// By name.
    #[must_use]
    pub fn list(&self) -> &[Recipe] {
        &self.recipes
    }

    /// Names within a few slips of the pen, closest first.
    fn closest(&self, name: &str) -> Vec<String> {
        let slips_max = (name.chars().count() / 2).clamp(1, 3);
        let mut found: Vec<(usize, &str)> = self
            .recipes
            .iter()
            .flat_map(|recipe| std::iter::once(&recipe.name).chain(&recipe.aliases))
            .filter_map(|known| {
                let is_part = known.len() > 2 && name.len() > 2;
                let is_part = is_part && (known.contains(name) || name.contains(known.as_str()));
                let slips = distance(name, known);
                (slips <= slips_max || is_part).then_some((slips, known.as_str()))
            })
            .collect();
        found.sort_unstable();
        found.into_iter().take(CLOSEST).map(|(_, known)| known.to_owned()).collect()
    }
}

/// In the order of their names, so that the last of two with one name always wins.
fn read_folder(folder: &Path) -> Result<Vec<Recipe>, ToolError> {
    let entries = fs::read_dir(folder).map_err(ToolError::io("list the recipes in", folder))?;
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry.map_err(ToolError::io("list the recipes in", folder))?.path();
        if path.extension().is_some_and(|kind| kind == "toml") {
            paths.push(path);
        }
        if paths.len() > RECIPES_MAX {
            let reason = format!("there are more than {RECIPES_MAX}");
            return Err(ToolError::Recipe { path: folder.to_owned(), reason });
        }
    }
    paths.sort();
    paths
        .iter()
        .map(|path| {
            let text = fs::read_to_string(path).map_err(ToolError::io("read the recipe", path))?;
            Recipe::parse(path, &text)
        })
        .collect()
}

/// How many letters have to be put in, taken out, changed or swapped with the next.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows = vec![vec![0; b.len() + 1]; a.len() + 1];
    for (i, row) in rows.iter_mut().enumerate() {
        row[0] = i;
    }
    for (j, cell) in rows[0].iter_mut().enumerate() {
        *cell = j;
    }
    for i in 1..=a.len() {
        for j in 1..=b.len() {
            let changed = usize::from(a[i - 1] != b[j - 1]);
            let mut least =
                (rows[i - 1][j] + 1).min(rows[i][j - 1] + 1).min(rows[i - 1][j - 1] + changed);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                least = least.min(rows[i - 2][j - 2] + 1);
            }
            rows[i][j] = least;
        }
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests;
